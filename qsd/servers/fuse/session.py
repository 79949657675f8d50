"""The data path of one mounted file: what the kernel has asked in one pass, a batch to the node, the answers.

A request is one ``readv``: its head into memory of its own, so that a write's payload lies page-aligned in a buffer
that is lent to the node as it is. A read's buffer goes to the kernel behind its header with one ``writev``. Both
come from one pool. Everything that is not a plain read or write is the operations' (``operations.py``).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Protocol

import attrs
from trio_util import RepeatedEvent

from qsd.host.memory import AlignedPool
from qsd.host.reactor import EPOLLIN, Reactor, Registration
from qsd.messages import Op, ReplyQueue, Request
from qsd.wire import fuse

READ = Op.READ.value
WRITE = Op.WRITE.value
_FUSE_READ = fuse.Opcode.READ.value
_FUSE_WRITE = fuse.Opcode.WRITE.value

# The kernel insists on room for a header and a whole write.
_ROOM = fuse.MAX_TRANSFER + fuse.PAGE
# Free buffers kept for the next requests.
POOL_BYTES = 16 << 20
# Requests taken in one pass; and the passes after which a single request is followed by another look, because a
# look in vain costs 2 us, a tenth of a request that comes alone.
BURST = 32
LOOK_AGAIN = 8
# Requests under way above which the kernel is not asked for more.
MAX_IN_FLIGHT = 256

Buffer = tuple[memoryview, int]
# The request's ``unique``, and the buffer it was lent.
Tag = tuple[int, Buffer]


class Target(Protocol):
    """What is served: an export's edge to its node."""

    @property
    def length(self) -> int: ...

    def submit(self, batch: list[Request]) -> None: ...


class Control(Protocol):
    """Who answers what is no plain read or write."""

    def control(self, header: fuse.Header, body: fuse.Body) -> None:
        """Answer now or later, by ``Session.send``."""

    def write_beyond(self, unique: int, offset: int, data: memoryview, give_back: Callable[[], None]) -> None:
        """A write that reaches beyond the end of the node. ``data`` is lent until ``give_back`` is called."""


@attrs.define
class SessionStatistics:
    """What the kernel asked for."""

    requests: int = 0
    rd_bytes: int = 0
    wr_bytes: int = 0


class Session:
    """See the module. ``ended()`` is called once when the kernel asks no more (unmounted)."""

    def __init__(
        self,
        fd: int,
        reactor: Reactor,
        target: Target,
        control: Control,
        *,
        write_flags: int,
        ended: Callable[[], None],
        crashed: Callable[[Exception], None],
    ) -> None:
        self._fd = fd
        self._reactor = reactor
        self._target = target
        self._control = control
        self._write_flags = write_flags
        self._ended = ended
        self._crashed = crashed
        self.stats = SessionStatistics()
        self._replies = ReplyQueue(self._notified)
        self._replies.armed = True
        self._pool = AlignedPool(POOL_BYTES)
        self._head = bytearray(fuse.HEAD_LENGTH)
        self._data = self._pool.take(_ROOM)
        self._out = bytearray(fuse.OUT_HEADER.size)
        self._submitted = 0
        self._passes = 0
        self._is_busy = False
        self._idle = RepeatedEvent()
        self._registration: Registration | None = None

    def start(self) -> None:
        """Begin to take requests."""
        os.set_blocking(self._fd, False)
        self._registration = self._reactor.register(self._fd, self._ready, self._crashed)

    def stop(self) -> None:
        """Take no more requests; those under way are still answered. Idempotent."""
        if self._registration is not None:
            self._reactor.unregister(self._registration)
            self._registration = None

    def close(self) -> None:
        """Close the descriptor, which ends the connection. Nothing may be in flight."""
        self.stop()
        os.close(self._fd)

    @property
    def in_flight(self) -> int:
        """Reads and writes submitted and not completed."""
        return self._submitted

    async def wait_idle(self) -> None:
        """Return when no read or write is under way."""
        while self._submitted:
            await self._idle.wait()

    # -- taking -----------------------------------------------------------------------------------------------

    def _ready(self, _events: int) -> None:
        batch: list[Request] = []
        self._passes += 1
        looks = BURST if self._is_busy or self._passes % LOOK_AGAIN == 0 else 1
        taken = 0
        while taken < looks and self._take(batch):
            taken += 1
        if looks > 1:
            self._is_busy = taken > 1
        self.stats.requests += taken
        if batch:
            self._submitted += len(batch)
            self._target.submit(batch)
        self._work()

    def _take(self, batch: list[Request]) -> bool:
        """Take one request; False when there is none, or no more to come."""
        head = self._head
        try:
            count = os.readv(self._fd, (head, self._data[0]))
        except BlockingIOError:
            return False
        except OSError as error:
            # A request that was interrupted before it was taken leaves ENOENT.
            if error.errno in (errno.ENOENT, errno.EINTR):
                return True
            self.stop()
            self._ended()
            return False
        _length, opcode, unique = fuse.IN_HEADER.unpack_from(head)[:3]
        if opcode == _FUSE_READ:
            _fh, offset, length = fuse.TRANSFER.unpack_from(head, fuse.IN_HEADER.size)[:3]
            length = min(length, fuse.MAX_TRANSFER, self._target.length - offset)
            if length <= 0:
                self.send(fuse.answer(unique))
                return True
            buffer = self._pool.take(length)
            batch.append(Request(READ, offset, length, buffer[0][:length], self._replies, 0, (unique, buffer)))
        elif opcode == _FUSE_WRITE:
            self._take_write(batch, unique, count)
        else:
            self._take_other(count)
        return True

    def _take_write(self, batch: list[Request], unique: int, count: int) -> None:
        _fh, offset, length = fuse.TRANSFER.unpack_from(self._head, fuse.IN_HEADER.size)[:3]
        if length != count - fuse.HEAD_LENGTH:
            self.send(fuse.refuse(unique, errno.EIO))
            return
        buffer = self._data
        self._data = self._pool.take(_ROOM)
        payload = buffer[0][:length]
        if offset + length > self._target.length:
            self._control.write_beyond(unique, offset, payload, lambda: self._pool.give_back(buffer))
            return
        batch.append(Request(WRITE, offset, length, payload, self._replies, self._write_flags, (unique, buffer)))

    def _take_other(self, count: int) -> None:
        message = bytes(self._head) + bytes(self._data[0][: max(0, count - fuse.HEAD_LENGTH)])
        message = message[:count]
        try:
            header = fuse.parse_header(message)
        except fuse.ProtocolError as error:
            self._crashed(error)
            return
        try:
            body = fuse.parse_body(header, message)
        except fuse.ProtocolError:
            self.send(fuse.refuse(header.unique, errno.EINVAL))
            return
        self._control.control(header, body)

    # -- answering --------------------------------------------------------------------------------------------

    def _notified(self) -> None:
        self._reactor.defer(self._work, self._crashed)

    def _work(self) -> None:
        replies = self._replies
        while replies.ready:
            ready = replies.ready
            replies.ready = []
            self._submitted -= len(ready)
            for request in ready:
                self._reply(request)
        replies.armed = True
        if self._registration is not None:
            self._reactor.set_events(self._registration, EPOLLIN if self._submitted < MAX_IN_FLIGHT else 0)
        if not self._submitted:
            self._idle.set()

    def _reply(self, request: Request) -> None:
        unique, buffer = request.tag
        if request.error:
            self.send(fuse.refuse(unique, request.error))
        elif request.op == READ:
            self.stats.rd_bytes += request.length
            out = self._out
            fuse.OUT_HEADER.pack_into(out, 0, fuse.OUT_HEADER.size + request.length, 0, unique)
            self._write((out, request.buffer))  # type: ignore[arg-type]  # a read has its buffer
        else:
            self.stats.wr_bytes += request.length
            self.send(fuse.answer(unique, fuse.pack_written(request.length)))
        self._pool.give_back(buffer)

    def send(self, message: bytes) -> None:
        """Give the kernel an answer or a notification."""
        self._write((message,))

    def _write(self, parts: tuple[bytes | bytearray | memoryview, ...]) -> None:
        try:
            os.writev(self._fd, parts)
        except OSError as error:
            # ENOENT: nobody waits for it any more; the others: the mount has gone.
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED, errno.EPERM, errno.ENOTCONN):
                raise
