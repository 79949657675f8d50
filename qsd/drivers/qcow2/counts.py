"""How often each cluster of an image is used, or counted: for images that are larger than memory, and mostly holes.

Pure.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final

BLOCK_BITS: Final = 15
BLOCK: Final = 1 << BLOCK_BITS


class Counts:
    """How often each cluster is used or counted: numbers in blocks that exist where they are needed."""

    def __init__(self) -> None:
        # Two bytes a number; a block with one that does not fit has eight.
        self.blocks: dict[int, array[int]] = {}

    def copy(self) -> Counts:
        """The same numbers, to be changed on their own."""
        made = Counts()
        made.blocks = {index: block[:] for index, block in self.blocks.items()}
        return made

    def limit(self, highest: int) -> None:
        """Let no number be higher."""
        for block in self.blocks.values():
            if max(block) > highest:
                block[:] = array(block.typecode, [min(number, highest) for number in block])

    def add(self, cluster: int, difference: int = 1) -> None:
        """Count a cluster once more, or so many times."""
        index, at = divmod(cluster, BLOCK)
        block = self.blocks.get(index)
        if block is None:
            block = self.blocks[index] = array("H", bytes(2 * BLOCK))
        try:
            block[at] += difference
        except OverflowError:
            block = self.blocks[index] = array("Q", block)
            block[at] += difference

    def get(self, cluster: int) -> int:
        """The count of a cluster."""
        block = self.blocks.get(cluster >> BLOCK_BITS)
        return 0 if block is None else block[cluster & (BLOCK - 1)]

    def items(self) -> Iterator[tuple[int, int]]:
        """Clusters whose number is not 0, in their order, with the number."""
        for index in sorted(self.blocks):
            for at, number in enumerate(self.blocks[index]):
                if number:
                    yield index * BLOCK + at, number

    def put(self, first: int, counts: array[int]) -> None:
        """Set counts of clusters in a row; those of a block that does not exist are 0."""
        for start in range(0, len(counts), BLOCK):
            part = counts[start : start + BLOCK]
            if is_nothing(part):
                continue
            index, at = divmod(first + start, BLOCK)
            block = self.blocks.get(index, array("H", bytes(2 * BLOCK)))
            if part.typecode != block.typecode:
                wide = "Q" if "Q" in (part.typecode, block.typecode) or max(part) > 0xFFFF else "H"
                block, part = array(wide, block), array(wide, part)
            block[at : at + len(part)] = part
            self.blocks[index] = block

    def slice(self, first: int, count: int) -> array[int]:
        """``count`` numbers from cluster ``first`` on; both lie in one block, or are whole blocks."""
        nothing = array("H", bytes(2 * BLOCK))
        found: array[int] = array("Q")
        for start in range(first, first + count, BLOCK):
            index, at = divmod(start, BLOCK)
            found.extend(array("Q", self.blocks.get(index, nothing)[at : at + min(count, BLOCK)]))
        return found

    def last(self) -> int:
        """The last cluster whose number is not 0, or -1."""
        for index in sorted(self.blocks, reverse=True):
            at = last_used(self.blocks[index], BLOCK)
            if at >= 0:
                return index * BLOCK + at
        return -1


def last_used(block: array[int] | None, length: int) -> int:
    """The last of the first ``length`` numbers that is not 0, or -1."""
    if block is None:
        return -1
    used = len(block[:length].tobytes().rstrip(b"\0"))
    return -(-used // block.itemsize) - 1


def is_nothing(counts: array[int]) -> bool:
    """Whether all numbers are 0."""
    return not counts.tobytes().strip(b"\0")
