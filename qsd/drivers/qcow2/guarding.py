"""What is known as metadata of an image that is going to be written: where writes of data must not go.

An image may claim millions of tables. They are gone through in pieces, so that others run meanwhile.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator
from operator import lt
from typing import TYPE_CHECKING, Final, NamedTuple

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
# What entries lead to stands at whole sectors.
SECTOR_BITS: Final = 9


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
    tables = [
        (ACTIVE_L2, await _places(image.map.l1, OFFSET_MASK, header.cluster_bits)),
        (REFCOUNT_BLOCK, await _places(refcount_table, BLOCK_OFFSET, header.cluster_bits)),
    ]
    others = sum(length >> header.cluster_bits for _kind, _offset, length in inactive)
    many = sum(len(places.numbers) for _kind, places in tables)
    # Only together, as the second replace the first.
    are_ascending = all(places.is_ascending for _kind, places in tables)
    known.expect(others if are_ascending else others + many, ascending=many if are_ascending else 0)
    for kind, places in tables:
        if not (are_ascending and known.add_ascending(kind, places.numbers)):
            for piece in _pieces(places.numbers):
                known.put(kind, piece)
                await trio.lowlevel.checkpoint()
    for kind, offset, length in inactive:
        known.add(kind, offset, length, replaces=False)
        await trio.lowlevel.checkpoint()
    known.add(REFCOUNT_TABLE, header.refcount_table_offset, header.refcount_table_clusters * cluster)
    known.add(ACTIVE_L1, header.l1_offset, header.l1_size * 8)
    known.add(SNAPSHOT_TABLE, header.snapshots_offset, image.snapshot_clusters * cluster)
    known.add(MAIN_HEADER, 0, cluster)
    if image.encryption is not None:
        slots = image.encryption.places(header)
        image.encryption.overlap = next(
            ((found, *slot) for slot in slots if (found := known.kind_at(*slot)) is not None), None
        )
        for offset, length in slots:
            known.add(ENCRYPTION_HEADER, offset, length)
    if INACTIVE_L2 in known.checked:
        await _guard_snapshots(image)


async def used_twice(entries: array[int], mask: int) -> frozenset[int]:
    """Where more than one entry of a table leads."""
    places = await _places(entries, mask, SECTOR_BITS)
    found: set[int] = set()
    if not places.is_ascending:
        many = len(places.numbers)
        once: set[int] | ClusterTable = ClusterTable(many) if many > MANY else set()
        for piece in _pieces(places.numbers):
            for place in piece:
                if place in once:
                    found.add(place << SECTOR_BITS)
                else:
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


class _Places(NamedTuple):
    """Where the entries of a table lead that lead somewhere; ``is_ascending``: each further than the one before."""

    numbers: array[int]
    is_ascending: bool


async def _places(entries: array[int], mask: int, bits: int) -> _Places:
    """The places in units of ``1 << bits`` bytes. Four million entries take 0.5 s."""
    numbers = array("Q")
    is_ascending, last = True, -1
    for piece in _pieces(entries):
        if any(piece):
            some = [(entry & mask) >> bits for entry in piece if entry & mask]
            if is_ascending and some:
                is_ascending = last < some[0] and all(map(lt, some, some[1:]))
                last = some[-1]
            numbers.fromlist(some)
        await trio.lowlevel.checkpoint()
    return _Places(numbers, is_ascending)


def _pieces(entries: array[int]) -> Iterator[array[int]]:
    return (entries[start : start + PIECE] for start in range(0, len(entries), PIECE))
