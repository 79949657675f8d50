"""What a check has found so far: how often each cluster is used, and what is wrong.

Works on anything that can be read by offset; pure otherwise.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterator
from typing import Final

import attrs

from qsd.drivers.qcow2 import layout
from qsd.drivers.qcow2.counts import Counts
from qsd.drivers.qcow2.geometry import swap
from qsd.drivers.qcow2.layout import Header

# Reads ``length`` bytes at an offset; what lies beyond the file's end is zeroes.
Read = Callable[[int, int], bytes]

# Clusters behind the file's end that a new refcount structure may come to stand in: for 2 TiB at 64 KiB.
_NEARBY: Final = 1024


@attrs.define
class Findings:
    """What a check found. ``problems`` are lines for people, up to the limit that the check was given.

    ``used`` says how often clusters are used, ``counted`` how often the image says so.
    """

    corruptions: int = 0
    # Those of them that are entries whose COPIED flag does not say what is counted.
    flags: int = 0
    leaks: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    compressed_clusters: int = 0
    fragmented_clusters: int = 0
    image_end: int = 0
    # Clusters, from one to before another, that something leads to which reaches beyond the end of the file: those
    # before the end, and nearby. They are not ``used``; what is written there would be taken for it.
    claimed: set[tuple[int, int]] = attrs.field(factory=set)
    problems: list[str] = attrs.field(factory=list)
    # Cluster, counted, and what should be counted, where they differ.
    changes: Callable[[], Iterator[tuple[int, int, int]]] = attrs.field(default=lambda: iter(()))
    # Offset in the file and entry as it should be, of zeroes that have a place, which they need not, off a cluster.
    crooked_zeroes: Callable[[], Iterator[tuple[int, int]]] = attrs.field(default=lambda: iter(()))
    # The same where COPIED does not say what should be counted.
    wrong_flags: Callable[[], Iterator[tuple[int, int]]] = attrs.field(default=lambda: iter(()))
    used: Counts = attrs.field(factory=Counts)
    counted: Counts = attrs.field(factory=Counts)
    # Entries of the refcount table that lead to a cluster of the file: index, cluster, and whether it is ``used``
    # by that, which one with reserved bits does not.
    refcount_blocks: list[tuple[int, int, bool]] = attrs.field(factory=list)
    # Whether the refcount table is a part of the file.
    has_refcount_table: bool = False
    # What is broken of the refcount table and blocks: there have to be new ones.
    broken_structures: int = 0
    # Those of them that are blocks beyond the end of the file: all other blocks may be written to.
    lost_blocks: int = 0
    # Something leads nowhere: what looks like a leak may be what it should lead to.
    is_lossy: bool = False
    # What is wrong with the snapshot table itself, how many of its entries can be kept, and the bytes these take.
    bad_snapshots: int = 0
    kept_snapshots: int = 0
    snapshot_table_length: int = 0
    # Places in the file: of directory entries whose bitmap table leads nowhere, with the number of the table's
    # entries, and of entries in bitmap tables whose bits do.
    lost_bitmap_tables: list[tuple[int, int]] = attrs.field(factory=list)
    lost_bitmap_data: array[int] = attrs.field(factory=lambda: array("Q"))

    def lows(self) -> int:
        """How many counts are too low."""
        return sum(counted < wanted for _cluster, counted, wanted in self.changes())


class Ledger:
    """The account of one check. ``file_length`` is the image file's, in bytes.

    Of what is found the first ``max_problems`` lines are kept.
    """

    def __init__(self, header: Header, read: Read, file_length: int, max_problems: int = sys.maxsize) -> None:
        self.header = header
        self.read = read
        self.file_length = file_length
        self.bits, self.size = header.cluster_bits, header.cluster_size
        # The cluster behind the file, and behind what begins in it.
        self.end = -(-file_length // self.size)
        self.findings = Findings(total_clusters=-(-header.disk_size // header.cluster_size))
        # There is a table that was not looked at: what it leads to is known from the counts alone.
        self.is_blind = False
        self._max_problems = max_problems
        # Bytes of tables there may still be.
        self._room = file_length + self.size

    def corrupt(self, text: str, times: int = 1, mark: str = "ERROR") -> None:
        """Say that something is corrupt, which counts so many times."""
        self.findings.corruptions += times
        self.tell(f"{mark} {text}")

    def tell(self, line: str) -> None:
        """Say something."""
        if len(self.findings.problems) < self._max_problems:
            self.findings.problems.append(line)

    def use(
        self,
        offset: int,
        length: int,
        what: str,
        times: int = 1,
        *,
        counts: bool = False,
        is_data: bool = False,
        is_bitmap: bool = False,
    ) -> bool:
        """Count the clusters of a range as used once more, or so many times; False when it reaches beyond the file.

        ``counts``: it is a part of the refcount structure. ``is_data``: a cluster of the guest's. ``is_bitmap``: a
        part of a bitmap, of which no repair needs to know where it was (see ``mend_bitmaps``).
        """
        if not length:
            return True
        first, last = offset >> self.bits, (offset + length - 1) >> self.bits
        # A last cluster may be cut short: the file ends where its data does.
        is_inside = offset + length < self.file_length + self.size
        # A cluster of data may follow the file's end, where nothing has been written: the file can become longer.
        follows = is_data and last << self.bits < self.file_length + self.size
        if not (is_inside or follows) or offset + length > layout.MAX_SIZE:
            self.corrupt(f"{what} at {offset:#x} lies beyond the end of the file", times)
            self.claim(offset, length)
            if counts:
                self.findings.broken_structures += 1
            elif not is_bitmap:
                self.findings.is_lossy = True
            return False
        if is_inside:
            self.end = max(self.end, last + 1)
        for cluster in range(first, last + 1):
            self.findings.used.add(cluster, times)
        return True

    def claim(self, offset: int, length: int) -> None:
        """Say that something leads to a range that reaches beyond the end of the file."""
        far = -(-self.file_length // self.size) + _NEARBY
        first, end = offset >> self.bits, min((offset + length - 1 >> self.bits) + 1, far)
        if first < end:
            self.findings.claimed.add((first, end))

    def words(self, offset: int, count: int) -> array[int]:
        """Entries of a table."""
        words = array("Q")
        words.frombytes(self.read(offset, count * 8))
        swap(words)
        return words

    def has_room(self, length: int, what: str) -> bool:
        """Whether all tables together can still be parts of the file that do not overlap."""
        self._room -= length
        if self._room < 0:
            self.corrupt(f"{what} overlaps with others")
            self.findings.is_lossy = self.is_blind = True
        return self._room >= 0
