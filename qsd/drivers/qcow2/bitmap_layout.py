"""Dirty bitmaps inside a qcow2 image: the header extension, the directory, the tables.

Pure. Follows the qcow2 specification (interop/qcow2, "Bitmaps extension" and "Bitmaps"); the bounds beyond it and
the error texts are the reference's. All numbers are big endian.

The header extension leads to the directory, an entry of it to a table, the entries of the table to clusters of
bits. A cluster whose bits are all equal is not stored.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import attrs

from qsd.drivers.qcow2.extensions import BitmapsExtension, parse_bitmaps_extension
from qsd.drivers.qcow2.geometry import swap
from qsd.errors import QmpError

MAX_NAME: Final = 1023
# Bytes of one bitmap: a bound on memory an image can ask for.
MAX_DATA: Final = 512 << 20
MIN_GRANULARITY_BITS: Final = 9
MAX_GRANULARITY_BITS: Final = 31

# Flags of a directory entry. Bit 2 (extra data may be ignored) is not supported, as there is no such data yet.
IN_USE: Final = 1 << 0
AUTO: Final = 1 << 1
KNOWN_FLAGS: Final = IN_USE | AUTO
FLAG_NAMES: Final = ((IN_USE, "in-use"), (AUTO, "auto"))
DIRTY_TRACKING: Final = 1

# Entries of a table that stand for a cluster which is not stored.
ALL_ZEROES: Final = 0
ALL_ONES: Final = 1
OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00

# Table offset, table entries, flags, type, granularity bits, name size, extra data size.
ENTRY: Final = struct.Struct(">QIIBBHI")


@attrs.frozen
class DirectoryEntry:
    """One bitmap: its name as it is stored, and ``table_entries`` entries of table at ``table_offset``."""

    name: bytes
    table_offset: int
    table_entries: int
    granularity_bits: int
    flags: int = 0

    @property
    def text(self) -> str:
        """The name to show and to ask for."""
        return self.name.decode("utf-8", "surrogateescape")

    def pack(self) -> bytes:
        """The bytes of the entry."""
        packed = ENTRY.pack(
            self.table_offset,
            self.table_entries,
            self.flags,
            DIRTY_TRACKING,
            self.granularity_bits,
            len(self.name),
            0,
        )
        return (packed + self.name).ljust(entry_size(len(self.name)), b"\0")


@attrs.frozen
class Run:
    """Neighbours in a table: ``count`` entries from number ``first`` on, whose clusters lie in a row at ``offset``.

    An ``offset`` of ``ALL_ZEROES`` or ``ALL_ONES`` says what all their bits are.
    """

    first: int
    count: int
    offset: int


def parse_extension(data: bytes, cluster_size: int) -> BitmapsExtension:
    """Read the data of the header extension, to load bitmaps. Raises QmpError."""
    found = parse_bitmaps_extension(data, cluster_size)
    if not found.size:
        raise QmpError("Requested bitmap directory size is zero")
    return found


def entry_size(name_size: int) -> int:
    """Bytes of a directory entry, from those of its name."""
    return -(-(ENTRY.size + name_size) // 8) * 8


def parse_directory(data: bytes, count: int, cluster_size: int) -> Iterator[DirectoryEntry]:
    """Read a directory of ``count`` entries, one by one. Raises QmpError, at the end as well."""
    found = 0
    position = 0
    while position < len(data):
        if position + ENTRY.size > len(data):
            raise QmpError("Broken bitmap directory")
        if found == count:
            raise QmpError("More bitmaps found than specified in header extension")
        offset, entries, flags, kind, bits, name_size, extra = ENTRY.unpack_from(data, position)
        start = position + ENTRY.size
        position += entry_size(name_size + extra)
        if position > len(data):
            raise QmpError("Broken bitmap directory")
        if extra:
            raise QmpError("Bitmap extra data is not supported")
        # As C reads it: what follows a NUL is no part of the name.
        name = data[start : start + name_size].split(b"\0", 1)[0]
        entry = DirectoryEntry(name, offset, entries, bits, flags)
        if kind != DIRTY_TRACKING or name_size > MAX_NAME or not _is_acceptable(entry, cluster_size):
            raise QmpError(f"Bitmap '{entry.text}' doesn't satisfy the constraints")
        found += 1
        yield entry
    if found < count:
        raise QmpError("Less bitmaps found than specified in header extension")


def _is_acceptable(entry: DirectoryEntry, cluster_size: int) -> bool:
    return bool(
        entry.name
        and entry.table_offset
        and not entry.table_offset & (cluster_size - 1)
        and 0 < entry.table_entries * cluster_size <= max(MAX_DATA, cluster_size)
        and MIN_GRANULARITY_BITS <= entry.granularity_bits <= MAX_GRANULARITY_BITS
        and not entry.flags & ~KNOWN_FLAGS
    )


def pack_directory(entries: Iterable[DirectoryEntry]) -> bytes:
    """The bytes of a directory."""
    return b"".join(entry.pack() for entry in entries)


def parse_table(data: bytes, cluster_size: int) -> array[int]:
    """Read the entries of a table. Raises ValueError when one of them is neither a cluster's offset nor 0 or 1."""
    table = array("Q", data)
    swap(table)
    bad = ~OFFSET_MASK | (cluster_size - 1)
    if any(entry & bad for entry in table if entry > ALL_ONES):
        raise ValueError("an entry of a bitmap table is not the offset of a cluster")
    return table


def runs_of(table: Sequence[int], cluster_size: int, longest: int) -> list[Run]:
    """The runs of a table; of stored clusters at most ``longest`` are in one."""
    runs: list[Run] = []
    first, end = 0, len(table)
    while first < end:
        offset = table[first]
        step = cluster_size if offset > ALL_ONES else 0
        stop = min(end, first + longest) if step else end
        last = first + 1
        while last < stop and table[last] == offset + (last - first) * step:
            last += 1
        runs.append(Run(first, last - first, offset))
        first = last
    return runs
