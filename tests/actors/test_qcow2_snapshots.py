"""Internal snapshots of a qcow2 node: against a model, with everything else that happens to the image, cut off."""

from __future__ import annotations

import random

import attrs
import pytest
from qcow2_fakes import HEADERS, KIB, Bench, MemoryFile, check, cut, examine, read

from qsd.drivers.qcow2.layout import DIRTY, Header, parse_header
from qsd.errors import QmpError

TINY_CACHES = {"l2_cache_size": 1, "l2_cache_entry_size": 512, "refcount_cache_size": 1}
# An external data file has no snapshots, and a count of one bit no room for a second user.
KINDS: dict[str, Header] = {
    **{kind: HEADERS[kind] for kind in ("plain", "small", "old", "extended")},
    "narrow": attrs.evolve(HEADERS["narrow"], refcount_order=2),
}


@pytest.mark.parametrize(
    "options", [{}, {"l2_cache_size": 1, "l2_cache_entry_size": 512, "refcount_cache_size": 1}]
)
@pytest.mark.parametrize("kind", KINDS)
async def test_random_snapshots(kind: str, options: dict[str, int]) -> None:
    header = KINDS[kind]
    rng = random.Random(kind)
    bench = Bench(header, rng, MemoryFile(rng.randbytes(100 * KIB)) if header.version >= 3 else None)
    for _ in range(5):
        async with bench.open(**options) as driver:
            for _ in range(8):
                for _ in range(4):
                    # A version 2 image that has snapshots cannot be resized.
                    await bench.step(driver, 1 << 19, resizes=header.version >= 3)
                await bench.snapshot_step(driver)
            assert [each.id for each in driver.snapshots()] == list(bench.snapshots)
            await bench.compare(driver)
            await driver.close()
        assert check(bench.file) == (0, 0)
        assert not parse_header(bytes(bench.file.data)).incompatible & DIRTY
        await bench.compare_snapshots(bench.file.data)
    async with bench.open(**options) as driver:
        for each in list(bench.snapshots):
            await bench.delete_snapshot(driver, each)
        await bench.compare(driver)
        await driver.close()
    assert check(bench.file) == (0, 0)
    assert parse_header(bytes(bench.file.data)).snapshots_offset == 0


@pytest.mark.parametrize("kind", ["plain", "small", "extended", "old"])
async def test_snapshots_cut_off_anywhere(kind: str) -> None:
    rng = random.Random(kind)
    bench = Bench(HEADERS[kind], rng)
    async with bench.open() as driver:
        await bench.write(driver, 0, rng.randbytes(70 * KIB if kind != "small" else 20 * KIB))
        first = await bench.create_snapshot(driver)
        await bench.write(driver, 8 * KIB, rng.randbytes(10 * KIB))
        await driver.close()
    for which in ("", first, "2"):
        before = bytes(bench.file.data)
        old = dict(bench.snapshots)
        bench.file.log.clear()
        async with bench.open() as driver:
            if which:
                await bench.delete_snapshot(driver, which)
            else:
                await bench.create_snapshot(driver)
            await driver.close()
        after = dict(bench.snapshots)
        content = bytes(bench.disk)
        seen = set()
        seen_marks: list[int] = []
        for data in cut(before, bench.file.log):
            found = examine(data)
            header = parse_header(data)
            assert not found.corruptions or header.incompatible & DIRTY, found.problems
            assert header.content_version == HEADERS[kind].version
            bench.snapshots = old if header.snapshot_count == len(old) else after
            seen.add(header.snapshot_count)
            await bench.compare_snapshots(data)
            if header.incompatible & DIRTY and (found.corruptions or rng.random() < 0.3):
                # Opened again, it is as if nothing had happened.
                seen_marks.append(found.corruptions)
                file, bench.file = bench.file, MemoryFile(data)
                async with bench.open() as driver:
                    assert not driver.image.header.incompatible & DIRTY
                    assert driver.image.header.version == driver.image.geometry.version == HEADERS[kind].version
                    await bench.compare(driver)
                    await driver.close()
                assert check(bench.file) == (0, 0)
                bench.file = file
        assert seen == {len(old), len(after)}
        # Flags and counts differ at some moment, unless another snapshot has everything too.
        assert any(seen_marks) is (which != first)
        bench.snapshots = after
        bench.file = MemoryFile(data)
        assert check(bench.file) == (0, 0)
        async with bench.open() as driver:
            assert await read(driver, 0, len(content)) == content
            await driver.close()


async def test_failed_snapshot_leaves_nothing() -> None:
    bench = Bench(HEADERS["plain"], random.Random(1))
    async with bench.open() as driver:
        await bench.write(driver, 0, b"x" * 100 * KIB)
        await driver.close()
    data = bytes(bench.file.data)
    for room in range(1, 40):
        bench.file = MemoryFile(data)
        async with bench.open() as driver:
            bench.file.room = room
            try:
                await driver.create_snapshot("s", 1)
            except OSError:
                assert driver.snapshots() == []
                await bench.write(driver, 4 * KIB, b"goes on")
                await bench.compare(driver)
                await driver.close()
                assert check(bench.file) == (0, 0), room
            else:
                assert room > 5
                return
    raise AssertionError("it never works")


async def test_counts_that_have_no_room() -> None:
    bench = Bench(HEADERS["narrow"], random.Random(1))
    async with bench.open() as driver:
        await bench.write(driver, 0, b"x" * 100 * KIB)
        with pytest.raises(OSError, match="out of range"):
            await driver.create_snapshot("s", 1)
        await bench.write(driver, 4 * KIB, b"goes on")
        await bench.compare(driver)
        await driver.close()
    assert check(bench.file) == (0, 0)


async def test_names_ids_and_refusals() -> None:
    bench = Bench(HEADERS["plain"], random.Random(1))
    async with bench.open() as driver:
        for name in ("a", "b" * 1000, "a"):
            await driver.create_snapshot(name, 1)
        await driver.delete_snapshot("2")
        await driver.create_snapshot("c", 1)
        assert [(each.id, each.name) for each in driver.snapshots()] == [("1", "a"), ("3", "a"), ("4", "c")]
        image = driver.image
        image.snapshots = (attrs.evolve(image.snapshots[0], l1_offset=77), *image.snapshots[1:])
        with pytest.raises(QmpError, match="Snapshot L1 table offset invalid"):
            await driver.delete_snapshot("1")
        image.snapshots = (attrs.evolve(image.snapshots[0], l1_size=1 << 30), *image.snapshots[1:])
        with pytest.raises(QmpError, match="Snapshot L1 table too large"):
            await driver.delete_snapshot("1")
        await driver.close()


async def test_failed_deletion_keeps_the_snapshot_or_leaves_leaks() -> None:
    bench = Bench(HEADERS["plain"], random.Random(1))
    async with bench.open() as driver:
        await bench.write(driver, 0, b"x" * 100 * KIB)
        await bench.create_snapshot(driver)
        kept = await bench.create_snapshot(driver)
        await bench.write(driver, 0, b"y" * 50 * KIB)
        await driver.close()
    data = bytes(bench.file.data)
    both = dict(bench.snapshots)
    for room in range(1, 40):
        bench.file, bench.snapshots = MemoryFile(data), dict(both)
        async with bench.open() as driver:
            bench.file.room = room
            try:
                await driver.delete_snapshot("1")
            except QmpError:
                if len(driver.snapshots()) == 1:
                    bench.snapshots = {kept: both[kept]}
                await bench.write(driver, 4 * KIB, b"goes on")
                await bench.compare(driver)
                await driver.close()
                found = examine(bench.file.data)
                is_marked = parse_header(bytes(bench.file.data)).incompatible & DIRTY
                assert is_marked or (found.corruptions, found.leaks) == (0, 0), (room, found.problems)
                await bench.compare_snapshots(bench.file.data)
            else:
                assert room > 5
                return
            bench.disk = bytearray(b"y" * 50 * KIB + b"x" * 50 * KIB).ljust(256 * KIB, b"\0")
    raise AssertionError("it never works")
