"""Clusters that a repair may write new tables to: of those in the file what nobody has, and what is behind its end.

Inside first: a disk that is full has no other. What looks leaked is nobody's, unless something leads nowhere: then
it may be what that should lead to, and free is only what the image itself counts as free.
"""

from __future__ import annotations

import errno
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

from qsd.drivers.qcow2 import refcount_codec
from qsd.drivers.qcow2.counts import BLOCK
from qsd.drivers.qcow2.layout import Header
from qsd.drivers.qcow2.ledger import Findings

Write = Callable[[int, bytes], None]

# Of the disk, of a quota, of a file's length.
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_full(error: OSError) -> bool:
    """Whether a write failed because there is no room for more, not because something is broken."""
    return error.errno in _NO_ROOM


def sound_blocks(found: Findings) -> dict[int, int]:
    """The clusters of refcount blocks that are nothing else, by their index in the refcount table.

    Of entries that lead to one block the first is right, and it may have reserved bits.
    """
    uses = Counter(cluster for _index, cluster, is_used in found.refcount_blocks if is_used)
    sound: dict[int, int] = {}
    seen = set()
    for index, cluster, _is_used in found.refcount_blocks:
        if cluster not in seen and found.used.get(cluster) == uses[cluster]:
            sound[index] = cluster
        seen.add(cluster)
    return sound


class Room:
    """See the module. ``found`` says what is used, and is told what is taken."""

    def __init__(self, header: Header, write: Write, found: Findings, file_length: int) -> None:
        self._bits = header.cluster_bits
        self._write = write
        self._found = found
        # The cluster behind the file.
        self._end = -(-file_length >> self._bits)
        self._per_block = refcount_codec.block_entries(self._bits, header.refcount_order)
        # The refcount blocks that say what is free, where that matters.
        self._trusted = sound_blocks(found).keys() if found.is_lossy else None
        self._claimed = _merged(found.claimed)
        # Where to look on, by the number of clusters: what was taken or has no room is not tried again.
        self._places: dict[int, Iterator[int]] = {}

    def take(self, length: int) -> int:
        """The first of ``length`` clusters in a row, which the disk has room for: they are zeroes now.

        Raises OSError where it has none.
        """
        for start in self._places.setdefault(length, self._inside(length)):
            try:
                return self._fill(start, length)
            except OSError as error:
                # A hole of the file: another cluster may be none.
                if not is_full(error):
                    raise
        return self._fill(self._behind(), length)

    def _fill(self, start: int, length: int) -> int:
        self._write(start << self._bits, bytes(length << self._bits))
        for cluster in range(start, start + length):
            self._found.used.add(cluster)
        return start

    def _behind(self) -> int:
        claimed = self._claimed[-1].stop if self._claimed else 0
        return max(self._found.used.last() + 1, claimed, 0 if self._trusted is None else self._end)

    def _inside(self, length: int) -> Iterator[int]:
        """Where ``length`` clusters of the file that nobody has begin, near those that somebody has."""
        found = self._found
        for index in sorted({*found.used.blocks, *found.counted.blocks}):
            taken = self._taken(index)
            at = taken.find(bytes(length))
            while at >= 0:
                start = index * BLOCK + at
                if not any(map(found.used.get, range(start, start + length))):
                    yield start
                at = taken.find(bytes(length), at + 1)

    def _taken(self, index: int) -> bytes:
        """A byte for each cluster of one block of counts, as far as the file goes: 0 where nobody has it."""
        found, first = self._found, index * BLOCK
        nothing = array("H", bytes(2 * BLOCK))
        taken = bytearray(map(bool, found.used.blocks.get(index, nothing)))
        kept = [each for each in self._claimed if each.start < first + BLOCK and each.stop > first]
        if self._trusted is not None:
            counted = found.counted.blocks.get(index, nothing)
            taken = bytearray(map(any, zip(taken, counted, strict=True)))
            for block in range(first // self._per_block, (first + BLOCK - 1) // self._per_block + 1):
                if block not in self._trusted:
                    kept.append(range(block * self._per_block, (block + 1) * self._per_block))
        for each in kept:
            start, end = max(each.start - first, 0), min(each.stop - first, BLOCK)
            taken[start:end] = b"\1" * (end - start)
        return bytes(taken[: max(0, self._end - first)])


def _merged(claimed: set[tuple[int, int]]) -> list[range]:
    """The same clusters, in their order."""
    merged: list[range] = []
    for start, end in sorted(claimed):
        if merged and start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, end))
        else:
            merged.append(range(start, end))
    return merged
