"""Writing guest data: in place where the cluster is this image's alone, else into clusters newly allocated.

A write is planned on the spot (``planning``). Then the fillings of new clusters are read from what the guest sees
there now (the backing file, a shared or compressed cluster), all is written, and only when that has ended the L2
table is changed. Until then others who want to change the same guest clusters wait; everything else goes on.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from qsd.drivers.base import Child
from qsd.drivers.gather import Gather
from qsd.drivers.mapped import READ, fill_zeroes
from qsd.drivers.qcow2.geometry import COPIED, OFFSET_MASK
from qsd.drivers.qcow2.image import Freeing
from qsd.drivers.qcow2.planning import CONTENT, NOTHING, Plan, Planner
from qsd.drivers.runs import Cold
from qsd.drivers.spot import end_epoch
from qsd.messages import Flag, Op, ReplyQueue, Request

if TYPE_CHECKING:
    from qsd.drivers.qcow2.driver import Qcow2Driver
    from qsd.drivers.qcow2.image import Image

WRITE: Final = Op.WRITE.value
WRITE_ZEROES: Final = Op.WRITE_ZEROES.value
FUA: Final = Flag.FUA.value

# A write with its fillings is put together in one buffer up to this size; larger ones are written in pieces.
ASSEMBLE: Final = 512 << 10
# Both fillings, and what lies between them, are read at once when that is not longer than this.
READ_THROUGH: Final = 128 << 10
# Fillings of zeroes at least this long are left to the file system.
ZERO_RANGE: Final = 256 << 10
# Buffers kept for the next writes, of at most this size.
KEPT_BUFFERS: Final = 8
KEPT_SIZE: Final = 128 << 10

# Where to, host offset, bytes, what is written there (None: zeroes).
Part = tuple[Child, int, int, memoryview | None]


class Changing(Protocol):
    """Something that is going to change entries; others who want to, wait for it."""

    waiting: list[Callable[[], None]]


class Claim:
    """Guest clusters ``first`` to ``last`` (included) that are to change; too many to name each of them."""

    __slots__ = ("first", "last", "waiting")

    def __init__(self, first: int, last: int) -> None:
        self.first = first
        self.last = last
        self.waiting: list[Callable[[], None]] = []


class Operation(ReplyQueue):
    """A write into new clusters, from its plan to the changed L2 table. The reply queue of its own parts.

    ``parts`` are what is to be written when all fillings have been read; then ``room`` takes the data, when the
    data is put together with its fillings.
    """

    __slots__ = (
        "buffer",
        "clusters",
        "error",
        "is_writing",
        "left",
        "number",
        "parts",
        "plan",
        "reply",
        "request",
        "room",
        "table",
        "waiting",
        "writer",
    )

    def __init__(
        self, writer: Writer, request: Request, clusters: range, number: int, table: array[int], plan: Plan
    ) -> None:
        self.ready = []
        self.armed = True
        self.writer = writer
        self.request = request
        self.reply = request.reply
        # The guest's clusters that are written to, those in place as well: while the others are being filled nobody
        # may give one of them up, or what is written there later would be another's.
        self.clusters = clusters
        self.number = number
        self.table = table
        self.plan = plan
        self.waiting: list[Callable[[], None]] = []
        self.left = 0
        self.error = 0
        self.is_writing = False
        self.parts: list[Part] = []
        self.room: memoryview | None = None
        self.buffer: bytearray | None = None

    def notify(self) -> None:
        """A part has ended."""
        self.armed = True
        error = self.ready.pop().error
        if error and not self.error:
            self.error = error
        self.left -= 1
        if not self.left:
            self.writer.go_on(self)


class Durable(ReplyQueue):
    """A write with FUA: when it has ended, all metadata goes to the disk, and then it is complete."""

    __slots__ = ("driver", "reply")

    def __init__(self, driver: Qcow2Driver, reply: ReplyQueue) -> None:
        self.ready = []
        self.armed = True
        self.driver = driver
        self.reply = reply

    def notify(self) -> None:
        """The write has ended."""
        self.armed = True
        request = self.ready.pop()
        request.reply = self.reply
        if request.error:
            request.complete(request.error)
        else:
            self.driver.writeback.request(request.complete)


class Writer:
    """See the module."""

    def __init__(self, driver: Qcow2Driver, image: Image) -> None:
        self._driver = driver
        self._image = image
        geometry = image.geometry
        self._bits = geometry.cluster_bits
        self._slice_bits = geometry.slice_bits
        self._slice_mask = geometry.slice_mask
        self._planner = Planner(driver, image)
        self._link = self._link_plain if geometry.words == 1 else self._link_extended
        # Guest cluster -> what is going to change its entry, or to write where that leads.
        self.busy: dict[int, Changing] = {}
        self._claims: list[Claim] = []
        self._is_hot = image.is_hot
        self._buffers: list[bytearray] = []

    # -- the beginning ----------------------------------------------------------------------------------------

    def write(self, request: Request) -> None:
        """Begin a write. Raises Cold and OSError with nothing changed."""
        offset = request.offset
        end = offset + request.length
        if request.flags & FUA:
            self.make_durable(request)
        first = offset >> self._bits
        last = end - 1 >> self._bits
        if self.is_blocked(request, first, last):
            return
        number = first >> self._slice_bits
        if number != last >> self._slice_bits:
            self._split(request)
            return
        table = self._image.writable_slice(number)
        plan = self._planner.plan(table, first, last, offset, end)
        if plan.targets:
            self._begin(Operation(self, request, range(first, last + 1), number, table, plan))
        else:
            self._pass_on(request, plan)

    def make_durable(self, request: Request) -> None:
        """Let a request's end wait for the disk to have everything."""
        request.flags &= ~FUA
        request.reply = Durable(self._driver, request.reply)

    def is_blocked(self, request: Request, first: int, last: int) -> bool:
        """Let a request wait that touches guest clusters about to change; False when it does not."""
        operation = self._operation_on(first, last)
        if operation is None:
            return False
        self._driver.started()
        operation.waiting.append(partial(self._serve_again, request))
        return True

    def _serve_again(self, request: Request) -> None:
        self._driver.finished()
        self._driver.serve(request)

    def require_free(self, first: int, last: int) -> None:
        """Raise Cold while one of the guest clusters ``first`` to ``last`` is about to change."""
        operation = self._operation_on(first, last)
        if operation is not None:
            waiting = operation.waiting
            raise Cold(("cluster", operation), lambda done: waiting.append(partial(done, 0)))

    def claim(self, first: int, last: int) -> Claim:
        """Let everybody wait who wants to write to these guest clusters, in place as well; none of them is busy."""
        claim = Claim(first, last)
        self._claims.append(claim)
        # The hot path knows of single clusters only.
        self._image.is_hot = False
        return claim

    def release(self, claim: Claim) -> None:
        """The end of it. Whoever calls this sees to ``send``."""
        self._claims.remove(claim)
        if not self._claims and self._is_hot:
            self._image.is_hot = True
            end_epoch()
        for waiting in claim.waiting:
            self._driver.resume(waiting)

    def _operation_on(self, first: int, last: int) -> Changing | None:
        for claim in self._claims:
            if claim.first <= last and first <= claim.last:
                return claim
        busy = self.busy
        if not busy:
            return None
        if last - first < len(busy):
            return next((busy[cluster] for cluster in range(first, last + 1) if cluster in busy), None)
        return next((operation for cluster, operation in busy.items() if first <= cluster <= last), None)

    def _split(self, request: Request) -> None:
        """A write over several slices: one request for each, so that one slice in memory is enough."""
        driver = self._driver
        buffer = request.buffer
        assert buffer is not None
        gather = Gather(driver, request)
        span = 1 << self._bits + self._slice_bits
        base = offset = request.offset
        end = offset + request.length
        while offset < end:
            stop = min(end, (offset // span + 1) * span)
            gather.left += 1
            part = Request(WRITE, offset, stop - offset, buffer[offset - base : stop - base], gather, request.flags)
            driver.resume(partial(driver.serve, part))
            offset = stop
        gather.end()

    def _pass_on(self, request: Request, plan: Plan) -> None:
        """Everything is in place."""
        data_at = self._image.map.data_at
        if len(plan.runs) == 1:
            start, _stop, host = plan.runs[0]
            request.offset = host
            self._driver.post(data_at(start, host), request)
            return
        buffer = request.buffer
        assert buffer is not None
        gather = Gather(self._driver, request)
        base = request.offset
        for start, stop, host in plan.runs:
            gather.left += 1
            part = Request(WRITE, host, stop - start, buffer[start - base : stop - base], gather)
            self._driver.post(data_at(start, host), part)
        gather.end()

    # -- new clusters -----------------------------------------------------------------------------------------

    def _begin(self, operation: Operation) -> None:
        plan, request = operation.plan, operation.request
        self._driver.in_flight += 1
        self._image.dirty.pin(operation.number)
        for cluster in operation.clusters:
            self.busy[cluster] = operation
        if not plan.head and not plan.tail and len(plan.runs) == 1:
            # The request itself is the one part.
            operation.is_writing = True
            operation.left = 1
            start, _stop, host = plan.runs[0]
            request.offset = host
            request.reply = operation
            self._driver.post(self._image.map.data_at(start, host), request)
            return
        operation.left = 1
        try:
            if len(plan.runs) == 1 and plan.high - plan.low <= ASSEMBLE and (plan.head or plan.tail):
                self._assemble(operation)
            else:
                self._lay_out(operation)
        except MemoryError:
            operation.error = errno.ENOMEM
        operation.left -= 1
        if not operation.left:
            self.go_on(operation)

    def _assemble(self, operation: Operation) -> None:
        """One buffer for the fillings with the data between them."""
        plan, request = operation.plan, operation.request
        size = plan.high - plan.low
        operation.buffer = self._take_buffer(size)
        view = memoryview(operation.buffer)[:size]
        head, tail = request.offset - plan.low, plan.high - request.offset - request.length
        operation.room = view[head : size - tail]
        start, _stop, host = plan.runs[0]
        operation.parts.append((self._image.map.data_at(start, host), host, size, view))
        if plan.head == plan.tail == CONTENT and size <= READ_THROUGH:
            self._fill(operation, CONTENT, plan.low, view)
        else:
            self._fill(operation, plan.head, plan.low, view[:head])
            self._fill(operation, plan.tail, plan.high - tail, view[size - tail :])

    def _lay_out(self, operation: Operation) -> None:
        """Fillings in buffers of their own; the data is written from where it is."""
        plan, request = operation.plan, operation.request
        buffer = request.buffer
        assert buffer is not None
        low, high = request.offset, request.offset + request.length
        for start, stop, host in plan.runs:
            if start < low:
                self._lay_filling(operation, plan.head, start, low, host)
            first, last = max(start, low), min(stop, high)
            child = self._image.map.data_at(start, host)
            operation.parts.append((child, host + first - start, last - first, buffer[first - low : last - low]))
            if stop > high:
                self._lay_filling(operation, plan.tail, high, stop, host + high - start)

    def _lay_filling(self, operation: Operation, kind: int, start: int, stop: int, host: int) -> None:
        size, child = stop - start, self._image.map.data_at(start, host)
        if kind != CONTENT and size >= ZERO_RANGE:
            operation.parts.append((child, host, size, None))
            return
        view = memoryview(bytearray(size))
        operation.parts.append((child, host, size, view))
        if kind == CONTENT:
            self._fill(operation, kind, start, view)

    def _fill(self, operation: Operation, kind: int, offset: int, view: memoryview) -> None:
        """Bring into a buffer what the guest sees at ``offset``."""
        if kind == CONTENT:
            operation.left += 1
            self._driver.serve(Request(READ, offset, len(view), view, operation))
        elif kind != NOTHING:
            fill_zeroes(view)

    def go_on(self, operation: Operation) -> None:
        """All parts of a step have ended: write, or finish."""
        if operation.is_writing or operation.error:
            self._finish(operation)
            return
        operation.is_writing = True
        if operation.room is not None:
            assert operation.request.buffer is not None
            operation.room[:] = operation.request.buffer
        operation.left = len(operation.parts)
        for child, host, size, view in operation.parts:
            op = WRITE if view is not None else WRITE_ZEROES
            self._driver.post(child, Request(op, host, size, view, operation))
        self._driver.send()

    def _finish(self, operation: Operation) -> None:
        driver, request, plan = self._driver, operation.request, operation.plan
        for cluster in operation.clusters:
            del self.busy[cluster]
        if not operation.error or self._image.header.is_data_file_raw:
            # Some of a write that failed may be in a raw data file: there it has to be what the guest sees.
            self._link(operation)
        else:
            self._planner.give_back(plan)
        self._image.dirty.unpin(operation.number)
        if (
            operation.buffer is not None
            and len(operation.buffer) <= KEPT_SIZE
            and len(self._buffers) < KEPT_BUFFERS
        ):
            self._buffers.append(operation.buffer)
        driver.finished()
        for waiting in operation.waiting:
            driver.resume(waiting)
        request.reply = operation.reply
        request.complete(operation.error)
        driver.send_resumed()

    def _take_buffer(self, size: int) -> bytearray:
        if self._buffers and len(self._buffers[-1]) >= size:
            return self._buffers.pop()
        return bytearray(max(size, min(self._image.geometry.cluster_size, KEPT_SIZE)))

    # -- the mapping ------------------------------------------------------------------------------------------

    def _link_plain(self, operation: Operation) -> None:
        image, table, size = self._image, operation.table, self._image.geometry.cluster_size
        for target in operation.plan.targets:
            index = target.cluster & self._slice_mask
            image.dirty.touch(operation.number, table, index, index + target.count)
            entry = target.host | COPIED
            for position in range(index, index + target.count):
                old = table[position]
                if old and target.is_new:
                    image.release_entry(old, Freeing.OTHER)
                table[position] = entry
                entry += size

    def _link_extended(self, operation: Operation) -> None:
        image, table = self._image, operation.table
        for target in operation.plan.targets:
            word = 2 * (target.cluster & self._slice_mask)
            image.dirty.touch(operation.number, table, word, word + 2)
            old = table[word]
            if old & ~COPIED and target.is_new:
                image.release_entry(old, Freeing.OTHER)
            table[word] = target.host & OFFSET_MASK | COPIED
            table[word + 1] = table[word + 1] & ~(target.bits << 32) | target.bits


class EntryChanger:
    """The base of those who change entries beside the writer, and ask it who is changing which."""

    def __init__(self, driver: Qcow2Driver, image: Image, writer: Writer) -> None:
        self._driver = driver
        self._image = image
        self._writer = writer
        geometry = image.geometry
        self._bits = geometry.cluster_bits
        self._size = geometry.cluster_size
        self._slice_bits = geometry.slice_bits
        self._slice_mask = geometry.slice_mask
        self._words = geometry.words
