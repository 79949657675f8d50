"""qcow2 images of every variant, written through the daemon: what a guest reads back, and what is left behind."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disk_model import Model
from harness import RunningDaemon
from nbd_reader import NbdReader
from qcow2_images import TINY_CACHES, VARIANTS, assert_clean, find, img, node_options, write_raw

Start = Callable[..., RunningDaemon]


@pytest.mark.parametrize(
    ("caches", "variants"),
    [({}, tuple(VARIANTS)), (TINY_CACHES, ("cluster-512", "extended", "chain-4k", "snapshots", "zlib"))],
    ids=["usual-caches", "tiny-caches"],
)
def test_random_operations_on_every_variant(
    daemon: Start, tmp_path: Path, caches: dict[str, int], variants: tuple[str, ...]
) -> None:
    running = daemon("--nbd-server", "addr.type=unix,addr.path=nbd.sock")
    qmp = running.qmp()
    left = []
    for number, name in enumerate(variants):
        place = tmp_path / name
        place.mkdir()
        made = VARIANTS[name](place)
        model = Model(made.data, number)
        qmp.execute_raw("blockdev-add", node_options(made.path, f"n{number}", **caches))
        export = {"type": "nbd", "id": name, "node-name": f"n{number}", "name": name, "writable": True}
        qmp.execute_raw("block-export-add", export)
        with NbdReader(tmp_path / "nbd.sock", name) as client:
            for _ in range(40):
                model.step(client)
            assert client.read(0, len(model.data)) == model.data, name
        qmp.execute("block-export-del", id=name)
        qmp.wait_event("BLOCK_EXPORT_DELETED")
        qmp.execute("blockdev-del", node_name=f"n{number}")
        left.append((made.path, bytes(model.data)))
    for path, data in left:
        assert_clean(path)
        img("compare", "-q", "-f", "qcow2", "-F", "raw", path, write_raw(tmp_path, "expected.raw", data))


def reopen(qmp: Any, image: Path, **more: Any) -> str:
    """Reopen ``n`` with those options; the error's text, or nothing."""
    answer = qmp.command("blockdev-reopen", {"options": [node_options(image, "n", **more)]})
    text: str = answer.get("error", {}).get("desc", "")
    return text


def export(qmp: Any) -> None:
    qmp.execute("block-export-add", type="nbd", id="e", node_name="n", name="d", writable=True)


def unexport(qmp: Any) -> None:
    qmp.execute("block-export-del", id="e")
    qmp.wait_event("BLOCK_EXPORT_DELETED")


@pytest.mark.parametrize("variant", ["plain", "lazy", "extended", "data-file", "chain"])
def test_reopened_images_go_on_as_they_are_told(daemon: Start, tmp_path: Path, variant: str) -> None:
    made = VARIANTS[variant](tmp_path)
    # What the image itself has opened has to be named.
    named = {"chain": ["backing"], "data-file": ["data-file"]}.get(variant, [])
    model = Model(made.data, 5)
    qmp = daemon("--nbd-server", "addr.type=unix,addr.path=nbd.sock").qmp()
    qmp.execute_raw("blockdev-add", node_options(made.path, "n"))
    info = next(each for each in qmp.execute("query-named-block-nodes") if each["node-name"] == "n")
    children = {each["child"]: each["node-name"] for each in info["children"] if each["child"] in named}
    more: dict[str, Any] = {}
    for more in ({}, {"l2-cache-size": 65536, "overlap-check": "none"}, {"discard-no-unref": True}):
        # While somebody uses it, and with nobody there, from read-only to writable.
        export(qmp)
        with NbdReader(tmp_path / "nbd.sock", "d") as client:
            for _ in range(12):
                model.step(client)
            assert reopen(qmp, made.path, **children, **more) == ""
            wrong = reopen(qmp, made.path, **children, **{"l2-cache-size": -5})
            assert wrong == "Value '-5' is out of range for parameter 'l2-cache-size'"
            for _ in range(12):
                model.step(client)
        unexport(qmp)
        assert reopen(qmp, made.path, **children, **{"read-only": True}) == ""
        refusal = qmp.refusal("block-export-add", type="nbd", id="e", node_name="n", name="d", writable=True)
        assert refusal == "Cannot export read-only node as writable"
        assert_clean(made.path)
        # Said aloud, because a data file that is named keeps the mode it has been given.
        assert reopen(qmp, made.path, **children, **more, **{"read-only": False}) == ""
    export(qmp)
    with NbdReader(tmp_path / "nbd.sock", "d") as client:
        assert client.read(0, len(model.data)) == model.data
        client.write(0, b"the end")
        model.data[:7] = b"the end"
    unexport(qmp)
    qmp.execute("blockdev-del", node_name="n")
    assert_clean(made.path)
    img(
        "compare",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "raw",
        made.path,
        write_raw(tmp_path, "expected.raw", bytes(model.data)),
    )


def test_image_that_was_not_closed_is_repaired_when_it_is_opened(daemon: Start, tmp_path: Path) -> None:
    made = VARIANTS["lazy"](tmp_path)
    data = bytearray(made.data)
    running = daemon("--nbd-server", "addr.type=unix,addr.path=nbd.sock")
    qmp = running.qmp()
    qmp.execute_raw("blockdev-add", node_options(made.path, "n"))
    export(qmp)
    with NbdReader(tmp_path / "nbd.sock", "d") as client:
        client.write_zeroes(0, 2 << 20, may_unmap=True)
        client.write(100_000, b"allocates" * 50_000)
        client.flush()
    data[: 2 << 20] = bytes(2 << 20)
    data[100_000:550_000] = b"allocates" * 50_000
    running.expected_code = -9
    running.process.kill()
    running.wait()
    for left in ("qmp.sock", "nbd.sock"):
        (tmp_path / left).unlink()
    done = subprocess.run([find("qemu-img"), "check", "-q", made.path], capture_output=True, check=False)
    assert done.returncode, "its counts are not up to date"

    qmp = daemon("--nbd-server", "addr.type=unix,addr.path=nbd.sock").qmp()
    # To be read it may stay as it is.
    qmp.execute_raw("blockdev-add", node_options(made.path, "n", **{"read-only": True}))
    assert qmp.execute("query-named-block-nodes")[0]["image"]["dirty-flag"] is True
    assert reopen(qmp, made.path) == ""
    assert qmp.execute("query-named-block-nodes")[0]["image"]["dirty-flag"] is False
    export(qmp)
    with NbdReader(tmp_path / "nbd.sock", "d") as client:
        assert client.read(0, len(data)) == data
        client.write(0, b"the end")
        data[:7] = b"the end"
    unexport(qmp)
    qmp.execute("blockdev-del", node_name="n")
    assert_clean(made.path)
    expected = write_raw(tmp_path, "expected.raw", bytes(data))
    img("compare", "-q", "-f", "qcow2", "-F", "raw", made.path, expected)
