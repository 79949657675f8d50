"""Where guest clusters are: the L1 table, the cached L2 tables, and what their entries say.

Only reads. ``lookup`` and ``status`` answer for the base of mapping drivers; what they find broken is told to
``corrupt(text, fatal)``, in the reference's words, and ends in OSError(EIO).
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable
from functools import partial
from typing import Final, NoReturn, Protocol

from qsd.drivers.base import Child
from qsd.drivers.qcow2.geometry import (
    ALL_ALLOCATED,
    ALL_ZERO,
    COMPRESSED,
    OFFSET_MASK,
    ZERO_FLAG,
    Geometry,
    empty_table,
    swap,
    zero_words,
)
from qsd.drivers.qcow2.tables import SliceCache
from qsd.drivers.runs import DATA, PACKED, UNALLOCATED, ZERO, Cold, Run

_PLAIN_MASK: Final = 0x3FFF_FFFF_FFFF_FFFF


class Fetch(Protocol):
    """Reads metadata from the image file (``MappedDriver.fetch``)."""

    def __call__(self, child: Child, offset: int, buffer: memoryview, done: Callable[[int], None]) -> None: ...


class ClusterMap:
    """The mapping of one image. ``data`` is the child that holds guest clusters; the image file is ``file``.

    ``numbered`` gives ``data`` for a distance of guest and host offsets, where encryption goes by guest offsets.
    """

    def __init__(
        self,
        geometry: Geometry,
        l1: array[int],
        cache: SliceCache,
        file: Child,
        fetch: Fetch,
        corrupt: Callable[[str], None],
    ) -> None:
        self.geometry = geometry
        self.l1 = l1
        self.cache = cache
        self.file = file
        self.data = file
        self.numbered: Callable[[int], Child] | None = None
        self._fetch = fetch
        self._corrupt = corrupt
        self._cluster_bits = geometry.cluster_bits
        self._cluster_mask = geometry.cluster_size - 1
        self._slice_bits = geometry.slice_bits
        self._slice_mask = geometry.slice_mask
        self._l1_shift = geometry.l2_bits - geometry.slice_bits
        self._words = geometry.words

    def data_at(self, guest: int, host: int) -> Child:
        """The child to use for the guest's bytes at ``guest``, which are stored at ``host``."""
        return self.data if self.numbered is None else self.numbered(guest - host)

    # -- tables -----------------------------------------------------------------------------------------------

    def slice_offset(self, number: int) -> int:
        """Where slice ``number`` stands in the image; 0 when its L2 table does not exist. Raises OSError."""
        index = number >> self._l1_shift
        table = self.l1[index] & OFFSET_MASK if index < len(self.l1) else 0
        if table & self._cluster_mask:
            self._broken(f"L2 table offset {table:#x} unaligned (L1 index: {index:#x})")
        if not table:
            return 0
        return table + (number & ((1 << self._l1_shift) - 1)) * self.cache.slice_bytes

    def has_table(self, number: int) -> bool:
        """Whether an L2 table, right or wrong, describes what slice ``number`` is about."""
        index = number >> self._l1_shift
        return index >= len(self.l1) or self.l1[index] & OFFSET_MASK != 0

    def cold(self, number: int, offset: int) -> Cold:
        """What brings slice ``number``, which stands at ``offset``, into memory."""
        return self.cache.cold(("l2", number), number, partial(self._load, number, offset))

    def slice_at(self, number: int) -> array[int]:
        """Slice ``number`` of a table that exists. Raises Cold, OSError."""
        table = self.cache.find(number)
        if table is None:
            raise self.cold(number, self.slice_offset(number))
        return table

    def _load(self, number: int, offset: int, done: Callable[[int], None]) -> None:
        table = empty_table(self.cache.slice_bytes)

        def loaded(error: int) -> None:
            view.release()
            if not error:
                swap(table)
                self.cache.insert(number, table)
            done(error)

        view = memoryview(table).cast("B")
        self._fetch(self.file, offset, view, loaded)

    def _broken(self, text: str) -> NoReturn:
        self._corrupt(text)
        raise OSError(errno.EIO, text)

    # -- looking ----------------------------------------------------------------------------------------------

    def _missing(self, number: int, offset: int, length: int) -> int:
        """Bytes from ``offset`` on that no L2 table describes, at most ``length``. Raises Cold when one does."""
        where = self.slice_offset(number)
        if where:
            raise self.cold(number, where)
        shift = self._cluster_bits + self.geometry.l2_bits
        index = offset >> shift
        last = (offset + length - 1) >> shift
        # An entry may lead nowhere and yet have bits set; the first one is known to be such.
        tables = 1 + zero_words(self.l1, index + 1, min(last + 1, len(self.l1)))
        return min(length, ((index + tables) << shift) - offset)

    def unmapped(self, cluster: int, count: int) -> int:
        """How many clusters from ``cluster`` on no L2 table describes, at most ``count``. Raises OSError."""
        if self.slice_offset(cluster >> self._slice_bits):
            return 0
        bits = self.geometry.l2_bits
        index = cluster >> bits
        last = min(cluster + count - 1 >> bits, len(self.l1) - 1)
        return min(count, (index + 1 + zero_words(self.l1, index + 1, last + 1) << bits) - cluster)

    def lookup(self, offset: int, length: int) -> Run:
        """The run at ``offset``, at most ``length`` bytes and not beyond the slice of the table it is found in."""
        cluster = offset >> self._cluster_bits
        number = cluster >> self._slice_bits
        table = self.cache.find(number)
        if table is None:
            return UNALLOCATED, self._missing(number, offset, length), 0, None
        index = cluster & self._slice_mask
        within = offset & self._cluster_mask
        if self._words == 2:
            return self._subclusters(table, cluster, index, within, length)
        entry = table[index]
        left = self._cluster_mask + 1 - within
        kind, host = self.check_entry(entry, cluster, index)
        if kind == PACKED:
            return PACKED, min(left, length), entry, None
        stop = min(index + 1 + (length - left + self._cluster_mask >> self._cluster_bits), self._slice_mask + 1)
        run = left
        cluster_size = self._cluster_mask + 1
        following = index + 1
        while following < stop:
            # Entries that continue the run are not looked at for errors: they differ in nothing but the offset.
            other = table[following]
            if kind == UNALLOCATED:
                if other:
                    break
            elif kind == DATA:
                if (other ^ entry) & ~OFFSET_MASK or other & OFFSET_MASK != host + (
                    following - index
                ) * cluster_size:
                    break
            elif not other & ZERO_FLAG or other & COMPRESSED:
                break
            run += cluster_size
            following += 1
        child = self.data_at(cluster << self._cluster_bits, host) if kind == DATA else None
        return kind, min(run, length), host + within, child

    def check_entry(self, entry: int, cluster: int, index: int) -> tuple[int, int]:
        """Kind and host offset of a cluster with a plain entry. Raises OSError for what must not be."""
        if entry & COMPRESSED:
            return PACKED, 0
        host = entry & OFFSET_MASK
        if entry & ZERO_FLAG:
            if self.geometry.version < 3:
                what = "Preallocated zero cluster" if host else "Zero cluster"
                self._broken(
                    f"{what} entry found in pre-v3 image (L2 offset: {self._l2(cluster)}, L2 index: {index:#x})"
                )
            self._check_host(host, cluster, index)
            return ZERO, host
        if not host and not (entry and self.geometry.has_data_file):
            return UNALLOCATED, 0
        self._check_host(host, cluster, index)
        return DATA, host

    def _check_host(self, host: int, cluster: int, index: int) -> None:
        if host & self._cluster_mask:
            self._broken(
                f"Cluster allocation offset {host:#x} unaligned "
                f"(L2 offset: {self._l2(cluster)}, L2 index: {index:#x})"
            )
        if self.geometry.has_data_file and host and host != cluster << self._cluster_bits:
            self._broken(
                f"External data file host cluster offset {host:#x} does not match guest cluster "
                f"offset: {cluster << self._cluster_bits:#x}, L2 index: {index:#x})"
            )

    def _l2(self, cluster: int) -> str:
        return f"{self.l1[cluster >> self.geometry.l2_bits] & OFFSET_MASK:#x}"

    # -- extended entries -------------------------------------------------------------------------------------

    def _subclusters(self, table: array[int], cluster: int, index: int, within: int, length: int) -> Run:
        entry, bitmap = table[2 * index], table[2 * index + 1]
        left = self._cluster_mask + 1 - within
        if entry & COMPRESSED:
            return PACKED, min(left, length), entry, None
        host = entry & OFFSET_MASK
        bits = self.geometry.subcluster_bits
        first = within >> bits
        if bitmap & bitmap >> 32 & ALL_ALLOCATED:
            self._broken(f"Invalid cluster entry found  (L2 offset: {self._l2(cluster)}, L2 index: {index:#x})")
        self._check_host(host, cluster, index)
        kind = _kind_of(bitmap, first)
        last = min(32, (within + length - 1 >> bits) + 1)
        following = first + 1
        while following < last and _kind_of(bitmap, following) == kind:
            following += 1
        run = min(length, (following << bits) - within)
        if kind == DATA:
            if not host and not self.geometry.has_data_file:
                self._broken(f"Invalid cluster entry found  (L2 offset: {self._l2(cluster)}, L2 index: {index:#x})")
            return DATA, run, host + within, self.data_at(cluster << self._cluster_bits, host)
        return kind, run, 0, None

    # -- block status -----------------------------------------------------------------------------------------

    def status(self, offset: int, length: int) -> tuple[int, int]:
        """Kind and length of the run at ``offset``, wherever in the image its clusters are."""
        cluster = offset >> self._cluster_bits
        number = cluster >> self._slice_bits
        table = self.cache.find(number)
        if table is None:
            return UNALLOCATED, self._missing(number, offset, length)
        index = cluster & self._slice_mask
        within = offset & self._cluster_mask
        left = self._cluster_mask + 1 - within
        stop = min(index + 1 + (length - left + self._cluster_mask >> self._cluster_bits), self._slice_mask + 1)
        if self._words == 2:
            return self._subcluster_status(table, cluster, index, within, length, stop)
        kind, _host = self.check_entry(table[index], cluster, index)
        if kind == UNALLOCATED:
            following = index + 1 + zero_words(table, index + 1, stop)
        else:
            following = stop
            for position in range(index + 1, stop):
                entry = table[position]
                if entry & COMPRESSED:
                    other = DATA
                elif entry & ZERO_FLAG:
                    other = ZERO
                else:
                    other = DATA if entry else UNALLOCATED
                if other != kind and not (other == DATA and kind == PACKED):
                    following = position
                    break
        run = left + (following - index - 1 << self._cluster_bits)
        return kind, min(run, length)

    def _subcluster_status(
        self, table: array[int], cluster: int, index: int, within: int, length: int, stop: int
    ) -> tuple[int, int]:
        kind, run, _where, _child = self._subclusters(table, cluster, index, within, length)
        left = self._cluster_mask + 1 - within
        if run < left or run == length:
            return kind, run
        # To the end of the cluster: go on over whole clusters of the same kind.
        for position in range(index + 1, stop):
            entry, bitmap = table[2 * position], table[2 * position + 1]
            if entry & COMPRESSED or bitmap == ALL_ALLOCATED:
                other = DATA
            elif bitmap == ALL_ZERO:
                other = ZERO
            elif not bitmap:
                other = UNALLOCATED
            else:
                break
            if other != kind and not (other == DATA and kind == PACKED):
                break
            run += self._cluster_mask + 1
        return kind, min(run, length)


def _kind_of(bitmap: int, subcluster: int) -> int:
    if bitmap >> subcluster & 1:
        return DATA
    return ZERO if bitmap >> subcluster + 32 & 1 else UNALLOCATED
