"""What formats say about a range (``Run``), and that they cannot say it yet (``Cold``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from qsd.drivers.base import Child

# What a run is: stored in a child, zeroes, not described by this layer, one cluster that has to be unpacked.
DATA: Final = 0
ZERO: Final = 1
UNALLOCATED: Final = 2
PACKED: Final = 3
# Kind, length, where: offset in the child (DATA), what ``locate`` takes (PACKED); the child (DATA).
Run = tuple[int, int, int, Child | None]


class Cold(Exception):
    """Metadata has to be fetched. ``start(done)`` begins it; ``done(errno)`` may be called at once.

    ``key`` says what it is: whoever needs the same waits for the fetch that is under way. Between ``hold`` and
    ``release`` it stays in memory: however many want different things, and however little room there is for them,
    each finds what it has waited for.
    """

    def __init__(
        self,
        key: object,
        start: Callable[[Callable[[int], None]], None],
        hold: Callable[[], None] = lambda: None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(key)
        self.key = key
        self.start = start
        self.hold = hold
        self.release = release
