"""Repairs after a check: counts that were too high or too low, and COPIED flags.

What is broken beyond that (tables that lead nowhere, refcount blocks that are missing or used twice) is left alone
and said so: guessing there can cost data.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import attrs

from qsd.drivers.qcow2 import refcount_codec
from qsd.drivers.qcow2.check import REFCOUNT_BLOCK_MASK, Findings, Read
from qsd.drivers.qcow2.layout import Header

Write = Callable[[int, bytes], None]


@attrs.frozen
class Repaired:
    """How many leaks and corruptions were put right."""

    leaks: int = 0
    corruptions: int = 0


def repair(header: Header, read: Read, write: Write, found: Findings, *, leaks_only: bool) -> Repaired:
    """Set counts, and unless ``leaks_only`` also flags, to what was found. Raises OSError.

    Counts that are too low are raised before anything else: until then a cluster in use counts as free. Nothing is
    touched where counts have to be rebuilt: a refcount block that is something else too would be overwritten,
    and references may be hidden in what cannot be read.
    """
    if found.needs_rebuild:
        return Repaired()
    counted = _Table(header, read)
    lows: dict[int, int] = {}
    highs: dict[int, int] = {}
    for cluster, used in found.fixes.items():
        (lows if counted.get(cluster) < used else highs)[cluster] = used
    fixed = 0
    if not leaks_only:
        fixed += counted.set(lows, write)
        for place, entry in found.flag_fixes.items():
            write(place, entry.to_bytes(8, "big"))
            fixed += 1
    return Repaired(counted.set(highs, write), fixed)


class _Table:
    """The refcounts as they stand in the file."""

    def __init__(self, header: Header, read: Read) -> None:
        self._header = header
        self._read = read
        length = header.refcount_table_clusters << header.cluster_bits
        table = read(header.refcount_table_offset, length)
        self._blocks = [
            int.from_bytes(table[at : at + 8], "big") & REFCOUNT_BLOCK_MASK for at in range(0, length, 8)
        ]
        self._per_block = refcount_codec.block_entries(header.cluster_bits, header.refcount_order)

    def _block(self, index: int) -> int:
        offset = self._blocks[index] if index < len(self._blocks) else 0
        return 0 if offset % self._header.cluster_size else offset

    def get(self, cluster: int) -> int:
        """The count of a cluster; 0 where there is no block."""
        index, position = divmod(cluster, self._per_block)
        offset = self._block(index)
        if not offset:
            return 0
        counts = refcount_codec.decode(self._read(offset, self._header.cluster_size), self._header.refcount_order)
        return counts[position]

    def set(self, wanted: dict[int, int], write: Write) -> int:
        """Set counts where there is a block for them and they fit; how many."""
        order = self._header.refcount_order
        by_block: dict[int, dict[int, int]] = defaultdict(dict)
        for cluster, count in wanted.items():
            index, position = divmod(cluster, self._per_block)
            if self._block(index) and count <= refcount_codec.max_refcount(order):
                by_block[index][position] = count
        for index, changes in by_block.items():
            offset = self._block(index)
            counts = refcount_codec.decode(self._read(offset, self._header.cluster_size), order)
            for position, count in changes.items():
                counts[position] = count
            write(offset, bytes(refcount_codec.encode(counts, order)))
        return sum(map(len, by_block.values()))
