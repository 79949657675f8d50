"""Memory of the transmission phase: slabs that replies are built in, and buffers requests are received into.

Both come from one pool for all connections, page-aligned (an anonymous mapping), and go back when they are
empty: an idle connection holds no slab. A slab is a bump allocator: slots are taken one after the other, and when
every slot has been sent it starts again at 0, so a busy connection works in memory still in the CPU's cache.
"""

from __future__ import annotations

import mmap

SLAB_SIZE = 1 << 20
RECEIVE_SIZE = 256 << 10
# Bytes of free buffers of each size the pool keeps for the next connection.
POOL_BYTES = 8 << 20


class Slab:
    """Reply memory: ``used`` bytes are taken, ``outstanding`` slots have not been sent."""

    __slots__ = ("memory", "outstanding", "size", "used", "view")

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size)
        self.view = memoryview(self.memory)
        self.size = size
        self.used = 0
        self.outstanding = 0


class Receive:
    """Request memory: ``lent`` writes still use their payload in it."""

    __slots__ = ("lent", "memory", "size", "view")

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size)
        self.view = memoryview(self.memory)
        self.size = size
        self.lent = 0


class Pool:
    """Free slabs and receive buffers of the standard sizes; others are made and dropped."""

    def __init__(self) -> None:
        self._slabs: list[Slab] = []
        self._receives: list[Receive] = []

    def slab(self, size: int) -> Slab:
        """A slab of at least ``size`` bytes."""
        if size <= SLAB_SIZE:
            return self._slabs.pop() if self._slabs else Slab(SLAB_SIZE)
        return Slab(_rounded(size))

    def receive(self, size: int) -> Receive:
        """A receive buffer of at least ``size`` bytes."""
        if size <= RECEIVE_SIZE:
            return self._receives.pop() if self._receives else Receive(RECEIVE_SIZE)
        return Receive(_rounded(size))

    def give_back(self, item: Slab | Receive) -> None:
        """Take back what nobody uses any more."""
        if isinstance(item, Slab):
            if item.size == SLAB_SIZE and len(self._slabs) * SLAB_SIZE < POOL_BYTES:
                item.used = 0
                self._slabs.append(item)
        elif item.size == RECEIVE_SIZE and len(self._receives) * RECEIVE_SIZE < POOL_BYTES:
            self._receives.append(item)


def _rounded(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
