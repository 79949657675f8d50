"""The bytes of a bitmap in blocks, of which only those are in memory that are neither all zeroes nor all ones.

The bitmap of a 64 TiB disk takes 128 MiB at 64 KiB; most are zeroes, and nobody has to look at those. Copies
share their blocks until one of them changes one.
"""

from __future__ import annotations

from itertools import chain
from typing import Final

BLOCK_BITS: Final = 12
# Bytes of a block: a page, so that a single bit takes no more than where the kernel hands out zeroes.
BLOCK: Final = 1 << BLOCK_BITS
BLOCK_MASK: Final = BLOCK - 1
# A block of zeroes and one of ones: there is one of each.
UNIFORM: Final = (bytes(BLOCK), b"\xff" * BLOCK)


class Blocks:
    """See the module. Zeroes without end at first. ``own``: the blocks that may be changed in place, by number."""

    __slots__ = ("_shared", "own")

    def __init__(self) -> None:
        self.own: dict[int, bytearray] = {}
        # Never changed in place: copies have them too, or they are all ones.
        self._shared: dict[int, bytes | bytearray] = {}

    def at(self, number: int) -> bytes | bytearray:
        """The bytes of a block, to look at before anything is changed."""
        return self.own.get(number) or self._shared.get(number, UNIFORM[0])

    def skip(self, number: int, stop: int, value: int) -> int:
        """The first block from ``number`` on with perhaps another bit than ``value``; ``stop`` if there is none."""
        own, get, zeroes, uniform = self.own, self._shared.get, UNIFORM[0], UNIFORM[value]
        if not value and (len(own) + len(self._shared)) ** 2 < stop - number:
            # Going through the few that there are, for each of them, takes less than counting up to the last.
            return min((each for each in chain(own, self._shared) if number <= each < stop), default=stop)
        while number < stop and number not in own and get(number, zeroes) is uniform:
            number += 1
        return number

    def writable(self, number: int) -> bytearray:
        """The bytes of a block, to be changed in place."""
        found = self.own.get(number)
        if found is None:
            found = self.own[number] = bytearray(self._shared.pop(number, UNIFORM[0]))
        return found

    def put(self, number: int, block: bytes | bytearray) -> None:
        """Let a block be ``block``, which nobody changes any more."""
        self.own.pop(number, None)
        if block is UNIFORM[0]:
            self._shared.pop(number, None)
        else:
            self._shared[number] = block

    def copy(self) -> Blocks:
        """The same content, independent from now on. Costs nothing until something is changed."""
        self._shared |= self.own
        self.own = {}
        made = Blocks()
        made._shared = self._shared.copy()
        return made

    def stored(self) -> list[int]:
        """The numbers of all blocks with anything but zeroes in them, and perhaps of others; ascending."""
        return sorted([*self.own, *self._shared])
