"""Headers that cannot be written, once or again and again: nothing is lost, nobody waits, and the error is told."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from collections.abc import Awaitable, Callable
from typing import Any, Final

import attrs
import pytest
import trio
import trio.testing
from qcow2_fakes import (
    KIB,
    Bench,
    MemoryFile,
    check,
    cut,
    cut_somewhere,
    examine,
    new_image,
    opened_on,
    read,
    write,
)

from qsd.block.bitmap import DirtyBitmap
from qsd.block.dirty import NamedBitmap
from qsd.drivers.base import Mode
from qsd.drivers.calls import call
from qsd.drivers.qcow2.bitmap_image import DriverImage
from qsd.drivers.qcow2.bitmaps import Qcow2Bitmaps
from qsd.drivers.qcow2.driver import Qcow2Driver
from qsd.drivers.qcow2.extensions import EXT_BACKING_FORMAT, EXT_BITMAPS, Extension
from qsd.drivers.qcow2.layout import DIRTY, LAZY_REFCOUNTS, Header, marking, parse_header
from qsd.errors import QmpError
from qsd.host.shield import Shields
from qsd.messages import Op, Request

EFFORT: Final = int(os.environ.get("QSD_EFFORT", "1"))
NOTHING: Final = MemoryFile(b"")
ALWAYS: Final = 1 << 30


class Headless(MemoryFile):
    """A file whose header can be written ``before`` times, and then for ``times`` times it cannot.

    Of those that fail the first ``arriving`` are written all the same.
    """

    before = ALWAYS
    times = 0
    arriving = 0
    failures = 0

    def submit(self, batch: list[Request]) -> None:
        for request in batch:
            if request.op == Op.WRITE and not request.offset:
                self.before -= 1
                if self.before < 0 < self.times:
                    self.times -= 1
                    self.failures += 1
                    if self.failures <= self.arriving:
                        self._put(0, bytes(request.buffer or b""))
                    request.complete(errno.EIO)
                    continue
            super().submit([request])


async def take(bench: Bench, driver: Qcow2Driver) -> None:
    await bench.create_snapshot(driver)


async def drop(bench: Bench, driver: Qcow2Driver) -> None:
    await bench.delete_snapshot(driver, "1")


async def grow(bench: Bench, driver: Qcow2Driver) -> None:
    await bench.resize(driver, 40 << 20)


async def shrink(bench: Bench, driver: Qcow2Driver) -> None:
    await bench.resize(driver, 40 * KIB)


async def fill(bench: Bench, driver: Qcow2Driver) -> None:
    """So much is written that the refcount table moves."""
    start = 1800 * KIB
    data = bench.rng.randbytes(len(bench.disk) - start)
    try:
        await bench.write(driver, start, data)
    finally:
        bench.disk[:] = await read(driver, 0, len(bench.disk))


async def store(bench: Bench, driver: Qcow2Driver) -> None:
    bits = DirtyBitmap(len(bench.disk), 512)
    bits.set(0, 5000)
    store = Qcow2Bitmaps(DriverImage(driver), print)
    await store.load(driver.length)
    await store.mark_in_use()
    await store.store([NamedBitmap("b", bits, is_persistent=True)])


@attrs.frozen
class Case:
    do: Callable[[Bench, Qcow2Driver], Awaitable[None]]
    header: Header
    options: dict[str, Any] = attrs.field(factory=dict)


TINY: Final = {"l2_cache_size": 1, "l2_cache_entry_size": 512, "refcount_cache_size": 1}
# More refcount blocks than the cache may hold.
SMALL: Final = Header(size=700 * KIB, cluster_bits=9)
OLD: Final = attrs.evolve(SMALL, version=2)
# As version 3 it does not fit into a sector.
UNMARKED: Final = attrs.evolve(OLD, backing_file=b"x" * 420)
LAZY: Final = attrs.evolve(SMALL, compatible=LAZY_REFCOUNTS)
# A refcount table of 64 blocks of 64 counts.
WIDE: Final = Header(size=2100 * KIB, cluster_bits=9, refcount_order=6)
CASES: Final = {
    "take": Case(take, SMALL, TINY),
    "take-v2": Case(take, OLD, TINY),
    "take-unmarked": Case(take, UNMARKED, TINY),
    "take-lazy": Case(take, LAZY, TINY),
    "drop": Case(drop, SMALL, TINY),
    "drop-v2": Case(drop, OLD, TINY),
    "drop-lazy": Case(drop, LAZY),
    "grow": Case(grow, SMALL),
    "grow-v2": Case(grow, OLD, TINY),
    "shrink": Case(shrink, SMALL),
    "fill": Case(fill, WIDE, TINY),
    "fill-lazy": Case(fill, attrs.evolve(WIDE, compatible=LAZY_REFCOUNTS), TINY),
    "store": Case(store, SMALL),
}


# How many headers in a row cannot be written, and how many of these arrive.
HARDSHIPS: Final = ((2, 1), (ALWAYS, 1), (1, 0), (1, 1), (3, 1), (2, 0), (3, ALWAYS), (ALWAYS, 0), (ALWAYS, ALWAYS))
# Each with all of them when there is time, else with one; and what used to lose clusters.
TRIED: Final = (
    [(name, *hardship) for name in CASES for hardship in HARDSHIPS]
    if EFFORT > 1
    else [(name, *HARDSHIPS[at % 5]) for at, name in enumerate(CASES)] + [("take-unmarked", 3, 1)]
)


async def made(case: Case) -> Bench:
    """An image with a snapshot, half of which has been written since."""
    bench = Bench(case.header, random.Random(1), NOTHING)
    async with bench.open() as driver:
        if case.do is fill:
            await bench.write(driver, 0, b"x" * 1800 * KIB)
        else:
            await bench.write(driver, 0, bench.rng.randbytes(600 * KIB))
        if case.do not in (grow, shrink, fill):
            await bench.create_snapshot(driver)
            await bench.write(driver, 0, bench.rng.randbytes(300 * KIB))
        await driver.close()
    assert (examine(bench.file.data).corruptions, examine(bench.file.data).leaks) == (0, 0)
    return bench


@pytest.mark.parametrize(("name", "times", "arriving"), TRIED)
async def test_header_that_cannot_be_written(name: str, times: int, arriving: int) -> None:
    case = CASES[name]
    start = await made(case)
    before = bytes(start.file.data)
    for number in range(20):
        bench = Bench(case.header, random.Random(number), NOTHING)
        bench.file, bench.disk, bench.snapshots = Headless(before), bytearray(start.disk), dict(start.snapshots)
        file: Any = bench.file
        async with bench.open(**case.options) as driver:
            file.before, file.times, file.arriving = number, times, arriving
            try:
                await case.do(bench, driver)
            except (OSError, QmpError):
                assert file.failures
                assert_sound(bytes(file.data))
                # What was to be cut off may be gone.
                bench.disk[40 * KIB :] = await read(driver, 40 * KIB, driver.length - 40 * KIB)
            await go_on(bench, driver, file)
            await driver.close()
        if not file.failures:
            break
        assert_consistent(before, file, bench.rng)
        assert_sound(bytes(file.data))
        if case.header.version < 3:
            assert check(file) == (0, 0), "what has no mark for a repair is repaired when it is closed"
        async with bench.open() as driver:
            await bench.compare(driver)
            await driver.close()
        await bench.compare_snapshots(bench.file.data)
    else:
        raise AssertionError("it never works")
    assert number


async def go_on(bench: Bench, driver: Qcow2Driver, file: Headless) -> None:
    """The guest writes and flushes, first while the header cannot be written."""
    at = len(bench.disk) // 2
    assert len(bench.disk) == driver.length
    for is_possible in (False, True):
        try:
            await bench.write(driver, at, b"more")
        except OSError:
            assert not is_possible
        # A deletion may have failed behind the switch.
        bench.snapshots = {each.id: bench.snapshots[each.id] for each in driver.snapshots()}
        try:
            await call(driver, Op.FLUSH, 0, 0)
        except OSError:
            assert not is_possible
        else:
            await look(bench, bytes(file.data))
        file.times = 0
        at += 4 * KIB


async def look(bench: Bench, data: bytes) -> None:
    """What was flushed is there for who opens the file now."""
    async with opened_on(MemoryFile(data), backing=NOTHING) as driver:
        await bench.compare(driver)
    await bench.compare_snapshots(data)


def assert_consistent(before: bytes, file: MemoryFile, rng: random.Random) -> None:
    """Cut off at any moment, too."""
    for _ in range(2 * EFFORT):
        assert_sound(cut_somewhere(before, file.log, rng))


def assert_sound(data: bytes) -> None:
    found = examine(data)
    header = parse_header(data[: 2 << 20])
    flags = 0 if marking(header) else sum("OFLAG_COPIED" in each for each in found.problems)
    assert found.corruptions <= flags or header.incompatible & DIRTY, found.problems


async def test_name_in_a_header_that_may_be_there_is_not_written_over() -> None:
    """Of a name that failed and arrived all the same the next one took the place: the file had half of each."""
    names = [f"/{letter * 700}" for letter in "abc"]
    file = Headless(new_image(Header(size=1 << 20, cluster_bits=12)))
    async with opened_on(file) as driver:
        await driver.change_backing_file(names[0], "raw")
        file.before, file.times, file.arriving = 0, ALWAYS, 1
        for name in names[1:]:
            with pytest.raises(OSError, match="Input/output error"):
                await driver.change_backing_file(name, "raw")
            # The first that failed did arrive.
            assert parse_header(bytes(file.data)).backing_file == names[1].encode()


async def test_name_that_is_put_back_leaves_the_header_that_arrived_alone() -> None:
    """The old name began before the end of the new header, in the same sector: no image was left in between."""
    name = f"/{'a' * 600}"
    file = Headless(new_image(Header(size=1 << 20, cluster_bits=12)))
    async with opened_on(file) as driver:
        await driver.change_backing_file(name, "")
        file.before, file.times, file.arriving = 0, ALWAYS, 1
        before = bytes(file.data)
        file.log.clear()
        with pytest.raises(OSError, match="Input/output error"):
            await driver.change_backing_file("/b", "qcow2")
    for image in cut(before, file.log):
        assert parse_header(image[: 1 << 12]).backing_file in (name.encode(), b"/b")


@pytest.mark.parametrize("length", [2, 200, 340, 341, 380, 900, 1023])
async def test_header_of_more_than_a_sector_arrives_as_a_whole(length: int) -> None:
    """With a bitmap, the feature names of an overlay reached to where the backing file's name had been."""
    extensions = (Extension(EXT_BACKING_FORMAT, b"qcow2"),)
    name = b"/" + b"n" * (length - 1)
    file = MemoryFile(new_image(Header(size=KIB, cluster_bits=14, backing_file=name, extensions=extensions)))
    more = (*extensions, Extension(EXT_BITMAPS, bytes(24)), Extension(0x12345678, b"something else"))
    async with opened_on(file, backing=NOTHING) as driver:
        image = driver.image
        for wanted in (more[:2], extensions, more, more[1:], (), extensions):
            before, old = bytes(file.data), image.header
            file.log.clear()
            await image.change_header(extensions=wanted)
            for data in cut(before, file.log):
                found = parse_header(data[: 1 << 14])
                assert found in (old, image.header)
                assert found.backing_file == name
            assert parse_header(bytes(file.data[: 1 << 14])).extensions == wanted
        await driver.close()


# -- storage that hangs --------------------------------------------------------------------------------------------


class Hanging(MemoryFile):
    """A file that keeps a write of the header, the one after ``before`` others, to itself."""

    before = ALWAYS
    kept: Request | None = None

    def submit(self, batch: list[Request]) -> None:
        for request in batch:
            if request.op == Op.WRITE and not request.offset:
                self.before -= 1
                if self.before == -1:
                    self.kept = request
                    continue
            super().submit([request])

    def arrive(self) -> None:
        """Let it reach the file after all."""
        assert self.kept is not None
        super().submit([self.kept])


# Filling changes it in a task of the node's own.
@pytest.mark.parametrize("is_lost", [False, True])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.do is not fill])
async def test_header_that_hangs_when_the_daemon_ends(name: str, is_lost: bool) -> None:
    """Who changes it is cut off; arrive it or not, the image is as sound as after a power cut."""
    case = CASES[name]
    start = await made(case)
    before = bytes(start.file.data)
    for number in range(20):
        bench = Bench(case.header, random.Random(number), NOTHING)
        file = bench.file = Hanging(before)
        bench.disk, bench.snapshots = bytearray(start.disk), dict(start.snapshots)
        shields, scope = Shields(), trio.CancelScope()

        async def change(
            bench: Bench, driver: Qcow2Driver, shields: Shields = shields, scope: trio.CancelScope = scope
        ) -> None:
            shields.use()
            with scope:
                await case.do(bench, driver)

        async with bench.open(**case.options) as driver:
            file.before = number
            async with trio.open_nursery() as nursery:
                nursery.start_soon(change, bench, driver)
                await trio.testing.wait_all_tasks_blocked()
                if file.kept is None:
                    break
                scope.cancel()
                await trio.testing.wait_all_tasks_blocked()
                has_held = len(nursery.child_tasks)
                shields.drop()
            assert has_held
            await end(driver)
        if not is_lost:
            file.arrive()
        assert_sound(bytes(file.data))
        assert_consistent(before, file, bench.rng)
    else:
        raise AssertionError("it never works")
    assert number


async def end(driver: Qcow2Driver) -> None:
    """What is left to do when the daemon ends: data of guests may come, none of it is flushed."""
    with contextlib.suppress(OSError):
        await write(driver, driver.length // 2, b"more")
    with pytest.raises(OSError, match="Input/output"):
        await call(driver, Op.FLUSH, 0, 0)
    await driver.close()


# -- files that cannot be read everywhere --------------------------------------------------------------------------


class Scratched(MemoryFile):
    """A file of which one sector cannot be read."""

    broken = -1

    def submit(self, batch: list[Request]) -> None:
        for request in batch:
            if request.op == Op.READ and request.offset <= self.broken < request.offset + request.length:
                request.complete(errno.EIO)
            else:
                super().submit([request])


async def test_broken_sector_matters_where_something_stands() -> None:
    """One anywhere in the header's cluster, or behind the snapshot table, kept the image from being opened."""
    bench = Bench(Header(size=256 * KIB, cluster_bits=12, backing_file=b"/" + b"b" * 600), random.Random(0))
    async with opened_on(bench.file, backing=NOTHING) as driver:
        await bench.write(driver, 0, b"x" * 4096)
        await bench.create_snapshot(driver)
        await bench.create_snapshot(driver)
        await driver.close()
    header = parse_header(bytes(bench.file.data[:4096]))
    # The header with its name; two entries of less than 80 bytes; one entry.
    needed = {0, 512, header.snapshots_offset, header.l1_offset}
    file = Scratched(bench.file.data)
    refused = set()
    for sector in range(0, len(file.data), 512):
        file.broken = sector
        try:
            async with opened_on(file, mode=Mode(read_only=True), backing=NOTHING) as driver:
                assert len(driver.snapshots()) == 2
        except* QmpError:
            refused.add(sector)
    assert refused == needed
