"""The luks driver on a node, over a child that ends its requests when it likes, against a bytearray."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import trio
import trio.testing

pytest.importorskip("numpy")
pytest.importorskip("cryptography")

from qsd.actors.node import Node
from qsd.actors.supervisor import Floor, Supervisor
from qsd.drivers.base import Driver, Limits, Mode
from qsd.drivers.luks.driver import LuksDriver
from qsd.drivers.luks.volume import FormatOptions, Formatted, format_volume
from qsd.errors import QmpError
from qsd.messages import Flag, Op, ReplyQueue, Request

SIZE = 96 * 512
PASSWORD = b"pass"


class LateDisk(Driver):
    """Does requests when told, in any order; some fail when ``is_failing``."""

    name = "late"

    def __init__(self, data: bytearray) -> None:
        host: Any = None
        super().__init__("disk", None, Mode(discard_unmap=True), host)
        self.data = data
        self.length = len(data)
        self.limits = Limits()
        self.pending: list[Request] = []
        self.is_late = False
        self.is_failing = False
        self.flushes = 0

    async def open(self) -> None:
        """Open from the beginning."""

    def submit(self, batch: list[Request]) -> None:
        for request in batch:
            assert not request.flags & Flag.MAY_LEND, "what is encrypted cannot be lent"
            if self.is_late:
                self.started()
                self.pending.append(request)
            else:
                self._do(request)

    def end_one(self, chance: random.Random) -> None:
        request = self.pending.pop(chance.randrange(len(self.pending)))
        self.finished()
        self._do(request)

    def _do(self, request: Request) -> None:
        if self.is_failing:
            request.complete(errno.EIO)
            return
        place = slice(request.offset, request.offset + request.length)
        assert place.stop <= len(self.data)
        if request.op == Op.READ:
            assert request.buffer is not None
            request.buffer[:] = self.data[place]
        elif request.op == Op.WRITE:
            assert request.buffer is not None
            self.data[place] = request.buffer
        elif request.op == Op.FLUSH:
            self.flushes += 1
        else:
            raise AssertionError(f"luks does not pass on {request!r}")
        request.complete()


class Child:
    """The edge to the disk's node."""

    name = "file"

    def __init__(self, node: Node) -> None:
        self.node = node
        self.submit = node.submit
        self.spot = node.spot
        self.read = node.read
        self.write = node.write
        self.flush = node.flush
        self.quiesce = node.quiesce
        self.node_name = node.name

    @property
    def length(self) -> int:
        return self.node.length

    @property
    def limits(self) -> Limits:
        return self.node.limits


class Engine:
    """``Aio.call`` and ``defer``: what runs on threads ends when told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[[], int], Callable[[int], None]]] = []

    def call(self, function: Callable[[], int], done: Callable[[int], None]) -> None:
        self.calls.append((function, done))

    def defer(self, function: Callable[[], None]) -> None:
        function()

    def end_one(self) -> None:
        function, done = self.calls.pop(0)
        done(function())


@attrs.define(eq=False)
class Host:
    aio: Engine = attrs.field(factory=Engine)
    node: Node | None = None

    def spawn(self, function: Callable[..., Any], *args: Any, name: str) -> None:
        assert self.node is not None
        self.node.spawn(function, *args, name=name)

    def warn(self, text: str) -> None:
        raise AssertionError(text)

    def secret(self, name: str) -> bytes:
        if name != "s":
            raise QmpError(f"No secret with id '{name}'")
        return PASSWORD


_formatted: dict[str, Formatted] = {}


async def formatted(cipher: str) -> Formatted:
    if cipher not in _formatted:
        mode = "cbc" if cipher.startswith("cast5") else "xts"
        options = FormatOptions(cipher_alg=cipher, cipher_mode=mode, iter_time=0)
        _formatted[cipher] = await format_volume(options, PASSWORD)
    return _formatted[cipher]


class Bytes:
    """An ``Area`` in memory."""

    def __init__(self, data: bytearray) -> None:
        self.data = data

    async def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length]).ljust(length, b"\0")

    async def write(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data

    async def flush(self) -> None:
        """Nothing is held back."""


@attrs.define(eq=False)
class House:
    supervisor: Supervisor
    disk: LateDisk
    host: Host
    driver: LuksDriver
    node: Node


async def open_house(supervisor: Supervisor, cipher: str = "aes-256", size: int = SIZE) -> House:
    made = await formatted(cipher)
    start = made.header.payload_offset
    disk = LateDisk(bytearray(start + size))
    await made.write(Bytes(disk.data))
    below = Node("disk", disk)
    await supervisor.start(below, Floor.NODES)
    below.set_writable(writable=True)
    host = Host()
    options = SimpleNamespace(key_secret="s", header=None)
    lent: Any = host
    driver = LuksDriver("l", options, Mode(discard_unmap=True), lent)
    child: Any = Child(below)
    driver.children = {"file": child}
    node = host.node = Node("l", driver)
    await supervisor.start(node, Floor.NODES)
    await driver.open()
    node.set_writable(writable=True)
    return House(supervisor, disk, host, driver, node)


def some_request(
    chance: random.Random, expected: bytearray, replies: ReplyQueue, busy: list[range]
) -> Request | None:
    """A request for bytes nobody else is at; ``expected`` is what will be there."""
    start = chance.randrange(SIZE)
    length = chance.randrange(1, min(SIZE - start, 9000) + 1)
    if chance.random() < 0.6:
        start, length = start // 512 * 512, max(512, length // 512 * 512)
        length = min(length, SIZE - start)
    if any(start < other.stop and other.start < start + length for other in busy):
        return None
    busy.append(range(start, start + length))
    op = chance.choice((Op.READ, Op.READ, Op.WRITE, Op.WRITE, Op.WRITE_ZEROES, Op.DISCARD))
    data = bytearray(chance.randbytes(length))
    if op == Op.WRITE:
        expected[start : start + length] = data
    elif op == Op.WRITE_ZEROES:
        expected[start : start + length] = bytes(length)
    has_buffer = op in (Op.READ, Op.WRITE)
    flags = Flag.MAY_LEND.value if op == Op.READ else 0
    buffer = memoryview(data) if has_buffer else None
    return Request(op.value, start, length, buffer, replies, flags, bytes(data) if op == Op.WRITE else None)


@pytest.mark.parametrize("cipher", ["aes-256", "cast5-128"])
@pytest.mark.parametrize("seed", range(8))
async def test_volume_is_what_was_written(seed: int, cipher: str) -> None:
    chance = random.Random(seed)
    replies = ReplyQueue(lambda: None)
    async with Supervisor() as supervisor:
        house = await open_house(supervisor, cipher)
        node, disk, engine = house.node, house.disk, house.host.aio
        disk.is_late = seed % 2 == 1
        expected = bytearray()

        async def settle(count: int) -> None:
            while len(replies.ready) < count:
                if disk.pending and (chance.random() < 0.7 or not engine.calls):
                    disk.end_one(chance)
                elif engine.calls:
                    engine.end_one()
                await trio.testing.wait_all_tasks_blocked()

        request = Request(Op.READ.value, 0, SIZE, memoryview(bytearray(SIZE)), replies)
        node.submit([request])
        await settle(1)
        assert request.buffer is not None
        expected += request.buffer
        replies.ready.clear()
        for _ in range(12):
            busy: list[range] = []
            made = [some_request(chance, expected, replies, busy) for _ in range(20)]
            batch = [request for request in made if request is not None]
            count = len(batch)
            cut = chance.randrange(count + 1)
            node.submit(batch[:cut])
            if batch[cut:]:
                node.submit(batch[cut:])
            await settle(count)
            for request in replies.ready:
                assert not request.error
                assert request.result is None or request.op == Op.BLOCK_STATUS
                if request.op == Op.READ:
                    assert request.buffer == expected[request.offset : request.offset + request.length]
                elif request.op == Op.WRITE:
                    assert request.buffer == request.tag, "the caller's buffer is not touched"
            replies.ready.clear()
        assert not house.driver.in_flight
        assert not disk.in_flight


async def test_failures_of_the_child_are_the_requests() -> None:
    async with Supervisor() as supervisor:
        house = await open_house(supervisor)
        house.disk.is_failing = True
        for work in (house.node.read(0, 512), house.node.write(0, bytes(1024)), house.node.write_zeroes(512, 512)):
            with pytest.raises(OSError, match="Input/output error"):
                await work
        house.disk.is_failing = False
        await house.node.write(0, b"x" * 512)
        assert await house.node.read(0, 512) == b"x" * 512
        assert not house.driver.in_flight


async def test_zeroes_are_data_and_discards_are_nothing() -> None:
    async with Supervisor() as supervisor:
        house = await open_house(supervisor)
        await house.node.write(0, b"x" * 2048)
        await house.node.discard(0, 1024)
        assert await house.node.read(0, 2048) == b"x" * 2048
        await house.node.write_zeroes(0, 1024, Flag.MAY_UNMAP)
        assert await house.node.read(0, 2048) == bytes(1024) + b"x" * 1024
        assert bytes(1024) not in house.disk.data[house.driver.volume.header.payload_offset :][:2048]
        with pytest.raises(OSError, match="Operation not supported"):
            await house.node.write_zeroes(0, 1024, Flag.NO_FALLBACK)
        (extent,) = await house.node.block_status(0, SIZE, 10)
        assert (extent.length, extent.state, extent.depth) == (SIZE, 1 | 4, 1)
        before = house.disk.flushes
        await house.node.flush()
        assert house.disk.flushes == before + 1


async def test_long_zeroes_go_in_pieces() -> None:
    async with Supervisor() as supervisor:
        house = await open_house(supervisor, size=3 << 20)
        await house.node.write_zeroes(512, (3 << 20) - 512)
        assert await house.node.read(512, (3 << 20) - 512) == bytes((3 << 20) - 512)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"key_secret": None}, "Parameter 'key-secret' is required for cipher"),
        ({"key_secret": "zz"}, "No secret with id 'zz'"),
    ],
)
async def test_secret_is_needed(options: dict[str, Any], text: str) -> None:
    host: Any = Host()
    driver = LuksDriver("l", SimpleNamespace(header=None, **options), Mode(), host)
    with pytest.raises(QmpError) as caught:
        await driver.open()
    assert caught.value.desc == text


async def test_short_image_is_refused() -> None:
    made = await formatted("aes-256")
    whole = bytearray(made.header.payload_offset)
    await made.write(Bytes(whole))
    for length, text in (
        (0, "Volume is not in LUKS format"),
        (512, "Keyslots 0 and 6 are overlapping in the header"),
        (1024, "Invalid password, cannot unlock any keyslot"),
        (512 * 600, "Could not refresh total sector count: Input/output error"),
    ):
        async with Supervisor() as supervisor:
            below = Node("disk", LateDisk(whole[:length]))
            await supervisor.start(below, Floor.NODES)
            host: Any = Host()
            driver = LuksDriver("l", SimpleNamespace(key_secret="s", header=None), Mode(), host)
            child: Any = Child(below)
            driver.children = {"file": child}
            with pytest.raises(QmpError) as caught:
                await driver.open()
            assert caught.value.desc == text


async def test_reopening_changes_neither_key_nor_header() -> None:
    assert LuksDriver.lasting == ("key_secret",)
    assert LuksDriver.fixed == {"key_secret"}
    async with Supervisor() as supervisor:
        house = await open_house(supervisor)
        other = SimpleNamespace(key_secret="s", header="h")
        with pytest.raises(QmpError) as caught:
            await house.driver.prepare_reopen(other, house.driver.mode)
        assert caught.value.desc == "Cannot change the option 'header'"
        same = SimpleNamespace(key_secret="s", header=None)
        await house.driver.prepare_reopen(same, house.driver.mode)
        house.disk.length += 512  # of another file with the same key
        house.driver.children["file"].node.refresh()
        house.driver.commit_reopen(same, house.driver.mode)
        assert house.driver.length == SIZE + 512


async def test_keys_that_another_owner_has_added_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """They lost their slot to the next key when the image came back."""
    from qsd.drivers.luks import amend, keys
    from qsd.drivers.luks.volume import open_volume

    monkeypatch.setattr(keys, "_measure", lambda _name, _length: 1000)
    async with Supervisor() as supervisor:
        house = await open_house(supervisor)
        theirs = Bytes(house.disk.data)
        volume = await open_volume(theirs, PASSWORD)
        await amend.amend_volume(volume, amendment(state="active", new_secret="r", iter_time=0), **FORCED)
        await house.driver.activate()
        add = amendment(state="active", new_secret="t", iter_time=0)
        await amend.amend_volume(house.driver.volume, add, **FORCED)
        assert await slots_of(house.disk.data, PASSWORDS) == AMENDED["add"]
        # Made anew by its owner: what is read with the old key would be noise.
        await (await formatted("aes-128")).write(theirs)
        with pytest.raises(QmpError, match="another one than it was"):
            await house.driver.activate()
        # Nor is its file exchanged for that of another volume.
        with pytest.raises(QmpError, match="another one than it was"):
            await house.driver.prepare_reopen(SimpleNamespace(key_secret="s", header=None), house.driver.mode)


def amendment(**members: Any) -> Any:
    names = ("new_secret", "old_secret", "keyslot", "iter_time", "secret")
    state = SimpleNamespace(value=members.pop("state"))
    return SimpleNamespace(state=state, **{name: members.get(name) for name in names})


async def test_killed_amendment_leaves_a_volume_that_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write of adding and of erasing a slot is the last one, once: the first password opens all the same."""
    from qsd.drivers.luks import amend, keys
    from qsd.drivers.luks.volume import Volume, open_volume

    monkeypatch.setattr(keys, "_measure", lambda _name, _length: 1000)
    made = await formatted("aes-128")

    class Recorder(Bytes):
        def __init__(self, data: bytearray) -> None:
            super().__init__(data)
            self.states: list[bytes] = []

        async def write(self, offset: int, data: bytes) -> None:
            # Torn in the middle, then whole.
            half = len(data) // 2
            await super().write(offset, data[:half])
            self.states.append(bytes(self.data))
            await super().write(offset + half, data[half:])
            self.states.append(bytes(self.data))

    area = Recorder(bytearray(made.header.area_bytes))
    await made.write(area)
    area.states.clear()
    volume = await open_volume(area, PASSWORD)
    passwords = {"s": PASSWORD, "t": b"other"}
    for change in (
        amendment(state="active", new_secret="t", iter_time=0),
        amendment(state="inactive", keyslot=1),
        amendment(state="active", new_secret="t", iter_time=0, keyslot=1),
        amendment(state="inactive", old_secret="t"),
    ):
        await amend.amend_volume(volume, change, force=False, secret=passwords.__getitem__, opened_with="s")
        assert isinstance(volume, Volume)
    assert len(area.states) == 16
    for state in area.states:
        again = await open_volume(Bytes(bytearray(state)), PASSWORD)
        assert again.header.uuid == made.header.uuid
    assert volume.header.active_slots == (0,)
    with pytest.raises(QmpError, match="Invalid password"):
        await open_volume(Bytes(bytearray(area.states[-1])), b"other")


# Which slots a password opens in the end.
AMENDED: dict[str, Any] = {
    "add": {"r": [1], "s": [0], "t": [2]},
    "erase": {"r": [], "s": [0], "t": []},
    "overwrite": {"r": [1], "s": [], "t": [0]},
    "overwrite other": {"r": [], "s": [0], "t": [1]},
}
# How many requests in a row fail, and how much of what they were to write is there.
HARDSHIPS = [(1, 1.0), (1000, 1.0), (1, 0.0), (2, 0.9), (1000, 0.0), (2, 1.0), (1, 0.9)]


async def slots_of(data: bytearray, passwords: dict[str, bytes]) -> dict[str, list[int]]:
    from qsd.drivers.luks.volume import find_slots, open_volume

    for password in passwords.values():
        try:
            volume = await open_volume(Bytes(data), password)
        except QmpError:
            continue
        return {name: await find_slots(volume, each) for name, each in passwords.items()}
    raise AssertionError("nothing opens it")


class Failing(Bytes):
    """From its write or flush number ``first`` on so many fail; of a write some is there, or all."""

    first = -1
    times = 0
    keeps = 0.0

    def _fails(self) -> bool:
        self.first -= 1
        self.times -= self.first < 0
        return self.first < 0 <= self.times

    async def write(self, offset: int, data: bytes) -> None:
        fails = self._fails()
        kept = int(len(data) * self.keeps) // 512 * 512 if fails and self.keeps < 1 else len(data)
        await super().write(offset, data[:kept])
        if fails:
            raise OSError(errno.EIO, "as arranged")

    async def flush(self) -> None:
        if self._fails():
            raise OSError(errno.EIO, "as arranged")


PASSWORDS = {"r": b"other", "s": PASSWORD, "t": b"new"}
# How they are amended.
FORCED: dict[str, Any] = {"force": True, "secret": PASSWORDS.__getitem__, "opened_with": "s"}


async def opened_by_two(make: Callable[[bytearray], Any]) -> tuple[Any, Any]:
    """An area with a volume whose slots 0 and 1 the passwords s and r open, and the open volume."""
    from qsd.drivers.luks import amend
    from qsd.drivers.luks.volume import open_volume

    made = await formatted("aes-128")
    area = make(bytearray(made.header.area_bytes))
    await made.write(area)
    volume = await open_volume(area, PASSWORD)
    await amend.amend_volume(volume, amendment(state="active", new_secret="r", iter_time=0), **FORCED)
    return area, volume


AMENDMENTS: dict[str, Any] = {
    "add": amendment(state="active", new_secret="t", iter_time=0),
    "erase": amendment(state="inactive", keyslot=1),
    "overwrite": amendment(state="active", new_secret="t", iter_time=0, keyslot=0),
    "overwrite other": amendment(state="active", new_secret="t", iter_time=0, keyslot=1),
}


@pytest.mark.parametrize("name", AMENDMENTS)
async def test_amendment_that_fails_anywhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opened the volume before does so after the error, or the new password does; it can be tried again.

    Where a single request fails the slots are as before, or as they were to be.
    """
    from qsd.drivers.luks import amend, keys
    from qsd.drivers.luks.header import LENGTH, parse_header
    from qsd.drivers.luks.volume import open_volume

    monkeypatch.setattr(keys, "_measure", lambda _name, _length: 1000)
    area, volume = await opened_by_two(Failing)
    before, header = bytes(area.data), volume.header
    slots_before = await slots_of(bytearray(before), PASSWORDS)
    for number in range(40):
        times, area.keeps = HARDSHIPS[number % len(HARDSHIPS)]
        area.data[:], volume.header, volume.left = before, header, None
        area.first, area.times = number, times
        try:
            await amend.amend_volume(volume, AMENDMENTS[name], **FORCED)
        except OSError:
            assert number < 30
        else:
            assert area.first >= 0, "nobody was told"
            break
        area.times = 0
        if times == 1:
            assert parse_header(bytes(area.data[:LENGTH])).slots == volume.header.slots
            assert await slots_of(area.data, PASSWORDS) in (slots_before, AMENDED[name])
        known = "s"
        try:
            await open_volume(Bytes(bytearray(area.data)), PASSWORD)
        except QmpError:
            assert name == "overwrite"
            await open_volume(Bytes(bytearray(area.data)), PASSWORDS["t"])
            known = "t"
        if number % 3 or times > 1:
            await amend.amend_volume(volume, AMENDMENTS[name], **FORCED | {"opened_with": known})
            # Also what held the new password meanwhile is not left from the first time.
            assert await slots_of(area.data, PASSWORDS) == AMENDED[name]
    assert number > 3
    assert await slots_of(area.data, PASSWORDS) == AMENDED[name]


@pytest.mark.parametrize("name", AMENDMENTS)
async def test_amendment_that_is_given_up_anywhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun is done: the slots are as before, or as they were to be, and what is not in use opens nothing."""
    from qsd.drivers.luks import amend, keys
    from qsd.drivers.luks.header import LENGTH, parse_header

    monkeypatch.setattr(keys, "_measure", lambda _name, _length: 1000)

    class GivenUp(Bytes):
        left = -1

        async def write(self, offset: int, data: bytes) -> None:
            self.left -= 1
            if not self.left:
                scope.cancel()
            await trio.lowlevel.checkpoint()
            await super().write(offset, data)

    area, volume = await opened_by_two(GivenUp)
    before, header = bytes(area.data), volume.header
    slots_before = await slots_of(bytearray(before), PASSWORDS)
    seen = []
    for number in range(1, 20):
        area.data[:], volume.header, area.left = before, header, number
        with trio.CancelScope() as scope:
            await amend.amend_volume(volume, AMENDMENTS[name], **FORCED)
        assert parse_header(bytes(area.data[:LENGTH])).slots == volume.header.slots
        seen.append(await slots_of(area.data, PASSWORDS))
        if area.left > 0:
            break
    assert number > 2
    assert all(each in (slots_before, AMENDED[name]) for each in seen)
    assert seen[-1] == AMENDED[name]
