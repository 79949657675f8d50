"""Reads on the spot: where in which file the bytes are, asked of the layers once for many requests.

Most reads find what they want in the page cache, and every layer above the file does nothing but say where. So a
node can hand out a ``Spot``: a function that goes through all of its layers at once. Whoever holds it reads with
``preadv2`` into the answer's own place; nobody else hears of the request, which has ended before anything else
happens. What the function does not know (it answers None), and what is not in the page cache, goes the usual way.

A spot may be kept while ``epoch`` is the same. Everything it was made of ends the epoch when it changes: a
descriptor, a mapping, an edge, a node that is held or let go.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import attrs

if TYPE_CHECKING:
    from qsd.drivers.base import Child

# Descriptor, offset in it, flags for preadv2; None when the usual way has to be taken. The range asked for lies
# within the node's length.
Find = Callable[[int, int], tuple[int, int, int] | None]

# The number of the epoch, alone in a list, so that it can be looked at without a call.
epoch: list[int] = [0]


def end_epoch() -> None:
    """What spots were made of is about to change, or has: none of them is used any more."""
    epoch[0] += 1


@attrs.frozen(eq=False)
class Spot:
    """``find``, and what an overlay makes its own of: its ``layers``, top first, and what is below them.

    ``fd`` (with ``flags``) is set where the node's bytes are those of one file at the same offsets; else it is -1.
    """

    find: Find
    fd: int = -1
    flags: int = 0
    layers: tuple[Any, ...] = ()
    below: Find | None = None


class Spotted(Protocol):
    """A node, or the way to one."""

    def spot(self) -> Spot | None:
        """How reads are found on the spot until the epoch ends."""


class Finder:
    """Keeps what ``target`` says for as long as it holds."""

    __slots__ = ("_epoch", "_find", "target")

    def __init__(self, target: Spotted) -> None:
        self.target = target
        self._epoch = -1
        self._find: Find | None = None

    def find(self) -> Find | None:
        """What to ask for the place of a read, now; None: nothing is read on the spot."""
        if self._epoch != epoch[0]:
            self._epoch = epoch[0]
            spot = self.target.spot()
            self._find = None if spot is None else spot.find
        return self._find


def read_now(child: Child, find: Find | None, offset: int, buffer: memoryview) -> bool:
    """Fill ``buffer`` with what ``child`` holds at ``offset``; False: ask for that the usual way."""
    size = len(buffer)
    place = find(offset, size) if find is not None and offset + size <= child.length else None
    if place is None:
        return False
    fd, where, flags = place
    try:
        if os.preadv(fd, (buffer,), where, flags) != size:
            return False
    except OSError:
        # Not in the page cache, as a rule.
        return False
    child.served(1, size)
    return True
