"""Memory of the transmission phase: slabs that replies are built in, and buffers requests are received into.

Both come from one pool for all connections, page-aligned (an anonymous mapping), and go back when they are
empty: an idle connection holds no slab. A slab is a bump allocator: slots are taken one after the other, and when
every slot has been sent it starts again at 0, so a busy connection works in memory still in the CPU's cache.

Requests of 1 MiB, the largest that are common, fit into a standard size: a mapping of its own for each costs
0.4 ms, its page faults above all, more than everything else about such a request.
"""

from __future__ import annotations

import mmap
from typing import Final

# A request of 1 MiB with its header, and a reply of as much.
LARGE: Final = (1 << 20) + (64 << 10)
SLAB_SIZE: Final = LARGE
RECEIVE_SIZES: Final = (256 << 10, LARGE)
# Bytes of free buffers of each size the pool keeps for the next connection.
POOL_BYTES: Final = 9 << 20


def _memory(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class Slab:
    """Reply memory: ``used`` bytes are taken, ``outstanding`` slots have not been sent."""

    __slots__ = ("memory", "outstanding", "size", "used", "view")

    def __init__(self, size: int) -> None:
        self.memory = _memory(size)
        self.view = memoryview(self.memory)
        self.size = size
        self.used = 0
        self.outstanding = 0


class Receive:
    """Request memory: ``lent`` writes still use their payload in it."""

    __slots__ = ("lent", "memory", "size", "view")

    def __init__(self, size: int) -> None:
        self.memory = _memory(size)
        self.view = memoryview(self.memory)
        self.size = size
        self.lent = 0


class Pool:
    """Free slabs and receive buffers of the standard sizes; others are made and dropped."""

    def __init__(self) -> None:
        self._slabs: list[Slab] = []
        self._receives: dict[int, list[Receive]] = {size: [] for size in RECEIVE_SIZES}

    def slab(self, size: int) -> Slab:
        """A slab of at least ``size`` bytes."""
        if size <= SLAB_SIZE:
            return self._slabs.pop() if self._slabs else Slab(SLAB_SIZE)
        return Slab(_rounded(size))

    def receive(self, size: int) -> Receive:
        """A receive buffer of at least ``size`` bytes."""
        for standard, free in self._receives.items():
            if size <= standard:
                return free.pop() if free else Receive(standard)
        return Receive(_rounded(size))

    def give_back(self, item: Slab | Receive) -> None:
        """Take back what nobody uses any more."""
        if isinstance(item, Slab):
            if item.size == SLAB_SIZE and len(self._slabs) * SLAB_SIZE < POOL_BYTES:
                item.used = 0
                self._slabs.append(item)
        else:
            free = self._receives.get(item.size)
            if free is not None and len(free) * item.size < POOL_BYTES:
                free.append(item)


def _rounded(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
