"""A qcow2 driver on disks that lose what was not flushed, with a guest that knows what may be read.

All that happens is decided by one random number generator: which request the guest makes next, which of the
requests under way on the disks ends next. ``World.events`` records it, so that ``Replay`` can stop the world at any
moment and say what the disks may hold then.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import attrs
import pytest
import trio
import trio.testing
from guest import SECTOR as SECTOR
from guest import Allowed, GuestOp, assert_shown
from qcow2_fakes import extents_of, file_node
from qcow2_vault import derive_on_the_spot

from qsd.drivers.base import ChildRole, Limits, Mode
from qsd.drivers.calls import SlowPath
from qsd.drivers.gather import Callback
from qsd.drivers.qcow2.check import Checker
from qsd.drivers.qcow2.driver import Qcow2Driver
from qsd.drivers.qcow2.layout import CRYPT_AES, CRYPT_LUKS, parse_header
from qsd.drivers.qcow2.ledger import Findings
from qsd.errors import QmpError
from qsd.messages import Flag, Op, Request
from qsd.qapi.core import NULL
from qsd.qapi.schema.block import BlockdevDriver
from qsd.qapi.schema.qcow2 import (
    BlockdevOptionsQcow2,
    BlockdevQcow2EncryptionAes,
    BlockdevQcow2EncryptionFormat,
    BlockdevQcow2EncryptionLuks,
)

derive_on_the_spot()

_ENCRYPT: Final[dict[int, Any]] = {
    CRYPT_AES: BlockdevQcow2EncryptionAes(format=BlockdevQcow2EncryptionFormat.AES, key_secret="s"),
    CRYPT_LUKS: BlockdevQcow2EncryptionLuks(format=BlockdevQcow2EncryptionFormat.LUKS, key_secret="s"),
}

# What a discarded range of a disk reads as: whoever relies on it is found out.
DISCARDED: Final = b"\xdb"
CHANGES: Final = (Op.WRITE, Op.WRITE_ZEROES, Op.DISCARD)


def run_seeded(seed: int, function: Callable[..., Any], *args: Any) -> Any:
    """``trio.run`` with the order of tasks decided by ``seed`` as well."""
    core: Any = trio._core._run  # type: ignore[attr-defined]  # nowhere else is the order decided
    core._ALLOW_DETERMINISTIC_SCHEDULING = True
    core._r.seed(seed)
    return trio.run(function, *args)


# -- disks ------------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Change:
    """One request on a disk. ``data``: what it leaves there. ``length`` is the new size when ``op`` is None."""

    disk: str
    op: Op | None
    offset: int
    length: int
    data: bytes = b""
    # Of a flush: how many changes had ended when it began.
    covers: int = 0


class Disk(SlowPath):
    """A child whose requests end when the world says so."""

    def __init__(self, world: World, name: str, data: bytes) -> None:
        self.world = world
        self.name = self.node_name = name
        self.data = bytearray(data)
        self.initial = data
        self.limits = Limits()
        self.changes_done = 0
        self.node = file_node(name)
        self.largest_read = 0
        self.grows_at_once = world.rng.random() < 0.7
        self.is_read_only = False
        # A guest that discards may see zeroes, and sees what a data file has.
        self.discarded = b"\0" if name == "data-file" else DISCARDED
        self._under_way: set[Request] = set()
        self._settled: list[tuple[set[Request], trio.Event]] = []

    @property
    def length(self) -> int:
        return -(-len(self.data) // SECTOR) * SECTOR

    def submit(self, batch: list[Request]) -> None:
        for request in batch:
            self._under_way.add(request)
            self.world.issue(self, request)

    def apply(self, change: Change) -> None:
        """Do it."""
        apply(self.data, change)
        self.changes_done += 1

    def ended(self, request: Request) -> None:
        """Called before a request is completed."""
        self._under_way.discard(request)
        for waited, event in self._settled[:]:
            waited.discard(request)
            if not waited:
                event.set()
                self._settled.remove((waited, event))

    def grow(self, size: int) -> bool:
        if size <= len(self.data):
            return True
        self.world.refuse_growth(self, size)
        if not self.grows_at_once:
            return False
        self.world.resize(self, size)
        return True

    async def truncate(self, size: int, *, exact: bool = True) -> None:
        await trio.lowlevel.checkpoint()
        try:
            self.world.refuse_growth(self, size)
        except OSError:
            raise QmpError("no space") from None
        self.world.resize(self, size)

    async def quiesce(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._under_way:
            event = trio.Event()
            self._settled.append((set(self._under_way), event))
            await event.wait()


def apply(data: bytearray, change: Change) -> None:
    """Let a change show in a file's bytes."""
    if change.op is None:
        del data[change.length :]
        data.extend(bytes(change.length - len(data)))
        return
    end = change.offset + len(change.data)
    if change.data and end > len(data):
        data.extend(bytes(end - len(data)))
    data[change.offset : end] = change.data


# More requests than one step of any test makes.
MOST_ASKED: Final = 20_000


# -- the guest -------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Habits:
    """A guest: how many requests, how many at once and how many sent together, the weight of each kind, the longest
    (a part of the disk).
    """

    requests: int = 60
    depth: int = 4
    together: tuple[int, ...] = (1, 1, 1, 4, 12)
    writes: int = 6
    zeroes: int = 2
    discards: int = 2
    reads: int = 1
    flushes: int = 1
    packed: int = 3
    longest: float = 0.15
    # How likely a child's request ends on the spot, which ones always do, and how likely it fails.
    on_the_spot: float = 0.3
    quick: Callable[[Request], bool] = lambda _request: False
    slow: float = 0.1
    failing: float = 0.0


class World:
    """See the module. ``unit`` bytes are written as a whole by the guest; ``base`` is what it sees at first."""

    def __init__(self, rng: random.Random, unit: int, base: bytes, habits: Habits) -> None:
        self.rng = rng
        self.unit = unit
        self.base = self.first_base = base
        self.habits = habits
        # How many the disk has at present; ``give_room`` makes room for more.
        self.units = len(base) // unit
        self.disks: dict[str, Disk] = {}
        self.events: list[tuple[str, Any]] = []
        self.pending: list[tuple[Disk, Request, Change]] = []
        # Requests that end long after others.
        self.slow: list[tuple[Disk, Request, Change]] = []
        # Work on threads.
        self.jobs: list[Callable[[], None]] = []
        self.under_way = 0
        # Requests that are going to be submitted together.
        self.batch: list[Request] = []
        self.is_holding = False
        self.origin = GuestOp(0, Op.WRITE, 0, self.units, done=-1)
        self.live = Allowed(self.units, self.origin)
        self.finished: list[GuestOp] = []
        self.reading: list[GuestOp] = []
        self.numbers = 0
        # Whether requests of the disks fail at all, and at present; which one does, and how.
        self.fails = self.is_failing = False
        self.fail_at = -1
        # So many in a row; of all requests, or of those that write the image's header.
        self.fail_times = 1
        self.fails_headers = False
        self.fail_with = errno.EIO
        self.fails_writing_only = False
        self.failures = 0
        # Requests of the disks since something was last made to happen.
        self.asked = 0
        self.warnings: list[str] = []
        # Units in a cluster that may be written compressed; 0: none may. And requests whose data does not compress.
        self.packing = 0
        self.noisy: set[int] = set()

    def give_room(self, units: int) -> None:
        """Let the guest's disk be able to grow by so many units."""
        self.base += bytes(units * self.unit)
        self.origin.count += units
        self.live.units += [[self.origin] for _ in range(units)]

    def disk(self, name: str, data: bytes) -> Disk:
        """A new disk."""
        made = self.disks[name] = Disk(self, name, data)
        return made

    # -- the disks' side --------------------------------------------------------------------------------------

    def issue(self, disk: Disk, request: Request) -> None:
        """A request arrives at a disk."""
        op = Op(request.op)
        self.asked += 1
        assert self.asked < MOST_ASKED, "somebody asks again and again, and lets nothing else happen"
        if not self.is_inside(disk, request):
            request.complete(errno.EIO)
            return
        if op in CHANGES:
            assert not disk.is_read_only, (disk.name, request)
        change = Change(disk.name, op, request.offset, request.length, covers=disk.changes_done)
        if op == Op.READ:
            disk.largest_read = max(disk.largest_read, request.length)
        elif op != Op.BLOCK_STATUS:
            if op == Op.WRITE:
                assert request.buffer is not None
                assert len(request.buffer) == request.length
                change.data = bytes(request.buffer)
            elif op in CHANGES:
                change.data = (disk.discarded if op == Op.DISCARD else b"\0") * request.length
            self.events.append(("issue", change))
        luck = self.rng.random()
        if luck < self.habits.on_the_spot or self.habits.quick(request):
            self._end(disk, request, change)
        elif luck > 1 - self.habits.slow:
            self.slow.append((disk, request, change))
        else:
            self.pending.append((disk, request, change))

    def is_inside(self, disk: Disk, request: Request) -> bool:
        """Whether a node would let a request pass; a driver that asks for more has a bug."""
        is_inside = 0 <= request.offset <= request.offset + request.length <= disk.length
        assert is_inside, (disk.name, request)
        return is_inside

    def resize(self, disk: Disk, size: int) -> None:
        """A disk changes its size at once."""
        change = Change(disk.name, None, 0, size)
        self.events.append(("issue", change))
        disk.apply(change)
        self.events.append(("done", change))

    def refuse_growth(self, disk: Disk, size: int) -> None:
        """Raise OSError when it is time for an error."""
        error = 0 if self.fails_headers else self._error()
        if error:
            raise OSError(error, "as arranged")

    def _error(self) -> int:
        if not self.is_failing:
            return 0
        self.fail_at -= 1
        if -self.fail_times < self.fail_at <= 0 or self.rng.random() < self.habits.failing:
            self.failures += 1
            return self.fail_with
        return 0

    def _end(self, disk: Disk, request: Request, change: Change) -> None:
        op = Op(request.op)
        is_immune = (
            disk.name == "backing"
            or (self.fails_writing_only and op in (Op.READ, Op.FLUSH))
            or (self.fails_headers and (disk.name != "file" or op != Op.WRITE or request.offset))
        )
        error = 0 if is_immune else self._error()
        if op == Op.READ:
            assert request.buffer is not None
            if not error:
                got = disk.data[request.offset : request.offset + request.length]
                request.buffer[:] = got.ljust(request.length, b"\0")
        elif op == Op.BLOCK_STATUS:
            request.result = extents_of(disk.data, request)
        else:
            if op == Op.WRITE:
                assert bytes(request.buffer or b"") == change.data, "a buffer was changed while it was lent"
            if error:
                # Some of its sectors may have been written, or all of it.
                stop = change.offset + self.rng.randrange(len(change.data) + 1)
                if self.rng.random() < 0.7:
                    change.data = change.data[: max(0, stop // SECTOR * SECTOR - change.offset)]
            if op in CHANGES:
                disk.apply(change)
            self.events.append(("failed" if error else "done", change))
        disk.ended(request)
        request.complete(error)

    @property
    def is_busy(self) -> bool:
        """Whether something is under way on a disk."""
        return bool(self.pending or self.slow or self.jobs)

    def end_one(self) -> None:
        """Let one of the disks' requests, or of the threads' jobs, end."""
        if self.jobs and (not (self.pending or self.slow) or self.rng.random() < 0.3):
            self.jobs.pop(self.rng.randrange(len(self.jobs)))()
            return
        some = self.pending if self.pending and (not self.slow or self.rng.random() < 0.95) else self.slow
        at = self.rng.randrange(len(some))
        some[at], some[-1] = some[-1], some[at]
        self._end(*some.pop())

    # -- the guest's side -------------------------------------------------------------------------------------

    def pattern(self, number: int, unit: int) -> bytes:
        """What unit ``unit`` holds after the request ``number`` has written it."""
        if number in self.noisy:
            return random.Random(number << 32 | unit).randbytes(self.unit)
        return b"%06d/%08d;" % (number, unit) * (self.unit // 16)

    def value(self, op: GuestOp, unit: int) -> bytes:
        """What the unit holds after ``op``."""
        if op is self.origin:
            return self.base[unit * self.unit : (unit + 1) * self.unit]
        return self.pattern(op.number, unit) if op.kind == Op.WRITE else bytes(self.unit)

    def request(self, driver: Qcow2Driver, kind: Op, first: int = 0, count: int = 0, flags: int = 0) -> GuestOp:
        """Make a request, and note what becomes of it."""
        self.numbers += 1
        op = GuestOp(self.numbers, kind, first, count, flags, len(self.events))
        buffer = None
        if kind == Op.WRITE:
            buffer = memoryview(b"".join(self.pattern(op.number, unit) for unit in range(first, first + count)))
        elif kind == Op.READ:
            buffer = memoryview(bytearray(count * self.unit))
            op.seen = [list(self.live.units[unit]) for unit in range(first, first + count)]
            self.reading.append(op)
        elif kind == Op.FLUSH:
            op.covers, self.finished = self.finished, []
        self.events.append(("guest", op))
        if kind in CHANGES:
            self.live.add(op)
            for reading in self.reading:
                for unit in range(max(first, reading.first), min(first + count, reading.first + reading.count)):
                    reading.seen[unit - reading.first].append(op)
        self.under_way += 1
        reply = Callback(lambda request: self._ended(op, request, buffer))
        self.batch.append(Request(kind.value, first * self.unit, count * self.unit, buffer, reply, flags))
        if not self.is_holding:
            self.submit(driver)
        return op

    def submit(self, driver: Qcow2Driver) -> None:
        """Send what was held back, as one batch."""
        self.is_holding = False
        batch, self.batch = self.batch, []
        driver.submit(batch)

    def _ended(self, op: GuestOp, request: Request, buffer: memoryview | None) -> None:
        self.under_way -= 1
        op.done = len(self.events)
        op.has_failed = bool(request.error)
        if request.error:
            assert self.failures or op.flags & Flag.COMPRESSED, f"{request} failed"
        if op.kind == Op.READ:
            self.reading.remove(op)
            if not request.error:
                assert buffer is not None
                self.compare(bytes(buffer), op.first, op.seen)
            return
        self.events.append(("guest done", op))
        if request.error:
            if op.kind == Op.FLUSH:
                self.finished += op.covers
            return
        if op.kind in CHANGES:
            self.live.settle(op)
            self.finished.append(op)

    def compare(self, data: bytes, first: int, allowed: list[list[GuestOp]]) -> None:
        """Assert that every unit shows what it may show."""
        assert_shown(data, first, allowed, self.unit, self.value)

    def random_request(self, driver: Qcow2Driver) -> None:
        """One request of the guest's kind."""
        rng, habits = self.rng, self.habits
        kinds = (Op.WRITE, Op.WRITE_ZEROES, Op.DISCARD, Op.READ, Op.FLUSH, None)
        packed = habits.packed if self.packing else 0
        weights = (habits.writes, habits.zeroes, habits.discards, habits.reads, habits.flushes, packed)
        (kind,) = rng.choices(kinds, weights)
        if kind is None:
            self._write_packed(driver)
            return
        if kind == Op.FLUSH:
            self.request(driver, kind)
            return
        longest = max(1, int(habits.longest * self.units))
        count = min(self.units, rng.randint(1, rng.choice((1, 4, 16, longest))))
        first = rng.randrange(self.units - count + 1)
        if rng.random() < 0.3:
            first = first // 16 * 16
        flags = 0
        if kind in (Op.WRITE, Op.WRITE_ZEROES) and rng.random() < 0.1:
            flags |= Flag.FUA
        if kind == Op.WRITE_ZEROES and rng.random() < 0.5:
            flags |= Flag.MAY_UNMAP
        self.request(driver, kind, first, count, int(flags))

    def _write_packed(self, driver: Qcow2Driver) -> None:
        """Write clusters compressed. Where there is data already that is refused, as one that is not compressed."""
        rng, size = self.rng, self.packing
        clusters = -(-self.units // size)
        first = rng.randrange(clusters)
        count = min(clusters - first, rng.choice((1, 1, 2, 5)))
        if rng.random() < 0.2:
            self.noisy.add(self.numbers + 1)
        flags = Flag.COMPRESSED | (Flag.FUA if rng.random() < 0.1 else 0)
        end = min(self.units, (first + count) * size)
        self.request(driver, Op.WRITE, first * size, end - first * size, int(flags))

    async def run(self, driver: Qcow2Driver) -> None:
        """Make all requests, and let all of them end."""
        left = self.habits.requests
        while left or self.under_way or self.is_busy:
            if left and self.under_way < self.habits.depth and self.rng.random() < 0.5:
                together = min(left, self.rng.choice(self.habits.together), self.habits.depth - self.under_way)
                left -= together
                self.is_holding = True
                for _ in range(together):
                    self.random_request(driver)
                self.submit(driver)
            else:
                await self.go_on()

    async def go_on(self) -> None:
        """Let something happen that is under way."""
        self.asked = 0
        if not self.is_busy or self.rng.random() < 0.3:
            await trio.testing.wait_all_tasks_blocked()
        if self.is_busy:
            self.end_one()
        else:
            assert not self.under_way, "requests wait for nothing"

    async def finish(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run an async function, and let what it waits for end."""
        result: list[Any] = []
        problem: list[Exception] = []

        async def work() -> None:
            try:
                result.append(await function(*args))
            except (OSError, QmpError) as error:
                problem.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            await trio.testing.wait_all_tasks_blocked()
            while not result and not problem:
                assert self.is_busy, f"{function} waits for nothing"
                await self.go_on()
                await trio.testing.wait_all_tasks_blocked()
        if problem:
            raise problem[0]
        return result[0]

    async def whole(self, driver: Qcow2Driver) -> bytes:
        """All the guest can read."""
        return bytes(await self.finish(SlowRead(driver).read, 0, len(self.base)))


class SlowRead(SlowPath):
    """A driver's requests as methods to await."""

    def __init__(self, driver: Qcow2Driver) -> None:
        self.submit = driver.submit

    def submit(self, batch: list[Request]) -> None:
        raise NotImplementedError


# -- a driver ---------------------------------------------------------------------------------------------------


class Threads:
    """An aio engine whose work is done when the world says so."""

    def __init__(self, world: World) -> None:
        self._world = world

    def call(self, function: Callable[[], int], done: Callable[[int], None]) -> None:
        self._world.jobs.append(partial(self._work, function, done))

    @staticmethod
    def _work(function: Callable[[], int], done: Callable[[int], None]) -> None:
        try:
            result = function()
        except OSError as error:
            result = -(error.errno or errno.EIO)
        done(result)

    def defer(self, function: Callable[[], None]) -> None:
        function()

    def soon(self, function: Callable[[], None]) -> None:
        self._world.jobs.append(function)


class WorldHost:
    """Lends a driver what it needs; it opens no child for the image."""

    def __init__(self, world: World, nursery: trio.Nursery) -> None:
        self._world = world
        self._nursery = nursery
        self.aio = Threads(world)
        self.events: list[tuple[str, dict[str, Any]]] = []

    def spawn(self, function: Callable[..., Any], *args: Any, name: str) -> None:
        self._nursery.start_soon(function, *args, name=name)

    def warn(self, text: str) -> None:
        self._world.warnings.append(text)

    def emit(self, name: str, data: dict[str, Any]) -> None:
        self.events.append((name, data))

    def secret(self, name: str) -> bytes:
        return name.encode()

    async def open_child(self, name: str, role: ChildRole, options: Any, /) -> Any:
        raise AssertionError(f"the image opens {options}")


def make_driver(world: World, nursery: trio.Nursery, *, read_only: bool = False, **options: Any) -> Qcow2Driver:
    """A driver on the world's disks ``file``, ``data-file`` and ``backing``; not open yet."""
    has_backing = "backing" in world.disks
    options = {"cache_clean_interval": 0, "backing": "backing" if has_backing else NULL, **options}
    if "data-file" in world.disks:
        options["data_file"] = "data-file"
    # Looked at as it is: the header may be one that nobody can read.
    encrypt = _ENCRYPT.get(int.from_bytes(world.disks["file"].data[32:36]))
    if encrypt is not None:
        pytest.importorskip("numpy")
        pytest.importorskip("cryptography.hazmat.primitives.ciphers")
        options["encrypt"] = encrypt
    asked = BlockdevOptionsQcow2(driver=BlockdevDriver.QCOW2, file="file", **options)
    host: Any = WorldHost(world, nursery)
    driver = Qcow2Driver("n", asked, Mode(read_only=read_only, discard_unmap=True), host)
    # Nothing is unpacked on the spot: the world decides when.
    driver.unpacker.at_once = 0
    children: Any = world.disks
    driver.children.update(children)
    for disk in world.disks.values():
        disk.is_read_only = read_only or disk.name == "backing"
    return driver


def check(disk: bytes | bytearray) -> Findings:
    """What our check says about an image."""
    header = parse_header(bytes(disk[: 1 << 21]))

    def look(offset: int, length: int) -> bytes:
        return bytes(disk[offset : offset + length]).ljust(length, b"\0")

    return Checker(header, look, len(disk)).run()


# -- stopping the world -----------------------------------------------------------------------------------------


class Replay:
    """The world's past, event by event: what has reached the disks, and what the guest may rely on."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.durable = {name: bytearray(disk.initial) for name, disk in world.disks.items()}
        # Ended, in this order, and not known to be durable; and under way.
        self.volatile: dict[str, list[Change]] = {name: [] for name in world.disks}
        self.started: dict[str, list[Change]] = {name: [] for name in world.disks}
        self._flushed = dict.fromkeys(world.disks, 0)
        self.allowed = Allowed(len(world.live.units), world.origin)

    def moments(self) -> Iterator[int]:
        """Go on by one event at a time."""
        for number, (what, subject) in enumerate(self._world.events):
            if what == "guest":
                if subject.kind in CHANGES:
                    self.allowed.add(subject)
            elif what == "guest done":
                if not subject.has_failed:
                    self._guest_relies_on(subject)
            elif isinstance(subject, Change):
                self._disk_event(what, subject)
            else:
                self.step_event(what, subject)
            yield number

    def step_event(self, what: str, subject: Any) -> None:
        """Something else was done to the image: see ``qcow2_lives``."""
        raise NotImplementedError

    def _guest_relies_on(self, op: GuestOp) -> None:
        if op.kind == Op.FLUSH:
            for other in op.covers:
                self.allowed.settle(other)
        elif op.flags & Flag.FUA:
            self.allowed.settle(op)

    def _disk_event(self, what: str, change: Change) -> None:
        name = change.disk
        if what == "issue":
            self.started[name].append(change)
            return
        self.started[name].remove(change)
        if change.op != Op.FLUSH:
            self.volatile[name].append(change)
        elif what == "done":
            count = change.covers - self._flushed[name]
            if count > 0:
                for each in self.volatile[name][:count]:
                    apply(self.durable[name], each)
                del self.volatile[name][:count]
                self._flushed[name] = change.covers

    def crashed(self, rng: random.Random) -> dict[str, bytearray]:
        """What the disks may hold when the power goes now."""
        found = {}
        chance, torn = rng.choice(((0.0, 0.0), (1.0, 0.0), (0.5, 0.0), (0.9, 0.0), (0.1, 0.0), (0.5, 0.5)))
        for name, durable in self.durable.items():
            data = bytearray(durable)
            for change in (*self.volatile[name], *self.started[name]):
                if change.op == Op.FLUSH:
                    continue
                if rng.random() < torn and len(change.data) > SECTOR:
                    self._tear(data, change, rng)
                elif rng.random() < chance:
                    apply(data, change)
            found[name] = data
        return found

    @staticmethod
    def _tear(data: bytearray, change: Change, rng: random.Random) -> None:
        """Some of its sectors arrive."""
        offset, end = change.offset, change.offset + len(change.data)
        while offset < end:
            stop = min(end, (offset // SECTOR + rng.randint(1, 8)) * SECTOR)
            if rng.random() < 0.5:
                piece = change.data[offset - change.offset : stop - change.offset]
                apply(data, Change(change.disk, change.op, offset, len(piece), piece))
            offset = stop
