"""Requests a driver makes itself: what happens when one ends, and one request that ends when its parts have.

A part is an ordinary ``Request`` whose reply queue calls back at once, on the spot or later. Nothing here makes a
task or refers back to itself, so what has ended is freed without the garbage collector.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Final

from qsd.drivers.base import Driver
from qsd.messages import Flag, Pieces, ReplyQueue, Request

MAY_LEND: Final = Flag.MAY_LEND.value


class Callback(ReplyQueue):
    """A reply queue that hands every request that ends to ``ended``."""

    __slots__ = ("ended",)

    def __init__(self, ended: Callable[[Request], None]) -> None:
        self.ready = []
        self.armed = True
        self.ended = ended

    def notify(self) -> None:
        """One request has ended. (A method instead of an attribute: no reference cycle.)"""
        self.armed = True
        self.ended(self.ready.pop())


class Gather(ReplyQueue):
    """Completes ``request`` when everything it was split into has ended, with the first error there was.

    It begins with one part, the splitting itself; whoever splits adds to ``left`` for every further part, uses
    the gather as the parts' reply queue (or calls ``end``), and ends its own part last. The request counts as
    started by ``driver`` meanwhile.
    """

    __slots__ = ("driver", "error", "left", "request")

    def __init__(self, driver: Driver, request: Request) -> None:
        self.ready = []
        self.armed = True
        self.driver = driver
        self.request = request
        self.left = 1
        self.error = 0
        driver.in_flight += 1

    def notify(self) -> None:
        """A part has ended."""
        self.armed = True
        self.end(self.ready.pop().error)

    def end(self, error: int = 0) -> None:
        """A part has ended with a positive errno, or 0."""
        if error and not self.error:
            self.error = error
        self.left -= 1
        if not self.left:
            self.driver.finished()
            self.request.complete(self.error)


def gather_read(driver: Driver, request: Request) -> Gather:
    """The gather of a READ."""
    return (Lending if request.flags & MAY_LEND else Gather)(driver, request)


class Lending(Gather):
    """The gather of a READ that allows ``Pieces``: parts of it may be lent instead of copied."""

    __slots__ = ("lent",)

    def __init__(self, driver: Driver, request: Request) -> None:
        super().__init__(driver, request)
        self.lent: list[tuple[int, memoryview]] = []

    def end(self, error: int = 0) -> None:
        """A part has ended with a positive errno, or 0."""
        if self.left == 1 and self.lent and not self.error and not error:
            self.request.result = self._pieces()
        super().end(error)

    def _pieces(self) -> Pieces:
        """What is lent, and the buffer between."""
        buffer = self.request.buffer
        assert buffer is not None
        views = []
        end = 0
        for position, view in sorted(self.lent, key=itemgetter(0)):
            if position > end:
                views.append(buffer[end:position])
            views.append(view)
            end = position + len(view)
        if end < len(buffer):
            views.append(buffer[end:])
        return Pieces(views)
