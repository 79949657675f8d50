"""Repairs of ``qsd check``, cut off anywhere: what is on the disk is no worse than it was, and can be repaired.

Every kind of damage to images of every variant is repaired with the writes recorded, also on a disk that has no
room for more. Then the power goes at every point between them, what no flush has ordered in any order; and every
write and flush fails once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
from collections import Counter
from collections.abc import Container, Iterator
from typing import Any, Final

import attrs
import pytest
from qcow2_builder import Built, build
from qcow2_damage import DAMAGES, Damage
from qcow2_fakes import SECTOR, cut
from qcow2_mended import Bytes

from qsd.drivers.qcow2 import compressed, layout
from qsd.drivers.qcow2.bitmap_layout import ALL_ONES, ALL_ZEROES, parse_directory
from qsd.drivers.qcow2.check import Checker
from qsd.drivers.qcow2.examining import CannotCheck, Repairs, examine
from qsd.drivers.qcow2.extensions import EXT_CRYPTO, CryptoExtension
from qsd.drivers.qcow2.geometry import ALL_ALLOCATED, COMPRESSED, COPIED, OFFSET_MASK, ZERO_FLAG
from qsd.drivers.qcow2.layout import Header, parse_header, serialise_header
from qsd.drivers.qcow2.side_tables import snapshots_of
from qsd.errors import QmpError

EFFORT: Final = int(os.environ.get("QSD_EFFORT", "1"))
KIB: Final = 1 << 10
# The header, and what else the image has.
VARIANTS: Final[dict[str, tuple[Header, frozenset[str]]]] = {
    "plain": (Header(size=80 * KIB, cluster_bits=12), frozenset()),
    "old": (Header(size=40 * KIB, cluster_bits=10, version=2), frozenset({"snapshot"})),
    "small": (Header(size=40 * KIB, cluster_bits=9), frozenset({"snapshot", "bitmap"})),
    "one bit": (Header(size=40 * KIB, cluster_bits=10, refcount_order=0), frozenset()),
    "two bits": (Header(size=40 * KIB, cluster_bits=10, refcount_order=1), frozenset({"snapshot"})),
    "64 bits": (Header(size=40 * KIB, cluster_bits=9, refcount_order=6), frozenset({"snapshot"})),
    "bitmap": (Header(size=40 * KIB, cluster_bits=10), frozenset({"bitmap"})),
    "extended": (Header(size=128 * KIB, cluster_bits=14, incompatible=layout.EXTENDED_L2), frozenset({"snapshot"})),
    "data file": (Header(size=40 * KIB, cluster_bits=10, incompatible=layout.DATA_FILE), frozenset({"snapshot"})),
    "lazy": (
        Header(size=40 * KIB, cluster_bits=10, compatible=layout.LAZY_REFCOUNTS, incompatible=layout.DIRTY),
        frozenset({"snapshot"}),
    ),
    "corrupt": (Header(size=40 * KIB, cluster_bits=10, incompatible=layout.CORRUPT), frozenset({"snapshot"})),
    "aes": (Header(size=40 * KIB, cluster_bits=10, crypt_method=layout.CRYPT_AES), frozenset()),
    "luks": (Header(size=40 * KIB, cluster_bits=10, crypt_method=layout.CRYPT_LUKS), frozenset({"snapshot"})),
}


class Disk(Bytes):
    """An image in memory; ``log`` has what was written, None for a flush. Step ``fails_at`` fails, half done.

    ``is_full``: there is no room behind the end, and none in the clusters of ``holes`` before it.
    """

    def __init__(
        self, data: bytes, fails_at: int = -1, *, is_full: bool = False, holes: Container[int] = ()
    ) -> None:
        super().__init__(bytearray(data))
        self.log: list[tuple[int, bytes] | int | None] = []
        self.fails_at = fails_at
        self.limit = len(data) if is_full else 1 << 62
        self.holes, self.size = holes, header_of(data).cluster_size

    def write(self, offset: int, data: bytes) -> None:
        is_last = len(self.log) == self.fails_at
        if offset + len(data) > self.limit or offset // self.size in self.holes:
            data = data[: min(SECTOR, max(0, self.limit - offset))]
            self.log.append((offset, data))
            self.data[offset : offset + len(data)] = data
            raise OSError(errno.ENOSPC, "no space left")
        self.log.append((offset, data))
        if is_last:
            # Half of the sectors.
            data = data[: max(0, (offset + len(data) // 2) // SECTOR * SECTOR - offset)]
        super().write(offset, data)
        if is_last:
            raise OSError(errno.EIO, "input/output error")

    def flush(self) -> None:
        self.log.append(None)
        if len(self.log) == self.fails_at + 1:
            raise OSError(errno.EIO, "input/output error")


def make(name: str, rng: random.Random) -> Built:
    header, has = VARIANTS[name]
    marks = header.incompatible & (layout.DIRTY | layout.CORRUPT)
    plain = attrs.evolve(header, incompatible=header.incompatible & ~marks, crypt_method=0)
    built = build(plain, rng, has_snapshot="snapshot" in has, has_bitmap="bitmap" in has)
    image = bytearray(built.image)
    made = parse_header(bytes(image))
    if header.crypt_method == layout.CRYPT_LUKS:
        # A header of keys in clusters of its own.
        first = len(image) // header.cluster_size
        image += b"LUKS\xba\xbe".ljust(2 * header.cluster_size, b"k")
        where = CryptoExtension(first * header.cluster_size, 2 * header.cluster_size - 100).serialise()
        made = made.with_extension(EXT_CRYPTO, where)
    made = attrs.evolve(made, incompatible=made.incompatible | marks, crypt_method=header.crypt_method)
    start = serialise_header(made)
    image[: len(start)] = start
    if header.crypt_method == layout.CRYPT_LUKS:
        disk = Disk(bytes(image))
        examine(disk, Repairs.ALL)
        image = disk.data
    built.image = bytes(image)
    return built


# -- what a guest sees --------------------------------------------------------------------------------------------


def header_of(image: bytes) -> Header:
    return parse_header(image[: 1 << 21], is_for_check=True)


def seen(image: bytes, end: int, *, with_snapshots: bool = True) -> list[Any]:
    """What the disk and its snapshots lead to, with the bytes that stand there; flags nobody reads by left out.

    Bits of bitmaps that are behind ``end``, where the file ended, are all set.
    """
    header = header_of(image)
    tables = [(header.l1_offset, header.l1_size)]
    found: list[Any] = []
    for entry in snapshots_of(header, Disk(image).read):
        snapshot = entry.parse(Disk(image).read)
        found.append(attrs.evolve(snapshot, disk_size=snapshot.disk_size or header.size))
        if with_snapshots:
            tables.append((snapshot.l1_offset, snapshot.l1_size))
    for offset, entries in tables:
        for l1_entry in words(image, offset, min(entries, 1 << 12)):
            table = l1_entry & OFFSET_MASK
            found.append(l1_entry & ~COPIED)
            if table and not table % header.cluster_size:
                found += contents(header, image, table)
    bitmaps = header.bitmaps_extension()
    if bitmaps is not None:
        found += bits_of(header, image, end)
    keys = header.crypto_extension()
    if keys is not None:
        found.append(bytes(image[keys.offset : keys.offset + keys.length]).ljust(keys.length, b"\0"))
    return found


def bits_of(header: Header, image: bytes, end: int) -> Iterator[Any]:
    bitmaps = header.bitmaps_extension()
    assert bitmaps is not None
    directory = bytes(image[bitmaps.offset : bitmaps.offset + bitmaps.size])
    for entry in parse_directory(directory, bitmaps.count, header.cluster_size):
        yield attrs.evolve(entry, table_offset=0)
        is_lost = entry.table_offset + entry.table_entries * 8 > end
        table = words(image, entry.table_offset, entry.table_entries)
        for place in [ALL_ONES] * entry.table_entries if is_lost else table:
            is_stored = place > ALL_ONES and place + header.cluster_size <= end
            stored = bytes(image[place : place + header.cluster_size])
            yield stored if is_stored else ALL_ONES if place else ALL_ZEROES


def contents(header: Header, image: bytes, table: int) -> Iterator[Any]:
    step = 2 if header.has_extended_l2 else 1
    entries = words(image, table, header.cluster_size // 8)
    for index in range(0, len(entries), step):
        entry = entries[index]
        bitmap = entries[index + 1] if step == 2 else 0
        yield bitmap
        is_zero = not bitmap & ALL_ALLOCATED if step == 2 else entry & ZERO_FLAG
        if is_zero and not entry & COMPRESSED and (entry & OFFSET_MASK) % header.cluster_size:
            # Zeroes that could not be read for their place, which they need not: a repair takes it away.
            entry = ZERO_FLAG if step == 1 else 0
        if header.has_data_file:
            # Else it would not say whether the disk has the cluster.
            yield entry & ~COPIED if entry & OFFSET_MASK else entry
            continue
        yield entry & ~COPIED
        if entry & COMPRESSED:
            offset, length = compressed.decode_entry(entry, header.cluster_bits)
        else:
            offset, length = entry & OFFSET_MASK, header.cluster_size
        # The header says where the refcounts are, and that all is well: who leads a guest there sees it change.
        if offset >= header.cluster_size and (entry & COMPRESSED or not (entry & ZERO_FLAG or offset % length)):
            yield bytes(image[offset : offset + length]).ljust(length, b"\0")


def words(image: bytes, offset: int, count: int) -> list[int]:
    piece = bytes(image[offset : offset + 8 * count]).ljust(8 * count, b"\0")
    return [int.from_bytes(piece[at : at + 8], "big") for at in range(0, len(piece), 8)]


# -- what can hurt ------------------------------------------------------------------------------------------------


def dangers(image: bytes, end: int) -> Counter[Any]:
    """What makes a write to the image destroy something, or keeps it from being read.

    Behind ``end``, where the file ended, is nothing to be destroyed: what leads there is told as long as the file
    is not so long, and is a count that is too low from then on.

    A count that is too high costs space, and an entry that does not say that its cluster is its own a copy. That
    these are corruptions too, where an entry does not say what the count says, is a matter of the moment: two
    places cannot change at once.
    """
    header = header_of(image)
    disk = Disk(image)
    found = Checker(header, disk.read, disk.length).run()
    lows = (cluster for cluster, counted, wanted in found.changes() if counted < wanted)
    each: Counter[Any] = Counter(cluster for cluster in lows if cluster << header.cluster_bits < end)
    each.update(("COPIED", place) for place, entry in found.wrong_flags() if not entry & COPIED)
    harmless = ("Leaked", "ERROR OFLAG_COPIED", "ERROR cluster")
    kinds = (re.sub("(0x)?[0-9a-f]{3,}", "#", problem) for problem in found.problems)
    each.update(kind for kind in kinds if not kind.startswith(harmless))
    return each


def opens(image: bytes) -> str:
    """What keeps an image from being opened, and from being repaired."""
    try:
        examine(Disk(image), Repairs.NONE)
    except CannotCheck:
        pass
    except QmpError as error:
        return error.desc
    return ""


def repaired(image: bytes, repairs: Repairs) -> tuple[int, int]:
    """Corruptions and leaks that a repair leaves."""
    found = examine(Disk(image), repairs).found
    return found.corruptions, found.leaks


class Case:
    """A damaged image: what holds of it whatever a repair has come to."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        self.header = header_of(image)
        self.dangers = dangers(image, len(image))
        # A snapshot's table that is too long lies over what is repaired, and is looked at as far as the file goes.
        self.is_too_long = any("L1 table " in str(each) for each in self.dangers)
        self.seen = seen(image, len(image), with_snapshots=not self.is_too_long)
        self.best = repaired(image, Repairs.ALL)
        self.known: set[bytes] = {image}

    def look_at(self, image: bytes, what: str) -> None:
        """Assert that an image is no worse."""
        if image not in self.known:
            self.known.add(image)
            try:
                self._assert_no_worse(image)
            except BaseException as error:
                error.add_note(what)
                raise

    def _assert_no_worse(self, image: bytes) -> None:
        header = header_of(image)
        changes = {
            "refcount_table_offset": self.header.refcount_table_offset,
            "refcount_table_clusters": self.header.refcount_table_clusters,
            "snapshots_offset": self.header.snapshots_offset,
        }
        marks = layout.DIRTY | layout.CORRUPT
        assert header.incompatible & ~marks == self.header.incompatible & ~marks
        assert attrs.evolve(header, **changes, incompatible=self.header.incompatible) == self.header
        again = seen(image, len(self.image), with_snapshots=not self.is_too_long)
        assert again == self.seen, "a guest sees something else"
        assert not opens(image)
        worse = dangers(image, len(self.image)) - self.dangers
        if self.is_too_long:
            worse.clear()
        assert not worse, worse
        corruptions, leaks = repaired(image, Repairs.ALL)
        assert corruptions <= self.best[0]
        assert not leaks or self.best != (0, 0)


def holes(image: bytes, rng: random.Random) -> set[int]:
    """Some clusters that hold nothing, and that the file does not have either."""
    used = Checker(header_of(image), Disk(image).read, len(image)).run().used
    clusters = range(len(image) // header_of(image).cluster_size)
    return {cluster for cluster in clusters if not used.get(cluster) and rng.random() < 0.5}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", VARIANTS)
def test_repair_cut_off_anywhere(name: str, damage: str) -> None:
    for seed in range(EFFORT):
        repair_cuts(name, damage, seed)


def repair_cuts(name: str, damage: str, seed: int) -> None:
    rng = random.Random(f"{name} {damage} {seed}")
    broken = Damage(make(name, rng).image, rng)
    getattr(broken, damage)()
    before = bytes(broken.data)
    if opens(before):
        # Nothing is done to it.
        for repairs in (Repairs.LEAKS, Repairs.ALL):
            disk = Disk(before)
            with pytest.raises(QmpError):
                examine(disk, repairs)
            assert disk.data == before
        return
    case = Case(before)
    for repairs in (Repairs.LEAKS, Repairs.ALL):
        disk = Disk(before)
        try:
            examine(disk, repairs)
        except CannotCheck:
            assert repairs is Repairs.LEAKS
            assert disk.data == before
            continue
        full = Disk(before, is_full=True, holes=holes(before, rng))
        with contextlib.suppress(OSError):
            examine(full, repairs)
        for step, image in enumerate(cut(before, full.log)):
            if EFFORT > 1 or rng.random() < 0.3:
                case.look_at(image, f"seed {seed}, {repairs}, cut {step} on a full disk")
        case.look_at(bytes(full.data), f"seed {seed}, {repairs}, whole on a full disk")
        for step, image in enumerate(cut(before, disk.log)):
            if EFFORT > 1 or rng.random() < 0.3:
                case.look_at(image, f"seed {seed}, {repairs}, cut {step}")
        case.look_at(bytes(disk.data), f"seed {seed}, {repairs}, whole")
        for at in range(len(disk.log)):
            failing = Disk(before, fails_at=at)
            with pytest.raises(OSError, match=r"(?i)input/output error"):
                examine(failing, repairs)
            case.look_at(bytes(failing.data), f"seed {seed}, {repairs}, step {at} fails")
