"""Internal snapshots through QMP: the reference's answers, and images that it reads as its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Qmp, RunningDaemon
from nbd_reader import NbdReader
from qcow2_images import VARIANTS, assert_clean, img, write_raw

Start = Callable[..., RunningDaemon]

MIB = 1 << 20
CREATE, DELETE = "blockdev-snapshot-internal-sync", "blockdev-snapshot-delete-internal-sync"
STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    (CREATE, {"device": "n", "name": "first"}),
    (CREATE, {"device": "n", "name": "first"}),
    (CREATE, {"device": "n", "name": ""}),
    (CREATE, {"device": "file", "name": "x"}),
    (CREATE, {"device": "nobody", "name": "x"}),
    ("block_resize", {"node-name": "n", "size": 8 * MIB}),
    (CREATE, {"device": "n", "name": "l" * 300}),
    (CREATE, {"device": "n", "name": "ä€"}),
    ("block_resize", {"node-name": "n", "size": 5 * MIB}),
    (DELETE, {"device": "n"}),
    (DELETE, {"device": "n", "id": "2", "name": "first"}),
    (DELETE, {"device": "n", "id": "", "name": ""}),
    (DELETE, {"device": "file", "id": "1"}),
    (DELETE, {"device": "n", "name": "first"}),
    (CREATE, {"device": "n", "name": "last"}),
    (DELETE, {"device": "n", "id": "2"}),
)


def clean(value: Any) -> Any:
    """Without what depends on the moment."""
    if isinstance(value, dict):
        return {key: clean(each) for key, each in value.items() if not re.match("date|vm-clock|actual-size", key)}
    return [clean(each) for each in value] if isinstance(value, list) else value


def add(qmp: Qmp, image: Path) -> None:
    file = {"driver": "file", "filename": str(image), "node-name": "file"}
    qmp.execute_raw("blockdev-add", {"driver": "qcow2", "node-name": "n", "discard": "unmap", "file": file})


def answers(qmp: Qmp, image: Path) -> list[Any]:
    add(qmp, image)
    found = []
    for name, arguments in STEPS:
        answer = qmp.command(name, arguments)
        info = next(each for each in qmp.execute("query-named-block-nodes") if each["node-name"] == "n")["image"]
        found.append((name, arguments, answer.get("return"), answer.get("error"), info.get("snapshots")))
    qmp.execute("blockdev-del", node_name="n")
    return [clean(list(each)) for each in found]


def snapshots_of(image: Path) -> list[list[str]]:
    """Id and name of each, as qemu-img lists them."""
    return [line.split()[:2] for line in img("snapshot", "-l", image).splitlines()[2:]]


@pytest.mark.parametrize("variant", ["plain", "v2", "extended-16k", "refcount-1", "zlib", "snapshots"])
def test_same_answers_and_disks_as_the_reference(
    daemon: Start, reference_qmp: Qmp, tmp_path: Path, variant: str
) -> None:
    images = []
    for place in (tmp_path / "ours", tmp_path):
        place.mkdir(exist_ok=True)
        images.append(VARIANTS[variant](place).path)
    ours = daemon(place=tmp_path / "ours").qmp()
    assert answers(ours, images[0]) == answers(reference_qmp, images[1])
    assert snapshots_of(images[0]) == snapshots_of(images[1])
    if variant != "refcount-1":
        assert_clean(images[1])
    assert_clean(images[0])
    img("compare", "-q", "-f", "qcow2", "-F", "qcow2", *images)
    for number, (each, _name) in enumerate(snapshots_of(images[0])):
        for place, image in zip(("a", "b"), images, strict=True):
            words = ("-f", "qcow2", "-O", "raw", "-l", f"snapshot.id={each}")
            img("convert", *words, image, tmp_path / f"{place}{number}")
        assert (tmp_path / f"a{number}").read_bytes() == (tmp_path / f"b{number}").read_bytes()


def test_snapshots_keep_what_the_disk_held(daemon: Start, tmp_path: Path) -> None:
    made = VARIANTS["plain"](tmp_path)
    before = made.data
    after = bytearray(before)
    qmp = daemon("--nbd-server", "addr.type=unix,addr.path=nbd.sock").qmp()
    add(qmp, made.path)
    qmp.execute("block-export-add", type="nbd", id="e", node_name="n", name="d", writable=True)
    with NbdReader(tmp_path / "nbd.sock", "d") as client:
        actions = [{"type": CREATE, "data": {"device": "n", "name": name}} for name in ("one", "two")]
        assert qmp.execute("transaction", actions=actions) == {}
        failing = [{"type": CREATE, "data": {"device": "n", "name": "three"}}, {"type": "abort", "data": {}}]
        assert qmp.refusal("transaction", actions=failing) == "Transaction aborted using Abort action"
        for offset in range(0, 4 * MIB, 300_000):
            client.write(offset, b"new" * 1000)
            after[offset : offset + 3000] = b"new" * 1000
        client.trim(5 * MIB, MIB)
        assert qmp.execute(DELETE, device="n", name="one")["id"] == "1"
        after[5 * MIB :] = client.read(5 * MIB, len(after) - 5 * MIB)
        assert client.read(0, len(after)) == after
    qmp.execute("block-export-del", id="e")
    qmp.wait_event("BLOCK_EXPORT_DELETED")
    qmp.execute("blockdev-del", node_name="n")
    assert_clean(made.path)
    assert snapshots_of(made.path) == [["2", "two"]]
    now = write_raw(tmp_path, "now.raw", bytes(after))
    img("compare", "-q", "-f", "qcow2", "-F", "raw", made.path, now)
    img("snapshot", "-a", "two", made.path)
    img("compare", "-q", "-f", "qcow2", "-F", "raw", made.path, write_raw(tmp_path, "then.raw", before))
    assert_clean(made.path)


def test_data_files_have_no_snapshots(daemon: Start, tmp_path: Path) -> None:
    made = VARIANTS["data-file"](tmp_path)
    qmp = daemon().qmp()
    add(qmp, made.path)
    refused = "Failed to get a snapshot list: Operation not supported"
    assert qmp.refusal(CREATE, device="n", name="s") == refused
    assert qmp.refusal(DELETE, device="n", name="s") == refused
