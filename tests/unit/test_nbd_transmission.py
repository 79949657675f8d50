"""The transmission phase in a world of its own: whatever the socket takes when, and whenever requests end, every
request is answered. A lost wake-up shows as a world in which nothing can happen while answers are missing."""

from __future__ import annotations

import errno
import itertools
import struct
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsd.drivers.spot import Spot, end_epoch
from qsd.host.reactor import EPOLLIN, EPOLLOUT, Registration
from qsd.messages import BlockState, Extent, Loan, Op, Pieces, Request
from qsd.servers.nbd import transmission
from qsd.servers.nbd.buffers import RECEIVE_SIZES, Pool
from qsd.servers.nbd.replies import Encoder
from qsd.servers.nbd.transmission import Transmission
from qsd.wire.nbd import constants as c
from qsd.wire.nbd.handshake import ExportInfo, Negotiated
from qsd.wire.nbd.transmission import REQUEST, SIMPLE_REPLY

SIZE = 64 << 20
# The descriptor of what is lent at offset 0, those of other offsets are lower; nothing is ever asked of them. Of a
# lent range all bytes are what the first is.
LENT = -1000
# That of what is read on the spot.
ON_THE_SPOT = -78


def fill(offset: int) -> bytes:
    """The byte that is read from an offset on."""
    return bytes((offset >> 18 & 0xFF,))


def fake_preadv(fd: int, buffers: tuple[memoryview], offset: int, _flags: int) -> int:
    """Whole reads, and now and then a short one, or one that would block."""
    assert fd == ON_THE_SPOT
    (buffer,) = buffers
    outcome = offset >> 22 & 3
    if outcome == 3:
        raise BlockingIOError
    count = len(buffer) if outcome < 2 else 1
    buffer[:count] = (b"?" if outcome == 2 else fill(offset)) * count
    return count


class FakeSocket:
    """A socket whose client has sent ``inbox``; each sending call takes as many bytes as ``windows`` says next."""

    def __init__(self, inbox: bytes, windows: Iterable[int]) -> None:
        self.inbox = inbox
        self._windows = iter(windows)
        self.sent = bytearray()
        self.counts: list[int] = []
        self.is_closed = False

    def setblocking(self, _flag: bool) -> None:
        """Always non-blocking."""

    def fileno(self) -> int:
        return 7

    def recv_into(self, view: memoryview) -> int:
        if not self.inbox:
            raise BlockingIOError
        part = self.inbox[: len(view)]
        view[: len(part)] = part
        self.inbox = self.inbox[len(part) :]
        return len(part)

    def send(self, data: memoryview | bytes) -> int:
        window = next(self._windows, 64 << 20)
        if not window:
            raise BlockingIOError
        part = bytes(data[:window])
        self.sent += part
        self.counts.append(len(part))
        return len(part)

    def sendfile(self, _out: int, fd: int, _offset: int, count: int) -> int:
        """In place of os.sendfile: the bytes of a lent range are those the node would have given."""
        assert fd <= LENT
        return self.send(fill(LENT - fd << 18) * count)

    def sendmsg(self, views: list[memoryview], _ancillary: object = (), _flags: int = 0) -> int:
        return self.send(b"".join(views))

    def shutdown(self, _how: int) -> None:
        self.is_closed = True

    def close(self) -> None:
        self.is_closed = True


class FakeReactor:
    """Remembers what the connection waits for; runs what is deferred at once, as outside of a round."""

    registration: Registration

    def register(self, fd: int, ready: Callable[[int], None], crashed: Callable[[Exception], None]) -> Registration:
        self.registration = Registration(fd, ready, crashed, EPOLLIN)
        return self.registration

    def set_events(self, registration: Registration, events: int) -> None:
        registration.events = events

    def unregister(self, _registration: Registration) -> None:
        """Nothing is registered anywhere."""

    def defer(self, function: Callable[[], None], _crashed: object) -> None:
        function()


class FakeNode:
    """Ends some requests on the spot and keeps the others until ``finish``."""

    def __init__(self, is_late: Callable[[Request], bool]) -> None:
        self._is_late = is_late
        self.waiting: list[Request] = []
        self.lent = 0
        self.on_the_spot = self.bytes_on_the_spot = 0

    def submit(self, batch: list[Request]) -> None:
        for request in batch:
            if self._is_late(request):
                self.waiting.append(request)
            else:
                self._serve(request)

    def finish(self, index: int) -> None:
        self._serve(self.waiting.pop(index % len(self.waiting)))

    def spot(self) -> Spot:
        """Every other mebibyte is read on the spot, or tried to be."""
        return Spot(lambda offset, length: (ON_THE_SPOT, offset, 0) if offset >> 21 & 1 else None)

    def served(self, count: int, size: int) -> None:
        self.on_the_spot += count
        self.bytes_on_the_spot += size

    def _give_back(self) -> None:
        self.lent -= 1

    def _serve(self, request: Request) -> None:
        if request.op == Op.READ and request.flags and request.offset >> 20 & 1:
            self.lent += 1
            request.result = Loan(LENT - (request.offset >> 18), request.offset, request.length, self._give_back)
        elif request.op == Op.READ and request.flags and request.offset >> 21 & 1:
            assert request.buffer is not None
            # The middle of the reply is somewhere else.
            data, start, stop = fill(request.offset), request.length // 4, request.length // 2
            request.buffer[:] = data * start + bytes(stop - start) + data * stop
            views = [request.buffer[:start], memoryview(data * (stop - start)), request.buffer[stop:]]
            request.result = Pieces(views)
        elif request.op == Op.READ:
            assert request.buffer is not None
            request.buffer[:] = fill(request.offset) * request.length
        elif request.op == Op.BLOCK_STATUS:
            request.result = [Extent(request.length, BlockState.DATA)]
        request.complete(errno.EIO if request.offset == SIZE - 4096 else 0)


class World:
    """One connection with everything around it."""

    def __init__(
        self,
        inbox: bytes,
        windows: Iterable[int],
        is_late: Callable[[Request], bool],
        contexts: tuple[tuple[int, str], ...] = (),
    ) -> None:
        self.sock = FakeSocket(inbox, windows)
        self.reactor = FakeReactor()
        self.node = FakeNode(is_late)
        self.ended: list[str] = []
        export = ExportInfo("e", SIZE, read_only=False)
        sock: Any = self.sock
        reactor: Any = self.reactor
        self.transmission = Transmission(
            sock,
            reactor,
            self.node,
            Encoder(Negotiated(export, bool(contexts), False, contexts, b""), writethrough=False),
            Pool(),
            alignment=1,
            leftover=b"",
            ended=self.ended.append,
            crashed=self._crashed,
        )
        self.transmission.start()

    @staticmethod
    def _crashed(error: Exception) -> None:
        raise error

    def run(self, picks: list[int]) -> None:
        """Let things happen, a socket event first, else the end of a late request, until nothing can."""
        with mock.patch("os.sendfile", self.sock.sendfile), mock.patch("os.preadv", fake_preadv):
            self._run(picks)

    def _run(self, picks: list[int]) -> None:
        for pick in itertools.cycle(picks):
            events = self.reactor.registration.events & ((EPOLLIN if self.sock.inbox else 0) | EPOLLOUT)
            if events:
                self.reactor.registration.ready(events)
            elif self.node.waiting:
                self.node.finish(pick)
            else:
                return


def read(cookie: int, offset: int, length: int) -> bytes:
    return REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_READ, cookie, offset, length)


def write(cookie: int, offset: int, length: int) -> bytes:
    return REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_WRITE, cookie, offset, length) + bytes(length)


def cookies_answered(sent: bytes, reads: dict[int, tuple[int, int]]) -> list[int]:
    """Walk the simple replies. ``reads`` has offset and length of what was read; its data must be the node's."""
    found = []
    position = 0
    while position < len(sent):
        magic, error, cookie = SIMPLE_REPLY.unpack_from(sent, position)
        assert magic == c.SIMPLE_REPLY_MAGIC
        position += SIMPLE_REPLY.size
        offset, length = (0, 0) if error else reads.get(cookie, (0, 0))
        assert sent[position : position + length] == fill(offset) * length
        position += length
        found.append(cookie)
    assert position == len(sent)
    return found


kinds = st.tuples(
    st.booleans(), st.sampled_from((512, 4096, 20000, 65536, 262144, 1 << 20)), st.booleans(), st.booleans()
)


@settings(deadline=None, max_examples=60)
@given(
    requests=st.lists(kinds, min_size=1, max_size=40),
    windows=st.lists(st.sampled_from((0, 100, 5000, 300_000, 4 << 20)), max_size=20),
    picks=st.lists(st.integers(0, 50), min_size=1, max_size=8),
    slice_ns=st.sampled_from((-1, 1 << 40)),
)
def test_every_request_is_answered(
    requests: list[tuple[bool, int, bool, bool]], windows: list[int], picks: list[int], slice_ns: int
) -> None:
    inbox = b""
    reads: dict[int, tuple[int, int]] = {}
    late = set()
    for cookie, (is_read, length, is_late, fails) in enumerate(requests):
        # A request is known by its offset; the last block of the export is the one that cannot be read.
        offset = SIZE - 4096 if fails and length <= 4096 else cookie << 20
        inbox += (read if is_read else write)(cookie, offset, length)
        if is_read:
            reads[cookie] = offset, length
        if is_late:
            late.add(offset)
    world = World(inbox, windows, lambda request: request.offset in late)
    with mock.patch.object(transmission, "SLICE_NS", slice_ns):
        world.run(picks)
    assert sorted(cookies_answered(bytes(world.sock.sent), reads)) == list(range(len(requests)))
    assert not world.sock.inbox
    assert not world.ended
    assert not world.node.lent, "a loan was not given back"


def test_socket_that_empties_at_once_leaves_nothing_unparsed() -> None:
    """Replies of more than a batch were owed, the socket then took them all, and what had arrived stayed unseen."""
    count = 24
    inbox = b"".join(read(cookie, cookie << 18, 256 << 10) for cookie in range(count))
    for refusals in range(6):
        world = World(inbox, [0] * refusals, lambda _request: False)
        world.run([0])
        reads = {cookie: (cookie << 18, 256 << 10) for cookie in range(count)}
        assert cookies_answered(bytes(world.sock.sent), reads) == list(range(count))


@pytest.mark.parametrize("fails_at", [-1, 0, 1])
def test_trim_with_fua_is_answered_when_it_has_reached_the_disk(fails_at: int) -> None:
    """As the protocol and the reference have it; it was answered as soon as it was done."""
    trim = REQUEST.pack(c.REQUEST_MAGIC, c.CMD_FLAG_FUA, c.CMD_TRIM, 5, 4096, 4096)
    world = World(trim, [], lambda _request: True)
    world.reactor.registration.ready(EPOLLIN)
    for step, op in enumerate((Op.DISCARD, Op.FLUSH)[: 1 if fails_at == 0 else 2]):
        assert not world.sock.sent
        assert world.transmission.in_flight == 1
        (request,) = world.node.waiting
        world.node.waiting.clear()
        assert request.op == op
        request.complete(errno.EIO if step == fails_at else 0)
    assert world.sock.sent == SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, 0 if fails_at < 0 else errno.EIO, 5)
    assert world.transmission.in_flight == 0
    assert not world.node.waiting


def test_client_that_asks_on_and_takes_no_answer_is_not_read_for_ever() -> None:
    """What had arrived grew by a byte an event, with a system call and a copy of all of it for each."""
    asked = read(1, 0, 1 << 20) * 2 + read(2, 0, 4096) * 20000
    world = World(asked, itertools.repeat(0), lambda _request: False)
    events = 0
    while world.reactor.registration.events & EPOLLIN and world.sock.inbox and events < 1000:
        world.reactor.registration.ready(EPOLLIN)
        events += 1
    assert events < 10
    assert world.transmission.stats.bytes_received <= RECEIVE_SIZES[0]
    assert world.reactor.registration.events & EPOLLOUT
    world.transmission.disconnect("gone")
    assert world.ended == ["gone"]


def test_client_that_leaves_gives_its_loans_back() -> None:
    world = World(read(1, 1 << 20, 1 << 20), [1000, 5000, 0, 0], lambda _request: False)
    with mock.patch("os.sendfile", world.sock.sendfile):
        world.reactor.registration.ready(EPOLLIN)
        assert world.node.lent == 1
        world.transmission.disconnect("gone")
    assert not world.node.lent
    assert world.ended == ["gone"]


def test_work_for_longer_than_a_slice_lets_others_have_a_turn_after_each_batch() -> None:
    count = 24
    world = World(
        b"".join(read(cookie, cookie << 20, 1 << 20) for cookie in range(count)), [], lambda _request: False
    )
    ready = world.reactor.registration.ready
    with mock.patch("os.sendfile", world.sock.sendfile), mock.patch.object(transmission, "SLICE_NS", -1):
        ready(EPOLLIN)
        assert world.transmission.stats.requests < 4
        assert world.reactor.registration.events & EPOLLOUT
        world.transmission.disconnect("gone")
    assert world.ended == ["gone"]


def test_what_is_read_on_the_spot_is_sent_with_its_neighbours_and_nobody_else_hears_of_it() -> None:
    places = [2 << 20, (2 << 20) + 4096, 1 << 20, 3 << 20, 8 << 20]
    world = World(b"".join(read(n, place, 4096) for n, place in enumerate(places)), [], lambda _request: True)
    world.run([0])
    assert world.sock.counts[0] == 3 * (SIMPLE_REPLY.size + 4096)
    assert sorted(
        cookies_answered(bytes(world.sock.sent), {n: (place, 4096) for n, place in enumerate(places)})
    ) == [*range(5)]
    assert (world.node.on_the_spot, world.node.bytes_on_the_spot) == (3, 3 * 4096)


def test_few_block_status_requests_are_under_way_however_many_arrive() -> None:
    count = 300
    status = [REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_BLOCK_STATUS, n, 0, 4096) for n in range(count)]
    world = World(b"".join(status), [], lambda _request: True, contexts=((1, "base:allocation"),))
    most = 0
    while world.sock.inbox or world.node.waiting:
        if world.reactor.registration.events & EPOLLIN and world.sock.inbox:
            world.reactor.registration.ready(EPOLLIN)
        most = max(most, len(world.node.waiting))
        world.node.finish(0)
    assert 16 <= most <= 32
    assert world.transmission.stats.requests == count
    assert not world.transmission.in_flight
    assert world.reactor.registration.events == EPOLLIN


def test_run_of_reads_longer_than_a_slab_is_on_the_spot_to_its_end() -> None:
    reads = {n: ((2 << 20) + 512 * n, 31 << 10) for n in range(80)}
    arrived = b"".join(read(n, *place) for n, place in reads.items())
    world = World(arrived[:-5], [0, 100, 0, 600_000, 0], lambda _request: False)
    world.run([0])
    world.sock.inbox = arrived[-5:]
    world.run([0])
    assert cookies_answered(bytes(world.sock.sent), reads) == [*range(80)]
    assert world.node.on_the_spot == 80


def test_after_a_read_that_would_block_the_rest_of_what_arrived_takes_the_usual_way() -> None:
    places = [14 << 20, 2 << 20]
    world = World(b"".join(read(n, place, 4096) for n, place in enumerate(places)), [], lambda _request: False)
    world.run([0])
    assert cookies_answered(bytes(world.sock.sent), {n: (place, 4096) for n, place in enumerate(places)}) == [0, 1]
    assert not world.node.on_the_spot
    assert world.transmission.stats.requests == 2


def test_spot_is_asked_for_anew_when_the_epoch_has_ended() -> None:
    world = World(read(1, 2 << 20, 4096), [], lambda _request: False)
    world.run([0])
    world.node.spot = lambda: None  # type: ignore[method-assign,assignment,return-value]
    world.sock.inbox = read(2, 2 << 20, 4096)
    world.run([0])
    assert world.node.on_the_spot == 2
    end_epoch()
    world.sock.inbox = read(3, 2 << 20, 4096)
    world.run([0])
    assert world.node.on_the_spot == 2
    assert world.transmission.stats.requests == 3


def test_layout_is_the_protocols() -> None:
    assert read(1, 2, 3) == struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 2, 3)
