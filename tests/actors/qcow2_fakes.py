"""A qcow2 node's driver on files in memory, which can be cut off at any write."""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import attrs
import trio
import trio.testing

from qsd.drivers.base import ChildRole, Limits, Mode
from qsd.drivers.calls import SlowPath, call
from qsd.drivers.qcow2.check import Checker
from qsd.drivers.qcow2.driver import Qcow2Driver
from qsd.drivers.qcow2.layout import DATA_FILE, DATA_FILE_RAW, DIRTY, EXTENDED_L2, Header, parse_header
from qsd.drivers.qcow2.ledger import Findings
from qsd.drivers.qcow2.loading import read_snapshots
from qsd.drivers.qcow2.new_image import NewImage, header_cluster, metadata, place
from qsd.messages import BlockState, Extent, Op, Request
from qsd.qapi.schema.block import BlockdevDriver
from qsd.qapi.schema.qcow2 import BlockdevOptionsQcow2

CLUSTER = 1 << 16
SECTOR = 512


def extents_of(data: bytes | bytearray, request: Request) -> list[Extent]:
    """Answer a BLOCK_STATUS: what is zero is a hole, sector by sector."""
    found: list[Extent] = []
    offset, end = request.offset, request.offset + request.length
    while offset < end:
        stop = min(end, (offset // SECTOR + 1) * SECTOR)
        state = (BlockState.DATA if any(data[offset:stop]) else BlockState.ZERO) | BlockState.ALLOCATED
        if found and found[-1].state == state:
            found[-1] = Extent(found[-1].length + stop - offset, state)
        else:
            found.append(Extent(stop - offset, state))
        offset = stop
    return found[: request.extents_wanted]


def file_node(name: str) -> Any:
    """What a driver may ask the node of a file for: who it is."""
    return SimpleNamespace(driver=_FileDriver(name), name=name)


@attrs.define(eq=False)
class _FileDriver:
    path: str
    name: str = "file"
    is_format: bool = False
    children: dict[str, Any] = attrs.field(factory=dict)

    def filename(self) -> str:
        return self.path

    def allocated_size(self) -> int | None:
        return None


class MemoryFile(SlowPath):
    """A child that does everything on the spot. ``fails`` makes flushes fail.

    ``log`` has what was changed since it was last cleared: (offset, bytes), a new length, or None for a flush.
    ``reads`` has the lengths of what was read. ``room`` counts down to the write that fails with ENOSPC.
    """

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = bytearray(data)
        self.limits = Limits()
        self.name, self.node_name = "file", "file"
        self.fails = False
        self.room = -1
        self.node: Any = SimpleNamespace(driver=self)
        self.log: list[tuple[int, bytes] | int | None] = []
        self.reads: list[int] = []

    @property
    def length(self) -> int:
        return len(self.data)

    def submit(self, batch: list[Request]) -> None:
        for request in batch:
            place = slice(request.offset, request.offset + request.length)
            error = 0
            if request.op == Op.READ:
                assert request.buffer is not None
                assert place.stop <= self.length
                self.reads.append(request.length)
                request.buffer[:] = self.data[place]
            elif request.op in (Op.WRITE, Op.WRITE_ZEROES):
                self.room -= 1
                if self.room == 0:
                    error = errno.ENOSPC
                else:
                    self._put(request.offset, bytes(request.buffer or bytes(request.length)))
            elif request.op == Op.DISCARD:
                self._put(request.offset, bytes(request.length))
            elif request.op == Op.BLOCK_STATUS:
                request.result = extents_of(self.data, request)
            elif request.op == Op.FLUSH:
                self.log.append(None)
                error = errno.EIO if self.fails else 0
            request.complete(error)

    def _put(self, offset: int, data: bytes) -> None:
        self.log.append((offset, data))
        self.grow(offset + len(data))
        self.data[offset : offset + len(data)] = data

    def grow(self, size: int) -> bool:
        if size > self.length:
            self.log.append(size)
            self.data.extend(bytes(size - self.length))
        return True

    def allocated_size(self) -> int:
        return self.length

    async def quiesce(self) -> None:
        """Nothing is ever in flight."""

    async def truncate(self, size: int, *, exact: bool = True) -> None:
        if size < self.length:
            self.log.append(size)
        del self.data[size:]
        self.grow(size)


class SlowFile(MemoryFile):
    """A file whose requests wait in ``waiting`` when they are of a kind that is ``slow``."""

    def __init__(self, data: bytes | bytearray) -> None:
        super().__init__(data)
        self.slow: frozenset[Op] = frozenset()
        self.waiting: list[Request] = []

    def submit(self, batch: list[Request]) -> None:
        for request in batch:
            if request.op in self.slow:
                self.waiting.append(request)
            else:
                super().submit([request])

    def end_one(self) -> None:
        """Let the one that waits longest end."""
        super().submit([self.waiting.pop(0)])

    async def end_all(self) -> None:
        """Let all that waits end, and what comes of that."""
        await trio.testing.wait_all_tasks_blocked()
        while self.waiting:
            self.end_one()
            await trio.testing.wait_all_tasks_blocked()


def cut(before: bytes, log: list[tuple[int, bytes] | int | None]) -> Iterator[bytes]:
    """What is on the disk when the power fails at any point of ``log``.

    The writes since the last flush all, or every second of them, or none: what no flush has ordered comes in any
    order, but for changes of the file's length. The last one is torn, too: a disk writes sectors.
    """
    on_disk = bytearray(before)
    since: list[tuple[int, bytes] | int] = []
    for step in [*log, None]:
        if step is not None:
            for torn in _torn(step):
                yield bytes(_applied(on_disk, [*since, torn]))
                yield bytes(_applied(on_disk, [*filter(_is_length, since), torn]))
            since.append(step)
            yield bytes(_applied(on_disk, since))
            continue
        yield bytes(on_disk)
        for kept in (since[::2], since[1::2], since[-1:]):
            yield bytes(_applied(on_disk, [each for each in since if each in kept or _is_length(each)]))
        on_disk = _applied(on_disk, since)
        since = []


def cut_somewhere(before: bytes, log: list[tuple[int, bytes] | int | None], rng: random.Random) -> bytes:
    """One of the images there may be when the power fails at a random moment."""
    end = rng.randrange(len(log) + 1)
    flushed = max((at for at in range(end) if log[at] is None), default=0)
    chance = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
    kept = [each for each in log[:flushed] if each is not None]
    for each in log[flushed:end]:
        if each is not None and (_is_length(each) or rng.random() < chance):
            kept.append(each)
            if rng.random() < 0.1:
                kept[-1:] = list(_torn(each))[:1] or [each]
    return bytes(_applied(bytearray(before), kept))


def _is_length(step: tuple[int, bytes] | int) -> bool:
    return isinstance(step, int)


def _torn(step: tuple[int, bytes] | int) -> Iterator[tuple[int, bytes]]:
    """Only the first sector of a write, or all but the first."""
    if not isinstance(step, int) and len(step[1]) > SECTOR:
        offset, data = step
        first = SECTOR - offset % SECTOR
        yield offset, data[:first]
        yield offset + first, data[first:]


def _applied(data: bytearray, steps: list[tuple[int, bytes] | int]) -> bytearray:
    data = bytearray(data)
    for step in steps:
        if isinstance(step, int):
            del data[step:]
            data.extend(bytes(step - len(data)))
        else:
            offset, piece = step
            data.extend(bytes(max(0, offset + len(piece) - len(data))))
            data[offset : offset + len(piece)] = piece
    return data


class FakeHost:
    """Starts tasks in a nursery of the test's."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    def spawn(self, function: Callable[..., Any], *args: Any, name: str) -> None:
        self._nursery.start_soon(function, *args, name=name)

    def warn(self, text: str) -> None:
        raise AssertionError(text)

    def emit(self, name: str, data: dict[str, Any]) -> None:
        raise AssertionError((name, data))


def new_image(header: Header, *, allocates: bool = False) -> bytes:
    """The bytes of a new image."""
    placement = place(NewImage(header=header, allocates=allocates))
    data = bytearray(placement.end * header.cluster_size)
    for offset, part in [(0, header_cluster(placement.header)), *metadata(placement)]:
        data[offset : offset + len(part)] = part
    return bytes(data)


@asynccontextmanager
async def opened_on(
    file: MemoryFile,
    *,
    backing: MemoryFile | None = None,
    data_file: MemoryFile | None = None,
    mode: Mode | None = None,
    **options: Any,
) -> AsyncIterator[Qcow2Driver]:
    """A driver on an image, writable unless ``mode`` says otherwise; what it does later ends with the scope."""
    async with trio.open_nursery() as nursery:
        host: Any = FakeHost(nursery)
        children: dict[str, Any] = {"file": file, "backing": backing, "data-file": data_file}
        named = {name.replace("-", "_"): name for name, child in children.items() if child is not None}
        asked = BlockdevOptionsQcow2(driver=BlockdevDriver.QCOW2, **named, **options)
        driver = Qcow2Driver("n", asked, mode or Mode(discard_unmap=True), host)
        driver.children.update((name, child) for name, child in children.items() if child is not None)
        assert driver.child_specs[0] == ("file", ChildRole.DATA)
        await driver.open()
        yield driver
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def opened(**options: Any) -> AsyncIterator[tuple[Qcow2Driver, MemoryFile]]:
    """A writable driver on a new image of 64 MiB, whose clusters exist already."""
    file = MemoryFile(new_image(Header(size=64 << 20), allocates=True))
    async with opened_on(file, **options) as driver:
        yield driver, file


async def write(driver: Qcow2Driver, offset: int, data: bytes) -> None:
    await call(driver, Op.WRITE, offset, len(data), memoryview(bytearray(data)))


async def read(driver: Qcow2Driver, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    await call(driver, Op.READ, offset, length, memoryview(buffer))
    return bytes(buffer)


def examine(data: bytes | bytearray) -> Findings:
    """What the check finds in an image."""

    def look(offset: int, length: int) -> bytes:
        return bytes(data[offset : offset + length]).ljust(length, b"\0")

    return Checker(parse_header(bytes(data[: 1 << 21])), look, len(data)).run()


def check(file: MemoryFile) -> tuple[int, int]:
    """Corruptions and leaks of what is in the file."""
    found = examine(file.data)
    return found.corruptions, found.leaks


KIB = 1 << 10
HEADERS = {
    "plain": Header(size=256 * KIB, cluster_bits=12),
    "small": Header(size=40 * KIB, cluster_bits=9),
    "old": Header(size=256 * KIB, cluster_bits=12, version=2),
    "narrow": Header(size=256 * KIB, cluster_bits=10, refcount_order=0),
    "extended": Header(size=256 * KIB, cluster_bits=14, incompatible=EXTENDED_L2),
    "data-file": Header(size=256 * KIB, cluster_bits=12, incompatible=DATA_FILE),
    "raw-data-file": Header(size=256 * KIB, cluster_bits=12, incompatible=DATA_FILE, autoclear=DATA_FILE_RAW),
}


@attrs.define
class Bench:
    """An image with what belongs to it, a model of the disk, and steps on both."""

    header: Header
    rng: random.Random
    backing: MemoryFile | None = None
    data_file: MemoryFile | None = None
    disk: bytearray = attrs.field(factory=bytearray)
    # What the snapshots hold, by their ids.
    snapshots: dict[str, bytes] = attrs.field(factory=dict)
    file: MemoryFile = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.file = MemoryFile(new_image(self.header, allocates=self.header.is_data_file_raw))
        below = self.backing.data if self.backing is not None else b""
        self.disk = bytearray(below[: self.header.size].ljust(self.header.size, b"\0"))
        if self.header.has_data_file:
            self.data_file = MemoryFile(bytes(self.header.size))

    def open(self, **options: Any) -> Any:
        return opened_on(self.file, backing=self.backing, data_file=self.data_file, **options)

    async def resize(self, driver: Qcow2Driver, size: int) -> None:
        await driver.truncate(size)
        assert driver.length == size
        del self.disk[size:]
        self.disk.extend(bytes(size - len(self.disk)))

    async def write(self, driver: Qcow2Driver, offset: int, data: bytes) -> None:
        await write(driver, offset, data)
        self.disk[offset : offset + len(data)] = data

    async def step(self, driver: Qcow2Driver, largest: int, *, resizes: bool = True) -> None:
        rng, size = self.rng, len(self.disk)
        kind = rng.randrange(0 if resizes else 4, 10)
        if kind < 4 or not size:
            wanted = rng.choice((size // 2, size * 2, rng.randrange(largest), rng.randrange(size + 1)))
            await self.resize(driver, min(wanted, largest) // 512 * 512)
            return
        length = rng.choice((512, 4096, 5000, 20_000))
        offset = rng.randrange(size)
        length = min(length, size - offset)
        if kind < 8:
            await self.write(driver, offset, rng.randbytes(length))
        else:
            await call(driver, rng.choice((Op.WRITE_ZEROES, Op.DISCARD)), offset, length)
            self.disk[offset : offset + length] = await read(driver, offset, length)

    async def compare(self, driver: Qcow2Driver) -> None:
        assert driver.length == len(self.disk)
        if self.disk:
            assert await read(driver, 0, len(self.disk)) == self.disk

    async def create_snapshot(self, driver: Qcow2Driver) -> str:
        made = await driver.create_snapshot(f"name{self.rng.randrange(1000)}", 1_700_000_000_123_456_789)
        self.snapshots[made] = bytes(self.disk)
        return made

    async def delete_snapshot(self, driver: Qcow2Driver, which: str) -> None:
        await driver.delete_snapshot(which)
        del self.snapshots[which]

    async def snapshot_step(self, driver: Qcow2Driver) -> None:
        if self.snapshots and self.rng.randrange(2):
            await self.delete_snapshot(driver, self.rng.choice(list(self.snapshots)))
        else:
            await self.create_snapshot(driver)

    async def compare_snapshots(self, data: bytes | bytearray) -> None:
        """Look at each snapshot of an image as if it were the disk."""
        header = parse_header(bytes(data[: 1 << 21]))
        stored, _length = await read_snapshots(cast(Any, MemoryFile(data)), header)
        assert [each.shown.id for each in stored] == list(self.snapshots)
        for each in stored:
            content = self.snapshots[each.shown.id]
            assert each.disk_size == len(content)
            there = attrs.evolve(
                header,
                size=len(content),
                l1_offset=each.l1_offset,
                l1_size=each.l1_size,
                snapshot_count=0,
                incompatible=header.incompatible & ~DIRTY,
            )
            file = MemoryFile(data)
            await file.write(0, header_cluster(there)[: header.cluster_size])
            async with opened_on(file, backing=self.backing, mode=Mode(read_only=True)) as driver:
                if content:
                    assert await read(driver, 0, len(content)) == content
