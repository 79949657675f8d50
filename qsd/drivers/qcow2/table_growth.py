"""Larger tables: the refcount table and the L1 table move to where there is room for more entries.

The new table is written and on the disk before the header leads to it; the old one is given up after that. Both
hold the image's ``tables_lock``, so that no write-back meets them.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from qsd.drivers.qcow2 import refcount_codec as codec
from qsd.drivers.qcow2.geometry import big_endian, empty_table
from qsd.drivers.qcow2.layout import MAX_REFCOUNT_TABLE_BYTES
from qsd.drivers.qcow2.metadata_map import ACTIVE_L1, REFCOUNT_BLOCK, REFCOUNT_TABLE
from qsd.drivers.qcow2.refcounts import TABLE_SECTOR

if TYPE_CHECKING:
    from qsd.drivers.qcow2.image import Image


def new_area(blocks: int, old_clusters: int, cluster_bits: int, block_entries: int) -> tuple[int, int]:
    """Clusters of the new refcount table, and refcount blocks that count them, themselves and nothing else.

    ``blocks`` is how many blocks the old table has room for; the area begins where they end.
    """
    table = old_clusters + old_clusters // 2 + 1
    while True:
        extra = 1
        while extra * block_entries < table + extra:
            extra += 1
        if table << cluster_bits >= (blocks + extra) * 8:
            return table, extra
        table += 1


async def grow_refcount_table(image: Image) -> None:
    """Make room for half as many refcount blocks again. Raises OSError (EFBIG at the format's limit)."""
    refs, driver, bits = image.refs, image.driver, image.geometry.cluster_bits
    async with image.tables_lock:
        old_offset, old_clusters = image.header.refcount_table_offset, image.header.refcount_table_clusters
        size = len(refs.table)
        clusters, extra = new_area(size, old_clusters, bits, refs.entries)
        if clusters << bits > MAX_REFCOUNT_TABLE_BYTES:
            raise OSError(errno.EFBIG, "the refcount table has its largest size")
        first = size << refs.block_bits
        await driver.settled(image.claim, first, extra + clusters)
        offset = first + extra << bits
        blocks = []
        for number in range(extra):
            block = codec.zeroes(refs.entries, refs.order)
            used = min(refs.entries, max(0, extra + clusters - number * refs.entries))
            for entry in range(used):
                block[entry] = 1
            blocks.append(block)
            await image.file.write(first + number << bits, codec.encode(block, refs.order))
        table = empty_table(clusters << bits)
        table[:size] = refs.table
        for number in refs.new_blocks:
            # Not in the file yet: their entries follow when they are.
            table[number] = 0
            refs.dirty_table.add(number // TABLE_SECTOR)
        for number in range(extra):
            table[size + number] = first + number << bits
        await image.file.write(offset, big_endian(table))
        await image.file.flush()
        await image.change_header(refcount_table_offset=offset, refcount_table_clusters=clusters)
        # What has changed in the old table meanwhile is marked as dirty.
        table[:size] = refs.table
        refs.table = table
        for number, block in enumerate(blocks):
            refs.cache.insert(size + number, block)
        known = image.metadata
        known.remove(old_offset, old_clusters << bits)
        known.add(REFCOUNT_TABLE, offset, clusters << bits)
        known.add(REFCOUNT_BLOCK, first << bits, extra << bits)
        image.give_up(old_offset, old_clusters)


async def grow_l1_table(image: Image, entries: int) -> None:
    """Let the L1 table have at least ``entries`` entries. Raises OSError."""
    l1, bits = image.map.l1, image.geometry.cluster_bits
    if entries <= len(l1):
        return
    clusters = -(-entries * 8 >> bits)
    # Before the lock is taken: the refcount table may have to grow for it.
    first = await image.driver.settled(image.refs.allocate_contiguous, clusters)
    async with image.tables_lock:
        old_offset, old_bytes = image.header.l1_offset, len(l1) * 8
        table = empty_table(entries * 8)
        table[: len(l1)] = l1
        content = big_endian(table)
        try:
            await image.file.write(first << bits, content + bytes((clusters << bits) - len(content)))
            await image.write_refcounts()
            await image.file.flush()
            await image.change_header(l1_offset=first << bits, l1_size=entries)
        except OSError:
            image.give_up(first << bits, clusters)
            raise
        l1.extend(table[len(l1) :])
        known = image.metadata
        known.remove(old_offset, old_bytes)
        known.add(ACTIVE_L1, first << bits, entries * 8)
        if old_bytes:
            image.give_up(old_offset, -(-old_bytes >> bits))
