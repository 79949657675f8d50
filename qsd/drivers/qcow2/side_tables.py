"""What stands in an image beside the guest's data, for a check: snapshot table, bitmaps, encryption header.

Pure. Figures and limits are those of ``qemu-img check``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import attrs

from qsd.drivers.qcow2 import layout
from qsd.drivers.qcow2.bitmap_layout import ENTRY as ENTRY_OF_BITMAP
from qsd.drivers.qcow2.bitmap_layout import MAX_DATA
from qsd.drivers.qcow2.geometry import OFFSET_MASK
from qsd.drivers.qcow2.layout import Header
from qsd.drivers.qcow2.ledger import Ledger, Read
from qsd.drivers.qcow2.snapshot_table import ENTRY, MAX_EXTRA, MAX_TABLE, MIN_EXTRA_V3, StoredSnapshot, parse_entry

# Bytes of the snapshot table with all that entries have too much of, and may not have for the image to be opened.
_MAX_SNAPSHOT_TABLE: Final = (1 << 31) - 1
# Bytes: five hundred times what a LUKS header with its key slots takes. Every cluster of it is counted.
_MAX_ENCRYPTION_HEADER: Final = 1 << 30


# -- snapshots ----------------------------------------------------------------------------------------------------


@attrs.frozen
class RawSnapshot:
    """An entry of the snapshot table as it stands there: the sizes are what it says, however large."""

    number: int
    offset: int
    l1_offset: int
    l1_size: int
    id_size: int
    name_size: int
    extra_size: int

    @property
    def length(self) -> int:
        """Bytes of the entry, with the padding."""
        return -(-(ENTRY.size + self.extra_size + self.id_size + self.name_size) // 8) * 8

    @property
    def has_too_much(self) -> bool:
        """Whether it has more extra data than is possible."""
        return self.extra_size > MAX_EXTRA

    def parse(self, read: Read) -> StoredSnapshot:
        """All that it says, without what it has too much of."""
        start = bytearray(read(self.offset, ENTRY.size))
        extra = min(self.extra_size, MAX_EXTRA)
        start[-4:] = extra.to_bytes(4, "big")
        start += read(self.offset + ENTRY.size, extra)
        start += read(self.offset + ENTRY.size + self.extra_size, self.id_size + self.name_size)
        return parse_entry(bytes(start), self.number)[0]


def snapshots_of(header: Header, read: Read) -> Iterator[RawSnapshot]:
    """The entries of the snapshot table, as far as it may be long."""
    offset, room = header.snapshots_offset, MAX_TABLE
    for number in range(min(header.snapshot_count, layout.MAX_SNAPSHOTS)):
        entry = snapshot_at(offset, number, read)
        offset += entry.length
        room -= entry.length - max(0, entry.extra_size - MAX_EXTRA)
        if offset - header.snapshots_offset > _MAX_SNAPSHOT_TABLE or room < 0:
            return
        yield entry


def snapshot_at(offset: int, number: int, read: Read) -> RawSnapshot:
    """The entry that stands there."""
    fields = ENTRY.unpack(read(offset, ENTRY.size))
    return RawSnapshot(number, offset, fields[0], fields[1], fields[2], fields[3], fields[8])


def walk_snapshots(ledger: Ledger, walk_l1: Callable[[int, int], None]) -> None:
    """Look at the snapshot table; ``walk_l1(offset, entries)`` at the L1 table of each snapshot.

    An entry that does not fit into the table any more is not looked at, nor what follows it.
    """
    header, findings = ledger.header, ledger.findings

    def corrupt(text: str, times: int = 1) -> None:
        ledger.corrupt(text, times)
        findings.bad_snapshots += times

    for entry in snapshots_of(header, ledger.read):
        findings.kept_snapshots += 1
        findings.snapshot_table_length += entry.length
        if entry.has_too_much:
            corrupt(f"snapshot table entry {entry.number} has too much extra metadata")
        elif header.version >= 3 and entry.extra_size < MIN_EXTRA_V3:
            corrupt(f"snapshot table entry {entry.number} is incomplete")
        if entry.l1_offset % ledger.size:
            _tell_l1(ledger, entry, f"l1_offset={entry.l1_offset:#x}: L1 table is not cluster aligned")
            if entry.l1_size:
                findings.is_lossy = ledger.is_blind = True
        elif entry.l1_size * 8 > layout.MAX_L1_BYTES:
            _tell_l1(ledger, entry, f"l1_size={entry.l1_size:#x}: L1 table is too large")
            findings.is_lossy = ledger.is_blind = True
        else:
            walk_l1(entry.l1_offset, entry.l1_size)
    if header.has_data_file and findings.kept_snapshots:
        # The guest goes on writing to the clusters they would have.
        ledger.corrupt(f"{findings.kept_snapshots} snapshots in image with data file")
    overhanging = header.snapshot_count - findings.kept_snapshots
    if overhanging:
        end, number = header.snapshots_offset + findings.snapshot_table_length, findings.kept_snapshots
        # What the first of them has too much is one more thing to put right, if that was looked at.
        is_read = number < layout.MAX_SNAPSHOTS
        has_too_much = is_read and snapshot_at(end, number, ledger.read).has_too_much
        corrupt(f"{overhanging} overhanging snapshots", overhanging + has_too_much)
    ledger.use(header.snapshots_offset, findings.snapshot_table_length, "snapshot table")


def _tell_l1(ledger: Ledger, entry: RawSnapshot, what: str) -> None:
    shown = entry.parse(ledger.read).shown
    ledger.corrupt(f"snapshot {shown.id} ({shown.name}) {what}; snapshot table entry corrupted")


# -- bitmaps ------------------------------------------------------------------------------------------------------


def walk_bitmaps(ledger: Ledger) -> None:
    """Look at the bitmap directory and at what it leads to."""
    extension = ledger.header.bitmaps_extension()
    if extension is None or not ledger.use(extension.offset, extension.size, "bitmap directory"):
        return
    directory = ledger.read(extension.offset, extension.size)
    findings, size = ledger.findings, ledger.size
    position = 0
    for _ in range(extension.count):
        if position + ENTRY_OF_BITMAP.size > extension.size:
            ledger.corrupt("bitmap directory is broken")
            findings.is_lossy = True
            return
        table, entries, _flags, _type, _bits, name_size, extra = ENTRY_OF_BITMAP.unpack_from(directory, position)
        place = extension.offset + position
        position += -(-(ENTRY_OF_BITMAP.size + extra + name_size) // 8) * 8
        # With a larger one the image cannot be opened at all, which is told elsewhere.
        if entries * size > max(MAX_DATA, size):
            continue
        if not ledger.use(table, entries * 8, "bitmap table", is_bitmap=True):
            findings.lost_bitmap_tables.append((place, entries))
            continue
        if not ledger.has_room(entries * 8, "bitmap table"):
            return
        for index, entry in enumerate(ledger.words(table, entries)):
            data = entry & OFFSET_MASK
            if data and not ledger.use(data, size, "bitmap data", is_bitmap=True):
                findings.lost_bitmap_data.append(table + 8 * index)


# -- encryption ---------------------------------------------------------------------------------------------------


def walk_crypto(ledger: Ledger) -> None:
    """Look at what holds the keys."""
    extension = ledger.header.crypto_extension()
    if extension is None:
        return
    if extension.length > _MAX_ENCRYPTION_HEADER:
        ledger.corrupt(f"encryption header at {extension.offset:#x} has {extension.length} bytes")
        ledger.findings.is_lossy = True
        ledger.claim(extension.offset, extension.length)
    else:
        ledger.use(extension.offset, extension.length, "encryption header")
