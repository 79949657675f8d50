"""Writing what has changed of the refcounts: new blocks reach the disk before the table that leads to them."""

from __future__ import annotations

from array import array

from qsd.drivers.base import Child
from qsd.drivers.qcow2 import refcount_codec as codec
from qsd.drivers.qcow2.geometry import big_endian
from qsd.drivers.qcow2.refcounts import TABLE_SECTOR, Refcounts
from qsd.drivers.qcow2.storing import write_all


async def write_refcounts(refs: Refcounts, file: Child, table_offset: int) -> None:
    """Write what is dirty now; changes made meanwhile stay dirty. Raises OSError, with the rest dirty as before."""
    # Those too that were written and could not be flushed: nothing leads to them yet.
    new = list(refs.new_blocks)
    if new:
        await _write_blocks(refs, file, {index: refs.dirty[index] for index in new if index in refs.dirty})
        await file.flush()
        refs.new_blocks.difference_update(new)
    sectors = sorted(refs.dirty_table)
    if sectors:
        pieces = [(table_offset + sector * TABLE_SECTOR * 8, _table_sector(refs, sector)) for sector in sectors]
        # The entries of blocks made since the list above was taken were left out.
        refs.dirty_table = {index // TABLE_SECTOR for index in refs.new_blocks}
        try:
            await write_all(file, pieces)
        except OSError:
            refs.dirty_table.update(sectors)
            raise
    await _write_blocks(refs, file, {k: span for k, span in refs.dirty.items() if k not in refs.new_blocks})


def _table_sector(refs: Refcounts, sector: int) -> bytes:
    """Entries of the refcount table as the file may have them: without the blocks it does not have."""
    first = sector * TABLE_SECTOR
    words: array[int] = refs.table[first : first + TABLE_SECTOR]
    for index in refs.new_blocks:
        if first <= index < first + len(words):
            words[index - first] = 0
    return big_endian(words)


async def _write_blocks(refs: Refcounts, file: Child, blocks: dict[int, tuple[int, int]]) -> None:
    pieces = []
    for index, (first, last) in blocks.items():
        block = refs.cache.peek(index)
        assert block is not None, "a dirty block is pinned"
        start, data = codec.encode_range(block, refs.order, first, last)
        pieces.append((refs.block_offset(index) + start, data))
        refs.writing.add(index)
        del refs.dirty[index]
    try:
        await write_all(file, pieces)
    except OSError:
        for index, (first, last) in blocks.items():
            refs.touch(index, first, last)
        raise
    finally:
        refs.writing.difference_update(blocks)
