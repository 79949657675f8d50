"""Hostile qcow2 images: any field and any table of an image changed, then opened, read, written, asked and closed.

Whatever the image says, there is an answer or an error, after a bounded number of requests to the file and within
bounded memory; and nothing crashes, and no file is opened that the options do not name.
"""

from __future__ import annotations

import errno
import os
import random
import struct
import tracemalloc
from itertools import count
from typing import Any, Final

import attrs
import pytest
import trio
import trio.testing
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from qcow2_builder import build
from qcow2_fakes import MemoryFile, new_image, opened_on
from qcow2_world import Disk, Habits, SlowRead, World, make_driver, run_seeded
from watching import Turns

from qsd.drivers.calls import call
from qsd.drivers.qcow2 import layout, metadata_map, writeback
from qsd.drivers.qcow2.geometry import COPIED, OFFSET_MASK
from qsd.drivers.qcow2.layout import EXT_BACKING_FORMAT, EXT_DATA_FILE, Header
from qsd.drivers.qcow2.loading import read_table
from qsd.drivers.qcow2.snapshot_table import StoredSnapshot, pack
from qsd.errors import QmpError
from qsd.messages import Flag, Op, Request
from qsd.qapi.schema.qcow2 import Qcow2OverlapCheckMode

EFFORT: Final = int(os.environ.get("QSD_EFFORT", "1"))
HABITS: Final = Habits(on_the_spot=0.8, slow=0.0)
# The most that any image may cost here, whatever it says.
MOST_REQUESTS: Final = 3000
MOST_MEMORY: Final = 100 << 20
MOST_GROWTH: Final = 64 << 20
LONGEST_READ: Final = layout.MAX_L1_BYTES

# Fields of the header: offset and bytes.
FIELDS: Final = (
    *((4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4), (64, 8)),
    *((72, 8), (80, 8), (88, 8), (96, 4), (100, 4), (104, 1)),
)
VALUES: Final = (
    *(0, 1, 2, 3, 4, 8, 9, 16, 21, 31, 32, 63, 64, 72, 104, 112, 255, 511, 512, 513, 1023, 4096, 65535, 65536),
    *(1 << 20, 1 << 24, (1 << 25) // 8, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 55, (1 << 56) - 512, 1 << 56),
    *(1 << 62, 1 << 63, (1 << 63) - 512, (1 << 63) - 1, (1 << 64) - 1, (1 << 64) - 512),
)


@attrs.frozen
class Victim:
    """An image, and where its tables are (offset, bytes)."""

    image: bytes
    cluster: int
    tables: tuple[tuple[int, int], ...]
    data: bytes = b""


def make_victim(cluster_bits: int, **header: Any) -> Victim:
    """An image with everything in it: all kinds of clusters, a snapshot, a bitmap, extensions."""
    made = Header(cluster_bits=cluster_bits, size=20 << cluster_bits, **header)
    made = made.with_extension(EXT_BACKING_FORMAT, b"raw")
    if made.has_data_file:
        made = made.with_extension(EXT_DATA_FILE, b"/etc/passwd")
    made = attrs.evolve(made, backing_file=b"/etc/passwd")
    built = build(made, random.Random(cluster_bits), has_snapshot=True, has_bitmap=made.version >= 3)
    found = layout.parse_header(built.image[: 1 << cluster_bits])
    tables = [
        (found.l1_offset, found.l1_size * 8),
        (found.refcount_table_offset, 64),
        (built.snapshot_l1, found.l1_size * 8),
        (found.snapshots_offset, 64),
    ]
    (block,) = struct.unpack_from(">Q", built.image, found.refcount_table_offset)
    tables.append((block, min(512, 1 << cluster_bits)))
    for index in range(found.l1_size):
        (entry,) = struct.unpack_from(">Q", built.image, found.l1_offset + 8 * index)
        if entry & OFFSET_MASK:
            tables.append((entry & OFFSET_MASK, 320))
    if made.version >= 3:
        directory = found.bitmaps_extension()
        assert directory is not None
        tables.append((directory.offset, directory.size))
        (table,) = struct.unpack_from(">Q", built.image, directory.offset)
        tables.append((table, 16))
    # The header's extensions.
    tables.append((found.header_length, 400 if 1 << cluster_bits > 4096 else 120))
    return Victim(built.image, 1 << cluster_bits, tuple(tables), built.data)


VICTIMS: Final = {
    "512": make_victim(9),
    "4k": make_victim(12),
    "64k": make_victim(16),
    "v2": make_victim(12, version=2),
    "extended": make_victim(14, incompatible=layout.EXTENDED_L2),
    "narrow": make_victim(12, refcount_order=1),
    "wide": make_victim(12, refcount_order=6, compatible=layout.LAZY_REFCOUNTS),
    "data-file": make_victim(12, incompatible=layout.DATA_FILE),
}


@st.composite
def hostile(draw: st.DrawFn) -> tuple[str, list[tuple[int, bytes]], int | None]:
    """A victim's name, what is written into its image (offset, bytes), and how long it is then."""
    name = draw(st.sampled_from(sorted(VICTIMS)))
    victim = VICTIMS[name]
    length = len(victim.image)
    edits = []
    inside = st.integers(0, length // victim.cluster + 2).map(lambda cluster: cluster * victim.cluster)
    flags = st.sampled_from((0, 1, 1 << 62, 1 << 63, 3 << 62, 1 << 63 | 1))
    values = st.one_of(st.sampled_from(VALUES), st.builds(int.__or__, inside, flags), st.integers(0, (1 << 64) - 1))
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            offset, size = draw(st.sampled_from(FIELDS))
        else:
            start, room = draw(st.sampled_from(victim.tables))
            size = draw(st.sampled_from((1, 2, 4, 8, 8, 8)))
            offset = start + draw(st.integers(0, max(0, room // size - 1))) * size
        value = draw(values) & (1 << 8 * size) - 1
        edits.append((offset, value.to_bytes(size, "big")))
    return name, edits, draw(st.integers(0, length)) if draw(st.integers(0, 9)) == 0 else None


class HostileWorld(World):
    """Counts what an image costs; a request beyond the end of a disk fails, as a node's funnel would have it."""

    requests = 0
    most_requests = MOST_REQUESTS

    def issue(self, disk: Disk, request: Request) -> None:
        self.requests += 1
        assert self.requests < self.most_requests, "the image keeps us busy"
        super().issue(disk, request)

    def is_inside(self, disk: Disk, request: Request) -> bool:
        return request.offset + request.length <= disk.length

    def refuse_growth(self, disk: Disk, size: int) -> None:
        if size > MOST_GROWTH:
            raise OSError(errno.EFBIG, "no file is that long")


async def suffer(world: World, *, read_only: bool, overlap_check: str) -> str:
    """Everything that is done with an image; what came of it."""
    async with trio.open_nursery() as nursery:
        options: dict[str, Any] = {"overlap_check": Qcow2OverlapCheckMode(overlap_check)}
        driver = make_driver(world, nursery, read_only=read_only, **options)
        try:
            await world.finish(driver.open)
            assert driver.bitmap_store is not None
            await world.finish(driver.bitmap_store.load, driver.length)
        except QmpError as error:
            await world.finish(driver.close)
            nursery.cancel_scope.cancel()
            return error.desc
        driver.image_facts()
        driver.format_specific()
        driver.filename()
        io = SlowRead(driver)
        steps: list[tuple[Any, ...]] = []
        length = driver.length
        for offset in {0, length // 2, max(0, length - 70_000), length * 3 // 4 // 512 * 512}:
            some = min(length - offset, 70_000)
            if some > 0:
                steps += [(io.read, offset, some), (io.block_status, offset, some, 8)]
                if not read_only:
                    steps += [
                        (io.write, offset, b"w" * min(some, 3000)),
                        (io.write_zeroes, offset, some, int(Flag.MAY_UNMAP)),
                        (io.write, offset + some // 2, b"w" * (some // 2)),
                        (io.flush,),
                        (io.discard, offset, some),
                        (io.write_zeroes, offset, min(length - offset, 16 << 20)),
                    ]
        if not read_only:
            steps += [(driver.bitmap_store.mark_in_use,), (driver.bitmap_store.store, []), (io.flush,)]
        failed = ""
        for function, *arguments in steps:
            try:
                await world.finish(function, *arguments)
            except (OSError, QmpError) as error:
                failed = str(error)
        await world.finish(driver.close)
        nursery.cancel_scope.cancel()
    return failed


def look_at(name: str, image: bytes, *, read_only: bool, overlap_check: str = "cached") -> str:
    """Let a daemon's driver have such an image; what it says in the end."""
    victim = VICTIMS[name]
    world = HostileWorld(random.Random(1), 512, bytes(512), HABITS)
    world.disk("file", image)
    if victim.data:
        world.disk("data-file", victim.data)
    tracemalloc.start()
    try:
        said = run_seeded(1, lambda: suffer(world, read_only=read_only, overlap_check=overlap_check))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MOST_MEMORY
    assert world.disks["file"].largest_read <= LONGEST_READ
    return str(said)


# Shrinking what keeps us busy takes minutes; the changes are few.
@settings(max_examples=60 * EFFORT, deadline=None, derandomize=EFFORT == 1, phases=(Phase.generate,))
@given(hostile(), st.booleans(), st.sampled_from(("cached", "none", "all")))
def test_any_change_of_an_image_is_survived(
    change: tuple[str, list[tuple[int, bytes]], int | None], read_only: bool, overlap_check: str
) -> None:
    name, edits, length = change
    image = bytearray(VICTIMS[name].image)
    for offset, data in edits:
        image[offset : offset + len(data)] = data
    # Dirty images are mended on a thread, of which this world does not know that it is busy.
    image[layout.V2_LENGTH + 7] &= ~layout.DIRTY
    look_at(name, bytes(image[:length]), read_only=read_only, overlap_check=overlap_check)


@pytest.mark.parametrize("name", VICTIMS)
@pytest.mark.parametrize("read_only", [True, False])
def test_victims_are_sound(name: str, read_only: bool) -> None:
    assert look_at(name, VICTIMS[name].image, read_only=read_only) == ""


CLUSTERS: Final = 60


def full_table(on_the_spot: float, *, is_shared: bool = False) -> HostileWorld:
    """A refcount table with thousands of entries that lead to full blocks: all to one, if it is shared."""
    victim = VICTIMS["512"]
    image = bytearray(victim.image)
    entries = CLUSTERS * victim.cluster // 8
    table = len(image)
    first = table + CLUSTERS * victim.cluster
    blocks = [first + (0 if is_shared else number) * victim.cluster for number in range(entries)]
    struct.pack_into(">QI", image, 48, table, CLUSTERS)
    image += struct.pack(f">{entries}Q", *blocks)
    image += b"\xff" * (1 if is_shared else entries) * victim.cluster
    world = HostileWorld(random.Random(1), 512, bytes(512), attrs.evolve(HABITS, on_the_spot=on_the_spot))
    world.most_requests = entries + CLUSTERS + 100
    world.disk("file", bytes(image))
    return world


def write_to(world: HostileWorld, offset: int, data: bytes) -> str:
    """Write, flush and close; what went wrong."""
    said = ""

    async def write() -> None:
        nonlocal said
        async with trio.open_nursery() as nursery:
            driver = make_driver(world, nursery)
            await world.finish(driver.open)
            try:
                await world.finish(SlowRead(driver).write, offset, data)
                await world.finish(SlowRead(driver).flush)
            except OSError as error:
                said = str(error)
            await world.finish(driver.close)
            while world.is_busy:
                # The mark that the image is corrupt.
                await world.go_on()
                await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    run_seeded(1, write)
    return said


def test_refcount_block_for_two_places_is_not_believed() -> None:
    world = full_table(0.8, is_shared=True)
    assert "Input/output error" in write_to(world, 0, bytes(1 << 13))
    assert any("used twice" in warning for warning in world.warnings), world.warnings
    assert world.requests < 400, "the search ends where it meets the first of them"


@pytest.mark.parametrize(
    ("place", "leads_to", "kind"),
    [
        # L2 table, refcount block (victim.tables: 0 L1, 1 refcount table, 2 L1 of the snapshot, 3 snapshot table).
        ("l2", 0, "active L1 table"),
        ("l2", 1, "refcount table"),
        ("l2", 3, "snapshot table"),
        ("block", 0, "active L1 table"),
        ("block", 1, "refcount table"),
        ("block", 3, "snapshot table"),
    ],
)
def test_metadata_that_is_other_metadata_too_is_not_written(place: str, leads_to: int, kind: str) -> None:
    victim = VICTIMS["4k"]
    image = bytearray(victim.image)
    target = victim.tables[leads_to][0]
    if place == "l2":
        struct.pack_into(">Q", image, victim.tables[0][0], target | COPIED)
    else:
        struct.pack_into(">Q", image, victim.tables[1][0], target)
    world = HostileWorld(random.Random(1), 512, bytes(512), HABITS)
    world.disk("file", bytes(image))
    assert "Input/output error" in write_to(world, 0, b"x" * (20 << 12))
    assert any(f"overlaps with {kind}" in warning for warning in world.warnings), world.warnings
    after = world.disks["file"].data
    start, length = victim.tables[leads_to]
    assert after[start : start + length] == image[start : start + length]


def test_search_for_a_free_cluster_lets_others_run() -> None:
    world = full_table(1.0)
    turns = Turns()

    async def write() -> None:
        async with trio.open_nursery() as nursery:
            driver = make_driver(world, nursery)
            await driver.open()
            nursery.start_soon(turns.run)
            with pytest.raises(OSError, match="File too large"):
                await SlowRead(driver).write(0, bytes(1 << 13))
            await driver.close()
            nursery.cancel_scope.cancel()

    run_seeded(1, write)
    assert turns.count > world.requests // 512


def test_search_for_a_free_cluster_keeps_nothing_of_what_it_saw() -> None:
    world = full_table(0.8)

    async def write() -> None:
        async with trio.open_nursery() as nursery:
            driver = make_driver(world, nursery)
            await world.finish(driver.open)
            tracemalloc.start()
            try:
                with pytest.raises(OSError, match="File too large"):
                    await world.finish(SlowRead(driver).write, 0, bytes(1 << 13))
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert peak < 2 << 20
            await world.finish(driver.close)
            nursery.cancel_scope.cancel()

    run_seeded(1, write)


async def test_clusters_that_cannot_be_given_up_let_others_run_and_fill_no_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All guest clusters are one: its count goes to 0 and not below, a hundred thousand times if need be."""
    monkeypatch.setattr(writeback, "perf_counter_ns", count(step=writeback.SLICE_NS // 10).__next__)
    image = bytearray(new_image(Header(size=32 << 20, cluster_bits=12), allocates=True))
    header = layout.parse_header(bytes(image[:4096]))
    for index in range(header.l1_size):
        (table,) = struct.unpack_from(">Q", image, header.l1_offset + 8 * index)
        (first,) = struct.unpack_from(">Q", image, table & OFFSET_MASK)
        struct.pack_into(">512Q", image, table & OFFSET_MASK, *[first] * 512)
    turns = Turns()

    async with opened_on(MemoryFile(image)) as driver, trio.open_nursery() as nursery:
        await call(driver, Op.DISCARD, 0, 32 << 20)
        nursery.start_soon(turns.run)
        await call(driver, Op.FLUSH, 0, 0)
        await driver.close()
        nursery.cancel_scope.cancel()
    assert turns.count > 100
    lines = [record.getMessage() for record in caplog.records]
    assert 0 < len(lines) < 10, lines[:20]
    assert all(" like it)" in line for line in lines)


async def test_tables_that_are_used_twice_are_not_gone_along() -> None:
    """A snapshot, deleting one, or shrinking took as many days as the L1 table has millions of entries."""
    image = bytearray(new_image(Header(size=64 << 20, cluster_bits=12), allocates=True))
    header = layout.parse_header(bytes(image[:4096]))
    async with opened_on(MemoryFile(image)) as driver:
        await driver.create_snapshot("before", 0)
        await driver.close()
        image = bytearray(driver.children["file"].data)
    (snapshot_l1,) = struct.unpack_from(">Q", image, layout.parse_header(bytes(image[:4096])).snapshots_offset)
    for l1 in (header.l1_offset, snapshot_l1):
        broken = image[:]
        broken[l1 + 8 : l1 + 16] = broken[l1 : l1 + 8]
        file = MemoryFile(broken)
        async with opened_on(file) as driver:
            file.log.clear()
            with pytest.raises(QmpError, match="snapshot list: Invalid argument"):
                await driver.delete_snapshot("1")
            if l1 == header.l1_offset:
                with pytest.raises(OSError, match="used twice"):
                    await driver.create_snapshot("after", 0)
                with pytest.raises(QmpError, match="number of L2 tables: Invalid argument"):
                    await driver.truncate(1 << 20)
            assert file.log == [], "nothing has been done"


async def test_long_snapshot_table_lets_others_run() -> None:
    """65536 snapshots with long names held the daemon for a second."""
    count = 2048
    image = bytearray(new_image(Header(size=1 << 20)))
    snapshot = StoredSnapshot(l1_offset=1 << 16, l1_size=2, id=b"1", name=b"n" * 900, date_ns=0, vm_clock_ns=0)
    table = pack([snapshot] * count, 1 << 20)
    (block,) = struct.unpack_from(">Q", image, layout.parse_header(bytes(image[: 1 << 16])).refcount_table_offset)
    clusters = -(-len(table) >> 16)
    struct.pack_into(f">{clusters}H", image, block + 2 * (len(image) >> 16), *[1] * clusters)
    struct.pack_into(">IQ", image, 60, count, len(image))
    image += table
    turns = Turns()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.run)
        async with opened_on(MemoryFile(image)) as driver:
            assert len(driver.snapshots()) == count
            assert turns.count > count // 100
            turns.count = 0
            await driver.create_snapshot("one more", 0)
            assert turns.count > count // 100
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("cut", [0, 3, 1 << 20])
async def test_large_table_lets_others_run_and_is_zeroes_behind_the_end_of_the_file(cut: int) -> None:
    """An L1 table of 32 MiB that was in the page cache held the daemon for 50 ms."""
    entries = 1 << 19
    content = struct.pack(f">{entries}Q", *range(1, entries + 1))
    kept = content[: len(content) - cut]
    turns = Turns()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.run)
        table = await read_table(MemoryFile(bytearray(16) + kept), 16, entries, "not read")
        nursery.cancel_scope.cancel()
    assert turns.count >= 10
    assert list(table) == list(struct.unpack(f">{entries}Q", kept.ljust(len(content), b"\0")))


@pytest.mark.parametrize("bits", [1, 0x1FF, 1 << 56, 0x7F << 56])
def test_l1_entry_that_leads_nowhere_but_has_bits_set(bits: int) -> None:
    victim = VICTIMS["4k"]
    image = bytearray(victim.image)
    struct.pack_into(">Q", image, victim.tables[0][0], bits)
    for read_only in (True, False):
        look_at("4k", bytes(image), read_only=read_only)


@pytest.mark.parametrize("backwards", [False, True])
async def test_many_tables_are_known_as_few_are(monkeypatch: pytest.MonkeyPatch, *, backwards: bool) -> None:
    """Whichever way they are kept: as they come where they ascend, or one by one."""
    image = bytearray(new_image(Header(size=32 << 20, cluster_bits=12), allocates=True))
    header = layout.parse_header(bytes(image[:4096]))
    if backwards:
        entries = struct.unpack_from(f">{header.l1_size}Q", image, header.l1_offset)
        struct.pack_into(f">{header.l1_size}Q", image, header.l1_offset, *reversed(entries))
    known: list[dict[int, str | None]] = []
    for many in (metadata_map.MANY, 0):
        monkeypatch.setattr(metadata_map, "MANY", many)
        async with opened_on(MemoryFile(image)) as driver:
            clusters = driver.image.metadata.clusters
            assert isinstance(clusters, dict) is bool(many)
            known.append({cluster: clusters.get(cluster) for cluster in range(len(image) >> 12)})
    assert known[0] == known[1]
    assert list(known[0].values()).count(metadata_map.ACTIVE_L2) == header.l1_size
    assert metadata_map.REFCOUNT_BLOCK in known[0].values()
