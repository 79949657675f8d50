"""Block status of a mapping format: a walk over its runs, and down into the backing file where it says nothing."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from qsd.drivers.base import Child
from qsd.drivers.gather import Callback
from qsd.drivers.runs import DATA, PACKED, UNALLOCATED, ZERO, Cold
from qsd.messages import BlockState, Extent, Op, Request

if TYPE_CHECKING:
    from qsd.drivers.mapped import MappedDriver

# One BLOCK_STATUS looks at this many runs of metadata at most; its answer may end early.
MAX_STEPS: Final = 4096

_ALLOCATED: Final = BlockState.ALLOCATED
_STATES: Final = {
    DATA: BlockState.DATA | _ALLOCATED,
    PACKED: BlockState.DATA | _ALLOCATED,
    ZERO: BlockState.ZERO | _ALLOCATED,
    UNALLOCATED: BlockState.ZERO,
}
_FREE: Final = BlockState.ZERO


class StatusWalk:
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
        self.driver.post(child, question)

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
        self.driver.resume(partial(self.go_on, error))
        self.driver.send()

    def _add(self, length: int, state: BlockState, depth: int) -> None:
        self.position += length
        extents = self.extents
        if extents and extents[-1].state == state and extents[-1].depth == depth:
            extents[-1] = Extent(extents[-1].length + length, state, depth)
        else:
            extents.append(Extent(length, state, depth))
