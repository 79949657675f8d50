"""How much memory a daemon takes for images that ask for much: hostile ones, or just large ones."""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

import attrs
import pytest
from harness import Qmp, RunningDaemon
from nbd_reader import NbdError, NbdReader
from qcow2_images import img

from qsd.drivers.qcow2 import compressed
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


# -- again and again ----------------------------------------------------------------------------------------------


def resident(running: RunningDaemon) -> int:
    """The memory the daemon has now, in KiB."""
    status = Path(f"/proc/{running.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))


def nodes(qmp: Qmp, place: Path, _number: int) -> None:
    file = {"driver": "file", "filename": str(place / "disk")}
    qmp.execute("blockdev-add", driver="raw", node_name="more", file=file)
    qmp.execute("blockdev-del", node_name="more")


def refused_nodes(qmp: Qmp, place: Path, _number: int) -> None:
    file = {"driver": "file", "filename": str(place / "disk")}
    qmp.refusal("blockdev-add", driver="qcow2", node_name="more", file=file)


def exports(qmp: Qmp, _place: Path, number: int) -> None:
    qmp.execute("block-export-add", type="nbd", id=f"e{number}", node_name="n", name=f"e{number}")
    qmp.execute("block-export-del", id=f"e{number}")
    qmp.wait_event("BLOCK_EXPORT_DELETED")


def jobs(qmp: Qmp, place: Path, number: int) -> None:
    options = {"driver": "file", "filename": str(place / "made"), "size": 4096}
    qmp.execute("blockdev-create", job_id=f"j{number}", options=options)
    assert qmp.finish_job(f"j{number}") is None
    qmp.events.clear()


def snapshots(qmp: Qmp, _place: Path, number: int) -> None:
    qmp.execute("blockdev-snapshot-internal-sync", device="n", name=f"s{number}")
    qmp.execute("blockdev-snapshot-delete-internal-sync", device="n", name=f"s{number}")


def sessions(_qmp: Qmp, place: Path, _number: int) -> None:
    with contextlib.closing(Qmp(place / "other.sock")):
        pass


def clients(_qmp: Qmp, place: Path, _number: int) -> None:
    with NbdReader(place / "nbd.sock", "n") as client:
        client.read(0, 4096)


@pytest.mark.parametrize("use", [nodes, refused_nodes, exports, jobs, snapshots, sessions, clients])
def test_nothing_is_left_of_what_comes_and_goes(
    daemon: Callable[..., RunningDaemon], tmp_path: Path, use: Callable[[Qmp, Path, int], None]
) -> None:
    """Hundreds of times the same takes no more memory than the first fifty."""
    plain(tmp_path / "image")
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    arguments = ["--chardev", f"socket,id=o,path={tmp_path}/other.sock,server=on,wait=off", "--monitor", "o"]
    running = daemon(*arguments, "--nbd-server", f"addr.type=unix,addr.path={tmp_path}/nbd.sock")
    with contextlib.closing(Qmp(tmp_path / "qmp.sock")) as qmp:
        file = {"driver": "file", "filename": str(tmp_path / "image")}
        cache = {"no-flush": True}
        qmp.execute("blockdev-add", driver="qcow2", node_name="n", file=file, cache=cache)
        qmp.execute("block-export-add", type="nbd", id="n", node_name="n", writable=True)
        for number in range(50):
            use(qmp, tmp_path, number)
        before = resident(running)
        for number in range(50, 350):
            use(qmp, tmp_path, number)
        # What is left of a node is 100 KiB, until Python looks for circles.
        assert resident(running) - before < 4096


# -- compressed clusters ------------------------------------------------------------------------------------------

DISK: Final = 64 << 20


def packed(path: Path, data: bytes, places: Callable[[int], tuple[int, int]], *options: str) -> None:
    """An image all of whose clusters are compressed; ``places``: offset in ``data`` and bytes of each."""
    header, end = plain(path, str(DISK), *options)
    start = end + 2 * CLUSTER
    found = (places(number) for number in range(DISK // CLUSTER))
    l2 = (compressed.encode_entry(start + at, length, header.cluster_bits) for at, length in found)
    table = struct.pack(f">{DISK // CLUSTER}Q", *l2)
    change(path, attrs.evolve(header, l1_offset=end), end, struct.pack(">Q", end + CLUSTER), table, data)


def deflated(size: int) -> bytes:
    """So many zeroes."""
    deflater = zlib.compressobj(9, zlib.DEFLATED, -12)
    return b"".join(deflater.compress(bytes(1 << 20)) for _ in range(size >> 20)) + deflater.flush()


def endless(path: Path) -> None:
    """Every cluster goes on for 64 MiB when it is inflated."""
    bomb = deflated(64 << 20)
    packed(path, bomb, lambda _number: (0, len(bomb)))


def endless_zstd(path: Path) -> None:
    """Every cluster is a frame of repeated blocks, 128 KiB each, and asks for a window of 2 GiB."""
    block = (CLUSTER << 4 | 2).to_bytes(3, "little") + b"A"
    bomb = b"\x28\xb5\x2f\xfd\x00" + bytes([21 << 3]) + block * 30000
    packed(path, bomb, lambda _number: (0, CLUSTER * 2 - 512), "-o", "compression_type=zstd")


def overlapping(path: Path) -> None:
    """Every cluster begins within those before it, and within a stream."""
    bomb = deflated(16 << 20)
    packed(path, bomb, lambda number: (number % len(bomb), CLUSTER))


def beyond_the_end(path: Path) -> None:
    """The file ends within the first, and before all the others."""
    packed(path, b"\xff", lambda number: (number << 40, CLUSTER * 2 - 512))


@pytest.mark.parametrize("make", [endless, endless_zstd, overlapping, beyond_the_end])
def test_compressed_bombs_cost_no_more_than_other_clusters(
    daemon: Callable[..., RunningDaemon], tmp_path: Path, make: Callable[[Path], None]
) -> None:
    """Each is a cluster or an error; the daemon goes on answering."""
    make(tmp_path / "image")
    running = daemon("--nbd-server", "addr.type=unix,addr.path=nbd.sock")
    with contextlib.closing(Qmp(tmp_path / "qmp.sock")) as qmp:
        file = {"driver": "file", "filename": str(tmp_path / "image")}
        qmp.execute("blockdev-add", driver="qcow2", node_name="n", file=file, read_only=True)
        qmp.execute("block-export-add", type="nbd", id="e", node_name="n", name="d")
        before = peak(running)
        errors: list[int] = []
        with NbdReader(tmp_path / "nbd.sock", "d") as client:
            for start in range(0, DISK, 4 << 20):
                try:
                    client.read(start, 4 << 20)
                except NbdError as error:
                    errors.append(error.args[0])
                qmp.execute("query-version")
        # EIO.
        assert set(errors) == (set() if make is endless else {5})
        assert peak(running) - before < 60
        qmp.execute("block-export-del", id="e")
        qmp.wait_event("BLOCK_EXPORT_DELETED")
        qmp.execute("blockdev-del", node_name="n")
