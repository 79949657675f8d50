"""Growing and shrinking a qcow2 node: against a model, cut off anywhere, and with the tables at their limits."""

from __future__ import annotations

import random
from array import array

import attrs
import pytest
from qcow2_fakes import HEADERS, KIB, Bench, MemoryFile, check, cut, examine, read, write

from qsd.drivers.calls import call
from qsd.drivers.qcow2.driver import Qcow2Driver
from qsd.drivers.qcow2.layout import Header, parse_header
from qsd.errors import QmpError
from qsd.messages import Op


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize("backing_size", [None, 100 * KIB, 600 * KIB + 512])
async def test_random_resizes(kind: str, backing_size: int | None) -> None:
    header = HEADERS[kind]
    rng = random.Random(f"{kind} {backing_size}")
    # A raw data file has no backing file; version 2 cannot hide one.
    if backing_size is not None and (header.is_data_file_raw or header.version < 3):
        backing_size = None
    backing = None if backing_size is None else MemoryFile(rng.randbytes(backing_size))
    bench = Bench(header, rng, backing)
    for _ in range(4):
        async with bench.open(l2_cache_entry_size=512) as driver:
            for _ in range(25):
                await bench.step(driver, 1 << 20)
            await bench.compare(driver)
            await driver.close()
        assert check(bench.file) == (0, 0)
        assert parse_header(bytes(bench.file.data)).size == len(bench.disk)
        if header.is_data_file_raw:
            assert bench.data_file is not None
            assert bench.data_file.data == bench.disk
        async with bench.open() as driver:
            await bench.compare(driver)
            await driver.close()


@pytest.mark.parametrize("kind", ["plain", "small", "extended"])
async def test_resize_cut_off_anywhere(kind: str) -> None:
    rng = random.Random(kind)
    bench = Bench(HEADERS[kind], rng, MemoryFile(rng.randbytes(300 * KIB)))
    size = len(bench.disk)
    async with bench.open() as driver:
        await bench.write(driver, 0, bytes(range(256)) * (size // 256))
        await bench.resize(driver, 300 * KIB)
        await bench.write(driver, 260 * KIB, b"new")
        await driver.close()
    for wanted in (20 * KIB + 512, 700 * KIB, 0, 100 * KIB):
        before, old = bytes(bench.file.data), bytes(bench.disk)
        bench.file.log.clear()
        async with bench.open() as driver:
            await bench.resize(driver, wanted)
            await bench.compare(driver)
            await driver.close()
        seen = set()
        for number, data in enumerate(cut(before, bench.file.log)):
            found = examine(data)
            assert not found.corruptions, (wanted, number, found.problems)
            seen.add(parse_header(data).size)
            if number % 4:
                continue
            # Whatever has become of the size, what is common to both is there and the rest is nobody's old data.
            bench.file = MemoryFile(data)
            async with bench.open() as driver:
                content = await read(driver, 0, driver.length) if driver.length else b""
                common = min(len(old), wanted, driver.length)
                assert content[:common] == old[:common]
                if driver.length > len(old):
                    assert content[common:] == bytes(driver.length - common)
        assert seen == {len(old), wanted}
        bench.file = MemoryFile(data)
        assert check(bench.file) == (0, 0)


async def test_what_was_cut_off_does_not_come_back() -> None:
    bench = Bench(HEADERS["plain"], random.Random(1))
    async with bench.open() as driver:
        await bench.write(driver, 0, b"x" * len(bench.disk))
        await bench.resize(driver, 9 * KIB)
        # The rest of the third cluster is hidden when the disk grows over it.
        await bench.resize(driver, 256 * KIB)
        await bench.compare(driver)
        await driver.close()
    assert check(bench.file) == (0, 0)


async def test_file_becomes_shorter_with_the_disk() -> None:
    bench = Bench(HEADERS["plain"], random.Random(1))
    async with bench.open() as driver:
        await bench.write(driver, 0, b"x" * len(bench.disk))
        await call(driver, Op.FLUSH, 0, 0)
        assert bench.file.length > 256 * KIB
        await bench.resize(driver, 0)
        assert bench.file.length < 32 * KIB
        await driver.close()


async def test_tables_that_share_many_refcount_blocks() -> None:
    # Blocks that exist and count nothing: a table over more of them than the cache holds.
    bench = Bench(Header(size=3 << 20, cluster_bits=9), random.Random(1))
    async with bench.open(refcount_cache_size=1) as driver:
        await bench.write(driver, 0, b"x" * len(bench.disk))
        await bench.resize(driver, 0)
        await driver.truncate(16 << 30)
        assert len(driver.image.map.l1) == 512 * KIB
        await driver.close()
    found = examine(bench.file.data)
    assert (found.corruptions, found.leaks) == (0, 0)


async def test_refusals() -> None:
    bench = Bench(HEADERS["plain"], random.Random(1))
    async with bench.open() as driver:
        for size, text in (
            (1000, "The new size must be a multiple of 512"),
            (1 << 62, "Failed to grow the L1 table: File too large"),
        ):
            with pytest.raises(QmpError, match=text):
                await driver.truncate(size)
        await bench.compare(driver)
        await driver.close()
    old = Bench(HEADERS["old"], random.Random(1), MemoryFile(b"x" * 512 * KIB))
    async with old.open() as driver:
        with pytest.raises(QmpError, match="Failed to zero out new clusters: Operation not supported"):
            await driver.truncate(512 * KIB)
        await old.compare(driver)
        await driver.close()


async def depths(driver: Qcow2Driver, offset: int, length: int) -> list[tuple[int, int]]:
    """Runs of bytes, and the layer that has them."""
    extents = (await call(driver, Op.BLOCK_STATUS, offset, length, extents=100)).result
    return [(extent.length, extent.depth) for extent in extents]


async def test_growth_past_a_longer_backing_file_hides_all_that_is_new() -> None:
    # Should the backing file become longer yet, nothing of it is to be seen.
    bench = Bench(HEADERS["plain"], random.Random(1), MemoryFile(b"b" * 300 * KIB))
    async with bench.open() as driver:
        await bench.resize(driver, 900 * KIB)
        assert await depths(driver, 256 * KIB, 644 * KIB) == [(644 * KIB, 1)]
        assert bench.backing is not None
        bench.backing.data.extend(b"b" * 700 * KIB)
        await bench.compare(driver)
        await driver.close()
    assert check(bench.file) == (0, 0)


async def test_growth_marks_nothing_where_nothing_shows() -> None:
    bench = Bench(attrs.evolve(HEADERS["plain"], size=256 * KIB + 512), random.Random(1), MemoryFile(b"b" * KIB))
    async with bench.open() as driver:
        await bench.resize(driver, 900 * KIB)
        assert await depths(driver, 4 * KIB, 896 * KIB) == [(896 * KIB, 2)]
        await bench.compare(driver)
        await driver.close()


async def test_growth_over_much_takes_no_more_memory_than_the_cache_may() -> None:
    header = Header(size=64 * KIB, cluster_bits=9)
    bench = Bench(header, random.Random(1), MemoryFile(bytes(128 * KIB)))
    async with bench.open(l2_cache_size=32 * KIB) as driver:
        cache, most = driver.image.cache, 0
        insert = cache.insert

        def watched(number: int, table: array[int]) -> None:
            nonlocal most
            insert(number, table)
            most = max(most, cache.size)

        cache.insert = watched  # type: ignore[method-assign]
        await driver.truncate(16 << 20)
        assert 0 < most <= 32 * KIB
        assert not driver.image.expected_size
        await driver.close()
    assert check(bench.file) == (0, 0)


async def test_failed_growth_leaves_the_image_as_it_was() -> None:
    bench = Bench(HEADERS["plain"], random.Random(1), MemoryFile(b"b" * (1 << 20)))
    for room in range(1, 30):
        async with bench.open() as driver:
            await write(driver, 5000, b"kept")
            bench.file.room = room
            try:
                await driver.truncate(3 << 20)
            except QmpError:
                bench.file.room = -1
                assert driver.length == 256 * KIB
                assert await read(driver, 5000, 4) == b"kept"
                await driver.close()
                assert check(bench.file)[0] == 0
            else:
                assert room > 3
                return
    raise AssertionError("it never works")
