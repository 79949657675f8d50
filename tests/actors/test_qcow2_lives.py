"""Power cuts at any moment of an image's life: in the midst of snapshots, resizes, bitmaps, opening and closing."""

from __future__ import annotations

import errno
import logging
import os
import random
from typing import Any, Final

import attrs
import pytest
import trio
import trio.testing
from qcow2_lives import Life, LifeReplay, look_into, mended
from qcow2_mended import repaired
from qcow2_variants import VARIANTS, Variant, any_habits, any_variant
from qcow2_world import Habits, check, make_driver, run_seeded
from watching import noted

from qsd.drivers import mapped
from qsd.drivers.qcow2 import image as whole_image
from qsd.drivers.qcow2 import internal_snapshots, mending, resizing, storing, writeback, writing
from qsd.drivers.qcow2.layout import DIRTY, parse_header
from qsd.errors import QmpError

# More of everything when somebody has the time (make soak).
EFFORT: Final = int(os.environ.get("QSD_EFFORT", "1"))
FIRST: Final = int(os.environ.get("QSD_SEED", "0"))
HABITS: Final = Habits(requests=8, depth=4, longest=0.3)
STEPS: Final = 8
CUTS: Final = 8
# All variants when there is time; clusters of 2 MiB take too much of it.
LIVING: Final = (
    [name for name in VARIANTS if not name.endswith("2M")]
    if EFFORT > 1
    else [
        *("new", "v2-backing", "backing-snapshot", "cluster-512-new", "refcount-2-snapshot", "extended-backing"),
        *(
            "data-file-backing",
            "data-file-raw",
            "lazy-snapshot",
            "no-unref",
            "aes-backing",
            "luks-extended",
            "packed-snapshot",
        ),
    ]
)


async def live(life: Life) -> None:
    """From the first opening to an orderly end."""
    async with trio.open_nursery() as nursery:
        await life.open(nursery)
        for _ in range(STEPS):
            if life.world.units:
                await life.world.run(life.driver)
            await life.compare()
            await life.random_step(nursery)
            await life.compare()
        await life.close()
        nursery.cancel_scope.cancel()
    assert not life.world.warnings
    image = life.world.disks["file"].data
    found = check(image)
    assert (found.corruptions, found.leaks) == (0, 0), found.problems
    assert not parse_header(bytes(image[: 1 << 21])).incompatible & DIRTY


async def cut(life: Life, rng: random.Random) -> None:
    """Cut the power now and then, above all in steps."""
    events = life.world.events
    in_steps = []
    is_inside = False
    for at, (what, _subject) in enumerate(events):
        is_inside = what == "step" or (is_inside and what != "step done")
        if is_inside:
            in_steps.append(at)
    moments = {*rng.sample(in_steps, min(len(in_steps), CUTS)), rng.randrange(len(events)), len(events) - 1}
    replay = LifeReplay(life)
    for moment in replay.moments():
        if moment in moments:
            disks = replay.crashed(rng)
            with noted(f"event {moment}, in step {replay.name!r}"):
                await look_into(life, replay, disks)


def live_and_cut(variant: Variant, seed: int, habits: Habits = HABITS) -> Life:
    """One life, with some power cuts."""
    rng = random.Random(seed)
    life = Life(variant, rng, habits)
    run_seeded(seed, live, life)
    run_seeded(seed, cut, life, rng)
    return life


@pytest.mark.parametrize("name", LIVING)
def test_life_survives_power_cuts(name: str) -> None:
    for seed in range(FIRST, FIRST + EFFORT):
        with noted(f"variant {name}, seed {seed}"):
            live_and_cut(VARIANTS[name], seed)


# Constants that decide how much is done at a time: with these, what takes thousands of clusters happens with a few.
SMALL: Final[tuple[tuple[Any, str, int], ...]] = (
    *((module, "MOST_FREED", 2) for module in (whole_image, internal_snapshots, resizing, writeback)),
    *((writeback, name, value) for name, value in (("CLUSTERS", 1), ("SLICE_NS", 0), ("TOGETHER", 2))),
    (storing, "PIECES", 1),
    *((writing, name, size) for name, size in (("ASSEMBLE", 4096), ("READ_THROUGH", 2048), ("ZERO_RANGE", 512))),
    *((mapped, name, value) for name, value in (("MANY_ROUNDS", 1), ("SLICE_NS", -1), ("AT_ONCE", 1))),
)


@pytest.mark.parametrize("name", ["cluster-512", "v2", "extended-snapshot", "data-file", "packed-backing"])
def test_life_in_which_little_is_done_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, constant, value in SMALL:
        monkeypatch.setattr(module, constant, value)
    for seed in range(FIRST, FIRST + EFFORT):
        with noted(f"variant {name}, seed {seed}"):
            live_and_cut(VARIANTS[name], seed)


async def live_badly(life: Life, told: list[str]) -> None:
    """A life in which requests of the files fail during steps."""
    world = life.world
    world.fails = True
    async with trio.open_nursery() as nursery:
        await life.open(nursery)
        for _ in range(STEPS):
            if world.units:
                await world.run(life.driver)
            world.fails_headers = life.rng.random() < 0.3
            world.fail_at = life.rng.choice((1, 1, 2, 3) if world.fails_headers else (1, 2, 3, 5, 8, 12, 20, 40))
            world.fail_times = life.rng.choice((1, 1, 2, 3, 10))
            world.fail_with = life.rng.choice((errno.EIO, errno.ENOSPC))
            try:
                await life.random_step(nursery)
            except (OSError, QmpError) as error:
                # Version 2 has no mark: this is how it is told.
                told.extend(text for text in [str(error)] if "Failed to free" in text)
            await life.compare()
        world.fails = False
        told.extend(world.warnings)
        world.warnings.clear()
        await life.close()
        nursery.cancel_scope.cancel()
    image = world.disks["file"].data
    if parse_header(bytes(image[: 1 << 21])).incompatible & DIRTY:
        assert any("stays marked as dirty" in text for text in told), told
        found = mended(image)
        assert not found.leaks, found.problems
    else:
        found = check(image)
    assert not found.corruptions, found.problems
    # What has no mark is repaired when it is closed.
    assert not found.leaks or (told and life.header.version >= 3), found.problems


async def see_end(life: Life) -> None:
    """What is in the file is what the node said last."""
    disks = {name: bytearray(disk.data) for name, disk in life.world.disks.items()}
    await look_into(life, life.end(), disks)


class Told(logging.Handler):
    """Collects what the log says."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def live_badly_and_cut(variant: Variant, seed: int, habits: Habits = HABITS) -> Life:
    """One life with errors, and some power cuts."""
    rng = random.Random(seed)
    life = Life(variant, rng, habits)
    told = Told()
    log = logging.getLogger("qsd")
    log.addHandler(told)
    try:
        run_seeded(seed, live_badly, life, told.lines)
    finally:
        log.removeHandler(told)
    run_seeded(seed, see_end, life)
    run_seeded(seed, cut, life, rng)
    return life


@pytest.mark.parametrize("name", LIVING)
def test_steps_that_fail_were_not_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mending, "repaired", repaired)
    for seed in range(FIRST, FIRST + EFFORT):
        with noted(f"variant {name}, seed {seed}"):
            live_badly_and_cut(VARIANTS[name], seed)


@pytest.mark.parametrize("part", range(4))
def test_life_of_any_image(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Combinations that have no name among the variants."""
    monkeypatch.setattr(mending, "repaired", repaired)
    for seed in range(FIRST + part, FIRST + 4 * EFFORT, 4):
        rng = random.Random(seed)
        variant, habits = any_variant(rng), any_habits(rng, 8)
        with noted(f"seed {seed}, {variant}, {habits}"):
            live_and_cut(variant, seed, habits)
            live_badly_and_cut(variant, seed, habits)


async def give_up_step(life: Life, events: int) -> bool:
    """Make and delete a snapshot, cancelled after so many events of the files; whether that was in time."""
    world = life.world
    async with trio.open_nursery() as nursery:
        await life.open(nursery)
        await world.run(life.driver)
        await world.finish(life.driver.writeback.finish)
        end = len(world.events) + events
        scope = trio.CancelScope()

        async def change() -> None:
            with scope:
                await life.driver.create_snapshot("new", 1)
                await life.driver.delete_snapshot("1")

        async def stop() -> None:
            while len(world.events) < end and world.is_busy:
                await world.go_on()
                await trio.testing.wait_all_tasks_blocked()
            scope.cancel()

        async with trio.open_nursery() as both:
            both.start_soon(change)
            await trio.testing.wait_all_tasks_blocked()
            await stop()
            # What is shielded ends.
            while world.is_busy:
                await world.go_on()
                await trio.testing.wait_all_tasks_blocked()
        seen = await life.whole()
        await world.finish(life.driver.close)
        nursery.cancel_scope.cancel()
    world.warnings.clear()
    world.compare(seen, 0, world.live.units[: life.state.units])
    image = bytearray(world.disks["file"].data)
    header = parse_header(bytes(image[: 1 << 21]))
    found = mended(image) if header.incompatible & DIRTY else check(image)
    assert not found.corruptions, found.problems
    assert not found.leaks, found.problems
    async with trio.open_nursery() as nursery:
        life.driver = make_driver(world, nursery, read_only=True)
        await world.finish(life.driver.open)
        assert await life.whole() == seen
        nursery.cancel_scope.cancel()
    return scope.cancelled_caught


@pytest.mark.parametrize("name", ["snapshot", "v2-snapshot", "lazy-snapshot"])
def test_snapshot_commands_may_be_cancelled_anywhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mending, "repaired", repaired)
    variant = attrs.evolve(VARIANTS["v2"], has_snapshot=True) if name == "v2-snapshot" else VARIANTS[name]
    for events in range(0, 1000, 1 if EFFORT > 1 else 5):
        with noted(f"after {events} events"):
            life = Life(variant, random.Random(5), attrs.evolve(HABITS, requests=20))
            if not run_seeded(5, give_up_step, life, events):
                break
    assert events > 20
