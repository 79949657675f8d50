"""The consistency check of a qcow2 image: what refers to each host cluster, against what is counted.

Works on anything that can be read by offset; pure otherwise. A cluster that is counted higher than it is used is
leaked: space is lost, nothing else. A cluster that is used more often than counted, or metadata that leads nowhere,
is a corruption. Where the image says which, the figures are those of ``qemu-img check``.

Memory: twice two bytes for each cluster of the image that is used or counted, and what is told. Every table is
bounded by the header's checks before it is read, and all of them together by the file's length, for those of a
sound image do not overlap. An L2 table is looked at once, however many entries lead to it.
"""

from __future__ import annotations

import contextlib
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Final

from qsd.drivers.qcow2 import refcount_codec
from qsd.drivers.qcow2.comparison import Comparison
from qsd.drivers.qcow2.counts import Counts
from qsd.drivers.qcow2.geometry import ALL_ALLOCATED, COMPRESSED, COPIED, OFFSET_MASK, ZERO_FLAG
from qsd.drivers.qcow2.layout import Header
from qsd.drivers.qcow2.ledger import Findings, Ledger, Read
from qsd.drivers.qcow2.side_tables import walk_bitmaps, walk_crypto, walk_snapshots

REFCOUNT_BLOCK_MASK: Final = 0xFFFF_FFFF_FFFF_FE00
# Bits that must be 0 in entries of the three kinds of tables.
_L1_RESERVED: Final = 0x7F00_0000_0000_01FF
_L2_RESERVED: Final = 0x3F00_0000_0000_01FE
_REFCOUNT_RESERVED: Final = 0x1FF
# L2 tables that stand across clusters: no sound image has one, and each takes a hundred bytes of memory.
_MAX_UNALIGNED: Final = 1 << 16


class Checker:
    """One check. ``file_length`` is the image file's, in bytes; ``progress(done, total)`` counts the L1 entries of
    the disk as it is now.

    Of what is found the first ``max_problems`` lines are kept.
    """

    def __init__(
        self,
        header: Header,
        read: Read,
        file_length: int,
        progress: Callable[[int, int], None] = lambda _done, _total: None,
        max_problems: int = sys.maxsize,
    ) -> None:
        self._header = header
        self._read = read
        self._file_length = file_length
        self._progress = progress
        self._bits = header.cluster_bits
        self._size = header.cluster_size
        self._ledger = Ledger(header, read, file_length, max_problems)
        self.findings = self._ledger.findings
        self._used, self._counted = self.findings.used, self.findings.counted
        # An L1 table that reaches beyond the file is not: whatever stands in its clusters would look alone.
        self._is_l1_counted = False
        # How many L1 entries lead to each L2 table, of all L1 tables and of the active one.
        self._tables, self._active_tables = Counts(), Counts()
        # The same of tables that stand across clusters, by offset: of all, and of the active one.
        self._unaligned: dict[int, tuple[int, int]] = {}

    def run(self) -> Findings:
        """Look at everything. Raises OSError when the file cannot be read."""
        self._ledger.use(0, self._size, "header")
        self._load_refcounts()
        self._walk_l1(self._header.l1_offset, self._header.l1_size, is_active=True)
        walk_snapshots(self._ledger, partial(self._walk_l1, is_active=False))
        self._walk_tables()
        walk_bitmaps(self._ledger)
        walk_crypto(self._ledger)
        self._check_refcount_blocks()
        highest = refcount_codec.max_refcount(self._header.refcount_order)
        self._comparison = Comparison(self._used, self._counted, highest, self._ledger.end, self.findings.is_lossy)
        self.findings.changes = self._comparison.changes
        self.findings.wrong_flags, self.findings.crooked_zeroes = self._wrong_flags, self._crooked_zeroes
        self._compare()
        self._check_flags()
        return self.findings

    @contextlib.contextmanager
    def _telling(self, line: str) -> Iterator[None]:
        """Say what cannot be read, in the words of the reference."""
        try:
            yield
        except OSError:
            self._ledger.tell(line)
            raise

    def _words(self, offset: int, count: int, line: str) -> array[int]:
        with self._telling(line):
            return self._ledger.words(offset, count)

    # -- refcounts --------------------------------------------------------------------------------------------

    def _load_refcounts(self) -> None:
        header = self._header
        length = header.refcount_table_clusters << self._bits
        is_inside = self._ledger.use(header.refcount_table_offset, length, "refcount table", counts=True)
        self.findings.has_refcount_table = is_inside and length > 0
        # One that reaches beyond the file's end has entries before it.
        if not is_inside and header.refcount_table_offset >= self._file_length:
            return
        per_block = refcount_codec.block_entries(self._bits, header.refcount_order)
        seen: set[int] = set()
        for index, entry in enumerate(self._ledger.words(header.refcount_table_offset, length // 8)):
            offset = entry & REFCOUNT_BLOCK_MASK
            if entry & _REFCOUNT_RESERVED:
                # What stands there counts, but the block is nobody's.
                self._ledger.corrupt(f"refcount table entry {index} has reserved bits set")
                self.findings.broken_structures += 1
                if not offset or offset % self._size or offset >= self._file_length:
                    continue
            elif not offset:
                continue
            elif offset % self._size:
                text = f"refcount block {index} is not cluster aligned; refcount table entry corrupted"
                self._ledger.corrupt(text)
                self.findings.broken_structures += 1
                continue
            elif not self._ledger.use(offset, self._size, f"refcount block {index}", counts=True):
                self.findings.lost_blocks += 1
                continue
            is_used = not entry & _REFCOUNT_RESERVED
            self.findings.refcount_blocks.append((index, offset >> self._bits, is_used))
            if offset in seen:
                continue
            seen.add(offset)
            with self._telling(f"Can't get refcount for cluster {index * per_block}: Input/output error"):
                block = self._read(offset, self._size)
            counts = refcount_codec.decode(block, header.refcount_order)
            self._counted.put(index * per_block, counts)

    # -- the guest's data -------------------------------------------------------------------------------------

    def _walk_l1(self, offset: int, entries: int, *, is_active: bool) -> None:
        if not entries:
            return
        # One that reaches beyond the file's end has entries before it.
        is_inside = self._ledger.use(offset, entries * 8, "L1 table")
        self._is_l1_counted |= is_active and is_inside
        if (not is_inside and offset >= self._file_length) or not self._ledger.has_room(entries * 8, "L1 table"):
            return
        for entry in self._words(offset, entries, "ERROR: I/O error in check_refcounts_l1"):
            if not entry:
                continue
            if entry & _L1_RESERVED:
                self._ledger.corrupt(f"found L1 entry with reserved bits set: {entry:x}")
            table = entry & OFFSET_MASK
            if table % self._size:
                self._ledger.corrupt(f"l2_offset={table:x}: Table is not cluster aligned; L1 entry corrupted")
            # An entry that leads to no table is looked at all the same: whatever stands there may be one.
            if not table or table % self._size:
                self.findings.is_lossy = True
            if not self._ledger.use(table, self._size, "L2 table"):
                continue
            if table % self._size:
                self._add_unaligned(table, is_active=is_active)
                continue
            self._tables.add(table >> self._bits)
            if is_active:
                self._active_tables.add(table >> self._bits)

    def _add_unaligned(self, table: int, *, is_active: bool) -> None:
        times, active = self._unaligned.get(table, (0, 0))
        if not times:
            is_full = len(self._unaligned) == _MAX_UNALIGNED
            if is_full or not self._ledger.has_room(self._size, "L2 table"):
                return
        self._unaligned[table] = (times + 1, active + is_active)

    def _walk_tables(self) -> None:
        """Look at every L2 table once, and count for each L1 entry that leads to it."""
        entries = self._header.l1_size
        done = entries - sum(map(sum, self._active_tables.blocks.values()))
        done -= sum(active for _times, active in self._unaligned.values())
        self._progress(done, entries)
        for table, times, active in self._all_tables():
            self._walk_l2(table, times, active)
            done += active
            self._progress(done, entries)

    def _all_tables(self) -> Iterator[tuple[int, int, int]]:
        """Where each L2 table is, and how many L1 entries lead to it: of all, and of the active one."""
        for table, times in self._tables.items():
            yield table << self._bits, times, self._active_tables.get(table)
        for offset, (times, active) in self._unaligned.items():
            yield offset, times, active

    def _walk_l2(self, table: int, times: int, active: int) -> None:
        """Count what a table refers to: so many times, ``active`` of them for the disk as it is now."""
        step = 2 if self._header.has_extended_l2 else 1
        words = self._words(table, self._size // 8, "ERROR: I/O error in check_refcounts_l2")
        if not any(words):
            return
        has_data_file = self._header.has_data_file
        findings = self.findings
        last_data = -1
        for index in range(0, len(words), step):
            entry = words[index]
            bitmap = words[index + 1] if step == 2 else 0
            if entry & COMPRESSED:
                self._use_compressed(index // step, entry, bitmap, times, active)
                continue
            if step == 2:
                self._check_subclusters(entry, bitmap, times)
            if not entry:
                continue
            if entry & _L2_RESERVED:
                self._ledger.corrupt(f"found l2 entry with reserved bits set: {entry:x}", times)
            offset = entry & OFFSET_MASK
            if not offset and not has_data_file:
                continue
            # At the start of a data file a cluster has no offset; zeroes have none anyway.
            if has_data_file and not offset and (not entry & COPIED or (entry & ZERO_FLAG and step == 1)):
                continue
            if offset % self._size:
                is_zero = _is_zero(entry, bitmap if step == 2 else None)
                what = "Preallocated cluster" if is_zero else "Data cluster"
                text = f"offset={offset:x}: {what} is not properly aligned; L2 entry corrupted."
                self._ledger.corrupt(text, times)
            findings.allocated_clusters += active
            if last_data >= 0 and offset != last_data + self._size:
                findings.fragmented_clusters += active
            last_data = offset
            if not has_data_file:
                self._ledger.use(offset, self._size, "data cluster", times, is_data=True)

    def _check_subclusters(self, entry: int, bitmap: int, times: int) -> None:
        """A subcluster cannot be data and zeroes at once, nor data without a cluster (Extended L2 Entries)."""
        if entry & OFFSET_MASK or (self._header.has_data_file and entry & COPIED):
            if bitmap >> 32 & bitmap & 0xFFFF_FFFF:
                text = "Allocated cluster has corrupted subcluster allocation bitmap"
                self._ledger.corrupt(f"offset={entry & OFFSET_MASK:x}: {text}", times)
        elif bitmap & 0xFFFF_FFFF:
            text = "Unallocated cluster has non-zero subcluster allocation map"
            self._ledger.corrupt(text, times, "ERROR:")

    def _use_compressed(self, number: int, entry: int, bitmap: int, times: int, active: int) -> None:
        shift = 62 - (self._bits - 8)
        offset = entry & ((1 << shift) - 1)
        if entry & COPIED:
            text = f"coffset={offset:#x}: copied flag must never be set for compressed clusters"
            self._ledger.corrupt(text, times, "ERROR:")
        if self._header.has_data_file:
            # Nothing can be compressed into another file, and here is none of it.
            self._ledger.corrupt(f"compressed cluster {number} with data file, entry={entry:#x}", times)
            return
        if bitmap:
            text = f"compressed cluster {number} with non-zero subcluster allocation bitmap, entry={entry:#x}"
            self._ledger.corrupt(text, times)
            self.findings.is_lossy = True
            return
        sectors = (entry >> shift & ((1 << (self._bits - 8)) - 1)) + 1
        self._ledger.use(offset & ~511, sectors * 512, "compressed cluster", times)
        self.findings.allocated_clusters += active
        self.findings.compressed_clusters += active
        # It never follows its neighbour cluster by cluster.
        self.findings.fragmented_clusters += active

    # -- the verdict ------------------------------------------------------------------------------------------

    def _check_refcount_blocks(self) -> None:
        blocks = [(index, cluster) for index, cluster, is_used in self.findings.refcount_blocks if is_used]
        left = Counter(cluster for _index, cluster in blocks)
        highest = refcount_codec.max_refcount(self._header.refcount_order)
        for index, cluster in blocks:
            # Of entries that lead to one block the first is right.
            left[cluster] -= 1
            used = self._used.get(cluster) - left[cluster]
            if used != 1:
                self.findings.broken_structures += 1
                # Where no count can be more than one, that it is used twice is all there is to say, elsewhere.
                if highest > 1:
                    self._ledger.corrupt(f"refcount block {index} refcount={used}")

    def _compare(self) -> None:
        findings, highest = self.findings, self._comparison.highest
        for cluster, counted, used in self._comparison.differences():
            if counted > used:
                findings.leaks += 1
                self._ledger.tell(f"Leaked cluster {cluster} refcount={counted} reference={used}")
                continue
            # Each use behind the end is one too many, and each that no count has room for.
            wrong = used if cluster >= self._ledger.end else max(0, used - highest) + (counted < min(used, highest))
            findings.corruptions += wrong
            self._ledger.tell(f"ERROR cluster {cluster} refcount={counted} reference={used}")
        findings.image_end = self._comparison.end_of_use() << self._bits

    def _check_flags(self) -> None:
        """COPIED says that a cluster is used once, so that it may be written in place."""
        for is_l1, entries in (True, self._flagged_l1()), (False, self._flagged_l2()):
            for place, entry, cluster, times, _is_table in entries:
                count = self._counted.get(cluster) if cluster is not None else 1
                if bool(entry & COPIED) != (count == 1):
                    index = place - self._header.l1_offset >> 3
                    what = f"L2 cluster: l1_index={index} l1_entry" if is_l1 else "data cluster: l2_entry"
                    self._ledger.corrupt(f"OFLAG_COPIED {what}={entry:x} refcount={count}", times)
                    self.findings.flags += times

    def _wrong_flags(self) -> Iterator[tuple[int, int]]:
        for place, entry, cluster, _times, is_table in chain(self._flagged_l1(), self._flagged_l2()):
            is_alone = cluster is None or self._comparison.wanted(cluster) == 1
            is_known = not self._ledger.is_blind or cluster is None or self._counted.get(cluster) == 1
            if is_table and bool(entry & COPIED) != is_alone and (is_known or not is_alone):
                yield place, entry ^ COPIED

    def _crooked_zeroes(self) -> Iterator[tuple[int, int]]:
        # Version 2 has no zeroes: what the bit stands in may have been data, and nobody can read it anyway.
        if self._header.content_version < 3:
            return
        step = 2 if self._header.has_extended_l2 else 1
        for table, _times, _active in self._all_tables():
            number = table >> self._bits
            if table % self._size or self._used.get(number) != self._tables.get(number):
                continue
            words = self._ledger.words(table, self._size // 8)
            for index in range(0, len(words), step):
                entry = words[index]
                is_crooked = not entry & COMPRESSED and (entry & OFFSET_MASK) % self._size
                if is_crooked and _is_zero(entry, words[index + 1] if step == 2 else None):
                    yield table + 8 * index, ZERO_FLAG if step == 1 else 0

    def _flagged_l1(self) -> Iterator[tuple[int, int, int | None, int, bool]]:
        """Entries of the active L1 table that can have a COPIED flag.

        Place, entry, the cluster it leads to, how often it stands for guest clusters, and whether the table is
        nothing else, so that it may be written.
        """
        header = self._header
        if header.l1_offset % self._size or header.l1_offset >= self._file_length:
            return
        for position, l1_entry in enumerate(self._ledger.words(header.l1_offset, header.l1_size)):
            table = l1_entry & OFFSET_MASK
            if table:
                place = header.l1_offset + 8 * position
                is_alone = self._is_l1_counted and self._used.get(place >> self._bits) == 1
                yield place, l1_entry, table >> self._bits, 1, is_alone

    def _flagged_l2(self) -> Iterator[tuple[int, int, int | None, int, bool]]:
        """The same of active L2 tables.

        None is a cluster of another file: those are not counted, and all of them may be written in place. The
        tables are read once more instead of kept: they may be larger than all the counts.
        """
        has_data_file = self._header.has_data_file
        leads = OFFSET_MASK | COPIED if has_data_file else OFFSET_MASK
        step = 2 if self._header.has_extended_l2 else 1
        for table, _times, active in self._all_tables():
            if not table or not active:
                continue
            words = self._ledger.words(table, self._size // 8)
            number = table >> self._bits
            is_table = not table % self._size and self._used.get(number) == self._tables.get(number)
            for index in range(0, len(words), step):
                entry = words[index]
                if entry & leads and not entry & COMPRESSED:
                    cluster = None if has_data_file else (entry & OFFSET_MASK) >> self._bits
                    yield table + 8 * index, entry, cluster, active, is_table


def _is_zero(entry: int, bitmap: int | None) -> bool:
    """Whether an entry that is not compressed says that all of the cluster is zeroes, wherever that is."""
    return not bitmap & ALL_ALLOCATED if bitmap is not None else bool(entry & ZERO_FLAG)
