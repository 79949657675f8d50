"""Repairs that write a table anew: the snapshot table, and tables of bitmaps that lead nowhere.

The new table stands in free clusters, counted and on the disk, before anything leads to it: cut off anywhere, the
image leaks clusters at most. What is free the check before has to say, after counts were repaired.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import islice, repeat
from typing import Final

from qsd.drivers.qcow2 import snapshot_table
from qsd.drivers.qcow2.bitmap_layout import ALL_ONES
from qsd.drivers.qcow2.layout import Header, parse_header
from qsd.drivers.qcow2.ledger import Findings, Read
from qsd.drivers.qcow2.rebuilding import rebuild
from qsd.drivers.qcow2.repair import Table
from qsd.drivers.qcow2.room import Room, Write
from qsd.drivers.qcow2.side_tables import snapshots_of

# Where the header says how many snapshots there are, and where their table is.
_SNAPSHOT_FIELDS: Final = 60
_ENTRY: Final = struct.Struct(">Q")


def mend_snapshots(
    header: Header, read: Read, write: Write, found: Findings, file_length: int, flush: Callable[[], None]
) -> bool:
    """Write a snapshot table with all that every entry has to have, and nothing that keeps an image from opening.

    What an entry does not say is what the image says: the disk's size, no instruction count. Returns False where
    the image has no room for another table. Raises OSError.
    """
    entries = list(islice(snapshots_of(header, read), found.kept_snapshots))
    table = snapshot_table.pack((entry.parse(read) for entry in entries), header.size)
    offset = 0
    if entries:
        placed = _place(header, read, write, found, file_length, table, flush)
        if placed is None:
            return False
        offset = placed
    write(_SNAPSHOT_FIELDS, struct.pack(">IQ", len(entries), offset))
    flush()
    _give_back(header, read, write, found, header.snapshots_offset, found.snapshot_table_length)
    return True


def mend_bitmaps(
    header: Header, read: Read, write: Write, found: Findings, file_length: int, flush: Callable[[], None]
) -> int:
    """Let what leads to no bits of a bitmap say that all of them are set; how many there were. Raises OSError.

    Nobody knows what has changed there: a backup then copies it. The reference takes it for unchanged.
    """
    mended = 0
    for place in found.lost_bitmap_data:
        write(place, _ENTRY.pack(ALL_ONES))
        mended += 1
    for place, entries in found.lost_bitmap_tables:
        offset = _place(header, read, write, found, file_length, _ENTRY.pack(ALL_ONES) * entries, flush)
        if offset is not None:
            write(place, _ENTRY.pack(offset))
            mended += 1
    flush()
    return mended


def _place(
    header: Header,
    read: Read,
    write: Write,
    found: Findings,
    file_length: int,
    table: bytes,
    flush: Callable[[], None],
) -> int | None:
    """Write a table into clusters that nobody has, and count them; its offset, or None where there is no room."""
    bits = header.cluster_bits
    header = _now(header, read)
    length = -(-len(table) >> bits)
    start = Room(header, write, found, file_length).take(length)
    clusters = range(start, start + length)
    if not all(map(Table(header, read).has_block, clusters)):
        if not rebuild(header, read, write, found, file_length, flush):
            return None
        header = _now(header, read)
    Table(header, read).put(zip(clusters, repeat(1)), write)
    for cluster in clusters:
        found.counted.add(cluster, 1 - found.counted.get(cluster))
    write(start << bits, table.ljust(length << bits, b"\0"))
    flush()
    return start << bits


def _give_back(header: Header, read: Read, write: Write, found: Findings, offset: int, length: int) -> None:
    """Let a table that nothing leads to any more use its clusters no more, where they are counted right."""
    first, end = offset >> header.cluster_bits, offset + length + header.cluster_size - 1 >> header.cluster_bits
    counts = ((each, found.counted.get(each)) for each in range(first, end))
    right = [(each, count) for each, count in counts if count and count == found.used.get(each)]
    Table(_now(header, read), read).put(((each, count - 1) for each, count in right), write)


def _now(header: Header, read: Read) -> Header:
    """The header as it is by now: a table that was placed before may have needed new refcounts."""
    return parse_header(read(0, header.cluster_size), is_for_check=True)
