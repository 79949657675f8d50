"""Repairs after a check: counts that were too high or too low, and COPIED flags.

What is broken beyond that (tables that lead nowhere) is left alone and said so: guessing there can cost data. Then
clusters that look leaked stay as they are, too: they may be what the broken tables should lead to.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

import attrs

from qsd.drivers.qcow2 import refcount_codec
from qsd.drivers.qcow2.check import REFCOUNT_BLOCK_MASK
from qsd.drivers.qcow2.geometry import swap
from qsd.drivers.qcow2.layout import Header
from qsd.drivers.qcow2.ledger import Findings, Read
from qsd.drivers.qcow2.room import Write, is_full


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
    Counts that are too low are raised before anything else: until then a cluster in use counts as free. Each has
    to have a block (``rebuild``). With ``leaks_only`` nothing is done where blocks may be something else, too.
    ``flush`` returns when everything written is on the disk.
    """
    counted = Table(header, read)
    leaks_only = leaks_only and found.corruptions > found.flags
    if leaks_only and found.broken_structures > found.lost_blocks:
        return Repaired()
    fixed = 0
    if not leaks_only:
        fixed += counted.set(found, write, raises=True)
        if fixed:
            # What is counted now may stand just behind the file's end: clusters there are nobody's, for others.
            last = max(cluster for cluster, _counted, wanted in found.changes() if wanted)
            end = last + 1 << header.cluster_bits
            try:
                write(end - 1, read(end - 1, 1))
            except OSError as error:
                # There they stay where they are: the check afterwards says so.
                if not is_full(error):
                    raise
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
