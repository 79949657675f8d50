"""io_uring through ctypes: reads, writes, fdatasync, holes that must not block the loop, one system call a batch.

Layouts and constants: io_uring(7), io_uring_setup(2), io_uring_enter(2), <linux/io_uring.h>. Buffers are named by
address, so whoever lends one keeps it alive; the slot table holds a reference to it until the completion.

Memory order: the rings are shared with the kernel. The tail is published by the system call itself, which is a full
barrier; completions are read after epoll or after io_uring_enter said that there are some.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections import deque
from collections.abc import Callable
from typing import Any

from qsd.host.files import PUNCH_HOLE
from qsd.host.memory import address_of
from qsd.host.threads import Places, ThreadPool, Transfers, transfer_singly
from qsd.messages import Op, Request

_SYS_IO_URING_SETUP = 425
_SYS_IO_URING_ENTER = 426
_SYS_IO_URING_REGISTER = 427
_OFF_SQ_RING = 0
_OFF_SQES = 0x10000000
_FEAT_SINGLE_MMAP = 1
_FEAT_NODROP = 2
_SETUP_CLAMP = 1 << 4
_SETUP_COOP_TASKRUN = 1 << 8
_REGISTER_PROBE = 8

_OP_FSYNC = 3
_OP_FALLOCATE = 17
_OP_READ = 22
_OP_WRITE = 23
_FSYNC_DATASYNC = 1
_RWF_DSYNC = 2

_PARAMS = struct.Struct("<10I" + "10I" + "10I")  # io_uring_params: 10 u32, then sq and cq offsets (40 bytes each)
_SQE = struct.Struct("<BBHiQQIIQ24x")  # opcode flags ioprio fd off addr len rw_flags user_data
_CQE = struct.Struct("<QiI")

ENTRIES = 256
# Completions taken a round. The rest wait for the next: meanwhile the first answers leave, new requests are read
# and given to the disk, which would idle while all of a burst is answered.
TAKE = 8

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

Done = Callable[[int], None]


def _setup(entries: int) -> tuple[int, tuple[int, ...]]:
    for flags in (_SETUP_CLAMP | _SETUP_COOP_TASKRUN, 0):
        params = bytearray(_PARAMS.size)
        struct.pack_into("<I", params, 8, flags)
        view = (ctypes.c_char * len(params)).from_buffer(params)
        fd = _syscall(_SYS_IO_URING_SETUP, ctypes.c_uint(entries), ctypes.byref(view))
        if fd >= 0:
            del view
            return int(fd), _PARAMS.unpack(params)
        error = ctypes.get_errno()
        if error != errno.EINVAL:
            break
    raise OSError(error, os.strerror(error))


class Uring:
    """An ``Aio`` engine (drivers/base.py) on one ring. ``fileno`` becomes readable when completions wait.

    Raises OSError when the kernel has no io_uring, or refuses it.
    """

    name = "io_uring"

    def __init__(self, pool: ThreadPool, entries: int = ENTRIES) -> None:
        self._pool = pool
        self._fd, params = _setup(entries)
        sq_entries, cq_entries, _flags, _cpu, _idle, features = params[:6]
        if not (features & _FEAT_SINGLE_MMAP and features & _FEAT_NODROP):
            os.close(self._fd)
            raise OSError(errno.ENOSYS, "io_uring is too old")
        sq_head, sq_tail, sq_mask, _, _sq_flags, _, sq_array = params[10:17]
        cq_head, cq_tail, cq_mask, _, _, cq_cqes = params[20:26]
        size = max(sq_array + sq_entries * 4, cq_cqes + cq_entries * _CQE.size)
        try:
            self._ring = mmap.mmap(self._fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=_OFF_SQ_RING)
            self._sqes = mmap.mmap(
                self._fd, sq_entries * _SQE.size, mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=_OFF_SQES
            )
        except OSError:
            os.close(self._fd)
            raise
        self._words = memoryview(self._ring).cast("B")[: size // 4 * 4].cast("I")
        self._sq_head, self._sq_tail, self._cq_head, self._cq_tail = (
            offset // 4 for offset in (sq_head, sq_tail, cq_head, cq_tail)
        )
        self._sq_mask = self._words[sq_mask // 4]
        self._cq_mask = self._words[cq_mask // 4]
        self._cq_cqes = cq_cqes
        for index in range(sq_entries):
            self._words[sq_array // 4 + index] = index
        self._entries = sq_entries
        self._queued = 0
        self._tail = self._words[self._sq_tail]
        # user_data -> (done, None, what to keep alive), or (None, request, who is told of several at once).
        self._slots: dict[int, tuple[Done | None, Any, Any]] = {}
        self._next = 0
        self._is_reaping = False
        self._deferred: list[Callable[[], None]] = []
        # Operations that found the completion queue's worth in flight; started as others end.
        self._backlog: deque[tuple[int, int, int, int, int, int, Done, memoryview | None]] = deque()
        self._is_refilling = False
        self._limit = cq_entries

    def fileno(self) -> int:
        """The ring's descriptor."""
        return self._fd

    def close(self) -> None:
        """Close the ring. Nothing may be in flight."""
        self._words.release()
        self._ring.close()
        self._sqes.close()
        os.close(self._fd)

    @property
    def in_flight(self) -> int:
        """Operations that have not been reported yet."""
        return len(self._slots) + len(self._backlog)

    # -- operations -------------------------------------------------------------------------------------------

    def transfer(
        self, fd: int, requests: list[Request], places: Places | None, ended: Callable[[Transfers], None]
    ) -> None:
        """Whole requests, all READ or all WRITE without FUA."""
        slots = self._slots
        free = min(self._entries - self._queued, self._limit - len(slots))
        if len(requests) > free:
            transfer_singly(self, fd, requests, places, ended)
            return
        opcode = _OP_READ if requests[0].op == Op.READ else _OP_WRITE
        pack, sqes, mask = _SQE.pack_into, self._sqes, self._sq_mask
        token, tail = self._next, self._tail
        if places is None:
            places = [(request.buffer, address_of(request.buffer)) for request in requests]  # type: ignore[arg-type,misc]  # lent
        for request, (_buffer, address) in zip(requests, places, strict=True):
            slots[token] = (None, request, ended)
            pack(sqes, (tail & mask) * 64, opcode, 0, 0, fd, request.offset, address, request.length, 0, token)
            token += 1
            tail = (tail + 1) & 0xFFFFFFFF
        self._next, self._tail = token, tail
        self._queued += len(requests)

    def read(self, fd: int, buffer: memoryview, offset: int, done: Done) -> None:
        """preadv into ``buffer``; ``done`` gets the count, which may be short, or a negative errno."""
        self._queue(_OP_READ, fd, offset, address_of(buffer), len(buffer), 0, done, buffer)

    def write(self, fd: int, buffer: memoryview, offset: int, done: Done, *, dsync: bool = False) -> None:
        """pwritev from ``buffer``; ``dsync`` makes it stable before ``done``."""
        flags = _RWF_DSYNC if dsync else 0
        self._queue(_OP_WRITE, fd, offset, address_of(buffer), len(buffer), flags, done, buffer)

    def fsync(self, fd: int, done: Done) -> None:
        """fdatasync."""
        self._queue(_OP_FSYNC, fd, 0, 0, 0, _FSYNC_DATASYNC, done, None)

    def punch_hole(self, fd: int, offset: int, length: int, done: Done) -> None:
        """Deallocate a range of a file."""
        # The length is where others have their buffer's address, the mode where they have its length.
        self._queue(_OP_FALLOCATE, fd, offset, length, PUNCH_HOLE, 0, done, None)

    def call(self, function: Callable[[], int], done: Done) -> None:
        """Run a blocking function on a thread."""
        self._pool.call(function, done)

    def _queue(
        self,
        opcode: int,
        fd: int,
        offset: int,
        address: int,
        length: int,
        flags: int,
        done: Done,
        buffer: memoryview | None,
    ) -> None:
        if len(self._slots) >= self._limit:
            self._backlog.append((opcode, fd, offset, address, length, flags, done, buffer))
            return
        if self._queued == self._entries:
            self.flush()
        token = self._next
        self._next = token + 1  # 64 bits last for ever
        self._slots[token] = (done, None, buffer)
        position = (self._tail & self._sq_mask) * 64
        _SQE.pack_into(self._sqes, position, opcode, 0, 0, fd, offset, address, length, flags, token)
        self._tail = (self._tail + 1) & 0xFFFFFFFF
        self._queued += 1

    def defer(self, function: Callable[[], None]) -> None:
        """Run ``function`` when the completions being told have been told; at once when none are."""
        if self._is_reaping:
            self._deferred.append(function)
        else:
            function()

    def soon(self, function: Callable[[], None]) -> None:
        """Run ``function`` in the loop's next round."""
        self._pool.soon(function)

    def flush(self) -> None:
        """Submit what was queued: one system call. What is complete when it returns is delivered at once."""
        words = self._words
        while self._queued:
            words[self._sq_tail] = self._tail
            count = _syscall(_SYS_IO_URING_ENTER, self._fd, self._queued, 0, 0, None, ctypes.c_size_t(0))
            if count < 0:
                error = ctypes.get_errno()
                if error in (errno.EINTR, errno.EAGAIN, errno.EBUSY):
                    # EBUSY: completions must be taken first; EAGAIN: the kernel is short of memory for now.
                    if self._is_reaping:
                        self._take()
                    else:
                        self.reap()
                    continue
                raise OSError(error, os.strerror(error))
            self._queued -= count
        # Fast devices and cached pages end within the system call; who reaps already takes these as well.
        if words[self._cq_head] != words[self._cq_tail] and not self._is_reaping and not self._is_refilling:
            self.reap()

    # -- completions ------------------------------------------------------------------------------------------

    def reap(self, _events: int = 0) -> None:
        """Take ``TAKE`` completions at most and call their ``done``; the descriptor stays readable for more."""
        self._is_reaping = True
        try:
            self._take()
        finally:
            self._is_reaping = False
        while self._deferred:
            self._deferred.pop()()
        if self._backlog and not self._is_refilling:
            self._refill()

    def _refill(self) -> None:
        """Queue as much of the backlog as there is room for.

        What ends within that system call is left to the next round: there may be thousands more, and every ``reap``
        from here on would stand on the one before.
        """
        backlog = self._backlog
        self._is_refilling = True
        try:
            while backlog and len(self._slots) < self._limit:
                self._queue(*backlog.popleft())
            self.flush()
        finally:
            self._is_refilling = False

    def _take(self) -> None:
        words = self._words
        cqes = self._ring
        mask = self._cq_mask
        base = self._cq_cqes
        unpack = _CQE.unpack_from
        slots = self._slots
        transfers: Transfers = []
        owner: Callable[[Transfers], None] | None = None
        for _ in range(TAKE):
            # Read anew: who is told of one may have had to take others.
            head = words[self._cq_head]
            if head == words[self._cq_tail]:
                break
            token, result, _flags = unpack(cqes, base + (head & mask) * 16)
            words[self._cq_head] = (head + 1) & 0xFFFFFFFF
            done, request, context = slots.pop(token)
            if done is not None:
                done(result)
            elif context == owner:
                transfers.append((request, result))
            else:
                if owner is not None:
                    owner(transfers)
                owner, transfers = context, [(request, result)]
        if owner is not None:
            owner(transfers)
