"""A FUSE session against a kernel of our own: a socket pair whose messages are those of /dev/fuse."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from qsd.drivers.base import Limits
from qsd.errors import QmpError
from qsd.host.reactor import Reactor
from qsd.messages import BlockState, Extent, Flag, Op, Request
from qsd.servers.fuse import session as session_module
from qsd.servers.fuse.buffers import Pool
from qsd.servers.fuse.file import NodeFile
from qsd.servers.fuse.session import Session
from qsd.wire.fuse import KERNEL_MINOR, Opcode

SIZE = 64 << 10


class FakeEdge:
    """A node of ``data``, and its driver; requests it ``holds`` end when the test says so."""

    def __init__(self) -> None:
        self.node = self.driver = self
        self.data = bytearray(os.urandom(SIZE))
        self.limits = Limits()
        self.holds = False
        self.held: list[Request] = []
        self.seen: list[tuple[int, int, int, int]] = []

    @property
    def length(self) -> int:
        return len(self.data)

    def submit(self, batch: list[Request]) -> None:
        for request in batch:
            self.seen.append((request.op, request.offset, request.length, request.flags))
            if self.holds:
                self.held.append(request)
            else:
                self.serve(request)

    def serve(self, request: Request, error: int = 0) -> None:
        if request.buffer is not None and not error:
            start, end = request.offset, request.offset + request.length
            if request.op == Op.READ:
                request.buffer[:] = self.data[start:end]
            elif request.op == Op.WRITE:
                self.data[start:end] = request.buffer
        request.complete(error)

    def allocated_size(self) -> int | None:
        return None

    async def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        self.data[offset : offset + length] = bytes(length)

    async def block_status(self, offset: int, length: int, extents: int = 1) -> list[Extent]:
        return [Extent(length, BlockState.DATA | BlockState.ALLOCATED)]

    async def write(self, offset: int, data: memoryview, flags: int = 0) -> None:
        self.data[offset : offset + len(data)] = data

    async def truncate(self, size: int) -> None:
        if size > 4 * SIZE:
            raise QmpError("Failed to resize: File too large") from OSError(errno.EFBIG, "too large")
        self.data = self.data[:size] + bytes(max(0, size - len(self.data)))


@attrs.define
class Kernel:
    """The other end: says calls, hears replies as (unique, error, body)."""

    end: socket.socket
    edge: FakeEdge
    session: Session
    pool: Pool
    spawned: list[tuple[Callable[..., Any], tuple[Any, ...]]]
    told: list[str]
    unique: int = 1000

    def say(self, opcode: int, body: bytes = b"") -> int:
        """Send a call without waiting for its reply; its number."""
        self.unique += 2
        head = struct.pack("=IIQQIIIHH", 40 + len(body), opcode, self.unique, 1, 0, 0, 9, 0, 0)
        self.end.send(head + body)
        return self.unique

    def replies(self) -> list[tuple[int, int, bytes]]:
        """What has been answered; the call's number first."""
        found = []
        while True:
            try:
                reply = self.end.recv(1 << 20)
            except BlockingIOError:
                return found
            length, error, unique = struct.unpack_from("=IiQ", reply)
            assert length == len(reply)
            found.append((unique, error, reply[16:]))

    def turn(self, times: int = 40) -> list[tuple[int, int, bytes]]:
        """Let the session serve what was said."""
        for _ in range(times):
            self.session._round()
        return self.replies()

    def ask(self, opcode: int, body: bytes = b"") -> tuple[int, bytes]:
        """One call and its reply: error (0 or negative), body."""
        number = self.say(opcode, body)
        ((unique, error, reply),) = self.turn()
        assert unique == number
        return error, reply

    async def run_tasks(self) -> list[tuple[int, int, bytes]]:
        while self.spawned:
            function, args = self.spawned.pop(0)
            await function(*args)
        return self.replies()


def rw(offset: int, size: int, flags: int = 2) -> bytes:
    return struct.pack("=QQIIQII", 0, offset, size, 0, 0, flags, 0)


def init(minor: int = 45) -> bytes:
    return struct.pack("=IIIII44x", 7, minor, 131072, 0xFFFFFFFF & ~(1 << 31), 0xFFFF)


def make(*, writable: bool = True, growable: bool = False, greeted: bool = True) -> Kernel:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.setblocking(False)
    edge: Any = FakeEdge()
    spawned: list[Any] = []
    told: list[str] = []
    pool = Pool()

    def crashed(error: Exception) -> None:
        raise error

    session = Session(
        ours.detach(),
        NodeFile(edge, writable=writable, growable=growable, writethrough=False),
        Reactor(),
        pool,
        spawn=lambda function, *args, name: spawned.append((function, args)),
        ready=lambda: told.append("ready"),
        lost=lambda: told.append("lost"),
        idle=lambda: told.append("idle"),
        crashed=crashed,
    )
    session.start()
    kernel = Kernel(theirs, edge, session, pool, spawned, told)
    if greeted:
        assert kernel.ask(Opcode.INIT, init())[0] == 0
    return kernel


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    made = make()
    yield made
    close(made)


def close(kernel: Kernel) -> None:
    kernel.session.stop()
    kernel.session._reactor.close()
    os.close(kernel.session._fd)
    kernel.end.close()


def test_nothing_is_transferred_before_init() -> None:
    kernel = make(greeted=False)
    assert kernel.ask(Opcode.READ, rw(0, 4096)) == (-errno.EINVAL, b"")
    assert kernel.told == []
    error, body = kernel.ask(Opcode.INIT, init(minor=99))
    assert error == 0
    assert struct.unpack_from("=II", body) == (7, KERNEL_MINOR)
    assert kernel.told == ["ready"]
    assert kernel.ask(Opcode.READ, rw(0, 4096)) == (0, bytes(kernel.edge.data[:4096]))
    close(kernel)


def test_a_kernel_too_old_is_refused() -> None:
    kernel = make(greeted=False)
    assert kernel.ask(Opcode.INIT, init(minor=8)) == (-errno.EPROTO, b"")
    assert kernel.told == []
    close(kernel)


def test_reads_end_where_the_file_ends(kernel: Kernel) -> None:
    data = bytes(kernel.edge.data)
    assert kernel.ask(Opcode.READ, rw(100, 300)) == (0, data[100:400])
    assert kernel.ask(Opcode.READ, rw(SIZE - 10, 4096)) == (0, data[-10:])
    assert kernel.ask(Opcode.READ, rw(SIZE, 4096)) == (0, b"")
    assert kernel.ask(Opcode.READ, rw(2**64 - 1, 4096)) == (0, b"")
    assert kernel.ask(Opcode.READ, rw(0, 0)) == (0, b"")
    assert kernel.ask(Opcode.READ, rw(0, 2**32 - 1)) == (-errno.EINVAL, b"")


async def test_writes_end_where_the_file_ends(kernel: Kernel) -> None:
    assert kernel.ask(Opcode.WRITE, rw(5, 3) + b"abc") == (0, struct.pack("=II", 3, 0))
    kernel.say(Opcode.WRITE, rw(SIZE - 2, 3) + b"def")
    assert kernel.turn() == []
    ((_, error, body),) = await kernel.run_tasks()
    assert (error, body) == (0, struct.pack("=II", 2, 0))
    assert kernel.edge.data[5:8] == b"abc"
    assert kernel.edge.data[-2:] == b"de"
    assert kernel.ask(Opcode.WRITE, rw(0, 4) + b"abc")[0] == -errno.EINVAL
    assert kernel.session.in_flight == 0


async def test_a_growable_file_grows() -> None:
    kernel = make(growable=True)
    number = kernel.say(Opcode.WRITE, rw(SIZE + 5, 3) + b"abc")
    assert kernel.turn() == []
    assert await kernel.run_tasks() == [(number, 0, struct.pack("=II", 3, 0))]
    assert kernel.edge.data[SIZE:] == bytes(5) + b"abc"
    number = kernel.say(Opcode.WRITE, rw(2**63 - 1, 3) + b"abc")
    kernel.turn()
    assert await kernel.run_tasks() == [(number, -errno.EFBIG, b"")]
    close(kernel)


def test_a_read_only_file_is_not_written() -> None:
    kernel = make(writable=False)
    assert kernel.ask(Opcode.WRITE, rw(5, 3) + b"abc") == (-errno.EACCES, b"")
    assert kernel.edge.seen == []
    close(kernel)


def test_synchronous_writes_reach_the_disk_before_they_are_answered(kernel: Kernel) -> None:
    kernel.ask(Opcode.WRITE, rw(0, 3, flags=os.O_RDWR) + b"abc")
    kernel.ask(Opcode.WRITE, rw(0, 3, flags=os.O_RDWR | os.O_DSYNC) + b"abc")
    kernel.ask(Opcode.WRITE, rw(0, 3, flags=os.O_RDWR | os.O_SYNC) + b"abc")
    assert [flags for _, _, _, flags in kernel.edge.seen] == [0, Flag.FUA, Flag.FUA]


def test_errors_of_the_node_are_answered(kernel: Kernel) -> None:
    kernel.edge.holds = True
    numbers = [
        kernel.say(Opcode.READ, rw(0, 512)),
        kernel.say(Opcode.WRITE, rw(0, 3) + b"abc"),
        kernel.say(Opcode.FSYNC, bytes(16)),
    ]
    assert kernel.turn() == []
    for request in kernel.edge.held:
        kernel.edge.serve(request, errno.ENOSPC)
    kernel.session._collect()
    assert kernel.replies() == [(number, -errno.ENOSPC, b"") for number in numbers]
    assert kernel.session.in_flight == 0


def test_calls_nobody_serves_are_told_so(kernel: Kernel) -> None:
    for opcode in (1, 5, 21, 22, 34, 39, 40, 52, 53, 4096, 2**32 - 1):
        assert kernel.ask(opcode, bytes(64)) == (-errno.ENOSYS, b"")


def test_forgetting_has_no_reply(kernel: Kernel) -> None:
    kernel.say(Opcode.FORGET, struct.pack("=Q", 1))
    kernel.say(Opcode.BATCH_FORGET, struct.pack("=IIQQ", 1, 0, 1, 1))
    assert kernel.turn() == []


def test_an_interrupted_reader_does_not_wait(kernel: Kernel) -> None:
    kernel.edge.holds = True
    read = kernel.say(Opcode.READ, rw(0, 4096))
    write = kernel.say(Opcode.WRITE, rw(0, 3) + b"abc")
    kernel.turn()
    for target in (write, read, read, 5):
        kernel.say(Opcode.INTERRUPT, struct.pack("=Q", target))
    assert kernel.turn() == [(read, -errno.EINTR, b"")]
    assert kernel.session.in_flight == 2
    # The memory is lent until the node is done with it, and nothing is said twice.
    for request in kernel.edge.held:
        kernel.edge.serve(request)
    kernel.session._collect()
    assert kernel.replies() == [(write, 0, struct.pack("=II", 3, 0))]
    assert kernel.session.stats.interrupted == 1


def test_what_is_in_flight_is_bounded(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "MAX_CALLS", 4)
    kernel.edge.holds = True
    registration = kernel.session._registration
    assert registration is not None
    for _ in range(6):
        kernel.say(Opcode.READ, rw(0, 512))
    rounds = 0
    while registration.events:
        kernel.session._round()
        rounds += 1
        assert rounds < 100
    assert kernel.session.in_flight == 4
    kernel.edge.serve(kernel.edge.held.pop())
    kernel.session._collect()
    assert registration.events
    assert len(kernel.replies()) == 1


def test_the_end_of_the_connection_is_told_once(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_fd: int, _buffers: Any) -> int:
        raise OSError(errno.ENODEV, "no such device")

    kernel.edge.holds = True
    kernel.say(Opcode.READ, rw(0, 512))
    kernel.turn()
    monkeypatch.setattr(os, "readv", gone)
    kernel.turn()
    assert kernel.told == ["ready", "lost"]
    kernel.edge.serve(kernel.edge.held.pop())
    assert kernel.told == ["ready", "lost", "idle"]
    assert kernel.session.in_flight == 0


def test_many_calls_are_one_batch(kernel: Kernel) -> None:
    for _ in range(3):
        for _ in range(20):
            kernel.say(Opcode.READ, rw(0, 512))
        assert len(kernel.turn()) == 20
    # Slots come back: as many as were in flight at once, not as many as there were calls.
    assert len(kernel.pool.free) <= 33


def test_large_slots_give_their_memory_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool()
    slots = [pool.make() for _ in range(20)]
    for slot in slots:
        slot.view[4096 : 4096 + (1 << 20)] = b"x" * (1 << 20)
        pool.give_back(slot, 1 << 20)
    kept = sum(slot.view[-1] == ord("x") for slot in slots)
    assert kept == 8
    assert all(slot.view[4096] == ord("x") for slot in slots)


@given(
    st.lists(
        st.tuples(st.sampled_from(list(Opcode)) | st.integers(0, 2**32 - 1), st.binary(max_size=120)), max_size=20
    )
)
def test_no_message_upsets_a_session(messages: list[tuple[int, bytes]]) -> None:
    kernel = make()
    try:
        for opcode, body in messages:
            kernel.say(opcode, body)
            kernel.turn(3)
        kernel.turn()
        trio.run(kernel.run_tasks)
        assert kernel.session.in_flight == 0
    finally:
        close(kernel)


async def test_memory_of_a_write_nobody_waits_for_any_more_is_not_used_again(kernel: Kernel) -> None:
    """An export that ends by a crash gave it to the next call of another one, and that was written instead."""
    lent: list[memoryview] = []

    async def write(_offset: int, data: memoryview, _flags: int = 0) -> None:
        lent.append(data)
        await trio.sleep_forever()

    kernel.edge.write = write  # type: ignore[method-assign]
    kernel.say(Opcode.WRITE, rw(SIZE - 512, 1024) + bytes(1024))
    assert kernel.turn() == []
    async with trio.open_nursery() as nursery:
        ((function, args),) = kernel.spawned
        nursery.start_soon(function, *args)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert [error for _unique, error, _body in kernel.replies()] == [-errno.EIO]
    assert lent[0].obj not in [slot.memory for slot in kernel.pool.free]
