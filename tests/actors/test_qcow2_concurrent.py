"""Many requests at once on the same clusters of a qcow2 image, their parts ending in any order, or failing."""

from __future__ import annotations

import errno
import os
import random
from typing import Any, Final

import attrs
import pytest
import trio
from guest import GuestOp
from qcow2_variants import VARIANTS, any_habits, any_variant, is_no_large_write, make_world
from qcow2_world import Habits, World, check, make_driver, run_seeded
from watching import noted

from qsd.drivers.qcow2 import compressed, writing
from qsd.drivers.qcow2.layout import DIRTY, parse_header
from qsd.host.memory import AlignedPool
from qsd.messages import Flag, Op

# More of everything when somebody has the time (make soak).
EFFORT: Final = int(os.environ.get("QSD_EFFORT", "1"))
FIRST: Final = int(os.environ.get("QSD_SEED", "0"))
CROWD: Final = Habits(requests=120, depth=16, writes=6, zeroes=2, discards=3, reads=5, flushes=1, slow=0.3)
FEW: Final = Habits(requests=14, depth=4, flushes=2)


async def use(world: World, options: dict[str, Any]) -> None:
    """Open, do what the guest likes, with errors if the world is so; then without; close, and open again."""
    async with trio.open_nursery() as nursery:
        driver = make_driver(world, nursery, **options)
        await world.finish(driver.open)
        is_failing, world.is_failing = world.fails, world.fails
        await world.run(driver)
        world.is_failing = False
        if is_failing:
            await world.run(driver)
        seen = await world.whole(driver)
        world.compare(seen, 0, world.live.units)
        await world.finish(driver.close)
        assert not driver.in_flight
        again = make_driver(world, nursery, read_only=True, **options)
        await world.finish(again.open)
        assert await world.whole(again) == seen, "what is seen after closing is what was seen before"
        if again.image.header.is_data_file_raw:
            stored = world.disks["data-file"].data[: len(seen)]
            assert stored.ljust(len(seen), b"\0") == seen, "a raw data file is what the guest sees"
        nursery.cancel_scope.cancel()
    assert not world.warnings


def judge(world: World) -> None:
    """The image is as it has to be after an orderly end."""
    image = world.disks["file"].data
    found = check(image)
    assert not found.corruptions, found.problems
    assert not found.leaks, found.problems
    assert not parse_header(bytes(image[: 1 << 21])).incompatible & DIRTY


@pytest.mark.parametrize("name", VARIANTS)
def test_overlapping_requests_in_any_order(name: str) -> None:
    for seed in range(EFFORT):
        with noted(f"variant {name}, seed {seed}"):
            world, _built = make_world(VARIANTS[name], random.Random(seed), CROWD)
            run_seeded(seed, use, world, VARIANTS[name].options)
            judge(world)


@pytest.mark.parametrize("name", VARIANTS)
def test_overlapping_requests_where_only_large_writes_take_time(name: str) -> None:
    """As in the page cache. What goes on as soon as metadata is read or written never gives the rest a turn."""
    habits = attrs.evolve(CROWD, quick=is_no_large_write, together=(1, 4, 12))
    for seed in range(2 * EFFORT):
        with noted(f"variant {name}, seed {seed}"):
            world, _built = make_world(VARIANTS[name], random.Random(seed), habits)
            run_seeded(seed, use, world, VARIANTS[name].options)
            judge(world)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "cluster-2M"])
def test_requests_of_the_file_that_fail(name: str) -> None:
    for seed in range(EFFORT):
        with noted(f"variant {name}, seed {seed}"):
            rng = random.Random(seed)
            rate = rng.choice((0.01, 0.05, 0.3))
            world, _built = make_world(VARIANTS[name], rng, attrs.evolve(CROWD, failing=rate, requests=50))
            world.fails, world.fail_with = True, rng.choice((errno.EIO, errno.ENOSPC))
            run_seeded(seed, use, world, VARIANTS[name].options)
            judge(world)


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.3])
def test_overlapping_requests_on_any_image(rate: float) -> None:
    """Combinations that have no name among the variants."""
    for seed in range(FIRST, FIRST + 4 * EFFORT):
        variant = any_variant(random.Random(seed))
        with noted(f"seed {seed}, {variant}"):
            rng = random.Random(seed)
            world, _built = make_world(variant, rng, any_habits(rng, 120, rate))
            world.fails, world.fail_with = rate > 0, rng.choice((errno.EIO, errno.ENOSPC))
            run_seeded(seed, use, world, variant.options)
            judge(world)


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("name", ["empty-backing", "empty-4k", "empty-4k-backing", "empty-512-backing"])
def test_small_writes_into_new_clusters_together(name: str, rate: float) -> None:
    habits = attrs.evolve(CROWD, longest=0, writes=20, together=(1, 4, 12), failing=rate)
    for seed in range(3 * EFFORT):
        with noted(f"variant {name}, seed {seed}"):
            world, _built = make_world(VARIANTS[name], random.Random(seed), habits)
            world.fails, world.fail_with = rate > 0, (errno.EIO, errno.ENOSPC)[seed % 2]
            run_seeded(seed, use, world, VARIANTS[name].options)
            judge(world)


@pytest.mark.parametrize("name", ["new", "backing-snapshot", "refcount-2-snapshot", "extended-backing", "lazy"])
def test_any_one_request_that_fails(name: str) -> None:
    points = 40 * EFFORT
    for point in range(1, points):
        with noted(f"variant {name}, seed {point}"):
            world, _built = make_world(VARIANTS[name], random.Random(7), attrs.evolve(FEW, slow=0.1))
            world.fails, world.fail_at, world.fail_with = True, point, (errno.EIO, errno.ENOSPC)[point % 2]
            run_seeded(7, use, world, VARIANTS[name].options)
            judge(world)
        if not world.failures:
            return


@pytest.mark.parametrize(
    "name",
    ["empty-backing", "empty-4k-backing", "backing", "cluster-2M", "extended-backing", "packed", "aes-backing"],
)
def test_no_memory_for_some_requests(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those fail, or do with less. What had been counted before never ended: closing waited for that."""
    world: World | None = None

    def is_short() -> bool:
        if world is None or not world.is_failing or world.rng.random() < 0.5:
            return False
        world.failures += 1
        return True

    def take(pool: AlignedPool, length: int) -> tuple[memoryview, int]:
        if is_short():
            raise OSError(errno.ENOMEM, "as arranged")
        return original(pool, length)

    def allocate(size: int) -> bytearray:
        if is_short():
            raise MemoryError
        return bytearray(size)

    original = AlignedPool.take
    monkeypatch.setattr(AlignedPool, "take", take)
    monkeypatch.setattr(writing, "bytearray", allocate, raising=False)
    habits = attrs.evolve(CROWD, writes=20, together=(1, 4, 12), failing=0.0)
    for seed in range(2 * EFFORT):
        with noted(f"variant {name}, seed {seed}"):
            world, _built = make_world(VARIANTS[name], random.Random(seed), habits)
            world.fails = True
            run_seeded(seed, use, world, VARIANTS[name].options)
            judge(world)


@pytest.mark.parametrize("name", ["plain", "backing", "extended-new", "cluster-512", "data-file"])
def test_disk_that_is_full_goes_on_when_it_has_room_again(name: str) -> None:
    for seed in range(EFFORT):
        with noted(f"variant {name}, seed {seed}"):
            world, _built = make_world(VARIANTS[name], random.Random(seed), attrs.evolve(CROWD, failing=1.0))
            world.fails, world.fail_with = True, errno.ENOSPC
            world.fails_writing_only = True
            run_seeded(seed, use, world, VARIANTS[name].options)
            judge(world)


def test_clusters_that_cannot_be_packed_fail_with_those_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of several that one thread packs."""
    calls = 0

    def deflate(*args: Any) -> bytes | None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOMEM, "as arranged")
        return original(*args)

    async def pack(world: World) -> GuestOp:
        async with trio.open_nursery() as nursery:
            driver = make_driver(world, nursery)
            await world.finish(driver.open)
            op = world.request(driver, Op.WRITE, 0, 4 * world.packing, int(Flag.COMPRESSED))
            await world.run(driver)
            await world.finish(driver.close)
            assert not driver.in_flight
            nursery.cancel_scope.cancel()
        return op

    original = compressed.deflate
    monkeypatch.setattr(compressed, "deflate", deflate)
    world, _built = make_world(VARIANTS["packed-512"], random.Random(0), attrs.evolve(FEW, requests=0))
    assert run_seeded(0, pack, world).has_failed
    judge(world)


@pytest.mark.parametrize("name", ["plain", "cluster-512-snapshot", "extended"])
def test_image_whose_close_fails_is_consistent(name: str) -> None:
    async def close_badly(world: World, options: dict[str, Any], point: int) -> None:
        async with trio.open_nursery() as nursery:
            driver = make_driver(world, nursery, **options)
            await world.finish(driver.open)
            await world.run(driver)
            world.is_failing, world.fail_at = True, point
            await world.finish(driver.close)
            world.is_failing = False
            nursery.cancel_scope.cancel()

    for point in range(1, 20):
        with noted(f"variant {name}, seed {point}"):
            world, _built = make_world(VARIANTS[name], random.Random(point), FEW)
            run_seeded(point, close_badly, world, VARIANTS[name].options, point)
            assert not check(world.disks["file"].data).corruptions
        if not world.failures:
            break
