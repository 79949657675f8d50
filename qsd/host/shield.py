"""Waiting although one has been cancelled: for half of a change is none.

A shield holds for as long as the storage takes, for ever if it hangs. So those of an actor's tasks can be dropped,
which the supervisor does when the daemon ends and the actor's time is over: what was going on then is cut off as by
kill -9, and nothing must be written that takes its end for granted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import trio


class Shields:
    """The shields of one actor's tasks. ``are_dropped``: there are none any more."""

    def __init__(self) -> None:
        self._scopes: set[trio.CancelScope] = set()
        self.are_dropped = False

    def use(self) -> None:
        """Take in what this task, and those it starts, shield from now on."""
        _current.set(self)

    def drop(self) -> None:
        """Let who was cancelled feel it."""
        self.are_dropped = True
        for scope in self._scopes:
            scope.shield = False

    @contextmanager
    def _shield(self) -> Iterator[None]:
        with trio.CancelScope(shield=not self.are_dropped) as scope:
            self._scopes.add(scope)
            try:
                yield
            finally:
                self._scopes.discard(scope)


_current: ContextVar[Shields | None] = ContextVar("shields", default=None)


@contextmanager
def shield() -> Iterator[None]:
    """Keep cancellation out of the block, until the actor's shields are dropped."""
    with (_current.get() or Shields())._shield():
        yield
