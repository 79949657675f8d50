"""Dirty bitmaps through the whole daemon: recorded in the hot path, commanded over QMP, shown over NBD."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from bitmap_steps import FILES, carry_out, make_files, recorded
from harness import RunningDaemon
from nbd_reader import NbdReader
from qcow2_images import find, img

DATA = Path(__file__).parent.parent / "data"
Start = Callable[..., RunningDaemon]


def test_every_answer_is_the_reference_s(daemon: Start, tmp_path: Path) -> None:
    """What the reference (11.1.3) answered to the same steps, of which the later ones are random."""
    make_files(tmp_path)
    qmp = daemon().qmp()
    try:
        for number, step in enumerate(recorded(DATA / "bitmaps_reference.json")):
            got = carry_out(qmp, tmp_path, step)
            assert got == step["answer"], f"step {number}: {step['execute']} {step['arguments']}"
    finally:
        for name in FILES:
            (tmp_path / name).unlink()


def test_resizing_under_an_exported_bitmap_is_refused(daemon: Start, tmp_path: Path) -> None:
    """The reference asserts."""
    make_files(tmp_path)
    qmp = daemon("--blockdev", "file,node-name=a,filename=a", "--blockdev", "file,node-name=b,filename=b").qmp()
    qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
    qmp.execute("block-dirty-bitmap-add", node="a", name="m")
    bitmap = {"node": "a", "name": "m"}
    qmp.execute("block-export-add", id="e", type="nbd", node_name="b", bitmaps=[bitmap])
    busy = "Bitmap 'm' is currently in use by another operation and cannot be used"
    assert qmp.refusal("block_resize", node_name="a", size=1 << 20) == busy
    assert qmp.refusal("blockdev-del", node_name="a") == busy
    qmp.execute("block-export-del", id="e")
    qmp.wait_event("BLOCK_EXPORT_DELETED")
    qmp.execute("block_resize", node_name="a", size=1 << 20)
    qmp.execute("blockdev-del", node_name="a")


def test_merging_nothing_changes_nothing(daemon: Start, tmp_path: Path) -> None:
    """The reference ends with a segmentation fault."""
    qmp = daemon("--blockdev", "null-co,node-name=n").qmp()
    qmp.execute("block-dirty-bitmap-add", node="n", name="m")
    qmp.execute("block-dirty-bitmap-merge", node="n", target="m", bitmaps=[])
    (node,) = qmp.execute("query-named-block-nodes")
    assert node["dirty-bitmaps"][0]["count"] == 0


def test_clients_read_the_map(daemon: Start, tmp_path: Path) -> None:
    """nbdinfo and qemu-img see what was written."""
    make_files(tmp_path)
    qmp = daemon("--blockdev", "file,node-name=a,filename=a").qmp()
    qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
    qmp.execute("block-dirty-bitmap-add", node="a", name="m")
    qmp.execute("block-export-add", id="e", type="nbd", node_name="a", name="e", writable=True, bitmaps=["m"])
    with NbdReader(tmp_path / "nbd.sock", "e") as client:
        client.write(70_000, b"x" * 100_000)
    uri = f"nbd+unix:///e?socket={tmp_path}/nbd.sock"
    words = [find("nbdinfo"), "--json", "--map=qemu:dirty-bitmap:m", uri]
    listed = json.loads(subprocess.run(words, check=True, capture_output=True, timeout=60).stdout)
    runs = [(run["offset"], run["length"], run["type"]) for run in listed]
    assert runs == [(0, 65536, 0), (65536, 131072, 1), (196608, (10 << 20) - 196608, 0)]
    options = (
        f"driver=nbd,export=e,server.type=unix,server.path={tmp_path}/nbd.sock,x-dirty-bitmap=qemu:dirty-bitmap:m"
    )
    # A bitmap takes the place of the allocation: what is dirty reads as a hole.
    found = json.loads(img("map", "--output=json", "--image-opts", options))
    assert [(run["start"], run["length"], run["data"]) for run in found] == [
        (0, 65536, True),
        (65536, 131072, False),
        (196608, (10 << 20) - 196608, True),
    ]


@pytest.mark.parametrize("steps", ["stored_bitmaps_reference.json", "written_bitmaps_reference.json"])
def test_stored_bitmaps_are_the_reference_s(daemon: Start, tmp_path: Path, steps: str) -> None:
    """Bitmaps in qcow2 images: the same images, the same steps, and what the reference (11.1.3) answered.

    In between qemu-img checks the images, changes the bitmaps in them, and tells what they hold.
    """
    qmp = daemon().qmp()
    for number, step in enumerate(recorded(DATA / steps)):
        got = carry_out(qmp, tmp_path, step)
        assert got == step["answer"], f"step {number}: {step['execute']} {step['arguments']}"


def test_bitmaps_of_a_killed_daemon_are_inconsistent(daemon: Start, tmp_path: Path) -> None:
    """Both programs see it, both remove them, and nothing is lost but the bitmaps."""
    image = tmp_path / "q.qcow2"
    img("create", "-q", "-f", "qcow2", image, "64M")
    img("bitmap", "--add", image, "one")
    img("bitmap", "--add", image, "two")
    blockdev = f"qcow2,node-name=q,file.driver=file,file.filename={image}"
    first = daemon("--blockdev", blockdev)
    first.qmp().execute("block-dirty-bitmap-add", node="q", name="new", persistent=True)
    first.expected_code = -signal.SIGKILL
    first.terminate(signal.SIGKILL)
    (tmp_path / "qmp.sock").unlink()
    shown = json.loads(img("info", "--output=json", image))["format-specific"]["data"]["bitmaps"]
    assert [(bitmap["name"], bitmap["flags"]) for bitmap in shown] == [
        ("one", ["in-use", "auto"]),
        ("two", ["in-use", "auto"]),
    ]
    img("bitmap", "--remove", image, "one")
    qmp = daemon("--blockdev", blockdev).qmp()
    text = "Bitmap 'two' is inconsistent and cannot be used"
    assert qmp.refusal("block-dirty-bitmap-clear", node="q", name="two") == text
    assert qmp.refusal("block_resize", node_name="q", size=1 << 20) == text
    qmp.execute("block-dirty-bitmap-remove", node="q", name="two")
    qmp.execute("blockdev-del", node_name="q")
    assert "bitmaps" not in json.loads(img("info", "--output=json", image))["format-specific"]["data"]
    img("check", "-q", image)
