"""A block node: an actor around a driver, and the one funnel every request to it passes.

The funnel checks the contract once: drained? active? writable? inside the node? aligned? It counts, marks dirty
bitmaps, watches the write threshold, turns zero writes into WRITE_ZEROES, and serialises what must not overlap. A
batch in which every request is plain costs one pass over it (and one for every bitmap that records) and goes to the
driver as it came; ``_sort`` looks at the rest.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import attrs
import trio
from trio_util import AsyncValue, RepeatedEvent, wait_any

from qsd.actors.bitmap_keeping import store_at_close
from qsd.actors.core import Actor
from qsd.actors.rmw import Serialiser, unaligned
from qsd.block.dirty import BitmapSet
from qsd.drivers.base import SECTOR, DetectZeroes, Driver, Limits, Mode
from qsd.drivers.calls import SlowPath, call
from qsd.drivers.spot import Spot, end_epoch
from qsd.errors import ActorStopped
from qsd.host.memory import give_back_memory
from qsd.messages import Flag, Op, Request

log = logging.getLogger("qsd.node")

READ = Op.READ.value
WRITE = Op.WRITE.value
WRITE_ZEROES = Op.WRITE_ZEROES.value
DISCARD = Op.DISCARD.value
FLUSH = Op.FLUSH.value

_ZEROES = bytes(1 << 20)


@attrs.define
class NodeStatistics:
    """What a node has been asked for since it was opened: operations and bytes."""

    rd_operations: int = 0
    rd_bytes: int = 0
    wr_operations: int = 0
    wr_bytes: int = 0
    flush_operations: int = 0
    unmap_operations: int = 0
    unmap_bytes: int = 0
    zeroes_operations: int = 0
    zeroes_bytes: int = 0
    refused: int = 0
    wr_highest_offset: int = 0


class Node(Actor, SlowPath):
    """One block node. ``info`` is the graph's own record about it; the node never reads it."""

    kind = "node"

    def __init__(self, name: str, driver: Driver) -> None:
        super().__init__(name)
        self.driver = driver
        self.stats = NodeStatistics()
        self.info: Any = None
        self.write_threshold = 0
        self.on_write_threshold: Callable[[Node, int, int], None] | None = None
        self.length = 0
        self.bitmaps = BitmapSet()
        self.active = driver.mode.active
        # True while a parent may write: the graph sets it when permissions are committed.
        self.writable = False
        self._mask = 0
        self._plain_writes = False
        self._holds = 0
        self._held: list[Request] = []
        self._released = RepeatedEvent()
        self._trackers = 0
        self._tasks = AsyncValue(0)
        self._broken = False
        self._has_lost_count = trio.Event()
        # True from a successful driver.open() to its close.
        self.is_open = False
        self.serialiser = Serialiser(self._pass)
        self.refresh()

    # -- facts ------------------------------------------------------------------------------------------------

    @property
    def mode(self) -> Mode:
        """How the node is opened."""
        return self.driver.mode

    @property
    def limits(self) -> Limits:
        """The driver's limits."""
        return self.driver.limits

    @property
    def in_flight(self) -> int:
        """Requests started here that have not ended."""
        tasks: int = self._tasks.value
        return tasks + self.driver.in_flight + self.serialiser.in_flight

    @property
    def is_held(self) -> bool:
        """True inside a drained scope."""
        return self._holds > 0

    @property
    def is_held_once(self) -> bool:
        """True inside one drained scope and no other."""
        return self._holds == 1

    def statistics(self) -> dict[str, Any]:
        """The actor's facts and the node's."""
        stats = self.stats
        return super().statistics() | {
            "reads": stats.rd_operations,
            "writes": stats.wr_operations,
            "in_flight": self.in_flight,
            "held": len(self._held) if self._holds else "no",
        }

    def refresh(self) -> None:
        """Take over what opening, resizing, reopening or activation has changed. Call while drained or idle."""
        end_epoch()
        driver = self.driver
        self.length = (driver.length + SECTOR - 1) // SECTOR * SECTOR
        self.bitmaps.resize(self.length)
        self._mask = driver.limits.request_alignment - 1
        self._plain_writes = (
            self.active
            and self.writable
            and not driver.mode.read_only
            and not self.write_threshold
            and driver.mode.detect_zeroes is DetectZeroes.OFF
            and not self.serialiser.is_tracking
        )

    def set_writable(self, *, writable: bool) -> None:
        """Whether any parent may write now."""
        self.writable = writable
        self.refresh()

    def set_active(self, *, active: bool) -> None:
        """Take part in I/O, or refuse writes until the other owner of the image is done (blockdev-set-active)."""
        self.active = active
        self.refresh()

    def set_write_threshold(self, threshold: int) -> None:
        """Arm the one-shot threshold at ``threshold`` bytes; 0 disarms."""
        self.write_threshold = threshold
        self.refresh()

    # -- the funnel -------------------------------------------------------------------------------------------

    def submit(self, batch: list[Request]) -> None:
        """Take every request of the batch; see the module. Never blocks, never awaits."""
        if self._holds or self._broken:
            self._submit_stopped(batch)
            return
        length = self.length
        mask = self._mask
        reads = read_bytes = writes = write_bytes = highest = 0
        plain_writes = self._plain_writes
        for request in batch:
            op = request.op
            size = request.length
            end = request.offset + size
            if end > length or (request.offset | size) & mask or not size:
                self._sort(batch)
                return
            if op == READ:
                reads += 1
                read_bytes += size
            elif op == WRITE and plain_writes:
                writes += 1
                write_bytes += size
                if end > highest:
                    highest = end
            else:
                self._sort(batch)
                return
        stats = self.stats
        if reads:
            stats.rd_operations += reads
            stats.rd_bytes += read_bytes
        if writes:
            stats.wr_operations += writes
            stats.wr_bytes += write_bytes
            if highest > stats.wr_highest_offset:
                stats.wr_highest_offset = highest
            if self.bitmaps.recording:
                self.bitmaps.mark(batch)
        try:  # as ``_pass``, without the call
            self.driver.submit(batch)
        except Exception as error:
            self._lose_count(error)
            raise

    def spot(self) -> Spot | None:
        """The driver's way of reading on the spot, unless the funnel has something to do for reads."""
        return None if self._holds or self._broken or self._mask else self.driver.spot()

    def _submit_stopped(self, batch: list[Request]) -> None:
        if self._broken:
            for request in batch:
                request.complete(errno.EIO)
        else:
            self._held.extend(batch)

    def _sort(self, batch: list[Request]) -> None:
        """The careful pass: refuse what is not allowed, detour what needs care, pass on the rest in order."""
        plain: list[Request] = []
        for request in batch:
            error = self._refusal(request)
            if error is not None:
                self.stats.refused += error != 0
                request.complete(error)
                continue
            op = request.op
            if op == WRITE:
                self._watch(request)
            elif op == WRITE_ZEROES:
                self._watch_threshold(request)
                if not self.mode.discard_unmap:
                    request.flags &= ~Flag.MAY_UNMAP
            elif op == DISCARD:
                self._watch_threshold(request)
            self._count(request)
            if self.bitmaps.recording and op in (WRITE, WRITE_ZEROES, DISCARD):
                self._mark(request)
            if op == FLUSH:
                plain.append(request)
            elif (request.offset | request.length) & self._mask:
                self._task(unaligned, self, request, name=f"unaligned {Op(op).name.lower()}")
            elif op in (WRITE, WRITE_ZEROES, DISCARD) and self.serialiser.is_tracking:
                self.serialiser.submit(request, plain)
            else:
                plain.append(request)
        if plain:
            self._pass(plain)

    def _pass(self, batch: list[Request]) -> None:
        try:
            self.driver.submit(batch)
        except Exception as error:
            self._lose_count(error)
            raise

    def _lose_count(self, error: Exception) -> None:
        """Nobody knows what of a batch will ever end, and drained scopes would wait for it: the node crashes."""
        if not self._has_lost_count.is_set():
            self._has_lost_count.set()
            self.break_down()
            with suppress(ActorStopped):
                self.spawn(self._crash, error, name="requests")

    async def _crash(self, error: Exception) -> None:
        raise error

    def _refusal(self, request: Request) -> int | None:
        """The errno that refuses the request, 0 when there is nothing to do, None when it is to be done."""
        op = request.op
        if op == FLUSH:
            if not self.active:
                return errno.EPERM
            if self.mode.cache_no_flush and not self._has_children():
                return 0
            return None
        if request.offset + request.length > self.length:
            return errno.EIO
        if op in (WRITE, WRITE_ZEROES, DISCARD):
            if not self.active or self.mode.read_only or not self.writable:
                return errno.EPERM
            if op == DISCARD and not self.mode.discard_unmap:
                return 0
        elif op == Op.BLOCK_STATUS and not request.length:
            return errno.EINVAL
        # pwrite(2) of nothing would look like a full disk, fallocate(2) of nothing is an error.
        return None if request.length else 0

    def _mark(self, request: Request) -> None:
        # An unaligned write changes whole blocks, if only by writing again what was there.
        start, end = request.offset, request.offset + request.length
        if request.length:
            self.bitmaps.mark_range(start & ~self._mask, (end + self._mask & ~self._mask) - (start & ~self._mask))

    def _has_children(self) -> bool:
        return bool(self.driver.children)

    def _watch(self, request: Request) -> None:
        self._watch_threshold(request)
        detect = self.mode.detect_zeroes
        if detect is not DetectZeroes.OFF and request.buffer is not None and _is_zero(request.buffer):
            request.op = WRITE_ZEROES
            request.buffer = None
            if detect is DetectZeroes.UNMAP:
                request.flags |= Flag.MAY_UNMAP

    def _watch_threshold(self, request: Request) -> None:
        end = request.offset + request.length
        threshold = self.write_threshold
        if threshold and end > threshold:
            self.set_write_threshold(0)
            if self.on_write_threshold is not None:
                self.on_write_threshold(self, end - threshold, threshold)

    def _count(self, request: Request) -> None:
        stats = self.stats
        op, size = request.op, request.length
        if op == READ:
            stats.rd_operations += 1
            stats.rd_bytes += size
        elif op == WRITE:
            stats.wr_operations += 1
            stats.wr_bytes += size
        elif op == WRITE_ZEROES:
            stats.zeroes_operations += 1
            stats.zeroes_bytes += size
        elif op == DISCARD:
            stats.unmap_operations += 1
            stats.unmap_bytes += size
        elif op == FLUSH:
            stats.flush_operations += 1
        if op in (WRITE, WRITE_ZEROES):
            stats.wr_highest_offset = max(stats.wr_highest_offset, request.offset + size)

    # -- tasks of the node's own ------------------------------------------------------------------------------

    def _task(self, function: Callable[..., Any], *args: Any, name: str) -> None:
        self._tasks.value += 1
        self.spawn(self._counted, function, args, name=name)

    async def _counted(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            await function(*args)
        finally:
            self._tasks.value -= 1

    # -- drain ------------------------------------------------------------------------------------------------

    async def hold(self) -> None:
        """Keep back what is submitted from now on; return when all that came before has ended. Nests."""
        self._holds += 1
        end_epoch()
        while self.in_flight and not self._has_lost_count.is_set():
            await wait_any(self._wait_idle, self._has_lost_count.wait)

    async def _wait_idle(self) -> None:
        if self._tasks.value:
            await self._tasks.wait_value(0)
        await self.serialiser.wait_idle()
        await self.driver.wait_idle()

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Do something past the funnel, which drained scopes wait for, and which waits for them. Raises OSError."""
        await self.wait_released()
        with self.counted():
            yield

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Let drained scopes that begin meanwhile wait for the end of this one."""
        self._tasks.value += 1
        try:
            yield
        finally:
            self._tasks.value -= 1

    async def wait_released(self) -> None:
        """Return when the node is in no drained scope. Raises OSError when it is broken, and stays in one."""
        while self._holds:
            if self._broken:
                raise OSError(errno.EIO, "the node is broken")
            await self._released.wait()

    def release(self) -> None:
        """End one ``hold``; the last one lets go of what was kept back."""
        self._holds -= 1
        end_epoch()
        if not self._holds:
            held, self._held = self._held, []
            if held:
                self.submit(held)
            self._released.set()

    async def quiesce(self) -> None:
        """Return when everything that was submitted here before has ended."""
        while self._held:
            await self._released.wait()
        await self.hold()
        self.release()

    async def settle(self) -> None:
        """Return when what was submitted before has ended, here and below; what comes meanwhile is kept back.

        For tasks of the node's own, which ``quiesce`` would wait for.
        """
        self._holds += 1
        end_epoch()
        try:
            await self.driver.wait_idle()
            await self.serialiser.wait_idle()
            for child in self.driver.children.values():
                await child.quiesce()
        finally:
            self.release()

    async def track_writes(self) -> None:
        """Return when every write in flight is known to the serialiser: none is tracked before it is needed."""
        serialiser = self.serialiser
        if not serialiser.is_tracking:
            serialiser.is_tracking = True
            self.refresh()
            await self.settle()
            serialiser.settled.set()
        await serialiser.settled.wait()

    @asynccontextmanager
    async def writes_tracked(self) -> AsyncIterator[None]:
        """Inside the scope every write is known to the serialiser, so that ``exclusive`` keeps off others."""
        serialiser = self.serialiser
        self._trackers += 1
        await self.track_writes()
        try:
            yield
        finally:
            self._trackers -= 1
            # A node that was written unaligned once goes on tracking.
            if not self._trackers and not self._mask:
                serialiser.is_tracking = False
                serialiser.settled = trio.Event()
                self.refresh()

    def break_down(self) -> None:
        """The node's actor has crashed, or the node is gone: answer EIO from now on."""
        self._broken = True
        end_epoch()
        held, self._held = self._held, []
        for request in held:
            request.complete(errno.EIO)
        self._released.set()

    async def stopping(self) -> None:
        """Close the node: what came before ends, data reaches stable storage, then the driver lets go."""
        await self.hold()
        if self.is_open:
            self.is_open = False
            try:
                await self._store()
            finally:
                await self.driver.close()
            if self.bitmaps:
                # They may be large, and the node lives until Python looks for circles.
                self.bitmaps = BitmapSet()
                give_back_memory()
        self.break_down()

    async def _store(self) -> None:
        if not self._broken:
            await store_at_close(self)
        if self.active and not self.mode.read_only and not self.mode.cache_no_flush and not self._broken:
            try:
                await call(self.driver, Op.FLUSH, 0, 0)
            except OSError as error:
                log.error("flushing node %s while closing: %s", self.name, error)


def _is_zero(buffer: memoryview) -> bool:
    # bytes compare with memcmp; a memoryview compares item by item.
    length = len(buffer)
    step = len(_ZEROES)
    for start in range(0, length, step):
        part = bytes(buffer[start : start + step])
        if part != (_ZEROES if len(part) == step else _ZEROES[: len(part)]):
            return False
    return True
