"""``overlap-check``: images that call metadata free are not written over, as far as the option says."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import RunningDaemon
from nbd_reader import NbdError, NbdReader
from qcow2_images import img, io

Start = Callable[..., RunningDaemon]

BITMAPS = 0x23852875
OFFSET = 0x00FF_FFFF_FFFF_FE00
# The reference's answers: in which modes a write that would destroy the structure is refused.
REFUSED: dict[str, tuple[str, ...]] = {
    "refcount table": ("cached", "all", "constant"),
    "active L1 table": ("cached", "all", "constant"),
    "active L2 table": ("cached", "all"),
    "snapshot table": ("cached", "all", "constant"),
    "inactive L1 table": ("cached", "all"),
    "inactive L2 table": ("all",),
    "bitmap directory": ("cached", "all", "constant"),
    "bitmap table": (),
}
OPTIONS: dict[str, Any] = {
    "cached": None,
    "constant": "constant",
    "none": "none",
    "all": {"template": "none", **dict.fromkeys(("active-l1", "active-l2", "bitmap-directory"), True)},
}
OPTIONS["all"] |= dict.fromkeys(("inactive-l1", "inactive-l2", "refcount-table", "snapshot-table"), True)


def structures(data: bytes) -> dict[str, int]:
    """Where everything is in an image with a snapshot and a bitmap."""

    def word(at: int) -> int:
        return int.from_bytes(data[at : at + 8], "big")

    at = 112
    while (kind := int.from_bytes(data[at : at + 4], "big")) != BITMAPS:
        assert kind
        at += 8 + -(-int.from_bytes(data[at + 4 : at + 8], "big") // 8) * 8
    l1, snapshots, bitmaps = word(40), word(64), word(at + 8 + 16)
    return {
        "refcount table": word(48),
        "active L1 table": l1,
        "active L2 table": word(l1) & OFFSET,
        "snapshot table": snapshots,
        "inactive L1 table": word(snapshots),
        "inactive L2 table": word(word(snapshots)) & OFFSET,
        "bitmap directory": bitmaps,
        "bitmap table": word(bitmaps),
    }


@pytest.mark.parametrize("mode", OPTIONS)
def test_metadata_that_counts_as_free_is_left_alone(daemon: Start, tmp_path: Path, mode: str) -> None:
    image = tmp_path / "image.qcow2"
    img("create", "-q", "-f", "qcow2", image, "8M")
    io(image, "write -P 9 0 1M")
    img("snapshot", "-c", "s", image)
    io(image, "write -P 8 0 64k")
    img("bitmap", "--add", image, "b")
    data = image.read_bytes()
    block = int.from_bytes(data[(table := int.from_bytes(data[48:56], "big")) : table + 8], "big")
    running = daemon("--nbd-server", "addr.type=unix,addr.path=nbd.sock")
    running.expected_stderr = ["Marking image as corrupt: Preventing", "bitmap", "flushing node"]
    qmp = running.qmp()
    for number, (name, offset) in enumerate(structures(data).items()):
        damaged = bytearray(data)
        struct.pack_into(">H", damaged, block + 2 * (offset >> 16), 0)
        path = tmp_path / f"{number}.qcow2"
        path.write_bytes(damaged)
        more = {} if OPTIONS[mode] is None else {"overlap-check": OPTIONS[mode]}
        file = {"driver": "file", "filename": str(path)}
        qmp.execute_raw("blockdev-add", {"driver": "qcow2", "node-name": f"n{number}", "file": file, **more})
        qmp.execute(
            "block-export-add", type="nbd", id=f"e{number}", node_name=f"n{number}", name=name, writable=True
        )
        before = path.read_bytes()
        with NbdReader(tmp_path / "nbd.sock", name) as client:
            if mode in REFUSED[name]:
                with pytest.raises(NbdError):
                    client.write(4 << 20, b"x" * 65536)
                event = qmp.wait_event("BLOCK_IMAGE_CORRUPTED")
                text = f"Preventing invalid write on metadata (overlaps with {name})"
                assert (event["data"]["msg"], event["data"]["fatal"]) == (text, True)
                assert path.read_bytes()[offset : offset + 65536] == before[offset : offset + 65536]
            else:
                client.write(4 << 20, b"x" * 65536)
        qmp.execute("block-export-del", id=f"e{number}")
        qmp.wait_event("BLOCK_EXPORT_DELETED")
