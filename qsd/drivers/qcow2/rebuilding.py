"""The refcount structure of an image that is repaired: what is missing or broken of it is made anew.

Blocks that are nothing else stay where they are, and so does the table. What is new stands in clusters that nobody
has, counted and on the disk, before anything leads to it: cut off anywhere, the image leaks clusters at most.
Counts themselves are set when all of them have a place (``repair``).
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable
from itertools import repeat
from typing import Final

import attrs

from qsd.drivers.qcow2 import layout, refcount_codec
from qsd.drivers.qcow2.counts import BLOCK, Counts, is_nothing, last_used
from qsd.drivers.qcow2.geometry import big_endian
from qsd.drivers.qcow2.layout import Header
from qsd.drivers.qcow2.ledger import Findings, Read
from qsd.drivers.qcow2.repair import Table
from qsd.drivers.qcow2.room import Room, Write, sound_blocks

# Where the header says where the refcount table is, and how many clusters that has.
_TABLE_FIELDS: Final = 48


def is_incomplete(header: Header, read: Read, found: Findings) -> bool:
    """Whether there have to be other blocks, or another table, before every count can be what it should be."""
    table = Table(header, read)
    return bool(found.broken_structures) or any(
        low < high and not table.has_block(cluster) for cluster, low, high in found.changes()
    )


def rebuild(
    header: Header, read: Read, write: Write, found: Findings, file_length: int, flush: Callable[[], None]
) -> bool:
    """Make every block that something is counted in, and a table that leads to all of them.

    ``found`` says afterwards what is used then: what is not needed any more is not. Returns False with nothing
    written that is used, where the format has no room for the table. Raises OSError.
    """
    structure = _Structure(header, found)
    counts = _wanted(header, found)
    if not structure.place(_blocks_of(counts, structure.per_block), Room(header, write, found, file_length)):
        return False
    taken = structure.taken()
    for cluster in taken:
        counts.add(cluster)
        found.counted.add(cluster, 1 - found.counted.get(cluster))
    order, bits = header.refcount_order, header.cluster_bits
    for index, cluster in structure.new.items():
        entries = refcount_codec.from_counts(counts.slice(index * structure.per_block, structure.per_block), order)
        write(cluster << bits, bytes(refcount_codec.encode(entries, order)))
    counted_by_old = [each for each in taken if each // structure.per_block in structure.sound]
    Table(header, read).put(zip(counted_by_old, repeat(1)), write)
    flush()
    structure.lead(read, write, flush)
    structure.drop_old()
    return True


@attrs.define
class _Structure:
    """The table and the blocks as they are going to be: ``sound`` ones that stay, ``new`` ones, by their index."""

    header: Header
    found: Findings
    sound: dict[int, int] = attrs.field(init=False)
    new: dict[int, int] = attrs.field(factory=dict)
    # The table's clusters, as it is and as it is going to be.
    old_table: range = attrs.field(init=False)
    table: range = attrs.field(init=False)
    per_block: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        header, found = self.header, self.found
        self.per_block = refcount_codec.block_entries(header.cluster_bits, header.refcount_order)
        self.sound = sound_blocks(found)
        first = header.refcount_table_offset >> header.cluster_bits
        self.old_table = range(first, first + header.refcount_table_clusters if found.has_refcount_table else first)
        is_sound = all(found.used.get(cluster) == 1 for cluster in self.old_table)
        self.table = self.old_table if is_sound else range(0)
        for index, cluster, is_used in found.refcount_blocks:
            # A block whose entry has reserved bits is nobody's so far.
            if not is_used and self.sound.get(index) == cluster and not found.used.get(cluster):
                found.used.add(cluster)

    def place(self, wanted: set[int], room: Room) -> bool:
        """Find clusters for what is new, so that ``wanted`` blocks exist, and all that count those clusters.

        Returns False where the table would be longer than the format allows.
        """
        while True:
            counting = {cluster // self.per_block for cluster in self.taken()}
            missing = sorted((wanted | counting) - self.sound.keys() - self.new.keys())
            if missing:
                for index in missing:
                    self.new[index] = room.take(1)
                continue
            length = -(-(max(*self.sound, *self.new, 0, 0) + 1) * 8 >> self.header.cluster_bits)
            if length <= len(self.table):
                return True
            if length << self.header.cluster_bits > layout.MAX_REFCOUNT_TABLE_BYTES:
                return False
            self._leave(self.table if self.table != self.old_table else range(0))
            first = room.take(length)
            self.table = range(first, first + length)

    def _leave(self, clusters: range) -> None:
        for cluster in clusters:
            self.found.used.add(cluster, -1)

    def taken(self) -> list[int]:
        """The clusters of what is new, in their order."""
        table = () if self.table == self.old_table else self.table
        return sorted({*self.new.values(), *table})

    def lead(self, read: Read, write: Write, flush: Callable[[], None]) -> None:
        """Let the table lead to the blocks, and the header to the table."""
        bits = self.header.cluster_bits
        words = array("Q", bytes(len(self.table) << bits))
        for index, cluster in (*self.sound.items(), *self.new.items()):
            words[index] = cluster << bits
        table = big_endian(words)
        offset = self.table.start << bits
        if self.table != self.old_table:
            write(offset, table)
            flush()
            write(_TABLE_FIELDS, struct.pack(">QI", offset, len(self.table)))
        else:
            for start in range(0, len(table), 1 << bits):
                part = table[start : start + (1 << bits)]
                if part != read(offset + start, 1 << bits):
                    write(offset + start, part)
        flush()

    def drop_old(self) -> None:
        """Say that what is not needed any more is not used, and what is there instead."""
        for index, cluster, is_used in self.found.refcount_blocks:
            if is_used and self.sound.get(index) != cluster:
                self._leave(range(cluster, cluster + 1))
        if self.table != self.old_table:
            self._leave(self.old_table)
        blocks = sorted({**self.sound, **self.new}.items())
        self.found.refcount_blocks = [(index, cluster, True) for index, cluster in blocks]
        self.found.has_refcount_table = True


def _wanted(header: Header, found: Findings) -> Counts:
    """How often every cluster is to be counted."""
    counts = found.used.copy()
    if found.is_lossy:
        _keep(counts, found.counted, found.image_end >> header.cluster_bits)
    counts.limit(refcount_codec.max_refcount(header.refcount_order))
    return counts


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
