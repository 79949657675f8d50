"""One FUSE connection on the reactor: everything that has arrived is one batch, each reply is one write.

A call's successful reply is laid out when the call is parsed (``buffers``), so a READ or WRITE that ends well costs
one system call each for the message, the data and the reply. Whether the kernel has more calls can only be found
out by asking, and a vain attempt costs as much as a call: while calls come one at a time only one is read a round,
and every ``PROBE`` rounds a second is tried; once that finds one, reading goes on to the end.

Backpressure: ``MAX_CALLS`` and ``MAX_BYTES`` in flight; beyond that the device is not read, and callers wait.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import trio

from qsd import trace
from qsd.host.reactor import EPOLLIN, Reactor, Registration
from qsd.messages import Op, ReplyQueue, Request
from qsd.servers.fuse.buffers import DATA, LARGE, MAX_TRANSFER, MESSAGE, READ_REPLY, WRITE_REPLY, Pool, Slot
from qsd.servers.fuse.file import NodeFile
from qsd.wire import fuse as wire
from qsd.wire.fuse import InitFlag, Opcode

log = logging.getLogger("qsd.fuse")

CALL = trace.event("fuse_call")
INIT = trace.event("fuse_init")

MAX_CALLS = 128
MAX_BYTES = 16 << 20
# Data of one batch: stays in the CPU's cache between the node and the kernel.
BATCH_BYTES = 512 << 10
PROBE = 16
# Rounds in a row with a single call after which only one is read a round.
LONELY = 4
# Seconds the kernel may believe attributes; a change of the size is told at once.
ATTRIBUTES_VALID = 1

WISHES = wire.Wishes(
    flags=int(
        InitFlag.ASYNC_READ
        | InitFlag.ATOMIC_O_TRUNC
        | InitFlag.BIG_WRITES
        # A page of a mapping is read again when the file may have changed under it: its times always have.
        | InitFlag.AUTO_INVAL_DATA
        # Without it the kernel sends the parts of an asynchronous direct transfer one after the other.
        | InitFlag.ASYNC_DIO
        | InitFlag.PARALLEL_DIROPS
        | InitFlag.MAX_PAGES
        | InitFlag.INIT_EXT
        | InitFlag.DIRECT_IO_ALLOW_MMAP
    ),
    max_transfer=MAX_TRANSFER,
    max_background=1024,
    congestion_threshold=768,
)

READ = Op.READ.value
WRITE = Op.WRITE.value
_READ = Opcode.READ.value
_WRITE = Opcode.WRITE.value
_HEAD = wire.TRANSFER.size
_DSYNC = os.O_DSYNC
_FUA = 1  # messages.Flag.FUA: an IntFlag's operators cost a microsecond

# The kernel has taken the call back: the caller was killed, or the mount is coming apart.
_TAKEN_BACK = (errno.ENOENT, errno.EINTR)

Spawn = Callable[..., None]


@attrs.define
class SessionStatistics:
    """What one connection was asked for."""

    calls: int = 0
    failed: int = 0
    interrupted: int = 0


class Session:
    """See the module. ``lost()`` is called once when the kernel has ended the connection (it was unmounted)."""

    def __init__(
        self,
        fd: int,
        file: NodeFile,
        reactor: Reactor,
        pool: Pool,
        *,
        spawn: Spawn,
        ready: Callable[[], None],
        lost: Callable[[], None],
        idle: Callable[[], None],
        crashed: Callable[[Exception], None],
    ) -> None:
        self._fd = fd
        self._file = file
        self._target = file.edge
        self._reactor = reactor
        self._pool = pool
        self._spawn = spawn
        self._is_ready = ready
        self._is_lost = lost
        self._is_idle = idle
        self._crashed = crashed
        self.stats = SessionStatistics()
        self._replies = ReplyQueue(self._notified)
        self._submitted = 0  # requests in batches that have not ended
        self._tasks = 0  # calls served by tasks
        self._bytes = 0  # data of all these
        self._length = file.length
        self._writable = file.writable
        self._write_flags = file.write_flags
        self._max_transfer = 0  # nothing is transferred before INIT
        self._is_burst = False
        self._rounds = 0
        self._lonely = 0
        self._registration: Registration | None = None
        self._stopped = False
        self._fuse_calls: dict[int, Callable[[Any], bytes]] = {
            Opcode.INIT: self._init,
            Opcode.GETATTR: self._getattr,
            Opcode.STATFS: self._statfs,
            Opcode.RELEASE: self._release,
        }
        self._slow_calls: dict[int, Callable[[Any], Awaitable[bytes]]] = {
            Opcode.OPEN: self._open,
            Opcode.SETATTR: self._setattr,
            Opcode.FALLOCATE: self._fallocate,
            Opcode.LSEEK: self._lseek,
            Opcode.COPY_FILE_RANGE: self._copy_file_range,
        }

    # -- life -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to serve; INIT waits on the device already."""
        self._registration = self._reactor.register(self._fd, self._round, self._crashed)

    @property
    def in_flight(self) -> int:
        """Calls that have not been answered."""
        return self._submitted + self._tasks

    def stop(self) -> None:
        """Read no more calls. What is in flight ends and is answered; then the owner of ``fd`` closes it."""
        self._stopped = True
        if self._registration is not None:
            self._reactor.unregister(self._registration)
        self._replies.armed = True

    def resized(self) -> None:
        """The node has another length: the kernel must not believe the old one."""
        self._length = self._file.length
        if self._max_transfer and not self._stopped:
            # Attributes only: invalidating pages waits for readers of theirs, whom nobody would answer meanwhile.
            try:
                os.write(self._fd, wire.notify_inval_inode(offset=-1))
            except OSError as error:
                # ENOENT: nobody has looked at the file yet. Without the notice the kernel asks after a second.
                log.debug("invalidating attributes: %s", error)

    # -- the loop ---------------------------------------------------------------------------------------------

    def _notified(self) -> None:
        self._reactor.defer(self._collect, self._crashed)

    def _collect(self) -> None:
        """Answer what has ended meanwhile; read again when that made room."""
        self._replies.armed = False
        self._answer()
        self._replies.armed = True
        self._throttle()

    def _round(self, _events: int = 0) -> bool:
        replies = self._replies
        replies.armed = False
        batch = self._receive()
        if batch:
            self._submitted += len(batch)
            self._target.submit(batch)
        if replies.ready:
            self._answer()
        replies.armed = True
        if self._submitted or self._tasks:
            self._throttle()
            return False
        return len(batch) == 1

    def _throttle(self) -> None:
        if self._stopped:
            if not self.in_flight:
                self._is_idle()
            return
        is_full = self.in_flight >= MAX_CALLS or self._bytes >= MAX_BYTES
        if self._registration is not None:
            self._reactor.set_events(self._registration, 0 if is_full else EPOLLIN)

    # -- calls in ---------------------------------------------------------------------------------------------

    def _receive(self) -> list[Request]:
        """Read calls and turn them into a batch; what needs no node is answered right here."""
        fd = self._fd
        pool = self._pool
        free = pool.free
        unpack = wire.TRANSFER.unpack_from
        pack_read, pack_write = wire.OUT_HEADER.pack_into, wire.OUT_WRITE.pack_into
        readv = os.readv
        replies = self._replies
        length = self._length
        max_transfer = self._max_transfer
        batch: list[Request] = []
        budget = BATCH_BYTES
        room = MAX_CALLS - self._submitted - self._tasks
        calls = 0
        self._rounds += 1
        goes_on = self._is_burst or not self._rounds % PROBE
        while True:
            slot = free.pop() if free else pool.make()
            try:
                count = readv(fd, slot.receive)
            except OSError as error:
                free.append(slot)
                if error.errno in _TAKEN_BACK:
                    continue
                if error.errno != errno.EAGAIN:
                    self._lose(error)
                break
            calls += 1
            memory = slot.memory
            _, opcode, unique, _, _, _, _, _, _, _, offset, size, _, _, flags, _ = unpack(memory, MESSAGE)
            if opcode == _READ and count == _HEAD and 0 < size <= max_transfer and offset + size <= length:
                end = DATA + size
                pack_read(memory, READ_REPLY, size + 16, 0, unique)
                slot.reply = slot.view[READ_REPLY:end]
                slot.unique = unique
                slot.owner = self
                batch.append(Request(READ, offset, size, slot.view[DATA:end], replies, 0, slot))
                self._bytes += size
                budget -= size
            elif (
                opcode == _WRITE
                and count == _HEAD + size
                and 0 < size <= max_transfer
                and offset + size <= length
                and self._writable
            ):
                pack_write(memory, WRITE_REPLY, 24, 0, unique, size, 0)
                slot.reply = slot.write_reply
                wanted = self._write_flags | _FUA if flags & _DSYNC else self._write_flags
                batch.append(Request(WRITE, offset, size, slot.view[DATA : DATA + size], replies, wanted, slot))
                self._bytes += size
                budget -= size
            else:
                self._uncommon(slot, count, batch)
                length, max_transfer = self._length, self._max_transfer
            if calls >= room or budget <= 0 or not goes_on:
                break
        self.stats.calls += calls
        if calls > 1:
            self._is_burst = True
            self._lonely = 0
        elif self._is_burst:
            self._lonely += 1
            self._is_burst = self._lonely < LONELY
        return batch

    def _lose(self, error: OSError) -> None:
        if error.errno != errno.ENODEV:
            log.error("reading %s: %s", "/dev/fuse", error.strerror)
        if not self._stopped:
            self.stop()
            self._is_lost()
            self._throttle()

    def _uncommon(self, slot: Slot, count: int, batch: list[Request]) -> None:
        """A call that is not a plain READ or WRITE inside the file."""
        try:
            call = wire.decode(slot.view[MESSAGE : MESSAGE + count])
        except wire.ProtocolError as error:
            log.error("the kernel sent nonsense: %s", error)
            if error.unique:
                self._reply(wire.error_reply(error.unique, errno.EINVAL))
            self._pool.give_back(slot)
            return
        header = call.header
        if CALL.enabled:
            CALL("{}", call)
        if isinstance(call, wire.Transfer):
            self._transfer(call, slot, batch)
            return
        if header.opcode in (Opcode.FLUSH, Opcode.FSYNC):
            slot.reply = self._layout(slot, wire.ok_reply(header.unique))
            batch.append(Request(Op.FLUSH.value, 0, 0, None, self._replies, 0, slot))
            return
        self._pool.give_back(slot)
        if isinstance(call, wire.Interrupt):
            self._interrupt(call.target)
        elif header.opcode in self._slow_calls:
            self._begin(self._slow_calls[header.opcode], call, None)
        elif header.opcode in self._fuse_calls:
            self._reply(self._fuse_calls[header.opcode](call))
        elif header.opcode not in (Opcode.FORGET, Opcode.BATCH_FORGET):
            self._reply(wire.error_reply(header.unique, errno.ENOSYS))

    def _layout(self, slot: Slot, reply: bytes) -> memoryview:
        place = slot.view[DATA : DATA + len(reply)]
        place[:] = reply
        return place

    def _transfer(self, call: wire.Transfer, slot: Slot, batch: list[Request]) -> None:
        """A READ or WRITE that reaches beyond the end, or must not be."""
        unique = call.header.unique
        inside = min(call.size, max(0, self._length - call.offset))
        if not self._max_transfer or call.size > self._max_transfer:
            problem = errno.EINVAL
        elif call.header.opcode == _READ:
            if inside:
                wire.OUT_HEADER.pack_into(slot.memory, READ_REPLY, inside + 16, 0, unique)
                slot.reply = slot.view[READ_REPLY : DATA + inside]
                slot.unique, slot.owner = unique, self
                buffer = slot.view[DATA : DATA + inside]
                batch.append(Request(READ, call.offset, inside, buffer, self._replies, 0, slot))
                self._bytes += inside
                return
            problem = 0
        elif self._writable:
            self._begin(self._write, call, slot)
            return
        else:
            problem = errno.EACCES
        self._reply(wire.error_reply(unique, problem) if problem else wire.ok_reply(unique))
        self._pool.give_back(slot)

    def _interrupt(self, target: int) -> None:
        """A reader that got a signal need not wait. Who changes the disk does: the change is under way."""
        slot = self._pool.find(self, target)
        if slot is not None:
            slot.is_abandoned = True
            slot.unique = 0
            self.stats.interrupted += 1
            self._reply(wire.error_reply(target, errno.EINTR))

    # -- replies ----------------------------------------------------------------------------------------------

    def _reply(self, reply: bytes | memoryview) -> None:
        try:
            os.write(self._fd, reply)
        except OSError as error:
            # ENOENT: the caller was killed and does not wait any more; ENODEV: it was unmounted, reading finds out.
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise

    def _answer(self) -> None:
        replies = self._replies
        ready, replies.ready = replies.ready, []
        self._submitted -= len(ready)
        fd = self._fd
        write = os.write
        free = self._pool.free
        for request in ready:
            slot = request.tag
            if request.error or slot.is_abandoned:
                self._unhappy(request, slot)
            else:
                try:
                    write(fd, slot.reply)
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ENODEV):
                        raise
            size = request.length
            self._bytes -= size
            if size > LARGE:
                self._pool.give_back(slot, size)
            else:
                slot.unique = 0
                free.append(slot)

    def _unhappy(self, request: Request, slot: Slot) -> None:
        if slot.is_abandoned:
            slot.is_abandoned = False
            return
        self.stats.failed += 1
        unique = wire.OUT_HEADER.unpack_from(slot.reply)[2]
        self._reply(wire.error_reply(unique, request.error))

    # -- calls that are answered at once ----------------------------------------------------------------------

    def _init(self, call: wire.Init) -> bytes:
        try:
            agreed = wire.negotiate(call, WISHES)
        except wire.ProtocolError as error:
            log.error("%s", error)
            return wire.error_reply(call.header.unique, errno.EPROTO)
        if INIT.enabled:
            INIT("{} {}", call, agreed)
        if agreed is not None:
            self._max_transfer = agreed.max_transfer
            self._is_ready()
        return wire.init_reply(call.header.unique, agreed)

    def _getattr(self, call: wire.Call) -> bytes:
        return wire.attr_reply(call.header.unique, self._file.attributes(), ATTRIBUTES_VALID)

    def _statfs(self, call: wire.Call) -> bytes:
        return wire.statfs_reply(call.header.unique, self._file.file_system())

    def _release(self, call: wire.Call) -> bytes:
        return wire.ok_reply(call.header.unique)

    # -- calls that take more than one step -------------------------------------------------------------------

    def _begin(self, serve: Callable[..., Awaitable[bytes]], call: wire.Call, slot: Slot | None) -> None:
        self._tasks += 1
        opcode = call.header.opcode
        name = Opcode(opcode).name.lower()
        self._spawn(self._carry_out, serve, call, slot, name=f"{name} {call.header.unique}")

    async def _carry_out(self, serve: Callable[..., Awaitable[bytes]], call: wire.Call, slot: Slot | None) -> None:
        unique = call.header.unique
        reply = wire.error_reply(unique, errno.EIO)
        try:
            reply = await (serve(call) if slot is None else serve(call, slot))
        except OSError as error:
            self.stats.failed += 1
            reply = wire.error_reply(unique, error.errno or errno.EIO)
        except trio.Cancelled:
            if slot is not None:
                # The write goes on, out of this memory.
                self._pool.forget(slot)
                slot = None
            raise
        finally:
            self._tasks -= 1
            if slot is not None:
                self._pool.give_back(slot, MAX_TRANSFER)
            self._reply(reply)
            self._throttle()

    async def _open(self, call: wire.Open) -> bytes:
        await self._file.open(call.flags)
        return wire.open_reply(call.header.unique, self._file.open_flags)

    async def _setattr(self, call: wire.Setattr) -> bytes:
        await self._file.set_attributes(call)
        return self._getattr(call)

    async def _write(self, call: wire.Transfer, slot: Slot) -> bytes:
        flags = self._write_flags | (_FUA if call.flags & _DSYNC else 0)
        count = await self._file.write(call.offset, slot.view[DATA : DATA + call.size], flags)
        return wire.write_reply(call.header.unique, count)

    async def _fallocate(self, call: wire.Fallocate) -> bytes:
        await self._file.allocate(call.offset, call.length, call.mode)
        return wire.ok_reply(call.header.unique)

    async def _lseek(self, call: wire.Lseek) -> bytes:
        return wire.lseek_reply(call.header.unique, await self._file.seek(call.offset, call.whence))

    async def _copy_file_range(self, call: wire.CopyFileRange) -> bytes:
        return wire.write_reply(call.header.unique, await self._file.copy(call))
