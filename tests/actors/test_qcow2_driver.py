"""The qcow2 driver on a file in memory: what it does when nobody asks it for anything."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from qsd.drivers.base import ChildRole, Limits, Mode
from qsd.drivers.calls import SlowPath, call
from qsd.drivers.qcow2.check import Checker
from qsd.drivers.qcow2.driver import Qcow2Driver
from qsd.drivers.qcow2.layout import Header, parse_header
from qsd.drivers.qcow2.new_image import NewImage, header_cluster, metadata, place
from qsd.messages import Op, Request
from qsd.qapi.schema.block import BlockdevDriver
from qsd.qapi.schema.qcow2 import BlockdevOptionsQcow2

CLUSTER = 1 << 16


class MemoryFile(SlowPath):
    """A child that does everything on the spot. ``fails`` makes flushes fail."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.limits = Limits()
        self.name, self.node_name = "file", "file"
        self.fails = False
        self.node: Any = None

    @property
    def length(self) -> int:
        return len(self.data)

    def submit(self, batch: list[Request]) -> None:
        for request in batch:
            place = slice(request.offset, request.offset + request.length)
            if request.op == Op.READ:
                assert request.buffer is not None
                request.buffer[:] = self.data[place]
            elif request.op == Op.WRITE:
                assert request.buffer is not None
                self.data[place] = request.buffer
            elif request.op in (Op.WRITE_ZEROES, Op.DISCARD):
                self.data[place] = bytes(request.length)
            request.complete(errno.EIO if self.fails and request.op == Op.FLUSH else 0)

    def grow(self, size: int) -> bool:
        self.data.extend(bytes(max(0, size - len(self.data))))
        return True

    async def quiesce(self) -> None:
        """Nothing is ever in flight."""

    async def truncate(self, size: int, *, exact: bool = True) -> None:
        del self.data[size:]
        self.grow(size)


class FakeHost:
    """Starts tasks in a nursery of the test's."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    def spawn(self, function: Callable[..., Any], *args: Any, name: str) -> None:
        self._nursery.start_soon(function, *args, name=name)

    def warn(self, text: str) -> None:
        raise AssertionError(text)


@asynccontextmanager
async def opened(**options: Any) -> AsyncIterator[tuple[Qcow2Driver, MemoryFile]]:
    """A writable driver on a new image of 64 MiB, whose clusters exist already."""
    placement = place(NewImage(header=Header(size=64 << 20), allocates=True))
    file = MemoryFile(bytes(placement.end * CLUSTER))
    for offset, part in [(0, header_cluster(placement.header)), *metadata(placement)]:
        file.data[offset : offset + len(part)] = part
    async with trio.open_nursery() as nursery:
        host: Any = FakeHost(nursery)
        asked = BlockdevOptionsQcow2(driver=BlockdevDriver.QCOW2, file="file", **options)
        driver = Qcow2Driver("n", asked, Mode(), host)
        child: Any = file
        driver.children["file"] = child
        assert driver.child_specs[0] == ("file", ChildRole.DATA)
        await driver.open()
        yield driver, file
        nursery.cancel_scope.cancel()


async def write(driver: Qcow2Driver, offset: int, data: bytes) -> None:
    await call(driver, Op.WRITE, offset, len(data), memoryview(bytearray(data)))


async def read(driver: Qcow2Driver, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    await call(driver, Op.READ, offset, length, memoryview(buffer))
    return bytes(buffer)


def check(file: MemoryFile) -> tuple[int, int]:
    """Corruptions and leaks of what is in the file."""
    header = parse_header(bytes(file.data[:CLUSTER]))

    def look(offset: int, length: int) -> bytes:
        return bytes(file.data[offset : offset + length]).ljust(length, b"\0")

    found = Checker(header, look, file.length).run()
    return found.corruptions, found.leaks


async def test_image_that_was_not_inactivated_after_all_goes_on() -> None:
    async with opened() as (driver, file):
        await call(driver, Op.WRITE_ZEROES, 0, CLUSTER, flags=2)
        await write(driver, 0, b"before")
        await driver.inactivate()
        assert check(file) == (0, 0), "complete for its next owner"
        await write(driver, 0, b"after!")
        assert await read(driver, 0, 6) == b"after!"
        await driver.close()
        assert check(file) == (0, 0)


async def test_image_that_cannot_be_inactivated_goes_on() -> None:
    async with opened() as (driver, file):
        await call(driver, Op.WRITE_ZEROES, 0, CLUSTER, flags=2)
        file.fails = True
        with pytest.raises(Exception, match="Input/output error"):
            await driver.inactivate()
        file.fails = False
        await write(driver, 0, b"still here")
        assert await read(driver, 0, 10) == b"still here"
        await driver.close()
        assert check(file) == (0, 0)


async def test_tables_nobody_asks_for_are_forgotten(autojump_clock: trio.testing.MockClock) -> None:
    async with opened(cache_clean_interval=60) as (driver, _file):
        await write(driver, 0, b"x")
        await call(driver, Op.FLUSH, 0, 0)
        held = driver.image.cache.size
        assert held > 0
        await trio.sleep(90)
        assert driver.image.cache.size == held, "used since the last look"
        await trio.sleep(60)
        assert driver.image.cache.size == 0
        assert await read(driver, 0, 1) == b"x"


async def test_caches_are_left_alone_where_that_is_asked_for(autojump_clock: trio.testing.MockClock) -> None:
    async with opened(cache_clean_interval=0) as (driver, _file):
        await read(driver, 0, 1)
        await trio.sleep(10_000)
        assert driver.image.cache.size > 0


async def test_interval_can_be_changed(autojump_clock: trio.testing.MockClock) -> None:
    async with opened(cache_clean_interval=0) as (driver, _file):
        options = BlockdevOptionsQcow2(driver=BlockdevDriver.QCOW2, file="file", cache_clean_interval=5)
        await driver.prepare_reopen(options, driver.mode)
        driver.abort_reopen()
        await driver.prepare_reopen(options, driver.mode)
        driver.commit_reopen(options, driver.mode)
        await write(driver, 0, b"x")
        await call(driver, Op.FLUSH, 0, 0)
        await trio.sleep(16)
        assert driver.image.cache.size == 0
