"""The base of formats that map: they say where a range is, and one place moves the bytes.

A format answers ``lookup``: the run of bytes from an offset on that are in one state, at most as many as asked for.
This module joins and splits requests along the runs, fills zeroes, descends to the backing file, unpacks
compressed clusters and answers block status. A format that can only be read is a header parser and a ``lookup``.

Where metadata is not in memory, ``lookup`` raises ``Cold``: the request waits while it is fetched, all who need the
same wait together, and then it is served from the beginning. Nothing of it may have been changed by then.

Requests for children are collected in ``_outbox`` and sent in batches by ``send``, which also goes on with
requests that can be served now; so however deep callbacks nest, the stack does not.
"""

from __future__ import annotations

import errno
from abc import abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from time import perf_counter_ns
from typing import Any, ClassVar, Final, TypeVar

import attrs
import trio

from qsd.block.permissions import Perm
from qsd.block.plan import WRITING
from qsd.drivers.base import Child, Driver, Host, Mode
from qsd.drivers.gather import Callback, Gather, gather_read
from qsd.drivers.packed import Unpacker
from qsd.drivers.runs import DATA, PACKED, UNALLOCATED, Cold, Run
from qsd.drivers.status import StatusWalk
from qsd.errors import QmpError, errno_text
from qsd.messages import Op, ReplyQueue, Request

T = TypeVar("T")
# Serves one request of a driver.
Handler = Callable[[Any, Request], None]

READ: Final = Op.READ.value

# After so many rounds of ``send``, or requests it went on with, it looks at the clock; after so many nanoseconds
# more the loop has its turn. So many requests go on in one round.
MANY_ROUNDS: Final = 16
AT_ONCE: Final = 32
SLICE_NS: Final = 2_000_000
ZEROES: Final = memoryview(bytes(1 << 20))


class MappedDriver(Driver):
    """See the module."""

    is_format: ClassVar[bool] = True

    def __init__(self, node_name: str, options: Any, mode: Mode, host: Host) -> None:
        super().__init__(node_name, options, mode, host)
        self._outbox: dict[Child, list[Request]] = {}
        self._resumed: list[Callable[[], None]] = []
        self._sending = False
        self._waiting: dict[object, list[Callable[[int], None]]] = {}
        self.unpacker = Unpacker(self, self.unpack)

    # -- what a format says -----------------------------------------------------------------------------------

    @abstractmethod
    def lookup(self, offset: int, length: int) -> Run:
        """The run at ``offset``, of at most ``length`` bytes. Raises Cold, or OSError for broken metadata.

        A PACKED run does not reach beyond the unit that is unpacked at once.
        """

    def status(self, offset: int, length: int) -> tuple[int, int]:
        """Kind and length of the run at ``offset``, wherever its parts are stored. Raises as ``lookup`` does."""
        kind, run, _where, _child = self.lookup(offset, length)
        return kind, run

    def locate(self, where: int) -> tuple[Child, int, int]:
        """Child, offset and length (an upper bound) of the packed bytes ``where`` stands for."""
        raise NotImplementedError

    def unpack(self, where: int, data: memoryview) -> bytes | bytearray:
        """The bytes packed in ``data``; runs on a thread. Raises OSError."""
        raise NotImplementedError

    def packed_skip(self, offset: int) -> int:
        """How far into its unit a packed ``offset`` is."""
        raise NotImplementedError

    @property
    def asks_data(self) -> bool:
        """Whether block status asks the data's child about holes: where space was reserved and not written."""
        return False

    @property
    def lends(self) -> bool:
        """Whether reads may be answered with pages of the data's child: what is there never becomes another's."""
        return True

    @property
    def backing(self) -> Child | None:
        """The layer below."""
        return self.children.get("backing")

    # -- the batch --------------------------------------------------------------------------------------------

    def submit(self, batch: list[Request]) -> None:
        """Serve, or start, every request."""
        for request in batch:
            self.serve(request)
        if not self._sending:
            self.send()

    def serve(self, request: Request) -> None:
        """Serve one request as far as that goes now. Whoever calls this sees to ``send``."""
        self.serve_with(_SERVE[request.op], request)

    def serve_with(self, handler: Handler, request: Request) -> None:
        """Let ``handler`` serve a request, again from the beginning when it was ``Cold``."""
        try:
            handler(self, request)
        except Cold as cold:
            self.started()
            self.wait_for(cold, partial(self._warm, handler, request))
        except OSError as error:
            request.complete(error.errno or errno.EIO)

    def _warm(self, handler: Handler, request: Request, error: int) -> None:
        self.finished()
        if error:
            request.complete(error)
        else:
            self.serve_with(handler, request)

    def post(self, child: Child, request: Request) -> None:
        """Put a request into the outbox."""
        waiting = self._outbox.get(child)
        if waiting is None:
            self._outbox[child] = [request]
        else:
            waiting.append(request)

    def send(self) -> None:
        """Send what is in the outbox and go on with what can go on, until nothing is left of both."""
        if self._sending:
            return
        self._sending = True
        rounds = end = 0
        try:
            while self._outbox or self._resumed:
                rounds += 1
                if not end and rounds >= MANY_ROUNDS:
                    end = perf_counter_ns() + SLICE_NS
                elif end and perf_counter_ns() > end:
                    # An image can be made so that one request looks at a million tables. Let others run.
                    self.started()
                    self.host.spawn(self._send_later, name="go on")
                    return
                if self._resumed:
                    # A thousand parts of one request may have waited for the same table.
                    resumed, self._resumed = self._resumed[:AT_ONCE], self._resumed[AT_ONCE:]
                    rounds += len(resumed)
                    for go_on in resumed:
                        go_on()
                outbox, self._outbox = self._outbox, {}
                for child, requests in outbox.items():
                    child.submit(requests)
        finally:
            self._sending = False

    def send_resumed(self) -> None:
        """``send``, if anybody has been resumed."""
        if self._resumed:
            self.send()

    async def _send_later(self) -> None:
        await trio.lowlevel.checkpoint()
        self.finished()
        self.send()

    def resume(self, go_on: Callable[[], None]) -> None:
        """Let ``send`` call ``go_on``; whoever says this outside of a submit sees to ``send``."""
        self._resumed.append(go_on)

    async def caught_up(self) -> None:
        """Return when all that can go on now has gone on, and what it asks of children has been sent."""
        done = trio.Event()
        self.resume(done.set)
        self.send()
        await done.wait()

    # -- cold metadata ----------------------------------------------------------------------------------------

    def wait_for(self, cold: Cold, go_on: Callable[[int], None]) -> None:
        """Call ``go_on(errno)`` from ``send`` when the metadata is there, or cannot be had."""
        # Its frames lead to earlier requests, these to what they waited for: none of that would ever be freed.
        cold.__traceback__ = cold.__context__ = None
        waiting = self._waiting.get(cold.key)
        if waiting is not None:
            waiting.append(go_on)
            return
        self._waiting[cold.key] = [go_on]
        self._start(cold)

    def _start(self, cold: Cold) -> None:
        def done(error: int) -> None:
            if not error:
                cold.hold()
            for waiter in self._waiting.pop(cold.key):
                self.resume(partial(waiter, error))
            if not error:
                self.resume(cold.release)
            self.send()

        try:
            cold.start(done)
        except Cold as first:
            # It needs something itself: that comes first, and then it is tried again.
            self.wait_for(first, lambda error: done(error) if error else self._start(cold))
        except OSError as error:
            done(error.errno or errno.EIO)

    async def settled(self, function: Callable[..., T], *args: Any) -> T:
        """Call what may raise Cold until it does not. Raises OSError."""
        with ExitStack() as held:
            while True:
                try:
                    return function(*args)
                except Cold as cold:
                    await self._warmed(cold)
                    held.close()
                    held.callback(cold.release)

    async def _warmed(self, cold: Cold) -> None:
        """Return when the metadata is there, and held. Raises OSError."""
        done = trio.Event()
        errors: list[int] = []
        is_wanted = True

        def go_on(error: int) -> None:
            errors.append(error)
            if is_wanted and not error:
                cold.hold()
            done.set()

        self.wait_for(cold, go_on)
        self.send()
        try:
            await done.wait()
        except trio.Cancelled:
            is_wanted = False
            if errors == [0]:
                cold.release()
            raise
        if errors[0]:
            raise OSError(errors[0], errno_text(errors[0]))

    def fetch(self, child: Child, offset: int, buffer: memoryview, done: Callable[[int], None]) -> None:
        """Read metadata; what lies beyond the child's end is zeroes. ``done(errno)`` may be called at once."""
        self.fetch_for(Callback(lambda request: done(request.error)), child, offset, buffer)

    def fetch_for(self, reply: ReplyQueue, child: Child, offset: int, buffer: memoryview) -> None:
        """The same, as a request that ends on ``reply``."""
        inside = child.length - offset
        if inside < len(buffer):
            inside = max(0, inside)
            buffer[inside:] = bytes(len(buffer) - inside)
            buffer = buffer[:inside]
        request = Request(READ, offset, len(buffer), buffer, reply)
        if buffer:
            self.post(child, request)
            self.send()
        else:
            request.complete()

    # -- reading ----------------------------------------------------------------------------------------------

    def _read(self, request: Request) -> None:
        offset, length = request.offset, request.length
        run = self.lookup(offset, length)
        if run[1] == length:
            if run[0] == DATA:
                child = run[3]
                assert child is not None
                if run[2] + length <= child.length:
                    if request.flags and not self.lends:
                        request.flags = 0
                    request.offset = run[2]
                    self.post(child, request)
                    return
            elif run[0] == UNALLOCATED:
                backing = self.backing
                if backing is not None and offset + length <= backing.length:
                    self.post(backing, request)
                    return
        self._read_runs(request, run, gather_read(self, request))

    def _read_rest(self, request: Request) -> None:
        """Go on with a read whose metadata did not all fit: its parts are those of the whole.

        A gather for each rest would be one in the other, and their ends as many calls deep.
        """
        gather = request.reply
        assert isinstance(gather, Gather)
        self._read_runs(request, self.lookup(request.offset, request.length), gather)

    def _read_runs(self, request: Request, run: Run, gather: Gather) -> None:
        """Read along several runs, or along one that takes more than passing the request on."""
        buffer = request.buffer
        assert buffer is not None
        offset, end = request.offset, request.offset + request.length
        runs = [run]
        position = offset + run[1]
        while position < end:
            try:
                run = self.lookup(position, end - position)
            except (Cold, OSError):
                # The rest is a request of its own: with little room for metadata, the whole might never be warm.
                gather.left += 1
                rest = Request(READ, position, end - position, buffer[position - offset :], gather)
                self.resume(partial(self.serve_with, type(self)._read_rest, rest))
                break
            position += run[1]
            runs.append(_joined(runs.pop(), run, runs))
        position = 0
        # A rest is the end of the whole.
        before = gather.request.length - request.length
        for kind, length, where, child in runs:
            view = buffer[position : position + length]
            if kind == DATA:
                assert child is not None
                self._read_part(gather, child, where, view)
            elif kind == UNALLOCATED and self.backing is not None:
                self._read_part(gather, self.backing, offset + position, view)
            elif kind == PACKED:
                skip = self.packed_skip(offset + position)
                self.unpacker.read(where, skip, view, gather, before + position)
            else:
                fill_zeroes(view)
            position += length
        gather.end()

    def _read_part(self, gather: Gather, child: Child, where: int, view: memoryview) -> None:
        """Read into a part of a buffer; what lies beyond the child's end is zeroes."""
        length = len(view)
        inside = child.length - where
        if inside < length:
            inside = max(0, inside)
            fill_zeroes(view[inside:])
            if not inside:
                return
            view, length = view[:inside], inside
        gather.left += 1
        self.post(child, Request(READ, where, length, view, gather))

    # -- the rest ---------------------------------------------------------------------------------------------

    def _block_status(self, request: Request) -> None:
        StatusWalk(self, request).go_on()

    def _cache(self, request: Request) -> None:
        """Bring a range into the page cache: of what is stored in children, as much as one run."""
        kind, length, where, child = self.lookup(request.offset, request.length)
        if kind == UNALLOCATED and self.backing is not None:
            child, where = self.backing, request.offset
        if child is None or where >= child.length:
            request.complete()
            return
        request.offset, request.length = where, min(length, child.length - where)
        self.post(child, request)

    def _flush(self, request: Request) -> None:
        """Nothing is written by a format that can only be read."""
        request.complete()

    def _write(self, request: Request) -> None:
        request.complete(errno.ENOTSUP)

    def _write_zeroes(self, request: Request) -> None:
        request.complete(errno.ENOTSUP)

    def _discard(self, request: Request) -> None:
        request.complete(errno.ENOTSUP)

    def require_read_only(self) -> None:
        """For formats that cannot be written: fall back to reading where that is allowed. Raises QmpError."""
        if not self.mode.read_only:
            if not self.mode.auto_read_only:
                raise QmpError("Image is read-only")
            self.mode = attrs.evolve(self.mode, read_only=True)

    # -- permissions ------------------------------------------------------------------------------------------

    def child_permissions(self, name: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """A format needs its file for itself, idle or not, and a backing file as stable as it must be itself.

        Of an external data file it needs what its own users need, and lets others do all but resize it.
        """
        stable = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
        if not self.mode.active:
            return Perm.CONSISTENT_READ if name == "file" else Perm.NONE, Perm.ALL
        if name == "backing":
            return perm & Perm.CONSISTENT_READ, Perm.ALL if shared & Perm.WRITE else stable
        if name == "data-file":
            return perm if self.mode.read_only else _data_file_use(perm), shared & ~Perm.RESIZE
        if not self.mode.read_only:
            perm |= Perm.WRITE | Perm.RESIZE
        return perm | Perm.CONSISTENT_READ, shared & stable


def _data_file_use(perm: Perm) -> Perm:
    """What a format does with its data file for users who want ``perm``."""
    if perm & WRITING:
        # It grows with what is written. What changes nothing above may be new here.
        return perm | Perm.WRITE | Perm.RESIZE
    if perm & Perm.RESIZE:
        # What a longer disk shows first is zeroed.
        return perm | Perm.WRITE_UNCHANGED
    return perm


def _joined(last: Run, run: Run, runs: list[Run]) -> Run:
    """One run of two neighbours when they are one; else the second, after the first was put into ``runs``."""
    if (
        last[0] == run[0]
        and last[0] != PACKED
        and last[3] is run[3]
        and (last[0] != DATA or last[2] + last[1] == run[2])
    ):
        return last[0], last[1] + run[1], last[2], last[3]
    runs.append(last)
    return run


def fill_zeroes(view: memoryview) -> None:
    """Zero a buffer."""
    length = len(view)
    for start in range(0, length, len(ZEROES)):
        part = min(len(ZEROES), length - start)
        view[start : start + part] = ZEROES[:part]


_SERVE: dict[int, Handler] = {
    Op.READ.value: lambda driver, request: driver._read(request),
    Op.WRITE.value: lambda driver, request: driver._write(request),
    Op.WRITE_ZEROES.value: lambda driver, request: driver._write_zeroes(request),
    Op.DISCARD.value: lambda driver, request: driver._discard(request),
    Op.FLUSH.value: lambda driver, request: driver._flush(request),
    Op.BLOCK_STATUS.value: lambda driver, request: driver._block_status(request),
    Op.CACHE.value: lambda driver, request: driver._cache(request),
}
