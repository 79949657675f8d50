"""What is known as metadata of an image that is going to be written: where writes of data must not go.

An image may claim millions of tables. They are gone through in pieces, so that others run meanwhile.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import trio

from qsd.drivers.qcow2.cluster_table import ClusterTable
from qsd.drivers.qcow2.geometry import OFFSET_MASK
from qsd.drivers.qcow2.layout import MAX_L1_BYTES
from qsd.drivers.qcow2.loading import read_table
from qsd.drivers.qcow2.metadata_map import (
    ACTIVE_L1,
    ACTIVE_L2,
    BITMAP_DIRECTORY,
    ENCRYPTION_HEADER,
    INACTIVE_L1,
    INACTIVE_L2,
    MAIN_HEADER,
    MANY,
    REFCOUNT_BLOCK,
    REFCOUNT_TABLE,
    SNAPSHOT_TABLE,
)
from qsd.drivers.qcow2.refcounts import BLOCK_OFFSET

if TYPE_CHECKING:
    from qsd.drivers.qcow2.image import Image

# Of so many snapshots the tables are guarded, and so many clusters of the L1 table of each.
MOST_GUARDED: Final = 1024
# Bytes of all L1 tables of snapshots that are read to know their L2 tables (overlap-check=all).
MOST_READ: Final = 4 * MAX_L1_BYTES
# Entries gone through in one go (2 to 5 ms, where there are millions).
PIECE: Final = 2048


async def guard(image: Image, refcount_table: array[int]) -> None:
    """Let all that ``overlap-check`` names be known as metadata. Raises QmpError."""
    header, known = image.header, image.metadata
    cluster = header.cluster_size
    most = cluster * MOST_GUARDED
    inactive = [
        (INACTIVE_L1, each.l1_offset, min(each.l1_size * 8, most)) for each in image.snapshots[:MOST_GUARDED]
    ]
    directory = header.bitmaps_extension()
    if directory is not None:
        inactive.insert(0, (BITMAP_DIRECTORY, directory.offset, directory.size))
    known.expect(
        await _entries_in_use(image.map.l1)
        + await _entries_in_use(refcount_table)
        + sum(length >> header.cluster_bits for _kind, _offset, length in inactive)
    )
    for kind, offset, length in inactive:
        known.add(kind, offset, length)
        await trio.lowlevel.checkpoint()
    await _add_tables(image, ACTIVE_L2, image.map.l1)
    await _add_tables(image, REFCOUNT_BLOCK, refcount_table, BLOCK_OFFSET)
    known.add(REFCOUNT_TABLE, header.refcount_table_offset, header.refcount_table_clusters * cluster)
    known.add(ACTIVE_L1, header.l1_offset, header.l1_size * 8)
    known.add(SNAPSHOT_TABLE, header.snapshots_offset, image.snapshot_clusters * cluster)
    known.add(MAIN_HEADER, 0, cluster)
    if image.encryption is not None:
        places = image.encryption.places(header)
        image.encryption.overlap = next(
            ((found, *place) for place in places if (found := known.kind_at(*place)) is not None), None
        )
        for offset, length in places:
            known.add(ENCRYPTION_HEADER, offset, length)
    if INACTIVE_L2 in known.checked:
        await _guard_snapshots(image)


async def used_twice(entries: array[int], mask: int) -> frozenset[int]:
    """Where more than one entry of a table leads."""
    once: set[int] | ClusterTable = set()
    found: set[int] = set()
    if len(entries) > MANY and await _entries_in_use(entries) > MANY:
        once = ClusterTable(len(entries))
    for piece in _pieces(entries):
        for entry in piece:
            place = (entry & mask) >> 9
            if place and place in once:
                found.add(place << 9)
            elif place:
                once.add(place)
        await trio.lowlevel.checkpoint()
    return frozenset(found)


async def require_distinct(l1: array[int]) -> None:
    """Raise OSError (EINVAL) when two entries of an L1 table lead to the same L2 table.

    No program writes such images. Going along all they lead to could take days, for a file of some megabytes.
    """
    if await used_twice(l1, OFFSET_MASK):
        raise OSError(errno.EINVAL, "an L2 table is used twice")


async def _guard_snapshots(image: Image) -> None:
    room = MOST_READ
    for snapshot in image.snapshots:
        room -= snapshot.l1_size * 8
        if room >= 0 and snapshot.l1_size * 8 <= MAX_L1_BYTES:
            l1 = await read_table(image.file, snapshot.l1_offset, snapshot.l1_size, "Could not read L1 table")
            await _add_tables(image, INACTIVE_L2, l1, replaces=False)


async def _add_tables(
    image: Image, kind: str, entries: array[int], mask: int = OFFSET_MASK, *, replaces: bool = True
) -> None:
    for piece in _pieces(entries):
        image.metadata.add_tables(kind, piece, mask, replaces=replaces)
        await trio.lowlevel.checkpoint()


async def _entries_in_use(entries: array[int]) -> int:
    found = 0
    for piece in _pieces(entries):
        found += len(piece) - piece.count(0)
        await trio.lowlevel.checkpoint()
    return found


def _pieces(entries: array[int]) -> Iterator[array[int]]:
    return (entries[start : start + PIECE] for start in range(0, len(entries), PIECE))
