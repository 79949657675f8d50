"""How much memory a daemon takes for images that ask for much: hostile ones, or just large ones."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

import attrs
import pytest
from harness import Qmp, RunningDaemon
from qcow2_images import img

from qsd.drivers.qcow2.bitmap_layout import DirectoryEntry, pack_directory
from qsd.drivers.qcow2.layout import BITMAPS, EXT_BITMAPS, Header, parse_header, serialise_header
from qsd.drivers.qcow2.snapshot_table import StoredSnapshot, pack

CLUSTER: Final = 1 << 16


def plain(path: Path, size: str = "64M", *options: str) -> tuple[Header, int]:
    """An empty image: its header, and where there is room for more clusters."""
    img("create", "-q", "-f", "qcow2", *options, path, size)
    return parse_header(path.read_bytes()[:CLUSTER]), -(-path.stat().st_size // CLUSTER) * CLUSTER


def change(path: Path, header: Header, end: int, *parts: bytes, length: int = 0) -> None:
    """Write the header, and more behind the image."""
    with path.open("r+b") as file:
        file.write(serialise_header(header))
        file.seek(end)
        file.write(b"".join(part.ljust(-(-len(part) // CLUSTER) * CLUSTER, b"\0") for part in parts))
        if length:
            file.truncate(end + length)


def largest_l1(path: Path) -> None:
    header, end = plain(path)
    entries = (32 << 20) // 8
    new = attrs.evolve(header, size=entries << 29, l1_size=entries, l1_offset=end)
    change(path, new, end, length=32 << 20)


def largest_refcount_table(path: Path) -> None:
    header, end = plain(path)
    new = attrs.evolve(header, refcount_table_offset=end, refcount_table_clusters=128)
    change(path, new, end, length=8 << 20)


def most_snapshots(path: Path) -> None:
    header, end = plain(path)
    snapshots = [
        StoredSnapshot(
            l1_offset=end,
            l1_size=1,
            id=b"%d" % number,
            name=b"n" * 40,
            date_ns=0,
            vm_clock_ns=0,
            disk_size=1 << 26,
        )
        for number in range(65535)
    ]
    new = attrs.evolve(header, snapshot_count=len(snapshots), snapshots_offset=end + CLUSTER)
    change(path, new, end, bytes(CLUSTER), pack(snapshots, 0))


def many_bitmaps(path: Path) -> None:
    header, end = plain(path)
    directory = pack_directory(DirectoryEntry(b"b%d" % number, end, 1, 16, 2) for number in range(8000))
    places = struct.pack(">IIQQ", 8000, 0, len(directory), end + CLUSTER)
    new = attrs.evolve(header.with_extension(EXT_BITMAPS, places), autoclear=BITMAPS)
    change(path, new, end, bytes(CLUSTER), directory)


def long_chain(path: Path) -> None:
    plain(path.with_suffix(".0"))
    for number in range(1, 60):
        plain(path.with_suffix(f".{number}"), "64M", "-F", "qcow2", "-b", path.with_suffix(f".{number - 1}").name)
    plain(path, "64M", "-F", "qcow2", "-b", path.with_suffix(".59").name)


def large_clusters(path: Path) -> None:
    plain(path, "64T", "-o", "cluster_size=2M")


# What each may add to the daemon's memory, in MiB: a closed image leaves little, however often it is opened.
ROOM: Final[list[tuple[Callable[[Path], None], int]]] = [
    (largest_l1, 80),
    (largest_refcount_table, 30),
    (most_snapshots, 55),
    (many_bitmaps, 20),
    (long_chain, 25),
    (large_clusters, 20),
]


def peak(running: RunningDaemon) -> int:
    """The most memory the daemon has had in use so far, in MiB."""
    status = Path(f"/proc/{running.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) >> 10


@pytest.mark.parametrize(("make", "room"), ROOM, ids=lambda value: getattr(value, "__name__", ""))
def test_memory_is_bounded(
    daemon: Callable[..., RunningDaemon], tmp_path: Path, make: Callable[[Path], None], room: int
) -> None:
    """Opened, asked about, closed, three times over."""
    make(tmp_path / "image")
    plain(tmp_path / "small")
    running = daemon()
    with contextlib.closing(Qmp(tmp_path / "qmp.sock")) as qmp:

        def use(name: str) -> None:
            file = {"driver": "file", "filename": str(tmp_path / name)}
            # Not to be written: that would store every bitmap, three times.
            qmp.execute("blockdev-add", driver="qcow2", node_name="n", file=file, read_only=True)
            qmp.execute("query-named-block-nodes")
            qmp.execute("query-named-block-nodes", flat=True)
            qmp.execute("blockdev-del", node_name="n")

        use("small")
        before = peak(running)
        for _time in range(3):
            use("image")
        assert peak(running) - before < room
