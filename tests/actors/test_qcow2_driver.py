"""The qcow2 driver on a file in memory: what it does when nobody asks it for anything."""

from __future__ import annotations

from functools import partial

import pytest
import trio
import trio.testing
from qcow2_fakes import CLUSTER, MemoryFile, check, new_image, opened, opened_on, read, write

from qsd.drivers import mapped
from qsd.drivers.calls import call
from qsd.drivers.qcow2.layout import Header
from qsd.drivers.qcow2.mapping import ClusterMap
from qsd.drivers.qcow2.storing import PIECES, write_all
from qsd.messages import Extent, Flag, Op, ReplyQueue, Request
from qsd.qapi.schema.block import BlockdevDriver
from qsd.qapi.schema.qcow2 import BlockdevOptionsQcow2


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


REFCOUNTS = 4 * CLUSTER  # the least


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"l2_cache_size": 0}, 1024),
        ({"l2_cache_size": 2048}, 2048),
        ({"cache_size": 2048, "l2_cache_size": 2048}, 2048),
        ({"cache_size": REFCOUNTS + 2048, "refcount_cache_size": REFCOUNTS}, 2048),
        ({"cache_size": REFCOUNTS + 2048}, 2048),
        ({"cache_size": REFCOUNTS + 8192}, 8192),
        ({"l2_cache_size": 1 << 40}, 8192),
    ],
    ids=str,
)
async def test_tables_take_no_more_memory_than_they_may(options: dict[str, int], limit: int) -> None:
    async with opened(cache_clean_interval=0, l2_cache_entry_size=512, **options) as (driver, _file):
        most = 0
        for cluster in (*range(1024), *range(1023, -1, -7)):
            await write(driver, cluster * CLUSTER, b"%d" % cluster)
            await call(driver, Op.FLUSH, 0, 0)
            most = max(most, driver.image.cache.size)
        assert most == limit
        assert await read(driver, 0, 1) == b"0"


@pytest.mark.parametrize(("limit", "flushes"), [(8192, False), (4096, True)], ids=["all fit", "half of them fit"])
async def test_tables_are_written_back_for_want_of_room_only(limit: int, *, flushes: bool) -> None:
    """With tables for all of the disk in memory, half of them dirty started one write-back after the other."""
    file = MemoryFile(new_image(Header(size=1024 * CLUSTER)))
    async with opened_on(file, cache_clean_interval=0, l2_cache_entry_size=512, l2_cache_size=limit) as driver:
        for cluster in range(1024):
            await write(driver, cluster * CLUSTER, b"%d" % cluster)
            await trio.testing.wait_all_tasks_blocked()
        assert (None in file.log) is flushes
        await driver.close()
        assert check(file) == (0, 0)


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE], ids=["reads", "writes"])
async def test_more_requests_than_there_is_room_for_tables_each_need_another(op: Op) -> None:
    """What one had waited for had gone when its turn came, and its neighbour's in the next turn, without end.

    A disk with clusters of 512 bytes, and a write along many of their tables, was enough.
    """
    file = MemoryFile(new_image(Header(size=80 << 15, cluster_bits=9), allocates=True))
    async with opened_on(file, cache_clean_interval=0, l2_cache_entry_size=512, l2_cache_size=0) as driver:
        places = [number << 15 for number in range(80)]
        await write(driver, 0, b"".join(bytes([number]) * (1 << 15) for number in range(80)))
        await call(driver, Op.FLUSH, 0, 0)
        loads = len(file.reads)
        replies = ReplyQueue(lambda: None)
        buffers = [memoryview(bytearray(16)) for _place in places]
        batch = [Request(op, place, 16, buffer, replies) for place, buffer in zip(places, buffers, strict=True)]
        driver.submit(batch)
        await driver.wait_idle()
        assert len(replies.ready) == 80
        assert not any(request.error for request in replies.ready)
        if op is Op.READ:
            assert [bytes(buffer) for buffer in buffers] == [bytes([number]) * 16 for number in range(80)]
        tables = [length for length in file.reads[loads:] if length == 512]
        assert len(tables) <= 80, "each is fetched once"
        await trio.testing.wait_all_tasks_blocked()
        assert driver.image.cache.size <= 1024
        await driver.close()
    assert check(file) == (0, 0)


async def test_read_along_any_number_of_tables_that_are_not_in_memory() -> None:
    """A read of 32 MiB of an image with clusters of 512 bytes never ended: its parts were nested too deep."""
    file = MemoryFile(new_image(Header(size=20 << 20, cluster_bits=9), allocates=True))
    places = range(0, 20 << 20, (1 << 20) - 7000)
    async with opened_on(file) as driver:
        for place in places:
            await write(driver, place, b"%08d" % place)
        await driver.close()
    async with opened_on(file) as driver:
        found = await read(driver, 0, 20 << 20)
        assert [found[place : place + 8] for place in places] == [b"%08d" % place for place in places]
        await trio.testing.wait_all_tasks_blocked()
        assert driver.in_flight == 0


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


@pytest.mark.parametrize("passes", [True, False])
@pytest.mark.parametrize("clusters", [3, 700])
@pytest.mark.parametrize("op", [Op.DISCARD, Op.WRITE_ZEROES])
async def test_discarded_clusters_keep_their_place_and_not_their_space(op: Op, clusters: int, passes: bool) -> None:
    options = {"discard_no_unref": True, "pass_discard_request": passes, "l2_cache_entry_size": 512}
    async with opened(**options) as (driver, file):
        await write(driver, 0, b"x" * 3 * CLUSTER)
        before = driver.image.map.lookup(0, CLUSTER)[2]
        await call(driver, op, 0, clusters * CLUSTER, flags=Flag.MAY_UNMAP if op is Op.WRITE_ZEROES else 0)
        assert driver.image.map.lookup(0, CLUSTER)[2] == before
        held = bytes(file.data[before : before + CLUSTER])
        assert held == (bytes(CLUSTER) if passes else b"x" * CLUSTER)
        assert await read(driver, 0, 3 * CLUSTER) == bytes(3 * CLUSTER)
        await write(driver, 100, b"again")
        assert await read(driver, 0, 200) == bytes(100) + b"again" + bytes(95)
        await driver.close()
        assert check(file) == (0, 0)


async def test_what_waited_for_one_table_goes_on_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand parts of a large write into small clusters were looked at in one go, each time anew."""
    clock = 0

    def now() -> int:
        nonlocal clock
        clock += 10 * mapped.SLICE_NS
        return clock

    monkeypatch.setattr(mapped, "perf_counter_ns", now)
    async with opened() as (driver, _file):
        done: list[int] = []
        for number in range(1000):
            driver.resume(partial(done.append, number))
        driver.send()
        assert len(done) < 100
        await driver.wait_idle()
        assert done == list(range(1000))


async def test_small_tables_are_written_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four megabytes are 8192 tables of 512 bytes: 56 ms."""
    sizes: list[int] = []
    file = MemoryFile(b"")
    original = file.submit

    def counting(batch: list[Request]) -> None:
        sizes.append(len(batch))
        original(batch)

    monkeypatch.setattr(file, "submit", counting)
    await write_all(file, ((number * 512, number.to_bytes(512, "little")) for number in range(1000)))
    assert sizes == [PIECES, PIECES, PIECES, 1000 - 3 * PIECES]
    assert all(file.data[number * 512] == number % 256 for number in range(1000))


async def test_status_goes_over_what_no_table_describes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 131072 tables of 64 TiB there are two: two steps for each of their 16 parts, three for all others."""
    size = 64 << 40
    lookups = []
    status = ClusterMap.status

    def noting(self: ClusterMap, offset: int, length: int) -> tuple[int, int]:
        lookups.append(offset)
        return status(self, offset, length)

    monkeypatch.setattr(ClusterMap, "status", noting)
    async with opened_on(MemoryFile(new_image(Header(size=size)))) as driver:
        for place in (size // 3, size // 2):
            await write(driver, place & -65536, b"a" * 65536)
        lookups.clear()
        found: list[Extent] = (await call(driver, Op.BLOCK_STATUS, 0, size, extents=100)).result
        await driver.close()
    assert sum(extent.length for extent in found) == size
    assert len(found) == 5
    assert len(lookups) < 2 * 2 * 16 + 6
