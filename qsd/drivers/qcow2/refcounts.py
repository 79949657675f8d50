"""Reference counts of host clusters: looking up, allocating, and giving back.

Nothing here waits. What is not in memory is ``Cold``; what was changed is noted as dirty and written by the image's
write-back (``writeback``), blocks before the table that points to them. A new refcount block stands in the first
cluster of the range it counts, so that making one needs no other.

A cluster is only handed out when ``claim(first, count)`` agrees: it sees to it that the file reaches that far and
that nothing known as metadata is overwritten.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

from qsd.drivers.base import Child
from qsd.drivers.qcow2 import refcount_codec as codec
from qsd.drivers.qcow2.layout import MAX_SIZE
from qsd.drivers.qcow2.tables import SliceCache
from qsd.drivers.runs import Cold

BLOCK_OFFSET: Final = 0xFFFF_FFFF_FFFF_FE00
# Entries of the refcount table in what is written at once (512 bytes).
TABLE_SECTOR: Final = 64


class RefcountHost(Protocol):
    """What the image lends."""

    def fetch(self, child: Child, offset: int, buffer: memoryview, done: Callable[[int], None]) -> None:
        """Read metadata."""

    def claim(self, first: int, count: int) -> None:
        """Make clusters fit for use. Raises Cold, OSError."""

    def secure(self, cluster: int) -> None:
        """Have the disk give room to a cluster that nobody else can take. Raises Cold, OSError."""

    def block_made(self, cluster: int, index: int) -> None:
        """A cluster holds new refcount block ``index`` from now on. Raises OSError before anything has changed."""

    def check_block(self, offset: int) -> None:
        """Raise OSError when the block that stands there, and may be written, is other metadata too."""

    def corrupt(self, text: str) -> OSError:
        """The image is broken; the error to raise."""

    def grow_refcount_table(self, done: Callable[[int], None]) -> None:
        """Make a larger refcount table."""


class Refcounts:
    """See the module. Clusters are numbers of host clusters."""

    def __init__(
        self,
        file: Child,
        cluster_bits: int,
        order: int,
        table: array[int],
        limit: int,
        host: RefcountHost,
        shared: frozenset[int] = frozenset(),
    ) -> None:
        self.file = file
        self.order = order
        self.table = table
        self.block_bits = cluster_bits + 3 - order
        self.entries = 1 << self.block_bits
        self.highest = codec.max_refcount(order)
        self._cluster_bits = cluster_bits
        self._cluster_size = 1 << cluster_bits
        self._host = host
        # Block number -> first and last changed entry (excluded).
        self.dirty: dict[int, tuple[int, int]] = {}
        self.new_blocks: set[int] = set()
        self.dirty_table: set[int] = set()
        itemsize = array(codec.typecode(order)).itemsize
        self._itemsize = itemsize
        # Blocks whose bytes are on their way to the file.
        self.writing: set[int] = set()
        # A search for clusters in a row goes on where it was when a block had to be fetched: where the row begins,
        # and the blocks it reaches into, all of which have to be in memory at the end.
        self._row_start = 0
        self._searched: set[int] = set()
        self.cache = SliceCache(
            self.entries * itemsize,
            limit,
            lambda index: index in self.dirty or index in self.writing or index in self._searched,
        )
        # Where the last bytes allocated end: the rest of that host cluster is free for more. 0: there is none.
        self.tail = 0
        # The lowest cluster that may be free, and a byte for each block: whether it is known to have none.
        self.first_free = 0
        self._full = bytearray(len(table))
        # Where blocks stand that the table has more than one entry for.
        self._shared = shared

    def let_go(self) -> None:
        """Nobody counts any more: free the table and the blocks."""
        self.table = array("Q")
        self.cache.clear()

    # -- looking ----------------------------------------------------------------------------------------------

    def block(self, index: int) -> array[int] | None:
        """The counts of block ``index``; None when it does not exist (all 0). Raises Cold, OSError."""
        found = self.cache.find(index)
        if found is not None:
            return found
        where = self.block_offset(index)
        if not where:
            return None
        raise self.cache.cold(("refcount block", index), index, partial(self._load, index, where))

    def block_offset(self, index: int) -> int:
        """Where block ``index`` stands, or 0. Raises OSError."""
        where = self.table[index] & BLOCK_OFFSET if index < len(self.table) else 0
        if where & (self._cluster_size - 1):
            raise self._host.corrupt(f"Refblock offset {where:#x} unaligned (reftable index: {index:#x})")
        if where > MAX_SIZE - self._cluster_size:
            raise self._host.corrupt(f"Refblock offset {where:#x} beyond any file (reftable index: {index:#x})")
        if where in self._shared:
            # Clusters of two places would be counted as one; a small file could have us look at a million blocks.
            raise self._host.corrupt(f"Refblock offset {where:#x} used twice (reftable index: {index:#x})")
        return where

    def _load(self, index: int, where: int, done: Callable[[int], None]) -> None:
        self._host.check_block(where)
        packed = bytearray(self._cluster_size)

        def loaded(error: int) -> None:
            if not error:
                self.cache.insert(index, codec.decode(packed, self.order))
            done(error)

        self._host.fetch(self.file, where, memoryview(packed), loaded)

    def get(self, cluster: int) -> int:
        """The count of a cluster. Raises Cold, OSError."""
        block = self.block(cluster >> self.block_bits)
        return 0 if block is None else block[cluster & (self.entries - 1)]

    def are_one(self, first: int, count: int) -> bool:
        """Whether the counts of clusters of one block are all 1. Raises Cold, OSError."""
        block, low = self.block(first >> self.block_bits), first & (self.entries - 1)
        return block is not None and block[low : low + count].count(1) == count

    # -- allocating -------------------------------------------------------------------------------------------

    def allocate(self, count: int) -> tuple[int, int]:
        """A run of at most ``count`` free clusters: the first, and how many; their count is 1 from now on.

        Raises Cold, and OSError (ENOSPC, EFBIG).
        """
        cluster = self.first_free
        while True:
            index = cluster >> self.block_bits
            at = -1
            if index >= len(self._full) or not self._full[index]:
                block = self.block(index)
                if block is None:
                    block = self._make_block(index)
                at = self._find_free(block, cluster & (self.entries - 1))
                if at >= 0:
                    break
                # All below ``first_free`` is used, so the search saw all of the block that could be free.
                self._mark_full(index, is_full=True)
            cluster = self.first_free = (index + 1) << self.block_bits
        stop = min(at + count, self.entries)
        end = at + 1
        while end < stop and not block[end]:
            end += 1
        first = (index << self.block_bits) + at
        self._host.claim(first, end - at)
        for position in range(at, end):
            block[position] = 1
        self.touch(index, at, end)
        self.first_free = first + end - at
        return first, end - at

    def _mark_full(self, index: int, *, is_full: bool) -> None:
        if index >= len(self._full):
            self._full.extend(bytes(len(self.table) - len(self._full)))
        self._full[index] = is_full

    def allocate_contiguous(self, count: int) -> int:
        """``count`` free clusters in a row: the first. For tables; raises Cold, OSError.

        Blocks that do not exist yet are made behind the row: in the first cluster they count they would break it.
        """
        try:
            first, missing = self._search(count)
            self._host.claim(first, count + len(missing))
            for position, index in enumerate(missing, first + count):
                self._put_block(index, position)
            self.add(first, count + len(missing), 1)
        except OSError:
            self._end_search()
            raise
        self._end_search()
        return first

    def _end_search(self) -> None:
        self._row_start = 0
        self._searched.clear()

    def _search(self, count: int) -> tuple[int, list[int]]:
        """The first of ``count`` free clusters in a row, and the blocks that are missing to count them."""
        is_whole = self._row_start <= self.first_free
        cluster = max(self.first_free, self._row_start)
        length = 0
        missing: list[int] = []
        while length < count + len(missing):
            index, at = divmod(cluster + length, self.entries)
            self._searched.add(index)
            block = self.block(index)
            if block is None:
                if index >= len(self.table):
                    raise Cold("refcount table", self._host.grow_refcount_table)
                missing.append(index)
                length = min(length + self.entries - at, count + len(missing))
            elif length and not block[at]:
                length += 1
            else:
                free = self._find_free(block, at)
                is_whole = is_whole and not length
                length = 1 if free >= 0 else 0
                cluster = (index << self.block_bits) + (free if free >= 0 else self.entries)
                self._row_start = cluster
                missing.clear()
                self._searched.clear()
                self._searched.add(index)
        if is_whole:
            # Nothing free was passed over: what lies before the row is not looked at again.
            self.first_free = cluster
        return cluster, missing

    def allocate_bytes(self, size: int) -> int:
        """Room for ``size`` bytes, at most a cluster: its host offset. It shares clusters with its neighbours.

        Each cluster it reaches into is counted once for it. Raises Cold, OSError (ENOSPC, EFBIG).
        """
        tail, mask = self.tail, self._cluster_size - 1
        if tail & mask:
            cluster = tail >> self._cluster_bits
            reaches = (tail + size - 1 >> self._cluster_bits) - cluster
            if self.get(cluster) < self.highest and (not reaches or self._is_free(cluster + 1)):
                if reaches:
                    self._host.claim(cluster + 1, 1)
                self.add(cluster, 1 + reaches, 1)
                self.tail = tail + size
                return tail
        offset = self.allocate(1)[0] << self._cluster_bits
        self.tail = offset + size
        return offset

    def seal(self, first: int, count: int) -> None:
        """Let nothing more be packed into clusters that are about to be given up."""
        if first <= self.tail >> self._cluster_bits < first + count:
            self.tail = 0

    def _is_free(self, cluster: int) -> bool:
        """Whether a cluster can be taken; not where that needs a new refcount block. Raises Cold, OSError."""
        block = self.block(cluster >> self.block_bits)
        return block is not None and not block[cluster & (self.entries - 1)]

    def _find_free(self, block: array[int], start: int) -> int:
        """The first entry from ``start`` on that is 0, or -1."""
        size = self._itemsize
        if start < len(block) and not block[start]:
            return start
        data = block.tobytes()
        nothing = bytes(size)
        at = data.find(nothing, start * size)
        while at >= 0 and at % size:
            # Zero bytes of two neighbours: an aligned entry may begin in the middle of them.
            following = at + size - at % size
            if data[following : following + size] == nothing:
                return following // size
            at = data.find(nothing, at + 1)
        return at // size if at >= 0 else -1

    def _make_block(self, index: int) -> array[int]:
        if index >= len(self.table):
            raise Cold("refcount table", self._host.grow_refcount_table)
        first = index << self.block_bits
        self._host.claim(first, 1)
        self._host.secure(first)
        block = self._put_block(index, first)
        block[0] = 1
        return block

    def _put_block(self, index: int, cluster: int) -> array[int]:
        """Let block ``index``, which does not exist, be in a cluster."""
        self._host.block_made(cluster, index)
        block = codec.zeroes(self.entries, self.order)
        self.table[index] = cluster << self._cluster_bits
        self.dirty_table.add(index // TABLE_SECTOR)
        self.new_blocks.add(index)
        self.dirty[index] = (0, self.entries)
        self.cache.insert(index, block)
        return block

    # -- changing ---------------------------------------------------------------------------------------------

    def touch(self, index: int, first: int, last: int) -> None:
        """Entries ``first`` to ``last`` (excluded) of a block are about to differ from the image's."""
        known = self.dirty.get(index)
        self.dirty[index] = (first, last) if known is None else (min(first, known[0]), max(last, known[1]))

    def add(self, first: int, count: int, difference: int) -> list[tuple[int, int]]:
        """Add to the counts of ``count`` clusters; the runs that became free (first, how many).

        Raises Cold, or OSError when a count would leave its range, before anything is changed.
        """
        parts = []
        cluster = first
        while cluster < first + count:
            index = cluster >> self.block_bits
            low = cluster & (self.entries - 1)
            high = min(self.entries, low + first + count - cluster)
            block = self.block(index)
            if block is None:
                if difference < 0:
                    raise OSError(errno.EINVAL, f"refcount of cluster {cluster} is 0")
                block = self._make_block(index)
            counts = block[low:high]
            if min(counts) + difference < 0 or max(counts) + difference > self.highest:
                raise OSError(errno.EINVAL, "refcount out of range")
            parts.append((index, block, low, high))
            # Pinned from here on: making the next block must not throw this one out.
            self.touch(index, low, high)
            cluster += high - low
        freed: list[tuple[int, int]] = []
        for index, block, low, high in parts:
            for position in range(low, high):
                block[position] += difference
                if not block[position]:
                    _extend(freed, (index << self.block_bits) + position)
            self._mark_full(index, is_full=False)
        if freed:
            self.first_free = min(self.first_free, freed[0][0])
            for run in freed:
                # Somebody else's before long.
                self.seal(*run)
        return freed


def _extend(runs: list[tuple[int, int]], cluster: int) -> None:
    if runs and runs[-1][0] + runs[-1][1] == cluster:
        runs[-1] = (runs[-1][0], runs[-1][1] + 1)
    else:
        runs.append((cluster, 1))
