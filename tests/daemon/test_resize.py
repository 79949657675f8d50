"""Resizing qcow2 nodes: the same answers and the same disks as the reference's, and what others see of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Qmp, RunningDaemon
from nbd_reader import NbdReader
from qcow2_images import VARIANTS, Made, assert_clean, img, io

Start = Callable[..., RunningDaemon]

MIB = 1 << 20
# From 6 MiB: over an L2 table's reach at small clusters and back, to odd sizes, to nothing.
SIZES = (64 * MIB, 64 * MIB, 3 * MIB + 512, 2 * MIB + 100, 5 * MIB, 0, 7 * MIB, -1, 1 << 62, 1 << 63)


def v2_chain(place: Path) -> Made:
    made = VARIANTS["v2"](place)
    (place / "base.raw").write_bytes(b"b" * 7 * MIB)
    img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "base.raw", made.path)
    return made


def v2_snapshot(place: Path) -> Made:
    made = VARIANTS["v2"](place)
    img("snapshot", "-c", "s", made.path)
    return made


def bitmaps(place: Path) -> Made:
    made = VARIANTS["plain"](place)
    img("bitmap", "--add", "-g", "4096", made.path, "b")
    return made


# Not with a data file: there the reference fails an assertion when the old size is no whole cluster.
MADE: dict[str, Callable[[Path], Made]] = {
    **{name: VARIANTS[name] for name in ("plain", "cluster-512", "extended", "zlib", "chain", "snapshots")},
    **{name: VARIANTS[name] for name in ("prealloc-metadata", "lazy")},
    "v2-chain": v2_chain,
    "v2-snapshot": v2_snapshot,
    "bitmaps": bitmaps,
}


def answers(qmp: Qmp, image: Path, sizes: tuple[int, ...]) -> list[Any]:
    """What the sizes are answered with."""
    file = {"driver": "file", "filename": str(image)}
    qmp.execute_raw("blockdev-add", {"driver": "qcow2", "node-name": "n", "discard": "unmap", "file": file})
    found = []
    for size in sizes:
        answer = qmp.command("block_resize", {"node-name": "n", "size": size})
        info = next(each for each in qmp.execute("query-named-block-nodes") if each["node-name"] == "n")
        found.append((size, answer.get("error"), info["image"]["virtual-size"], info.get("dirty-bitmaps")))
    qmp.execute("blockdev-del", node_name="n")
    return found


@pytest.mark.parametrize("variant", MADE)
def test_same_answers_and_disks_as_the_reference(
    daemon: Start, reference_qmp: Qmp, tmp_path: Path, variant: str
) -> None:
    places = [tmp_path / "ours", tmp_path / "theirs"]
    images = []
    for place in places:
        place.mkdir()
        images.append(MADE[variant](place).path)
    ours = daemon(place=places[0]).qmp()
    # Bitmaps of such disks are refused here for the memory they would take.
    sizes = SIZES[:-2] if variant == "bitmaps" else SIZES
    assert answers(ours, images[0], sizes) == answers(reference_qmp, images[1], sizes)
    for image in images:
        assert_clean(image)
    img("compare", "-q", "-f", "qcow2", "-F", "qcow2", *images)
    assert images[0].stat().st_size <= images[1].stat().st_size + 65536


def test_growth_hides_what_the_backing_file_has(daemon: Start, tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"b" * 3 * MIB)
    image = tmp_path / "top.qcow2"
    img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", image, MIB + 512)
    qmp = daemon("--nbd-server", "addr.type=unix,addr.path=nbd.sock").qmp()
    file = {"driver": "file", "filename": str(image)}
    qmp.execute_raw("blockdev-add", {"driver": "qcow2", "node-name": "n", "file": file})
    assert qmp.execute("block_resize", node_name="n", size=4 * MIB) == {}
    qmp.execute("block-export-add", type="nbd", id="e", node_name="n", name="d", writable=True)
    with NbdReader(tmp_path / "nbd.sock", "d") as client:
        assert client.size == 4 * MIB
        assert client.read(0, MIB + 512) == b"b" * (MIB + 512)
        assert client.read(MIB + 512, 3 * MIB - 512) == bytes(3 * MIB - 512)
    # An NBD export does not share resizing.
    assert "Permission conflict on node 'n'" in qmp.refusal("block_resize", node_name="n", size=MIB)
    qmp.execute("block-export-del", id="e")
    qmp.wait_event("BLOCK_EXPORT_DELETED")
    qmp.execute("blockdev-del", node_name="n")
    assert_clean(image)


@pytest.mark.parametrize("raw", ["off", "on"])
def test_a_data_file_follows_the_size_of_an_image_nobody_else_uses(daemon: Start, tmp_path: Path, raw: str) -> None:
    """The resize alone has to be enough to write the data file. (The reference asserts.)"""
    image, data = tmp_path / "n.qcow2", tmp_path / "data"
    img("create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw={raw}", image, MIB)
    io(image, f"write -P 1 0 {MIB}")
    qmp = daemon("--nbd-server", "addr.type=unix,addr.path=nbd.sock").qmp()
    file = {"driver": "file", "filename": str(image)}
    qmp.execute_raw("blockdev-add", {"driver": "qcow2", "node-name": "n", "file": file})
    for size in (MIB - 65536 + 512, 2 * MIB + 512, 3 * MIB):
        qmp.execute("block_resize", node_name="n", size=size)
    assert data.stat().st_size == 3 * MIB
    qmp.execute("block-export-add", type="nbd", id="e", node_name="n", name="d")
    with NbdReader(tmp_path / "nbd.sock", "d") as client:
        kept = MIB - 65536 + 512
        assert client.read(0, 3 * MIB) == b"\1" * kept + bytes(3 * MIB - kept)
    qmp.execute("block-export-del", id="e")
    qmp.wait_event("BLOCK_EXPORT_DELETED")
    qmp.execute("blockdev-del", node_name="n")
    assert_clean(image)
