"""A child whose bytes are encrypted, sector by sector: what is read through it is plain, what is written sealed.

Reads are decrypted where they are, in the buffer the request was lent; writes are encrypted into buffers of our
own. All that comes with one batch, or is answered with one, goes through the cipher together. Zeroes are written
as encrypted zeroes.

A sector's number, which its encryption depends on, is that of its place in this child; ``shifted`` gives the same
child with other numbers, for formats that number what the guest sees.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from qsd.drivers.base import SECTOR, Child, Driver, Limits, limits_above
from qsd.drivers.calls import SlowPath
from qsd.host.memory import AlignedPool
from qsd.messages import Flag, Op, ReplyQueue, Request

if TYPE_CHECKING:
    from qsd.drivers.luks.sectors import Run, SectorCipher

READ: Final = Op.READ.value
WRITE: Final = Op.WRITE.value
WRITE_ZEROES: Final = Op.WRITE_ZEROES.value
FLUSH: Final = Op.FLUSH.value
_FUA: Final = Flag.FUA.value
_NO_FALLBACK: Final = Flag.NO_FALLBACK.value
# Zeroes are encrypted and written in pieces of this size.
ZERO_CHUNK: Final = 1 << 20
# Free bounce buffers a node keeps: what one busy NBD client has under way.
POOL_BYTES: Final = 8 << 20


class _Bounce:
    """The encrypted bytes of a batch of writes; goes back to the pool when the last of them has ended."""

    __slots__ = ("item", "users")

    def __init__(self, item: tuple[memoryview, int], users: int) -> None:
        self.item = item
        self.users = users


class Sealer:
    """The work of one driver's sealed child: its cipher, buffers and answers. Requests count as the driver's."""

    def __init__(self, driver: Driver, cipher: SectorCipher) -> None:
        self.driver = driver
        self._cipher = cipher
        self._aio = driver.host.aio
        self._replies = ReplyQueue(self._wake)
        self._pool = AlignedPool(POOL_BYTES)
        # Work for a slow cipher: one piece at a time on a thread.
        self._crypting = False
        self._waiting: deque[tuple[Callable[[], None], Callable[[], None], list[Request]]] = deque()

    def submit(self, child: Child, start: int, shift: int, batch: list[Request]) -> None:
        """Serve what is asked of ``child`` from its byte ``start`` on; sectors count from ``shift`` bytes."""
        down: list[Request] = []
        writes: list[Request] = []
        replies, count = self._replies, 0
        for request in batch:
            op, where = request.op, request.offset + start
            if op == READ:
                # The number of the first sector is wanted when the bytes are there.
                if shift:
                    request.offset += shift
                # No loan (flags 0): the child's bytes are not what was asked for.
                down.append(Request(READ, where, request.length, request.buffer, replies, 0, request))
                count += 1
            elif op == WRITE:
                writes.append(request)
            elif op == WRITE_ZEROES:
                self._write_zeroes(child, start, shift, request)
            else:
                if op != FLUSH:
                    request.offset = where
                down.append(request)
        replies.armed = False
        if down:
            self.driver.in_flight += count
            child.submit(down)
        if writes:
            self._write(child, start, shift, writes)
        self._collect()

    def _wake(self) -> None:
        # The child ends its requests one by one; together they cost a fraction.
        self._aio.defer(self._collect)

    def _collect(self) -> None:
        """Finish what the child has finished; reads are decrypted first, all of them together."""
        replies = self._replies
        while replies.ready:
            ready, replies.ready = replies.ready, []
            reads: list[Request] = []
            runs: list[Run] = []
            ended: list[Request] = []
            for inner in ready:
                if inner.op == READ and not inner.error:
                    buffer = inner.buffer
                    assert buffer is not None
                    runs.append((inner.tag.offset // SECTOR, buffer, buffer))
                    reads.append(inner)
                else:
                    ended.append(inner)
            if ended:
                self._finish(ended)
            if reads:
                self._crypt(partial(self._cipher.decrypt, runs), partial(self._finish, reads), reads)
        replies.armed = True

    def _finish(self, inners: list[Request]) -> None:
        finished = self.driver.finished
        for inner in inners:
            if inner.op == READ:
                outer = inner.tag
            else:
                outer, bounce = inner.tag
                bounce.users -= 1
                if not bounce.users:
                    self._pool.give_back(bounce.item)
            finished()
            outer.complete(inner.error)

    def _write(self, child: Child, start: int, shift: int, writes: list[Request]) -> None:
        try:
            bounce = _Bounce(self._pool.take(sum(request.length for request in writes)), len(writes))
        except OSError as error:
            for request in writes:
                request.complete(error.errno or errno.ENOMEM)
            return
        self.driver.in_flight += len(writes)
        down: list[Request] = []
        runs: list[Run] = []
        replies, used, view = self._replies, 0, bounce.item[0]
        for request in writes:
            buffer, length, offset = request.buffer, request.length, request.offset
            assert buffer is not None
            target = view[used : used + length]
            used += length
            runs.append(((offset + shift) // SECTOR, buffer, target))
            flags = request.flags & _FUA
            down.append(Request(WRITE, offset + start, length, target, replies, flags, (request, bounce)))
        self._crypt(partial(self._cipher.encrypt, runs), partial(child.submit, down), down)

    def _write_zeroes(self, child: Child, start: int, shift: int, request: Request) -> None:
        if request.flags & _NO_FALLBACK:
            request.complete(errno.EOPNOTSUPP)
            return
        self.driver.started()
        sealed = SealedChild(self, child, start, shift)
        self.driver.host.spawn(self._zero, sealed, request, name="write encrypted zeroes")

    async def _zero(self, sealed: SealedChild, request: Request) -> None:
        error = errno.EIO
        try:
            zeroes = memoryview(bytes(min(ZERO_CHUNK, request.length)))
            flags = request.flags & _FUA
            end = request.offset + request.length
            for offset in range(request.offset, end, ZERO_CHUNK):
                await sealed.write(offset, zeroes[: min(ZERO_CHUNK, end - offset)], flags)
            error = 0
        except OSError as failure:
            error = failure.errno or errno.EIO
        except MemoryError:
            error = errno.ENOMEM
        finally:
            self.driver.finished()
            request.complete(error)

    # -- the cipher -------------------------------------------------------------------------------------------

    def _crypt(self, work: Callable[[], None], then: Callable[[], None], inners: list[Request]) -> None:
        """Do ``work``, here or on a thread, and ``then``; when it fails, so do ``inners``, which it is about."""
        if self._cipher.is_fast:
            try:
                work()
            except MemoryError:
                self._fail(inners, errno.ENOMEM)
            else:
                then()
            return
        self._waiting.append((work, then, inners))
        if not self._crypting:
            self._crypt_next()

    def _fail(self, inners: list[Request], error: int) -> None:
        for inner in inners:
            inner.error = error
        self._finish(inners)

    def _crypt_next(self) -> None:
        work, then, inners = self._waiting.popleft()
        self._crypting = True

        def run() -> int:
            work()
            return 0

        def done(result: int) -> None:
            self._crypting = False
            if self._waiting:
                self._crypt_next()
            if result < 0:
                self._fail(inners, -result)
            else:
                then()

        self._aio.call(run, done)

    async def encrypted(self) -> None:
        """Return when every write that came before has been passed on."""
        if self._crypting:
            done = trio.Event()
            self._waiting.append((lambda: None, done.set, []))
            await done.wait()

    def let_go(self) -> None:
        """Free the buffers that are kept."""
        self._pool.clear()


class SealedChild(SlowPath):
    """See the module. ``start``: where in the child its byte 0 is; ``shift``: which byte that counts as."""

    __slots__ = ("_child", "_sealer", "_shift", "_start")

    def __init__(self, sealer: Sealer, child: Child, start: int = 0, shift: int = 0) -> None:
        self._sealer = sealer
        self._child = child
        self._start = start
        self._shift = shift

    def shifted(self, shift: int) -> SealedChild:
        """The same bytes, whose sectors are numbered ``shift`` bytes further on."""
        return SealedChild(self._sealer, self._child, self._start, shift)

    @property
    def name(self) -> str:
        """The edge's name."""
        return self._child.name

    @property
    def length(self) -> int:
        """Bytes behind ``start``."""
        return max(0, self._child.length - self._start)

    @property
    def limits(self) -> Limits:
        """Whole sectors."""
        return limits_above(self._child.limits, request_alignment=SECTOR)

    @property
    def node_name(self) -> str:
        """The child node's name."""
        return self._child.node_name

    def served(self, count: int, size: int) -> None:
        """Nothing is read on the spot: the bytes of the file are not those of the node."""

    def submit(self, batch: list[Request]) -> None:
        """Take every request of the batch; offsets and lengths are whole sectors."""
        self._sealer.submit(self._child, self._start, self._shift, batch)

    async def truncate(self, size: int, *, exact: bool = True) -> None:
        """Resize the child; what is new reads as anything. Raises QmpError."""
        await self._child.truncate(self._start + size, exact=exact)

    def grow(self, size: int) -> bool:
        """As the child's; what is new reads as anything."""
        return self._child.grow(self._start + size)

    async def quiesce(self) -> None:
        """As the child's, with what is still being encrypted."""
        await self._sealer.encrypted()
        await self._child.quiesce()
