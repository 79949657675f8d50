"""A check of an image file with the repairs that were asked for: what ``qsd check`` does to an image.

Whatever the file is, it is read and written by offset, by plain calls.
"""

from __future__ import annotations

import enum
import errno
import sys
from collections.abc import Callable
from typing import Final, Protocol

import attrs

from qsd.block.bitmap import DirtyBitmap
from qsd.drivers.qcow2 import bitmap_layout, layout, snapshot_table
from qsd.drivers.qcow2.check import Checker, Findings
from qsd.drivers.qcow2.layout import Header
from qsd.drivers.qcow2.repair import Repaired, place_nothing, repair
from qsd.errors import QmpError, errno_text

# Bytes of the snapshot table read at a time; one entry fits in at least.
_WINDOW: Final = 8 * snapshot_table.MAX_ENTRY


# How much is done, of how much.
Progress = Callable[[int, int], None]


class File(Protocol):
    """An image file. Everything raises OSError."""

    @property
    def length(self) -> int:
        """Bytes of the file."""

    def read(self, offset: int, length: int, /) -> bytes:
        """Bytes at an offset; zeroes beyond the end."""

    def write(self, offset: int, data: bytes, /) -> None:
        """Write all of it; the file becomes as long as that takes."""

    def flush(self) -> None:
        """Return when everything is on the disk."""


class Repairs(enum.Enum):
    """What a check puts right."""

    NONE = "none"
    LEAKS = "leaks"
    ALL = "all"


@attrs.frozen
class Examined:
    """What was found first, what was put right, and what is found now."""

    before: Findings
    fixed: Repaired
    found: Findings


def examine(
    file: File,
    repairs: Repairs,
    progress: Progress = lambda _done, _total: None,
) -> Examined:
    """Check a qcow2 image, repair it, and check it again.

    Raises OSError, and QmpError when the image could not be opened, by whomever.
    """
    header = read_header(file)
    _check_bitmaps(header, file)
    _check_snapshots(header, file)
    examined = check_and_repair(file, header, repairs, progress)
    header = read_header(file)
    is_repaired = examined.found is not examined.before and not examined.found.corruptions
    if is_repaired and header.incompatible & (layout.DIRTY | layout.CORRUPT):
        _clear_marks(file, header)
    return examined


def check_and_repair(
    file: File,
    header: Header,
    repairs: Repairs,
    progress: Progress = lambda _done, _total: None,
    max_problems: int = sys.maxsize,
) -> Examined:
    """Check, repair and check again an image that can be opened, whose marks stay. Raises OSError."""

    def check() -> Findings:
        return Checker(read_header(file), file.read, file.length, progress, max_problems).run()

    before = found = check()
    if repairs is Repairs.NONE or not (found.leaks or found.corruptions):
        return Examined(before, Repaired(), found)
    placed = 0
    if repairs is Repairs.ALL:
        placed = place_nothing(header, file.read, file.write, found)
    if placed:
        file.flush()
        found = check()
    leaks_only = repairs is Repairs.LEAKS
    fixed = repair(header, file.read, file.write, found, leaks_only=leaks_only, flush=file.flush)
    file.flush()
    return Examined(before, attrs.evolve(fixed, corruptions=fixed.corruptions + placed), check())


def read_header(file: File) -> Header:
    """The header of an image. Raises OSError, QmpError."""
    start = file.read(0, layout.PROBE_LENGTH)
    return layout.parse_header(file.read(0, layout.probe_cluster_size(start)))


def _check_bitmaps(header: layout.Header, file: File) -> None:
    """Raise QmpError when the image could not be opened for what it says about its bitmaps."""
    extension = header.bitmaps_extension() if header.version >= 3 else None
    if extension is None:
        return
    directory = file.read(extension.offset, extension.size)
    # Tables that do not overlap: 65535 of them could lead to the same megabytes.
    room = file.length + header.cluster_size
    for entry in bitmap_layout.parse_directory(directory, extension.count, header.cluster_size):
        if entry.flags & bitmap_layout.IN_USE:
            continue
        bits = DirtyBitmap.data_length_of(header.size, 1 << entry.granularity_bits)
        if entry.table_entries != -(-bits // header.cluster_size):
            raise QmpError(f"Could not read bitmap '{entry.text}' from image: {errno_text(errno.EINVAL)}")
        room -= entry.table_entries * 8
        try:
            if room < 0:
                raise ValueError("the tables overlap")
            bitmap_layout.parse_table(file.read(entry.table_offset, entry.table_entries * 8), header.cluster_size)
        except ValueError:
            what = f"Could not read bitmap_table table from image for bitmap '{entry.text}'"
            raise QmpError(f"{what}: {errno_text(errno.EINVAL)}") from None


def _check_snapshots(header: layout.Header, file: File) -> None:
    """Raise QmpError when the image could not be opened for what it says about its snapshots."""
    start, window = 0, b""
    position = 0
    for number in range(header.snapshot_count):
        if position > snapshot_table.MAX_TABLE:
            raise QmpError("Snapshot table too large")
        if position + snapshot_table.MAX_ENTRY > start + len(window):
            start, window = position, file.read(header.snapshots_offset + position, _WINDOW)
        at = position - start
        _snapshot, length = snapshot_table.parse_entry(window[at : at + snapshot_table.MAX_ENTRY], number)
        position += length


def _clear_marks(file: File, header: layout.Header) -> None:
    """The image is consistent: it need not be repaired when it is opened next, and may be written to."""
    clean = attrs.evolve(header, **layout.unmarking(header))
    if clean.version == header.version:
        marks = clean.incompatible & ~layout.CORRUPT
        file.write(layout.V2_LENGTH, marks.to_bytes(8, "big"))
    else:
        file.write(0, layout.serialise_header(clean))
    file.flush()
