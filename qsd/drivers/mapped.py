"""The base of formats that map: they say where a range is, and one place moves the bytes.

A format answers ``lookup``: the run of bytes from an offset on that are in one state, at most as many as asked for.
This module joins and splits requests along the runs, fills zeroes, descends to the backing file, unpacks
compressed clusters and answers block status. A format that can only be read is a header parser and a ``lookup``.

Where metadata is not in memory, ``lookup`` raises ``Cold``: the request waits while it is fetched, all who need the
same wait together, and then it is served from the beginning. Nothing of it may have been changed by then.

Requests for children are collected in ``_outbox`` and sent in batches by ``_send``, which also goes on with
requests that can be served now; so however deep callbacks nest, the stack does not.
"""

from __future__ import annotations

import errno
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Final

import attrs

from qsd.block.permissions import Perm
from qsd.drivers.base import Child, Driver, Host, Mode
from qsd.drivers.gather import Callback, Gather
from qsd.drivers.packed import Unpacker
from qsd.errors import QmpError
from qsd.messages import BlockState, Extent, Op, Request

READ: Final = Op.READ.value

# What a run is: stored in a child, zeroes, not described by this layer, one cluster that has to be unpacked.
DATA: Final = 0
ZERO: Final = 1
UNALLOCATED: Final = 2
PACKED: Final = 3
# Kind, length, where: offset in the child (DATA), what ``locate`` takes (PACKED); the child (DATA).
Run = tuple[int, int, int, Child | None]

# One BLOCK_STATUS looks at this many runs of metadata at most; its answer may end early.
MAX_STEPS: Final = 4096
ZEROES: Final = memoryview(bytes(1 << 20))

_ALLOCATED: Final = BlockState.ALLOCATED
_STATES: Final = {
    DATA: BlockState.DATA | _ALLOCATED,
    PACKED: BlockState.DATA | _ALLOCATED,
    ZERO: BlockState.ZERO | _ALLOCATED,
    UNALLOCATED: BlockState.ZERO,
}
_FREE: Final = BlockState.ZERO


class Cold(Exception):
    """Metadata has to be fetched. ``start(done)`` begins it; ``done(errno)`` may be called at once.

    ``key`` says what it is: whoever needs the same waits for the fetch that is under way.
    """

    def __init__(self, key: object, start: Callable[[Callable[[int], None]], None]) -> None:
        super().__init__(key)
        self.key = key
        self.start = start


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

    def unpack(self, where: int, data: bytearray) -> bytes | bytearray:
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
    def backing(self) -> Child | None:
        """The layer below."""
        return self.children.get("backing")

    # -- the batch --------------------------------------------------------------------------------------------

    def submit(self, batch: list[Request]) -> None:
        """Serve, or start, every request."""
        for request in batch:
            self.serve(request)
        if not self._sending:
            self._send()

    def serve(self, request: Request) -> None:
        """Serve one request as far as that goes now. Whoever calls this sees to ``_send``."""
        try:
            _SERVE[request.op](self, request)
        except Cold as cold:
            self._park(request, cold)
        except OSError as error:
            request.complete(error.errno or errno.EIO)

    def _post(self, child: Child, request: Request) -> None:
        """Put a request into the outbox."""
        waiting = self._outbox.get(child)
        if waiting is None:
            self._outbox[child] = [request]
        else:
            waiting.append(request)

    def _send(self) -> None:
        """Send what is in the outbox and go on with what can go on, until nothing is left of both."""
        if self._sending:
            return
        self._sending = True
        try:
            while self._outbox or self._resumed:
                resumed, self._resumed = self._resumed, []
                for go_on in resumed:
                    go_on()
                outbox, self._outbox = self._outbox, {}
                for child, requests in outbox.items():
                    child.submit(requests)
        finally:
            self._sending = False

    # -- cold metadata ----------------------------------------------------------------------------------------

    def _park(self, request: Request, cold: Cold) -> None:
        self.started()

        def go_on(error: int) -> None:
            self.finished()
            if error:
                request.complete(error)
            else:
                self.serve(request)

        self.wait_for(cold, go_on)

    def wait_for(self, cold: Cold, go_on: Callable[[int], None]) -> None:
        """Call ``go_on(errno)`` from ``_send`` when the metadata is there, or cannot be had."""
        waiting = self._waiting.get(cold.key)
        if waiting is not None:
            waiting.append(go_on)
            return
        self._waiting[cold.key] = [go_on]

        def done(error: int) -> None:
            for waiter in self._waiting.pop(cold.key):
                self._resumed.append(_bind(waiter, error))
            self._send()

        cold.start(done)

    def fetch(self, child: Child, offset: int, buffer: memoryview, done: Callable[[int], None]) -> None:
        """Read metadata; what lies beyond the child's end is zeroes. ``done(errno)`` may be called at once."""
        inside = max(0, min(len(buffer), child.length - offset))
        if inside < len(buffer):
            buffer[inside:] = bytes(len(buffer) - inside)
        if not inside:
            done(0)
            return
        reply = Callback(lambda request: done(request.error))
        self._post(child, Request(READ, offset, inside, buffer[:inside], reply))
        self._send()

    # -- reading ----------------------------------------------------------------------------------------------

    def _read(self, request: Request) -> None:
        offset, length = request.offset, request.length
        run = self.lookup(offset, length)
        if run[1] == length:
            if run[0] == DATA:
                child = run[3]
                assert child is not None
                if run[2] + length <= child.length:
                    request.offset = run[2]
                    self._post(child, request)
                    return
            elif run[0] == UNALLOCATED:
                backing = self.backing
                if backing is not None and offset + length <= backing.length:
                    self._post(backing, request)
                    return
        self._read_runs(request, run)

    def _read_runs(self, request: Request, run: Run) -> None:
        """Read along several runs, or along one that takes more than passing the request on."""
        buffer = request.buffer
        assert buffer is not None
        offset, end = request.offset, request.offset + request.length
        runs = [run]
        position = offset + run[1]
        while position < end:
            run = self.lookup(position, end - position)
            position += run[1]
            runs.append(_joined(runs.pop(), run, runs))
        gather = Gather(self, request)
        position = 0
        for kind, length, where, child in runs:
            view = buffer[position : position + length]
            if kind == DATA:
                assert child is not None
                self._read_part(gather, child, where, view)
            elif kind == UNALLOCATED and self.backing is not None:
                self._read_part(gather, self.backing, offset + position, view)
            elif kind == PACKED:
                self.unpacker.read(where, self.packed_skip(offset + position), view, gather)
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
        self._post(child, Request(READ, where, length, view, gather))

    # -- the rest ---------------------------------------------------------------------------------------------

    def _block_status(self, request: Request) -> None:
        _StatusWalk(self, request).go_on()

    def _cache(self, request: Request) -> None:
        """Bring a range into the page cache: of what is stored in children, as much as one run."""
        kind, length, where, child = self.lookup(request.offset, request.length)
        if kind == UNALLOCATED and self.backing is not None:
            child, where = self.backing, request.offset
        if child is None or where >= child.length:
            request.complete()
            return
        request.offset, request.length = where, min(length, child.length - where)
        self._post(child, request)

    def _flush(self, request: Request) -> None:
        """Nothing is written by a format that can only be read."""
        request.complete()

    def _refuse(self, request: Request) -> None:
        request.complete(errno.ENOTSUP)

    _write = _write_zeroes = _discard = _refuse

    def require_read_only(self) -> None:
        """For formats that cannot be written: fall back to reading where that is allowed. Raises QmpError."""
        if not self.mode.read_only:
            if not self.mode.auto_read_only:
                raise QmpError("Image is read-only")
            self.mode = attrs.evolve(self.mode, read_only=True)

    # -- permissions ------------------------------------------------------------------------------------------

    def child_permissions(self, name: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """A format needs its file for itself, idle or not, and a backing file as stable as it must be itself."""
        stable = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
        if not self.mode.active:
            return Perm.NONE, Perm.ALL
        if name == "backing":
            return perm & Perm.CONSISTENT_READ, Perm.ALL if shared & Perm.WRITE else stable
        if self.mode.read_only:
            return Perm.CONSISTENT_READ, stable
        return Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE, stable


def _bind(waiter: Callable[[int], None], error: int) -> Callable[[], None]:
    return lambda: waiter(error)


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


class _StatusWalk:
    """Answers one BLOCK_STATUS, with pauses where metadata or the backing file's answer has to be waited for."""

    __slots__ = ("driver", "end", "extents", "position", "request", "steps", "wanted")

    def __init__(self, driver: MappedDriver, request: Request) -> None:
        self.driver = driver
        self.request = request
        self.position = request.offset
        self.end = request.offset + request.length
        self.wanted = request.extents_wanted
        self.steps = MAX_STEPS
        self.extents: list[Extent] = []

    def go_on(self, error: int = 0) -> None:
        """Walk until the answer is complete or something has to be waited for."""
        driver = self.driver
        try:
            while not error and self.position < self.end and len(self.extents) <= self.wanted and self.steps:
                self.steps -= 1
                if self._step():
                    return
        except Cold as cold:
            driver.started()
            driver.wait_for(cold, self._woken)
            return
        except OSError as problem:
            error = problem.errno or errno.EIO
        self.request.result = self.extents[: self.wanted]
        self.request.complete(0 if self.extents else error)

    def _step(self) -> bool:
        """Add the run at the present position; True when a child has been asked for it instead."""
        driver = self.driver
        position = self.position
        left = self.end - position
        if driver.asks_data:
            kind, length, where, child = driver.lookup(position, left)
            if child is not None and where < child.length:
                self._ask(child, where, min(length, child.length - where), self._data_answered)
                return True
        else:
            kind, length = driver.status(position, left)
        backing = driver.backing if kind == UNALLOCATED else None
        if backing is None:
            self._add(length, _STATES[kind], 0 if kind == UNALLOCATED else 1)
        elif position < backing.length:
            self._ask(backing, position, min(length, backing.length - position), self._backing_answered)
            return True
        else:
            # What a short backing file does not have counts as zeroes of its own.
            self._add(length, _FREE, 2)
        return False

    def _woken(self, error: int) -> None:
        self.driver.finished()
        self.go_on(error)

    def _ask(self, child: Child, offset: int, length: int, answered: Callable[[Request], None]) -> None:
        question = Request(Op.BLOCK_STATUS.value, offset, length, None, Callback(answered))
        question.extents_wanted = self.wanted - len(self.extents) + 1
        self.driver.started()
        self.driver._post(child, question)

    def _backing_answered(self, question: Request) -> None:
        if not question.error:
            for extent in question.result:
                self._add(extent.length, extent.state & ~_ALLOCATED, extent.depth + 1 if extent.depth else 0)
        self._go_on_later(question.error)

    def _data_answered(self, question: Request) -> None:
        if not question.error:
            for extent in question.result:
                self._add(extent.length, _STATES[DATA] | extent.state & BlockState.ZERO, 1)
        self._go_on_later(question.error)

    def _go_on_later(self, error: int) -> None:
        self.driver.finished()
        self.driver._resumed.append(_bind(self.go_on, error))
        self.driver._send()

    def _add(self, length: int, state: BlockState, depth: int) -> None:
        self.position += length
        extents = self.extents
        if extents and extents[-1].state == state and extents[-1].depth == depth:
            extents[-1] = Extent(extents[-1].length + length, state, depth)
        else:
            extents.append(Extent(length, state, depth))


_SERVE: dict[int, Callable[[MappedDriver, Request], None]] = {
    Op.READ.value: lambda driver, request: driver._read(request),
    Op.WRITE.value: lambda driver, request: driver._write(request),
    Op.WRITE_ZEROES.value: lambda driver, request: driver._write_zeroes(request),
    Op.DISCARD.value: lambda driver, request: driver._discard(request),
    Op.FLUSH.value: lambda driver, request: driver._flush(request),
    Op.BLOCK_STATUS.value: lambda driver, request: driver._block_status(request),
    Op.CACHE.value: lambda driver, request: driver._cache(request),
}
