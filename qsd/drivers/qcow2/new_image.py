"""The metadata of a new qcow2 image as a value: where everything stands, and the bytes of each part. Pure.

Order in the file: header, refcount table, refcount blocks, L1 table, L2 tables and data (only when preallocated),
encryption header.
For small images that is the order qemu-img gives them, byte for byte.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from typing import Final

import attrs

from qsd.drivers.qcow2 import layout
from qsd.drivers.qcow2.extensions import CryptoExtension
from qsd.drivers.qcow2.layout import Header
from qsd.drivers.qcow2.refcount_codec import encode, typecode
from qsd.errors import QmpError

COPIED: Final = 1 << 63
# Bytes of a table that are made at a time.
PIECE: Final = 1 << 18
# The most bytes a block device may have in the reference.
MAX_LENGTH: Final = 0x7FFF_FFFF_C000_0000
# Sizes come as unsigned numbers and are signed ones in the reference.
MAX_SIGNED: Final = (1 << 63) - 1


@attrs.frozen(kw_only=True)
class NewImage:
    """What a new image is to be; ``allocates``: every cluster gets its place at once.

    ``crypto_bytes``: room for an encryption header.
    """

    header: Header
    allocates: bool = False
    crypto_bytes: int = 0


@attrs.frozen
class Placement:
    """Clusters of the parts, by their first one; ``end`` is the first behind all of it.

    Where the encryption header is, the header says.
    """

    header: Header
    refcount_blocks: int
    block_count: int
    l2_tables: int
    l2_count: int
    data: int
    data_count: int
    end: int


def place(image: NewImage) -> Placement:
    """Where everything stands. Raises QmpError when the format has no room for such a disk."""
    header = image.header
    if header.size > MAX_SIGNED:
        raise QmpError("Could not resize image: Image size cannot be negative")
    if header.size > MAX_LENGTH:
        raise QmpError(f"Could not resize image: offset({header.size}) exceeds maximum({MAX_LENGTH})")
    if header.l1_needed * 8 > layout.MAX_L1_BYTES:
        raise QmpError("Could not resize image: Failed to grow the L1 table: File too large")
    size = header.cluster_size
    l1_clusters = -(-header.l1_needed * 8 // size)
    l2_count = header.l1_needed if image.allocates else 0
    guest_clusters = -(-header.size // size)
    data_count = guest_clusters if image.allocates and not header.has_data_file else 0
    crypto_clusters = -(-image.crypto_bytes // size)
    rest = 1 + l1_clusters + l2_count + data_count + crypto_clusters
    table_clusters, block_count = _refcounts(header, rest)
    blocks = 1 + table_clusters
    l1 = blocks + block_count
    l2 = l1 + l1_clusters
    data = l2 + l2_count
    placed = attrs.evolve(
        header,
        l1_size=header.l1_needed,
        l1_offset=l1 * size if l1_clusters else 0,
        refcount_table_offset=size,
        refcount_table_clusters=table_clusters,
    )
    crypto = data + data_count
    if image.crypto_bytes:
        where = CryptoExtension(crypto * size, image.crypto_bytes)
        placed = placed.with_extension(layout.EXT_CRYPTO, where.serialise())
    return Placement(placed, blocks, block_count, l2, l2_count, data, data_count, crypto + crypto_clusters)


def _refcounts(header: Header, others: int) -> tuple[int, int]:
    """Clusters of the refcount table, and refcount blocks, that count ``others`` clusters and themselves."""
    size = header.cluster_size
    per_block = size * 8 // header.refcount_bits
    table, blocks = 1, 1
    while True:
        needed_blocks = -(-(others + table + blocks) // per_block)
        needed_table = -(-needed_blocks * 8 // size)
        if (needed_table, needed_blocks) == (table, blocks):
            break
        table, blocks = max(table, needed_table), max(blocks, needed_blocks)
    if table * size > layout.MAX_REFCOUNT_TABLE_BYTES:
        raise QmpError("Could not resize image: Failed to grow the L1 table: File too large")
    return table, blocks


def metadata(placement: Placement) -> Iterator[tuple[int, bytes]]:
    """The parts but the header, as (offset, bytes), in pieces that take a millisecond at most."""
    header = placement.header
    size = header.cluster_size
    first = placement.refcount_blocks * size
    blocks = range(first, first + placement.block_count * size, size)
    yield from _table(header.refcount_table_offset, blocks, header.refcount_table_clusters * size)
    per_block = size * 8 // header.refcount_bits
    for index in range(placement.block_count):
        used = max(0, min(per_block, placement.end - index * per_block))
        counts = array(typecode(header.refcount_order), [1]) * used
        counts.extend(array(counts.typecode, [0]) * (per_block - used))
        yield blocks[index], bytes(encode(counts, header.refcount_order))
    first = placement.l2_tables * size | COPIED
    tables = range(first, first + placement.l2_count * size, size)
    yield from _table(header.l1_offset, tables, -(-header.l1_size * 8 // size) * size)
    base = 0 if header.has_data_file else placement.data
    clusters, entries = -(-header.size // size), header.l2_entries
    # The second word of an extended entry: nothing is written there yet, so the subclusters read as zeroes, or as
    # the backing file.
    words = 2 if header.has_extended_l2 else 1
    for index in range(placement.l2_count):
        low, high = index * entries, min((index + 1) * entries, clusters)
        places = range((base + low) * size | COPIED, (base + high) * size | COPIED, size)
        yield from _table((placement.l2_tables + index) * size, places, size, words)


def _table(offset: int, values: range, length: int, words: int = 1) -> Iterator[tuple[int, bytes]]:
    """Big-endian entries of ``words`` 64-bit numbers, the first of them given; then zeroes up to ``length``."""
    for start in range(0, length, PIECE):
        stop = min(length, start + PIECE)
        given = array("Q", values[start // 8 // words : stop // 8 // words])
        table = array("Q", bytes(len(given) * words * 8))
        table[::words] = given
        if sys.byteorder == "little":
            table.byteswap()
        yield offset + start, table.tobytes().ljust(stop - start, b"\0")


def header_cluster(header: Header) -> bytes:
    """The header as the file's first cluster. Raises QmpError when it does not fit."""
    return layout.serialise_header(header).ljust(header.cluster_size, b"\0")
