"""The speed limit of a job."""

from __future__ import annotations

import math

import trio
from trio_util import RepeatedEvent

# Units (bytes) below which a step is not worth it, however slow the job is to be.
SMALLEST = 64 << 10


class Pace:
    """Spreads work over time: after ``spend(n)`` the next step may begin when ``n`` units had time at the speed.

    What is done at once is bounded by one step, so the first goes through however slow the job is.
    """

    def __init__(self, speed: int = 0) -> None:
        self._speed = speed
        self._next = -math.inf
        self._changed = RepeatedEvent()

    @property
    def speed(self) -> int:
        """Units per second; 0 is without limit."""
        return self._speed

    @speed.setter
    def speed(self, speed: int) -> None:
        self._speed = speed
        self._next = -math.inf
        self._changed.set()

    def step(self, largest: int) -> int:
        """How much to do at a time: ``largest``, or what is done in a tenth of a second, but not too little."""
        if not self._speed:
            return largest
        return min(largest, max(SMALLEST, self._speed // 10 // SMALLEST * SMALLEST))

    def spend(self, amount: int) -> None:
        """Note that ``amount`` units have been done."""
        if self._speed:
            self._next = max(self._next, trio.current_time()) + amount / self._speed

    @property
    def is_due(self) -> bool:
        """Whether the next step may begin."""
        return self._next <= trio.current_time()

    async def wait(self) -> None:
        """Return when the next step may begin, when the speed has changed, or at ``interrupt``."""
        if not self.is_due:
            with trio.move_on_at(self._next):
                await self._changed.wait()

    def interrupt(self) -> None:
        """Let who waits look at something else."""
        self._changed.set()
