"""Damage to qcow2 images: counts and flags that are wrong, tables that lead where they should not."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from typing import Final

import attrs

from qsd.drivers.qcow2 import refcount_codec
from qsd.drivers.qcow2.geometry import COMPRESSED, COPIED, OFFSET_MASK
from qsd.drivers.qcow2.layout import parse_header, serialise_header
from qsd.drivers.qcow2.snapshot_table import ENTRY


class Damage:
    """An image's refcounts and flags, to be made wrong."""

    def __init__(self, image: bytes, rng: random.Random) -> None:
        self.data, self.rng = bytearray(image), rng
        self.header = header = parse_header(image[: 2 << 20])
        self.size, self.order = header.cluster_size, header.refcount_order
        table = struct.unpack_from(f">{self.size // 8}Q", self.data, header.refcount_table_offset)
        self.blocks = [entry for entry in table if entry]
        self.step = 16 if header.has_extended_l2 else 8

    def word(self, place: int) -> int:
        """The entry that stands there; behind the file's end it is zeroes."""
        (entry,) = struct.unpack(">Q", self.data[place : place + 8].ljust(8, b"\0"))
        return int(entry)

    def set_word(self, place: int, entry: int) -> None:
        """Let an entry be another, unless an earlier damage has it behind the file's end."""
        if place + 8 <= len(self.data):
            struct.pack_into(">Q", self.data, place, entry)

    def tables(self) -> Iterator[tuple[int, int]]:
        """Where the entries of the active L1 table stand that lead to a table, and where to."""
        for index in range(self.header.l1_size):
            place = self.header.l1_offset + index * 8
            table = self.word(place) & OFFSET_MASK
            if table and not table % self.size and table + self.size <= len(self.data):
                yield place, table

    def entries(self) -> Iterator[tuple[int, int]]:
        """Places of the L2 entries that lead to a cluster, and their values."""
        for _place, table in self.tables():
            for place in range(table, table + self.size, self.step):
                entry = self.word(place)
                if entry & (OFFSET_MASK | COMPRESSED):
                    yield place, entry

    # -- counts and flags -----------------------------------------------------------------------------------------

    def counts(self, change: Callable[[int], int]) -> None:
        """Change a quarter of the counts of what is in use."""
        highest = refcount_codec.max_refcount(self.order)
        for block in self.blocks:
            counts = refcount_codec.decode(self.data[block : block + self.size], self.order)
            for at, count in enumerate(counts):
                if count and self.rng.random() < 0.25:
                    counts[at] = max(0, min(highest, change(count)))
            self.data[block : block + self.size] = refcount_codec.encode(counts, self.order)

    def leaks(self) -> None:
        self.counts(lambda count: count + 1)

    def lows(self) -> None:
        self.counts(lambda count: count - 1)

    def both(self) -> None:
        self.counts(lambda count: count + self.rng.choice((-1, 1)))

    def flags(self) -> None:
        """Entries of the active tables say the opposite of what is so."""
        for place, table in self.tables():
            for each in (place, *range(table, table + self.size, self.step)):
                entry = self.word(each)
                if entry & OFFSET_MASK and not entry & COMPRESSED and self.rng.random() < 0.3:
                    self.set_word(each, entry ^ COPIED)

    def all(self) -> None:
        self.both()
        self.flags()

    def dropped(self) -> None:
        """Clusters that nothing leads to any more."""
        for place, _entry in list(self.entries()):
            if self.rng.random() < 0.3:
                self.set_word(place, 0)
                if self.step == 16:
                    self.set_word(place + 8, 0)

    # -- the refcount structure -----------------------------------------------------------------------------------

    def table(self) -> None:
        """Nothing is counted: the structure is built anew."""
        self.all()
        self.set_word(self.header.refcount_table_offset, 0)

    def block(self) -> None:
        """A block is behind the file's end."""
        self.all()
        self.set_word(self.header.refcount_table_offset, len(self.data) + 8 * self.size)

    def crooked(self) -> None:
        """A block stands across clusters, another has reserved bits."""
        self.set_word(self.header.refcount_table_offset, self.blocks[0] + self.rng.choice((1, 512)))
        self.set_word(self.header.refcount_table_offset + 8, self.blocks[0])

    def outside(self) -> None:
        """The table is behind the file's end."""
        self.put_header(refcount_table_offset=len(self.data) + 64 * self.size)

    def put_header(self, **changes: int) -> None:
        """Let the header say something else."""
        self.header = attrs.evolve(self.header, **changes)
        start = serialise_header(self.header)
        self.data[: len(start)] = start

    # -- clusters that are two things -----------------------------------------------------------------------------

    def twice(self) -> None:
        """Entries that lead where others do."""
        places = [place for place, entry in self.entries() if not entry & COMPRESSED]
        for place in places[: len(places) // 3]:
            self.set_word(place, self.word(self.rng.choice(places)))

    def metadata(self) -> None:
        """Entries that lead to what is no data: a table, a refcount block, the refcount table."""
        header, rng = self.header, self.rng
        (first, table), *_more = [*self.tables(), (header.l1_offset, header.l1_offset)]
        targets = [header.l1_offset, header.refcount_table_offset, table, *self.blocks]
        places = [place for place, entry in self.entries() if not entry & COMPRESSED] or [first]
        for place in rng.sample(places, min(len(places), 2)):
            self.set_word(place, rng.choice(targets) | rng.choice((0, COPIED)))

    def shared_table(self) -> None:
        """L1 entries that lead where others do."""
        places = [self.header.l1_offset + 8 * index for index in range(self.header.l1_size)]
        self.set_word(places[-1], self.word(places[0]) | COPIED)

    # -- tables that lead nowhere ---------------------------------------------------------------------------------

    def nowhere(self) -> None:
        """Entries that lead behind the end, and between clusters."""
        places = [place for place, _entry in self.entries()] + [place for place, _table in self.tables()]
        for place in self.rng.sample(places, min(len(places), 3)):
            end = len(self.data)
            wanted = (end, end + 4 * self.size, 1 << 50, self.word(place) + 512 & OFFSET_MASK, self.size | 2)
            self.set_word(place, self.rng.choice(wanted) | self.rng.choice((0, COPIED)))

    def cut_off(self) -> None:
        """The file ends earlier."""
        del self.data[len(self.data) - self.rng.randrange(1, 4) * self.size :]

    def bits(self) -> None:
        """Some bits of tables are others."""
        header, rng = self.header, self.rng
        places = [
            header.l1_offset,
            header.refcount_table_offset,
            *self.blocks,
            *(each for _p, each in self.tables()),
        ]
        for _ in range(rng.randrange(1, 6)):
            at = rng.choice(places) + rng.randrange(128)
            if at < len(self.data):
                self.data[at] ^= 1 << rng.randrange(8)

    def snapshot(self) -> None:
        """A snapshot's table leads elsewhere, or is longer."""
        header, rng = self.header, self.rng
        if header.snapshot_count:
            if rng.randrange(2):
                self.set_word(header.snapshots_offset, rng.choice((0x4200, 1 << 50, header.l1_offset)))
            else:
                struct.pack_into(">I", self.data, header.snapshots_offset + 8, 0x1000)

    def entries_of_snapshots(self) -> None:
        """An entry of the snapshot table says less than it has to, or more than it may."""
        header, rng = self.header, self.rng
        if not header.snapshot_count:
            return
        place = header.snapshots_offset
        fields = list(ENTRY.unpack_from(self.data, place))
        ids = fields[2] + fields[3]
        old = self.data[place + ENTRY.size : place + ENTRY.size + fields[8] + ids]
        extra, names = old[: fields[8]].ljust(24, b"\xff"), old[fields[8] :]
        if rng.randrange(2):
            extra = extra[: rng.choice((0, 8, 15))]
        else:
            # There is no room for it where the table is: it stands behind everything, and nothing is counted.
            extra = extra.ljust(rng.randrange(1025, 1200), b"x")
            place = len(self.data)
            self.data += bytes(2048 if self.size < 2048 else self.size)
            self.put_header(snapshots_offset=place)
        entry = ENTRY.pack(*fields[:8], len(extra)) + extra + names
        self.data[place : place + len(entry)] = entry

    def bitmap(self) -> None:
        """A bitmap's table, or its bits, are behind the file's end."""
        extension = self.header.bitmaps_extension()
        if extension is not None:
            place = self.rng.choice((extension.offset, self.word(extension.offset)))
            self.set_word(place, len(self.data) + self.rng.choice((1, 2, 1000)) * self.size)

    def uncounted(self) -> None:
        """There is no refcount table."""
        self.all()
        self.put_header(refcount_table_clusters=0)

    def many(self) -> None:
        """A bit of everything."""
        for name in self.rng.sample(DAMAGES[:-1], 3):
            if name != "cut_off":
                getattr(self, name)()


# What opening an image mends; the rest is left to people, and to the command.
MENDED: Final = ("leaks", "lows", "both", "flags", "all", "table", "block", "outside")
DAMAGES: Final = (
    *MENDED,
    *("dropped", "crooked", "twice", "metadata", "shared_table", "nowhere", "cut_off", "bits", "snapshot"),
    *("entries_of_snapshots", "bitmap", "uncounted", "many"),
)
