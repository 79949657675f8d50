"""Whole lives of a qcow2 image in a ``World``: guests, and between them everything an administrator does to it.

A ``Life`` keeps what is known of the image: its size, its snapshots with what they hold, its stored bitmaps. What
a step may leave when it is interrupted is noted among the world's events, for ``LifeReplay``: until it has ended,
what was before it and what is after it.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any, Final

import attrs
import trio
from guest import GuestOp
from qcow2_fakes import MemoryFile
from qcow2_mended import header_of, mend
from qcow2_variants import Variant, make_world
from qcow2_world import SECTOR, Habits, Replay, SlowRead, World, check, make_driver

from qsd.block.bitmap import DirtyBitmap
from qsd.block.dirty import NamedBitmap
from qsd.drivers.qcow2.bitmap_image import DriverImage
from qsd.drivers.qcow2.bitmaps import Qcow2Bitmaps
from qsd.drivers.qcow2.driver import Qcow2Driver
from qsd.drivers.qcow2.layout import (
    DIRTY,
    EXT_BACKING_FORMAT,
    MIN_CLUSTER_BITS,
    Header,
    parse_header,
    serialise_header,
    unmarking,
)
from qsd.drivers.qcow2.ledger import Findings
from qsd.drivers.qcow2.loading import read_snapshots
from qsd.errors import QmpError
from qsd.messages import Op

# A disk may grow by a third.
ROOM: Final = 3
GRANULARITY: Final = 1 << 16
IN_USE: Final = None
TINY: Final = {"l2_cache_size": 1, "l2_cache_entry_size": 512, "refcount_cache_size": 1}
OPTIONS: Final[tuple[dict[str, Any], ...]] = (
    {},
    TINY,
    {"lazy_refcounts": True},
    {"lazy_refcounts": True, **TINY},
    {"discard_no_unref": True},
    {"pass_discard_snapshot": False, "pass_discard_other": True},
)


@attrs.frozen
class State:
    """What the image holds apart from the disk's data: its length in units, snapshots by id, bitmaps by name.

    A bitmap is its bits' digest, or IN_USE. ``backing``: the name of the backing file, and its format's.
    """

    units: int
    snapshots: dict[str, bytes | None] = attrs.field(factory=dict)
    bitmaps: dict[str, str | None] = attrs.field(factory=dict)
    backing: tuple[bytes | None, bytes | None] = (None, None)

    def disowned(self, by: State) -> State:
        """The same, with no promise about snapshots that another state has not."""
        kept = {name: data if name in by.snapshots else None for name, data in self.snapshots.items()}
        return attrs.evolve(self, snapshots=kept)

    def shows(self, snapshots: dict[str, bytes]) -> bool:
        """Whether it has these snapshots."""
        return list(self.snapshots) == list(snapshots) and all(
            data in (None, snapshots[name]) for name, data in self.snapshots.items()
        )


def backing_of(header: Header) -> tuple[bytes | None, bytes | None]:
    """The name of the backing file, and its format's."""
    return header.backing_file, header.extension(EXT_BACKING_FORMAT)


@attrs.define(eq=False)
class Step:
    """Something done to the image."""

    name: str
    # What the guest may find before the step has ended, and what is there when it has.
    possible: list[State]
    hidden: list[GuestOp] = attrs.field(factory=list)
    shown: list[GuestOp] = attrs.field(factory=list)


class LifeWorld(World):
    """A world whose disk may end before the last unit there can be."""

    below: bytes = b""

    def value(self, op: GuestOp, unit: int) -> bytes:
        if op.flags == UNCOVERED:
            return self.below[unit * self.unit : (unit + 1) * self.unit].ljust(self.unit, b"\0")
        return super().value(op, unit)


# A request nobody has made: what lies below shows where the disk was cut off.
UNCOVERED: Final = 1 << 20


class Life:
    """See the module. ``steps`` counts what was done, by name."""

    def __init__(self, variant: Variant, rng: random.Random, habits: Habits) -> None:
        world, built = make_world(variant, rng, habits, kind=LifeWorld)
        assert isinstance(world, LifeWorld)
        self.world, self.built, self.variant, self.rng = world, built, variant, rng
        header = parse_header(built.image[: 1 << 21])
        self.header = header
        length = header.size // world.unit
        below = world.disks.get("backing")
        world.below = below.initial if below is not None else b""
        snapshots = {"1": world.first_base} if built.snapshot_l1 else {}
        self.first = self.state = State(length, snapshots, backing=backing_of(header))
        room = length // ROOM * max(1, SECTOR // world.unit)
        world.give_room(room)
        self.possible = [self.state]
        self.bitmaps: list[NamedBitmap] = []
        self.options = dict(variant.options)
        self.steps: dict[str, int] = {}
        self.driver: Qcow2Driver
        self.numbers = 0

    # -- opening and closing ----------------------------------------------------------------------------------

    async def open(self, nursery: trio.Nursery) -> None:
        """Open it and take in its bitmaps."""
        self.driver = make_driver(self.world, nursery, **self.options)
        await self.world.finish(self.driver.open)
        assert self.driver.length == self.state.units * self.world.unit
        found = await self.world.finish(self.store.load, self.driver.length)
        assert {each.name: each.bits.digest() for each in found if not each.is_inconsistent} == {
            name: digest for name, digest in self.state.bitmaps.items() if digest is not IN_USE
        }
        self.bitmaps = [each for each in found if not each.is_inconsistent]
        await self.step("mark in use", self.marked(), self.store.mark_in_use)

    def marked(self) -> State:
        """Its bitmaps are in use."""
        return attrs.evolve(self.state, bitmaps=dict.fromkeys(self.state.bitmaps, IN_USE))

    @property
    def store(self) -> Qcow2Bitmaps:
        """Where its bitmaps are."""
        store = self.driver.bitmap_store
        assert isinstance(store, Qcow2Bitmaps)
        return store

    async def keep_bitmaps(self) -> None:
        """Store them."""
        after = {name: IN_USE for name in self.state.bitmaps if name not in {each.name for each in self.bitmaps}}
        wanted = {str(each.name): each.bits.digest() for each in self.bitmaps}
        self.check_kept(after)
        await self.step("store", attrs.evolve(self.state, bitmaps=wanted), self.store.store, self.bitmaps)

    @staticmethod
    def check_kept(lost: dict[str, None]) -> None:
        """Nothing in the image is unknown to the node."""
        assert not lost, lost

    async def close(self) -> None:
        """As a node is closed."""
        if self.header.version >= 3 and self.state.units:
            await self.keep_bitmaps()
        await self.world.finish(self.driver.close)
        assert not self.driver.in_flight

    async def reopen(self, nursery: trio.Nursery) -> None:
        """Close it, and open it with other options."""
        self.steps["reopen"] = self.steps.get("reopen", 0) + 1
        await self.close()
        found = check(self.world.disks["file"].data)
        assert not found.corruptions, found.problems
        assert not found.leaks or self.world.failures, found.problems
        more = self.rng.choice(OPTIONS)
        if self.header.version < 3:
            more = {name: value for name, value in more.items() if name in TINY}
        self.options = {**self.variant.options, **more}
        await self.open(nursery)

    # -- steps ------------------------------------------------------------------------------------------------

    async def step(self, name: str, after: State, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Do something that brings the image to another state."""
        world = self.world
        self.steps[name] = self.steps.get(name, 0) + 1
        step = Step(name, [*self.possible, after])
        if after.units != self.state.units:
            self._change_units(step, after.units)
        world.events.append(("step", step))
        world.is_failing = world.fails
        failures = world.failures
        try:
            result = await world.finish(function, *args)
            self._settle(after)
        except (OSError, QmpError):
            if world.failures > failures:
                # What the node says it is now, whatever was to become of it.
                self._settle(next(each for each in (self.state, after) if self.is_at(each)), after)
            else:
                self._settle(self.state)
            raise
        finally:
            world.is_failing = False
        return result

    def _settle(self, state: State, *possible: State) -> None:
        """The image has that state, for certain unless its header could not be written back."""
        self.state = state
        is_certain = not self.driver.is_writable or self.driver.image.header_changes.is_certain
        if is_certain:
            self.possible = [state]
        else:
            # Of a snapshot that was not made, the guest may have overwritten what it would hold.
            self.possible = [each.disowned(state) for each in (*self.possible, *possible)] + [state]
        self.world.events.append(("step done", self.possible))
        self.world.units = state.units

    def is_at(self, state: State) -> bool:
        """Whether that is what the node says."""
        names = [each.id for each in self.driver.snapshots()]
        bitmaps = {each["name"]: "in-use" in each["flags"] for each in self.store.facts()}
        return (
            self.driver.length == state.units * self.world.unit
            and names == list(state.snapshots)
            and bitmaps == {name: value is IN_USE for name, value in state.bitmaps.items()}
            and backing_of(self.driver.image.header) == state.backing
        )

    def _change_units(self, step: Step, units: int) -> None:
        """What is cut off may go at once; what is new is zeroes."""
        world, old = self.world, self.state.units
        first, count = min(units, old), abs(units - old)
        self.numbers -= 1
        now = len(world.events)
        zeroes = GuestOp(self.numbers, Op.WRITE_ZEROES, first, count, issued=now, done=now)
        if units < old:
            below = GuestOp(self.numbers, Op.WRITE_ZEROES, first, count, UNCOVERED, issued=now, done=now)
            step.hidden = [zeroes, below]
            for op in step.hidden:
                world.live.add(op)
        else:
            step.shown = [zeroes]
            world.live.units[first : first + count] = [[zeroes] for _ in range(count)]

    def end(self) -> LifeReplay:
        """A replay of all of it."""
        replay = LifeReplay(self)
        for _moment in replay.moments():
            pass
        return replay

    async def random_step(self, nursery: trio.Nursery) -> None:
        """One of all."""
        # Opening again is not to fail.
        kinds = ["resize"] if self.world.fails else ["resize", "reopen"]
        if not self.header.is_data_file_raw:
            kinds += ["rename"]
        if not self.header.has_data_file and self.header.refcount_order:
            kinds += ["snapshot", "snapshot"]
            if self.state.snapshots:
                kinds += ["delete", "delete"]
            if self.header.version < 3 and self.state.snapshots:
                kinds.remove("resize")
        if self.header.version >= 3:
            kinds += ["bitmap"]
            if self.bitmaps:
                kinds += ["remove bitmap"]
        await getattr(self, self.rng.choice(kinds).replace(" ", "_"))(nursery)

    async def resize(self, _nursery: trio.Nursery) -> None:
        """Any size there is room for."""
        most = len(self.world.live.units)
        align = max(1, SECTOR // self.world.unit)
        units = self.rng.choice(
            (most, self.first.units, self.rng.randrange(most + 1), self.rng.randrange(most + 1))
        )
        units = max(align, units // align * align)
        if self.header.version < 3 and len(self.world.below) > self.state.units * self.world.unit:
            # Nothing can hide it.
            return
        if units == self.state.units:
            return
        name = "grow" if units > self.state.units else "shrink"
        for bitmap in self.bitmaps:
            bitmap.bits.resize(units * self.world.unit)
        try:
            size = units * self.world.unit
            await self.step(name, attrs.evolve(self.state, units=units), self.driver.truncate, size)
        finally:
            for bitmap in self.bitmaps:
                bitmap.bits.resize(self.driver.length)

    async def rename(self, _nursery: trio.Nursery) -> None:
        """Name another backing file, or none; where it lies does not change."""
        # With a header of more than a sector version 2 has no mark for snapshots.
        lengths = (1, 30, 200) if self.header.version < 3 else (1, 30, 200, 600, 1022)
        if self.header.cluster_bits <= MIN_CLUSTER_BITS + 1:
            # Room is left for other things in the header, and where it is two sectors for another name.
            lengths = (1, 30) if self.header.cluster_bits == MIN_CLUSTER_BITS else (1, 30, 200)
        letter = self.rng.choice("abc")
        name = "" if self.rng.random() < 0.2 else "/" + letter * self.rng.choice(lengths)
        kind = self.rng.choice(("", "raw", "qcow2"))
        wanted = (name.encode(), kind.encode() or None) if name else (None, None)
        after = attrs.evolve(self.state, backing=wanted)
        await self.step("rename", after, self.driver.change_backing_file, name, kind)

    async def whole(self) -> bytes:
        """All that the guest sees."""
        length = self.state.units * self.world.unit
        if not length:
            return b""
        return bytes(await self.world.finish(SlowRead(self.driver).read, 0, length))

    async def snapshot(self, _nursery: trio.Nursery) -> None:
        """Make one."""
        data = await self.whole()
        taken = [int(each) for each in self.state.snapshots]
        wanted = str(max(taken, default=0) + 1)
        after = attrs.evolve(self.state, snapshots={**self.state.snapshots, wanted: data})
        try:
            made = await self.step("snapshot", after, self.driver.create_snapshot, f"name{wanted}", 10**18)
        except OSError as error:
            # Too many for counts of so few bits.
            if "out of range" not in str(error):
                raise
            return
        assert made == wanted

    async def delete(self, _nursery: trio.Nursery) -> None:
        """Delete one."""
        gone = self.rng.choice(list(self.state.snapshots))
        rest = {name: data for name, data in self.state.snapshots.items() if name != gone}
        after = attrs.evolve(self.state, snapshots=rest)
        await self.step("delete snapshot", after, self.driver.delete_snapshot, gone)

    async def bitmap(self, _nursery: trio.Nursery) -> None:
        """Add one, which is stored when the image is closed."""
        self.numbers -= 1
        bits = DirtyBitmap(self.driver.length, 512 << self.rng.randrange(8))
        for _ in range(self.rng.randrange(20)):
            offset = self.rng.randrange(self.driver.length)
            bits.set(offset, min(self.driver.length - offset, self.rng.choice((1, 512, 1 << 16, 1 << 20))))
        name = f"b{-self.numbers}"
        self.store.check(name, bits.data_length, self.bitmaps)
        self.bitmaps.append(NamedBitmap(name, bits, is_persistent=True))
        self.steps["bitmap"] = self.steps.get("bitmap", 0) + 1

    async def remove_bitmap(self, _nursery: trio.Nursery) -> None:
        """Remove one."""
        gone = self.bitmaps.pop(self.rng.randrange(len(self.bitmaps)))
        rest = {name: value for name, value in self.state.bitmaps.items() if name != gone.name}
        await self.step("remove bitmap", attrs.evolve(self.state, bitmaps=rest), self.store.remove, gone.name)

    async def compare(self) -> None:
        """The guest sees what it may see."""
        assert self.driver.length == self.state.units * self.world.unit
        self.world.compare(await self.whole(), 0, self.world.live.units[: self.state.units])


# -- after a power cut --------------------------------------------------------------------------------------------


class LifeReplay(Replay):
    """Knows the states the image may have, too."""

    def __init__(self, life: Life) -> None:
        super().__init__(life.world)
        self.possible = [life.first]
        self.name = ""

    def step_event(self, what: str, subject: Any) -> None:
        """A step begins or has ended."""
        if what == "step":
            self.possible, self.name = subject.possible, subject.name
            for op in subject.hidden:
                self.allowed.add(op)
            for op in subject.shown:
                self.allowed.units[op.first : op.first + op.count] = [[op] for _ in range(op.count)]
        else:
            self.possible, self.name = subject, ""


def mended(image: bytearray) -> Findings:
    """Do what opening a dirty image does."""
    mend(image)
    header = header_of(image)
    clean = serialise_header(attrs.evolve(header, **unmarking(header)))
    image[: len(clean)] = clean
    return check(image)


async def look_into(life: Life, replay: LifeReplay, disks: dict[str, bytearray]) -> None:
    """Open what a power cut has left; it is one of the states there may be."""
    image = disks["file"]
    found = check(image)
    header = parse_header(bytes(image[: 1 << 21]))
    if header.incompatible & DIRTY:
        found = mended(image)
    assert not found.corruptions, found.problems
    world = life.world
    units, rest = divmod(header.size, world.unit)
    assert not rest
    after = LifeWorld(world.rng, world.unit, world.base, attrs.evolve(world.habits, on_the_spot=1.0))
    for name, data in disks.items():
        after.disk(name, bytes(data))
    async with trio.open_nursery() as nursery:
        driver = make_driver(after, nursery, read_only=True)
        await driver.open()
        data = await after.finish(SlowRead(driver).read, 0, driver.length) if driver.length else b""
        world.compare(data, 0, replay.allowed.units[:units])
        store = Qcow2Bitmaps(DriverImage(driver), after.warnings.append)
        bitmaps = {
            str(each.name): IN_USE if each.is_inconsistent else each.bits.digest()
            for each in await store.load(driver.length)
        }
        await driver.close()
        nursery.cancel_scope.cancel()
    snapshots = await look_at_snapshots(life, disks, header)
    assert not after.warnings
    possible = replay.possible
    assert any(each.units == units for each in possible), (units, possible)
    assert any(each.shows(snapshots) for each in possible), (list(snapshots), possible)
    assert any(each.backing == backing_of(header) for each in possible), (backing_of(header), possible)
    assert any(list(each.bitmaps) == list(bitmaps) for each in possible) or set(bitmaps) in [
        set(each.bitmaps) for each in possible
    ], (bitmaps, [each.bitmaps for each in possible])
    for bitmap, value in bitmaps.items():
        assert value in [each.bitmaps[bitmap] for each in possible if bitmap in each.bitmaps], (bitmap, value)


async def look_at_snapshots(life: Life, disks: dict[str, bytearray], header: Header) -> dict[str, bytes]:
    """What each snapshot of the image holds."""
    image = disks["file"]
    file: Any = MemoryFile(image)
    stored, _length = await read_snapshots(file, header)
    found = {}
    for each in stored:
        there = attrs.evolve(
            header,
            size=each.disk_size,
            l1_offset=each.l1_offset,
            l1_size=each.l1_size,
            snapshot_count=0,
            incompatible=header.incompatible & ~DIRTY,
        )
        start = serialise_header(there)
        after = World(life.world.rng, life.world.unit, b"", attrs.evolve(life.world.habits, on_the_spot=1.0))
        for name, data in disks.items():
            after.disk(name, start + bytes(data[len(start) :]) if name == "file" else bytes(data))
        async with trio.open_nursery() as nursery:
            driver = make_driver(after, nursery, read_only=True)
            await driver.open()
            found[each.shown.id] = bytes(await after.finish(SlowRead(driver).read, 0, driver.length))
            await driver.close()
            nursery.cancel_scope.cancel()
    return found
