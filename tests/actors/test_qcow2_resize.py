"""Growing and shrinking a qcow2 node: against a model, cut off anywhere, and with the tables at their limits."""

from __future__ import annotations

import random

import pytest
from qcow2_fakes import HEADERS, KIB, Bench, MemoryFile, check, cut, examine, read, write

from qsd.drivers.calls import call
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
