"""The data plane of ``file`` and ``host_device``: requests against one descriptor.

Buffered reads are tried on the spot with RWF_NOWAIT and go to the aio engine when the page cache lacks them; all of
them do where the file system knows no such flag, unless it is memory itself (tmpfs).
Buffered writes are done on the spot while nothing is under way and the kernel takes them quickly; when it starts to
throttle (a batch's writes took over ``SLOW_WRITE_NS``) they go through the engine for a while. O_DIRECT always goes
through the engine, with a bounce buffer where the request's own is not aligned. What may block otherwise (discard,
write zeroes, cache) runs on a thread. Reads beyond the end of the file are zeroes: the node's length is
rounded up to 512, the file's need not be.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import time
from collections.abc import Callable
from functools import partial

from qsd.drivers.base import Driver
from qsd.drivers.file_direct import DirectIo, aligned, is_end
from qsd.drivers.file_extents import answer_status
from qsd.drivers.lending import Lender
from qsd.drivers.spot import end_epoch
from qsd.host import files
from qsd.messages import Flag, Op, Request

READ = Op.READ.value
WRITE = Op.WRITE.value
# Plain integers: the operators of an IntFlag cost a microsecond each.
FUA = Flag.FUA.value
ASIDE = Flag.ASIDE.value
MAY_UNMAP = Flag.MAY_UNMAP.value
NO_FALLBACK = Flag.NO_FALLBACK.value

_NOWAIT = os.RWF_NOWAIT

# The kernel throttles a writer that dirties memory faster than the disk takes it (balance_dirty_pages): single
# writes then take milliseconds. The loop must answer QMP within 50 ms.
SLOW_WRITE_NS = 2_000_000
SLOW_WRITE_PAUSE_NS = 100_000_000
# How long the kernel takes for a small buffered write depends on the file's folios: 2 us while they are small, over
# 20 us where ext4 walks the buffer heads of a 2 MiB folio. Above ``OFFLOAD_NS`` (moving average), with a second
# CPU, a batch of at least ``BURST`` writes goes through the engine: the kernel works on while the loop parses on.
# After ``OFFLOAD_BATCHES`` such batches one write is done on the spot, to see whether that still holds.
# Measured, randwrite 4k QD32, on the spot / through io_uring: 4 us a write 100 k / 78 k, 13 us 45 k / 52 k, 22 us
# 25 k / 33 k; with a single CPU 38 k / 34 k.
HAS_OTHERS = len(os.sched_getaffinity(0)) > 1
BURST = 4 if HAS_OTHERS else sys.maxsize
OFFLOAD_NS = 9_000
OFFLOAD_BATCHES = 64
SMALL_WRITE = 16 << 10
# O_DIRECT requests given to the disk at a time: it works on the first while the next are prepared. Together with
# ``uring.TAKE``, randread 4k QD32 of a virtio disk: 33 k to 42 k IOPS.
DIRECT_BURST = 8
# Largest buffered transfer done on the spot: copying it takes about 100 us.
ON_THE_SPOT = 2 << 20
# Zero bytes are written in pieces of this size when the file system cannot zero a range.
ZERO_CHUNK = 1 << 20
# Results that say: the same again.
_RETRY = (-errno.EINTR, -errno.EAGAIN)
# What a disk that is full says, or the user's share of it.
_NO_ROOM = (-errno.ENOSPC, -errno.EDQUOT)

_ZEROES = memoryview(mmap.mmap(-1, ZERO_CHUNK, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


class FileIo:
    """Serves batches on ``fd``. The driver sets the attributes when it opens or commits a reopen."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._aio = driver.host.aio
        self._direct = DirectIo(self._aio, self._transferred)
        self.fd = -1
        self.is_device = False
        self.direct = False
        self.writable = False
        # The flag that asks for stable storage, 0 where nobody is to wait for that (``cache.no-flush``).
        self.fua = FUA
        self.aio_mode = "threads"
        # How reads are tried on the spot: flags of preadv2, None for not at all. Found out by the first read.
        self.spot_flags: int | None = _NOWAIT
        self._slow_until = 0
        self._write_ns = 0  # moving average of small writes done on the spot
        self._offload = 0  # batches that still go through the engine
        # Counts what a flush brings to the disk: completed writes, new lengths; and how far a flush has done so.
        self._generation = 0
        self._flushed = 0
        # A failed fdatasync of the page cache leaves pages marked clean that never reached the disk: no later flush
        # may claim success (fsync(2); the reference does the same).
        self._cache_lost = False
        self.lender = Lender()
        self.discard_ok = 0
        self.discard_failed = 0
        self.discard_bytes_ok = 0

    def resized(self) -> None:
        """The file has another length, which a flush brings to the disk as well."""
        self._generation += 1

    def let_go(self) -> None:
        """The file is going to be closed: free the buffers, and lend no more of it."""
        self._direct.let_go()
        self.lender.forget()

    # -- the batch --------------------------------------------------------------------------------------------

    def submit(self, batch: list[Request]) -> None:
        """Serve or start every request."""
        if self.direct:
            self._submit_direct(batch)
            return
        is_burst = len(batch) >= BURST
        if is_burst and self._offload:
            self._offload -= 1
        # The engine's worker may hold the inode's lock: the loop would sleep for it.
        goes_aside = HAS_OTHERS and self._driver.in_flight > 0
        offloaded: list[Request] = []
        fd = self.fd
        file_end = self._driver.length
        preadv = os.preadv
        spot = self.spot_flags
        started = False
        for request in batch:
            op = request.op
            if op == READ:
                if request.flags and self.lender.lend(fd, file_end, request):
                    continue
                buffer = request.buffer
                length = request.length
                count = 0
                if spot is not None:
                    try:
                        count = preadv(fd, (buffer,), request.offset, spot)  # type: ignore[arg-type]  # lent
                    except BlockingIOError:
                        count = 0
                    except OSError as error:
                        if error.errno != errno.EOPNOTSUPP or not spot:
                            request.complete(error.errno or errno.EIO)
                            continue
                        self.spot_flags = spot = 0 if files.is_memory(fd) else None
                        end_epoch()
                if count == length:
                    reply = request.reply
                    reply.ready.append(request)
                    if reply.armed:
                        reply.armed = False
                        reply.notify()
                else:
                    self._start_read(request, count)
                    started = True
            elif op == WRITE:
                if (goes_aside or (is_burst and self._offload)) and not request.flags & self.fua:
                    offloaded.append(request)
                else:
                    started |= self._write(request, is_burst)
            else:
                started |= self._other(request)
        if offloaded:
            self._transfer(offloaded)
            started = True
        if started:
            self._aio.flush()

    def _submit_direct(self, batch: list[Request]) -> None:
        reads: list[Request] = []
        writes: list[Request] = []
        started = False
        for request in batch:
            op = request.op
            if op == READ:
                reads.append(request)
            elif op != WRITE:
                started |= self._other(request)
            elif request.flags & self.fua:
                assert request.buffer is not None
                self._start_write(request, request.buffer, 0)
                started = True
            else:
                writes.append(request)
        for requests in (reads, writes):
            for first in range(0, len(requests), DIRECT_BURST):
                if first:
                    self._aio.flush()
                self._transfer_direct(requests[first : first + DIRECT_BURST])
        if started or reads or writes:
            self._aio.flush()

    def _transfer_direct(self, requests: list[Request]) -> None:
        self._driver.in_flight += len(requests)
        self._direct.transfer(self.fd, requests, self._driver.limits.min_mem_alignment)

    def _transfer(self, requests: list[Request]) -> None:
        self._driver.in_flight += len(requests)
        self._aio.transfer(self.fd, requests, None, self._transferred)

    def _transferred(self, transfers: list[tuple[Request, int]]) -> None:
        # Told of all that has ended: whole ones first, which is nearly always every one.
        whole = 0
        for request, result in transfers:
            if result != request.length:
                ended = self._read_done if request.op == READ else self._whole_write_done
                ended(request, 0, result)
                continue
            whole += 1
            if request.op == WRITE:
                self._generation += 1
            reply = request.reply
            reply.ready.append(request)
            if reply.armed:
                reply.armed = False
                reply.notify()
        if whole:
            self._driver.finished(whole)

    def _other(self, request: Request) -> bool:
        return _SERVE[request.op](self, request)

    # -- reading ----------------------------------------------------------------------------------------------

    def _start_read(self, request: Request, done: int) -> None:
        """Read what is missing behind the first ``done`` bytes."""
        assert request.buffer is not None
        self._driver.started()
        buffer = request.buffer[done:] if done else request.buffer
        self._aio.read(self.fd, buffer, request.offset + done, partial(self._read_done, request, done))

    def _read_done(self, request: Request, before: int, result: int) -> None:
        self._driver.finished()
        if result in _RETRY:
            self._read_on(request, before)
            return
        if result < 0:
            request.complete(-result)
            return
        have = before + result
        if have >= request.length:
            request.complete(0)
        elif result and not (self.direct and is_end(self._driver, request.offset + have)):
            self._read_on(request, have)
        else:
            assert request.buffer is not None
            # The end of the file: the rest of the node reads as zeroes.
            request.buffer[have:] = bytes(request.length - have)
            request.complete(0)

    def _read_on(self, request: Request, have: int) -> None:
        if self.direct:
            self._transfer_direct([self._direct.rest(request, have) if have else request])
        else:
            self._start_read(request, have)
        self._aio.flush()

    # -- writing ----------------------------------------------------------------------------------------------

    def _write(self, request: Request, is_burst: bool) -> bool:
        """A buffered write; True when it was started rather than done."""
        buffer = request.buffer
        assert buffer is not None
        length = request.length
        flags = request.flags
        if flags & self.fua or (flags & ASIDE and HAS_OTHERS) or length > ON_THE_SPOT or self._slow_until:
            if self._slow_until and time.perf_counter_ns() > self._slow_until:
                self._slow_until = 0
            self._start_write(request, buffer, 0)
            return True
        before = time.perf_counter_ns()
        try:
            count = os.pwrite(self.fd, buffer, request.offset)
        except OSError as error:
            request.complete(error.errno or errno.EIO)
            return False
        after = time.perf_counter_ns()
        took = after - before
        if took > SLOW_WRITE_NS:
            self._slow_until = after + SLOW_WRITE_PAUSE_NS
        if length <= SMALL_WRITE:
            self._write_ns += (took - self._write_ns) >> 3
            if is_burst and self._write_ns > OFFLOAD_NS:
                self._offload = OFFLOAD_BATCHES
        self._generation += 1
        if count == length:
            reply = request.reply
            reply.ready.append(request)
            if reply.armed:
                reply.armed = False
                reply.notify()
            return False
        self._start_write(request, buffer, count)
        return True

    def _start_write(self, request: Request, buffer: memoryview, done: int) -> None:
        dsync = bool(request.flags & self.fua)
        rest = buffer[done:] if done else buffer
        if self.direct:
            try:
                rest = aligned(rest, self._driver.limits.min_mem_alignment)
            except OSError as error:
                request.complete(error.errno or errno.ENOMEM)
                return
        self._driver.started()
        self._aio.write(
            self.fd, rest, request.offset + done, partial(self._write_done, request, buffer, done), dsync=dsync
        )

    def _whole_write_done(self, request: Request, before: int, result: int) -> None:
        assert request.buffer is not None
        self._write_done(request, request.buffer, before, result)

    def _write_done(self, request: Request, buffer: memoryview, before: int, result: int) -> None:
        self._driver.finished()
        if result in _RETRY:
            result = 0
        elif result <= 0:
            self._write_failed(request, result, buffer[before:], request.offset + before)
            return
        have = before + result
        if have < request.length:
            self._start_write(request, buffer, have)
            self._aio.flush()
            return
        self._generation += 1
        request.complete(0)

    def _write_failed(self, request: Request, result: int, data: memoryview, offset: int) -> None:
        """``data`` could not be written. With FUA it may be that it could not be brought to the disk.

        The kernel tells of a page that was lost only once, whichever page it was.
        """
        if request.flags & self.fua and not self.direct:
            if result == -errno.EIO:
                self._lose_cache()
            elif result in _NO_ROOM:
                self._try_without_fua(request, result, data, offset)
                return
        request.complete(-result or errno.ENOSPC)

    def _try_without_fua(self, request: Request, result: int, data: memoryview, offset: int) -> None:
        """Find out whether there is no room for ``data``, or was none for what is in memory (a thin volume)."""
        self._driver.started()

        def done(again: int) -> None:
            self._driver.finished()
            if again > 0:
                self._lose_cache()
            request.complete(-result)

        self._aio.write(self.fd, data, offset, done)
        self._aio.flush()

    # -- the rest ---------------------------------------------------------------------------------------------

    def _lose_cache(self) -> None:
        """Something could not be brought to the disk."""
        self._cache_lost = self._cache_lost or not self.direct

    def _flush(self, request: Request) -> bool:
        if self._cache_lost:
            request.complete(errno.EIO)
            return False
        if self._flushed == self._generation:
            request.complete(0)
            return False
        generation = self._generation
        self._driver.started()

        def done(result: int) -> None:
            self._driver.finished()
            if result < 0:
                self._lose_cache()
                request.complete(-result)
                return
            self._flushed = max(self._flushed, generation)
            request.complete(0)

        self._aio.fsync(self.fd, done)
        return True

    def _blocking(self, function: Callable[[], int], ended: Callable[[int], None]) -> bool:
        self._driver.started()

        def done(result: int) -> None:
            self._driver.finished()
            ended(result)

        self._aio.call(function, done)
        return True

    def _discard(self, request: Request) -> bool:
        offset, length = request.offset, self._inside(request)

        def done(result: int) -> None:
            self._driver.finished()
            if result == -errno.EINTR:
                self._discard(request)
                self._aio.flush()
                return
            self._generation += 1
            if result < 0:
                self.discard_failed += 1
            else:
                self.discard_ok += 1
                self.discard_bytes_ok += request.length
            # A discard is advice: a file system that cannot do it has not failed.
            request.complete(0 if -result in files.UNSUPPORTED else -result)

        if not length:
            request.complete(0)
            return False
        self._driver.started()
        if self.is_device:
            self._aio.call(partial(files.discard_sectors, self.fd, offset, length), done)
        else:
            self._aio.punch_hole(self.fd, offset, length, done)
        return True

    def _write_zeroes(self, request: Request) -> bool:
        flags = request.flags

        def ended(result: int) -> None:
            self._generation += 1
            if result == -errno.EOPNOTSUPP and not flags & NO_FALLBACK:
                self._write_zero_bytes(request, 0)
                self._aio.flush()
            elif result < 0:
                request.complete(-result)
            elif flags & self.fua:
                self._sync_then_complete(request)
            else:
                request.complete(0)

        if not request.length:
            request.complete(0)
            return False
        how = {
            "may_unmap": bool(flags & MAY_UNMAP),
            "no_fallback": bool(flags & NO_FALLBACK),
            "is_device": self.is_device,
        }
        return self._blocking(partial(files.zero_range, self.fd, request.offset, request.length, **how), ended)

    def _write_zero_bytes(self, request: Request, done: int) -> None:
        chunk = min(ZERO_CHUNK, request.length - done)
        self._driver.started()

        def ended(result: int) -> None:
            self._driver.finished()
            written = 0 if result in _RETRY else result
            if result <= 0 and result not in _RETRY:
                self._write_failed(request, result, _ZEROES[:chunk], request.offset + done)
            elif done + written < request.length:
                self._write_zero_bytes(request, done + written)
                self._aio.flush()
            else:
                # A flush that has ended meanwhile began before the last of them was written.
                self._generation += 1
                request.complete(0)

        dsync = bool(request.flags & self.fua)
        self._aio.write(self.fd, _ZEROES[:chunk], request.offset + done, ended, dsync=dsync)

    def _sync_then_complete(self, request: Request) -> None:
        self._driver.started()

        def done(result: int) -> None:
            self._driver.finished()
            if result < 0:
                self._lose_cache()
            request.complete(-result if result < 0 else 0)

        self._aio.fsync(self.fd, done)
        self._aio.flush()

    def _block_status(self, request: Request) -> bool:
        answer_status(self._driver, self.fd, request)
        return False

    def _cache(self, request: Request) -> bool:
        if self.direct or not request.length:
            request.complete(0)
            return False
        advise = partial(files.read_ahead, self.fd, request.offset, request.length)
        return self._blocking(advise, lambda result: request.complete(max(0, -result)))

    def _inside(self, request: Request) -> int:
        """Bytes of the request that lie inside the file."""
        return max(0, min(request.length, self._driver.length - request.offset))


_SERVE: dict[int, Callable[[FileIo, Request], bool]] = {
    Op.WRITE_ZEROES.value: FileIo._write_zeroes,
    Op.DISCARD.value: FileIo._discard,
    Op.FLUSH.value: FileIo._flush,
    Op.BLOCK_STATUS.value: FileIo._block_status,
    Op.CACHE.value: FileIo._cache,
}
