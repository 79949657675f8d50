"""Repairs after a check: counts that were too high or too low, COPIED flags, and the whole refcount structure.

What is broken beyond that (tables that lead nowhere) is left alone and said so: guessing there can cost data. Then
clusters that look leaked stay as they are, too: they may be what the broken tables should lead to.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Final

import attrs

from qsd.drivers.qcow2 import layout, refcount_codec
from qsd.drivers.qcow2.check import REFCOUNT_BLOCK_MASK
from qsd.drivers.qcow2.counts import BLOCK, Counts, is_nothing, last_used
from qsd.drivers.qcow2.geometry import swap
from qsd.drivers.qcow2.layout import Header
from qsd.drivers.qcow2.ledger import Findings, Read

Write = Callable[[int, bytes], None]

# Where the header says where the refcount table is, and how many clusters that has.
_TABLE_FIELDS: Final = 48


@attrs.frozen
class Repaired:
    """How many leaks and corruptions were put right."""

    leaks: int = 0
    corruptions: int = 0


def _nothing() -> None:
    """Nobody waits for the disk."""


def repair(
    header: Header,
    read: Read,
    write: Write,
    found: Findings,
    *,
    leaks_only: bool,
    flush: Callable[[], None] = _nothing,
) -> Repaired:
    """Set counts, and unless ``leaks_only`` also flags, to what was found. Raises OSError.

    Where nothing is wrong but counts that are too high and flags, all of it is put right in any case, as the
    reference does: with a count that becomes 1 an entry without the flag would be a corruption.
    Counts that are too low are raised before anything else: until then a cluster in use counts as free. Where the
    refcount structure is broken, or has no room for a count, a new one is written, which changes the header.
    ``flush`` returns when everything written is on the disk.
    """
    counted = Table(header, read)
    leaks_only = leaks_only and found.corruptions > found.flags
    if not leaks_only:
        is_missing = any(low < high and not counted.has_block(c) for c, low, high in found.changes())
        if found.broken_structures or is_missing:
            return _rebuild_all(header, read, write, found, flush)
    elif found.broken_structures > found.lost_blocks:
        return Repaired()
    fixed = 0
    if not leaks_only:
        fixed += counted.set(found, write, raises=True)
        if fixed:
            # What is counted now may stand just behind the file's end: clusters there are nobody's, for others.
            last = max(cluster for cluster, _counted, wanted in found.changes() if wanted)
            end = last + 1 << header.cluster_bits
            write(end - 1, read(end - 1, 1))
        flush()
        fixed += _set_flags(header, read, write, found)
    return Repaired(counted.set(found, write, raises=False), fixed)


def place_nothing(header: Header, read: Read, write: Write, found: Findings) -> int:
    """Let zeroes that have a place between two clusters have none, which they need not; how many. Raises OSError.

    Then they use nothing: what was found before is not what there is.
    """
    return _set_entries(header, read, write, found.crooked_zeroes())


def _set_flags(header: Header, read: Read, write: Write, found: Findings) -> int:
    return _set_entries(header, read, write, found.wrong_flags())


def _set_entries(header: Header, read: Read, write: Write, entries: Iterator[tuple[int, int]]) -> int:
    fixed = 0
    for _cluster, group in groupby(entries, lambda each: each[0] >> header.cluster_bits):
        changes = list(group)
        first, last = changes[0][0], changes[-1][0] + 8
        words = bytearray(read(first, last - first))
        for place, entry in changes:
            words[place - first : place - first + 8] = entry.to_bytes(8, "big")
        write(first, bytes(words))
        fixed += len(changes)
    return fixed


class Table:
    """The refcounts as they stand in the file."""

    def __init__(self, header: Header, read: Read) -> None:
        self._header = header
        self._read = read
        length = header.refcount_table_clusters << header.cluster_bits
        self._blocks = array("Q", read(header.refcount_table_offset, length))
        swap(self._blocks)
        self._per_block = refcount_codec.block_entries(header.cluster_bits, header.refcount_order)

    def _block(self, index: int) -> int:
        offset = self._blocks[index] & REFCOUNT_BLOCK_MASK if index < len(self._blocks) else 0
        return 0 if offset % self._header.cluster_size else offset

    def has_block(self, cluster: int) -> bool:
        """Whether there is a block that counts a cluster."""
        return bool(self._block(cluster // self._per_block))

    def set(self, found: Findings, write: Write, *, raises: bool) -> int:
        """Raise counts that are too low, or lower those that are too high; how many."""
        chosen = (each for each in found.changes() if (each[1] < each[2]) is raises)
        return self.put(((cluster, wanted) for cluster, _counted, wanted in chosen), write)

    def put(self, changes: Iterable[tuple[int, int]], write: Write) -> int:
        """Set counts of clusters, in their order, of which those without a block are left out; how many."""
        order = self._header.refcount_order
        done = 0
        for index, group in groupby(changes, lambda each: each[0] // self._per_block):
            offset = self._block(index)
            if not offset:
                continue
            counts = refcount_codec.decode(self._read(offset, self._header.cluster_size), order)
            for cluster, wanted in group:
                counts[cluster % self._per_block] = wanted
                done += 1
            write(offset, bytes(refcount_codec.encode(counts, order)))
        return done


# -- a new refcount structure -------------------------------------------------------------------------------------


def _rebuild_all(header: Header, read: Read, write: Write, found: Findings, flush: Callable[[], None]) -> Repaired:
    lows = sum(counted < wanted for _cluster, counted, wanted in found.changes())
    corruptions = found.broken_structures + lows
    if not rebuild(header, write, found, flush):
        return Repaired()
    return Repaired(0 if found.is_lossy else found.leaks, corruptions + _set_flags(header, read, write, found))


def rebuild(header: Header, write: Write, found: Findings, flush: Callable[[], None] = _nothing) -> bool:
    """Write a new refcount table, with blocks, behind everything there is, and let the header lead to it.

    ``found`` says afterwards what is used and counted then: what the old one took is not. Returns False with
    nothing written that is used, where the format has no room for the table. Raises OSError.
    """
    for cluster in found.structures:
        found.used.add(cluster, -1)
    counts = found.used.copy()
    if found.is_lossy:
        _keep(counts, found.counted, found.image_end >> header.cluster_bits)
    bits, order = header.cluster_bits, header.refcount_order
    per_block = refcount_codec.block_entries(bits, order)
    counts.limit(refcount_codec.max_refcount(order))
    # Of what is cut off by the file's end nothing is counted: what is left of the keys of an encrypted image, say.
    start = max(1 + max(counts.last(), max(found.structures, default=-1)), found.claimed_end)
    used = _blocks_of(counts, per_block)
    clusters, indices = _place(start, used, per_block, bits)
    if clusters << bits > layout.MAX_REFCOUNT_TABLE_BYTES:
        return False
    for cluster in range(start, start + len(indices) + clusters):
        counts.add(cluster)
    table = bytearray(clusters << bits)
    for position, index in enumerate(indices, start):
        entries = refcount_codec.from_counts(counts.slice(index * per_block, per_block), order)
        write(position << bits, bytes(refcount_codec.encode(entries, order)))
        table[8 * index : 8 * index + 8] = (position << bits).to_bytes(8, "big")
    offset = start + len(indices) << bits
    write(offset, bytes(table))
    flush()
    write(_TABLE_FIELDS, struct.pack(">QI", offset, clusters))
    flush()
    found.structures = list(range(start, start + len(indices) + clusters))
    for cluster in found.structures:
        found.used.add(cluster)
    found.counted.blocks = counts.blocks
    return True


def _keep(counts: Counts, counted: Counts, end: int) -> None:
    """Let no cluster before ``end``, where the file ends, be counted less than it was."""
    for index, block in counted.blocks.items():
        for at in range(last_used(block, max(0, min(BLOCK, end - index * BLOCK))) + 1):
            missing = block[at] - counts.get(index * BLOCK + at)
            if missing > 0:
                counts.add(index * BLOCK + at, missing)


def _blocks_of(counts: Counts, per_block: int) -> set[int]:
    """The refcount blocks in which something is counted."""
    found = set()
    step = min(per_block, BLOCK)
    for index, block in counts.blocks.items():
        for start in range(0, BLOCK, step):
            if not is_nothing(block[start : start + step]):
                found.add((index * BLOCK + start) // per_block)
    return found


def _place(start: int, used: set[int], per_block: int, cluster_bits: int) -> tuple[int, list[int]]:
    """Clusters of the table, and the blocks there have to be, when both stand from cluster ``start`` on."""
    clusters, indices = 1, set(used)
    while True:
        end = start + len(indices) + clusters
        wanted = used | set(range(start // per_block, (end - 1) // per_block + 1))
        needed = -(-(max(wanted) + 1) * 8 >> cluster_bits)
        if wanted == indices and needed <= clusters:
            return clusters, sorted(indices)
        indices, clusters = wanted, max(needed, clusters)
