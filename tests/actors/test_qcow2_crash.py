"""Power cuts: whatever of a qcow2 image has reached the disk, it opens, is consistent, and holds what was flushed.

A guest works on an image of every variant, on disks that record it. Then its past is played again, and now and then
the power goes: what was flushed is there; of the rest some writes are, some are not, some are torn.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import trio
from qcow2_builder import Built
from qcow2_mended import header_of, mend
from qcow2_variants import VARIANTS, Variant, any_habits, any_variant, make_world
from qcow2_world import SECTOR, Habits, Replay, World, check, make_driver, run_seeded
from watching import noted

from qsd.drivers.qcow2.layout import DIRTY, parse_header, serialise_header
from qsd.messages import Op

# More of everything when somebody has the time (make soak).
EFFORT: Final = int(os.environ.get("QSD_EFFORT", "1"))
FIRST: Final = int(os.environ.get("QSD_SEED", "0"))
HABITS: Final = Habits(requests=40, depth=4)
CUTS: Final = 6
BIG: Final = 4 << 20


async def work(world: World, options: dict[str, Any]) -> None:
    """The guest's day, to its orderly end."""
    async with trio.open_nursery() as nursery:
        driver = make_driver(world, nursery, **options)
        await world.finish(driver.open)
        await world.run(driver)
        data = await world.whole(driver)
        world.compare(data, 0, world.live.units)
        await world.finish(driver.close)
        nursery.cancel_scope.cancel()
    assert not world.warnings


async def look_into(
    disks: dict[str, bytearray], world: World, replay: Replay, built: Built, *, is_usable: bool
) -> None:
    """Open what the power cut has left."""
    found = check(disks["file"])
    header = parse_header(bytes(disks["file"][: 1 << 21]))
    if header.incompatible & DIRTY:
        found = repaired(disks["file"])
    assert not found.corruptions, found.problems
    after = World(world.rng, world.unit, world.base, attrs.evolve(HABITS, requests=10, on_the_spot=1.0))
    for name, data in disks.items():
        after.disk(name, bytes(data))
    after.live = world.live
    after.packing = world.packing
    async with trio.open_nursery() as nursery:
        driver = make_driver(after, nursery, read_only=not is_usable)
        await driver.open()
        data = await after.whole(driver)
        world.compare(data, 0, replay.allowed.units)
        if is_usable:
            # What was found counts from now on; more of it is written.
            after.base = data
            after.live = type(after.live)(after.units, after.origin)
            await after.run(driver)
            after.compare(await after.whole(driver), 0, after.live.units)
        await driver.close()
        nursery.cancel_scope.cancel()
    if is_usable:
        assert not check(after.disks["file"].data).corruptions
    if built.snapshot_l1:
        await look_at_snapshot(after, built)
    assert not after.warnings


def repaired(image: bytearray) -> Any:
    """Do what opening a dirty image does."""
    mend(image)
    header = header_of(image)
    clean = serialise_header(attrs.evolve(header, incompatible=header.incompatible & ~DIRTY))
    image[: len(clean)] = clean
    return check(image)


async def look_at_snapshot(world: World, built: Built) -> None:
    """The snapshot is as it was in the beginning."""
    image = world.disks["file"].data
    header = parse_header(bytes(image[: 1 << 21]))
    start = serialise_header(attrs.evolve(header, l1_offset=built.snapshot_l1))
    image[: len(start)] = start
    async with trio.open_nursery() as nursery:
        driver = make_driver(world, nursery, read_only=True)
        await driver.open()
        assert await world.whole(driver) == world.first_base
        await driver.close()
        nursery.cancel_scope.cancel()


def built_base(world: World) -> bytes:
    return world.first_base


def cut_power(variant: Variant, seed: int, habits: Habits = HABITS) -> bytearray:
    """One guest's day, with some power cuts; an image that one of them left."""
    rng = random.Random(seed)
    world, built = make_world(variant, rng, habits)
    run_seeded(seed, work, world, variant.options)
    is_big = len(world.disks["file"].data) > BIG
    cuts = CUTS // 3 if is_big else CUTS
    # Most is uncertain when a flush begins.
    flushes = [at for at, (what, subject) in enumerate(world.events) if what == "issue" and subject.op == Op.FLUSH]
    moments = {rng.randrange(len(world.events)) for _ in range(cuts // 2)} | {len(world.events) - 1}
    moments.update(rng.sample(flushes, min(len(flushes), cuts // 2)))
    left = [bytearray()]

    async def look() -> None:
        replay = Replay(world)
        for moment in replay.moments():
            for _ in range((moment in moments) * (1 if is_big else 2)):
                disks = replay.crashed(rng)
                await look_into(disks, world, replay, built, is_usable=rng.random() < 0.3)
                left.append(disks["file"])

    run_seeded(seed, look)
    return rng.choice(left[1:])


def agree(image: bytearray, path: Path) -> None:
    """The reference's check finds leaks at most, too."""
    program = shutil.which("/opt/qsd-reference/bin/qemu-img") or shutil.which("qemu-img")
    header = parse_header(bytes(image[: 1 << 21]))
    if program is None or header.has_data_file or header.crypt_method:
        return
    path.write_bytes(image)
    done = subprocess.run([program, "check", path], capture_output=True, text=True, timeout=60, check=False)
    # 3: leaked clusters.
    assert done.returncode in (0, 3), done.stdout + done.stderr


@pytest.mark.parametrize("part", range(4))
def test_any_image_survives_power_cuts_whatever_its_guest_does(part: int, tmp_path: Path) -> None:
    for seed in range(FIRST + part, FIRST + 8 * EFFORT, 4):
        rng = random.Random(seed)
        variant, habits = any_variant(rng), any_habits(rng, 60)
        with noted(f"seed {seed}, {variant}, {habits}"):
            agree(cut_power(variant, seed, habits), tmp_path / "cut.qcow2")


@pytest.mark.parametrize("name", VARIANTS)
def test_image_survives_power_cuts(name: str, tmp_path: Path) -> None:
    for seed in range(EFFORT):
        try:
            agree(cut_power(VARIANTS[name], seed), tmp_path / "cut.qcow2")
        except BaseException as error:
            error.add_note(f"variant {name}, seed {seed}")
            raise


@pytest.mark.parametrize("name", ["plain", "backing-snapshot", "refcount-1", "extended"])
@pytest.mark.parametrize("more", [SECTOR, -SECTOR])
def test_file_may_end_inside_a_cluster(name: str, more: int) -> None:
    world, _built = make_world(VARIANTS[name], random.Random(1), HABITS)
    disk = world.disks["file"]
    disk.data = bytearray(disk.initial[:more] if more < 0 else disk.initial + bytes(more))
    run_seeded(1, work, world, VARIANTS[name].options)
    assert (check(disk.data).corruptions, check(disk.data).leaks) == (0, 0)


def test_data_file_may_be_shorter_than_the_disk() -> None:
    world, _built = make_world(VARIANTS["data-file-new"], random.Random(2), HABITS)
    assert not world.disks["data-file"].data
    run_seeded(2, work, world, {})
    assert len(world.disks["data-file"].data) <= -(-len(world.base) // 4096) * 4096, "not more than it takes"
