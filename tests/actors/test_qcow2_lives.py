"""Power cuts at any moment of an image's life: in the midst of snapshots, resizes, bitmaps, opening and closing."""

from __future__ import annotations

import os
import random
from typing import Final

import attrs
import pytest
import trio
from qcow2_lives import Life, LifeReplay, look_into, noted
from qcow2_variants import VARIANTS, Variant
from qcow2_world import Habits, check, run_seeded

from qsd.drivers.qcow2.layout import DIRTY, parse_header

# More of everything when somebody has the time (make soak).
EFFORT: Final = int(os.environ.get("QSD_EFFORT", "1"))
FIRST: Final = int(os.environ.get("QSD_SEED", "0"))
HABITS: Final = Habits(requests=8, depth=4, longest=0.3)
STEPS: Final = 8
CUTS: Final = 8


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


def live_and_cut(variant: Variant, seed: int) -> Life:
    """One life, with some power cuts."""
    rng = random.Random(seed)
    life = Life(variant, rng, attrs.evolve(HABITS))
    run_seeded(seed, live, life)
    run_seeded(seed, cut, life, rng)
    return life


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "cluster-2M"])
def test_life_survives_power_cuts(name: str) -> None:
    for seed in range(FIRST, FIRST + EFFORT):
        with noted(f"variant {name}, seed {seed}"):
            live_and_cut(VARIANTS[name], seed)
