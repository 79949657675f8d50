"""A check of an image file with the repairs that were asked for: what ``qsd check`` does to an image.

Whatever the file is, it is read and written by offset, by plain calls.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import sys
from collections.abc import Callable, Iterator
from typing import Final, Protocol

import attrs

from qsd.block.bitmap import DirtyBitmap
from qsd.drivers.qcow2 import bitmap_layout, layout
from qsd.drivers.qcow2.check import Checker
from qsd.drivers.qcow2.layout import Header
from qsd.drivers.qcow2.ledger import Findings
from qsd.drivers.qcow2.rebuilding import is_incomplete, rebuild
from qsd.drivers.qcow2.repair import Repaired, place_nothing, repair
from qsd.drivers.qcow2.side_tables import snapshot_at, snapshots_of
from qsd.drivers.qcow2.table_mending import mend_bitmaps, mend_snapshots
from qsd.errors import QmpError, errno_text

# Where the header says which features of the image hold as long as nobody writes to it who does not know them.
_AUTOCLEAR: Final = 88
_UNREAD: Final = "failed to read the snapshot table"


# How much is done, of how much.
Progress = Callable[[int, int], None]
Tell = Callable[[Findings], None]


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


class CannotCheck(OSError):
    """A check that failed for a reason that can be told: ``text``, and ``hint``, what may help."""

    def __init__(self, text: str, number: int, hint: str = "") -> None:
        super().__init__(number, text)
        self.text, self.hint = text, hint


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
    tell: Tell = lambda _found: None,
) -> Examined:
    """Check a qcow2 image, repair it, and check it again. ``tell`` is called with what is wrong before and after.

    Raises OSError, CannotCheck, and QmpError when the image could not be opened, by whomever.
    """
    header = read_header(file)
    _check_tables(header, file)
    _check_bitmaps(header, file)
    _check_snapshots(header, file, repairs)
    if repairs is not Repairs.NONE and header.version == header.content_version:
        _clear_unknown(file, header)
    examined = check_and_repair(file, header, repairs, progress, tell=tell)
    if examined.fixed.leaks or examined.fixed.corruptions:
        tell(examined.found)
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
    tell: Tell = lambda _found: None,
) -> Examined:
    """Check, repair and check again an image that can be opened, whose marks stay. Raises OSError."""

    def check() -> Findings:
        checker = Checker(read_header(file), file.read, file.length, progress, max_problems)
        try:
            return checker.run()
        except OSError:
            tell(checker.findings)
            raise

    before = found = check()
    tell(found)
    if repairs is Repairs.NONE or not (found.leaks or found.corruptions):
        return Examined(before, Repaired(), found)
    placed = 0
    if repairs is Repairs.ALL:
        placed = place_nothing(header, file.read, file.write, found)
    if placed:
        file.flush()
        found = check()

    def put_right() -> Repaired:
        """Set counts and flags, when every count has a place. Then ``found`` is what is left."""
        nonlocal found
        made = None
        if repairs is Repairs.ALL and is_incomplete(read_header(file), file.read, found):
            made = Repaired(0 if found.is_lossy else found.leaks, found.broken_structures + found.lows())
            if not rebuild(read_header(file), file.read, file.write, found, file.length, file.flush):
                return Repaired()
            found = check()
            # The rest of them is counted when it is put right.
            made = attrs.evolve(made, corruptions=made.corruptions - found.lows())
        leaks_only = repairs is Repairs.LEAKS
        more = repair(read_header(file), file.read, file.write, found, leaks_only=leaks_only, flush=file.flush)
        file.flush()
        found = check()
        # What the old structure had is no leak that was found.
        return more if made is None else Repaired(made.leaks, made.corruptions + more.corruptions)

    fixed = put_right()
    if repairs is Repairs.ALL and (found.bad_snapshots or found.lost_bitmap_tables or found.lost_bitmap_data):
        placed += _mend_tables(file, found)
        found = check()
        if found.leaks or found.corruptions:
            # An old table may have been something else, too.
            again = put_right()
            fixed = Repaired(fixed.leaks + again.leaks, fixed.corruptions + again.corruptions)
    return Examined(before, attrs.evolve(fixed, corruptions=fixed.corruptions + placed), found)


def _mend_tables(file: File, found: Findings) -> int:
    """Put right what a check found wrong in tables of snapshots and bitmaps; how much."""

    def by(mend: Callable[..., int]) -> int:
        return mend(read_header(file), file.read, file.write, found, file.length, file.flush)

    mended = by(mend_bitmaps)
    try:
        if found.bad_snapshots and by(mend_snapshots):
            mended += found.bad_snapshots
        file.flush()
    except OSError as error:
        number = error.errno or 0
        raise CannotCheck(f"failed to update snapshot table: {errno_text(number)}", number) from None
    return mended


def read_header(file: File) -> Header:
    """The header of an image that can be checked. Raises OSError, QmpError."""
    start = file.read(0, layout.PROBE_LENGTH)
    size = layout.probe_cluster_size(start)
    try:
        return layout.parse_header(file.read(0, size), is_for_check=True)
    except OSError:
        with contextlib.suppress(OSError):
            start = b""
            while len(start) < size:
                start += file.read(len(start), layout.SECTOR)
        header = layout.parse_start(start, is_for_check=True)
        if header is None:
            raise
        return header


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    """Raise QmpError for what cannot be read, and with it the image cannot be opened."""
    try:
        yield
    except OSError as error:
        raise QmpError(f"{what}: {errno_text(error.errno or 0)}") from None


def _check_tables(header: Header, file: File) -> None:
    """Raise QmpError when the image could not be opened because a table cannot be read."""
    with _reading("Could not initialize refcount handling"):
        file.read(header.refcount_table_offset, header.refcount_table_clusters << header.cluster_bits)
    with _reading("Could not read L1 table"):
        file.read(header.l1_offset, header.l1_size * 8)


def _check_bitmaps(header: layout.Header, file: File) -> None:
    """Raise QmpError when the image could not be opened for what it says about its bitmaps."""
    extension = header.bitmaps_extension() if header.version >= 3 else None
    if extension is None:
        return
    with _reading("Failed to read bitmap directory"):
        directory = file.read(extension.offset, extension.size)
    # Tables that do not overlap: 65535 of them could lead to the same megabytes.
    room = file.length + header.cluster_size
    for entry in bitmap_layout.parse_directory(directory, extension.count, header.cluster_size):
        if entry.flags & bitmap_layout.IN_USE:
            continue
        bits = DirtyBitmap.data_length_of(header.disk_size, 1 << entry.granularity_bits)
        if entry.table_entries != -(-bits // header.cluster_size):
            raise QmpError(f"Could not read bitmap '{entry.text}' from image: {errno_text(errno.EINVAL)}")
        room -= entry.table_entries * 8
        end = entry.table_offset + entry.table_entries * 8
        what = f"Could not read bitmap_table table from image for bitmap '{entry.text}'"
        if end > layout.MAX_SIZE:
            raise QmpError(f"{what}: {errno_text(errno.EIO)}")
        try:
            if room < 0:
                raise ValueError("the tables overlap")
            with _reading(what):
                table = file.read(entry.table_offset, entry.table_entries * 8)
            bitmap_layout.parse_table(table, header.cluster_size)
        except ValueError:
            raise QmpError(f"{what}: {errno_text(errno.EINVAL)}") from None


def _check_snapshots(header: layout.Header, file: File, repairs: Repairs) -> None:
    """Raise CannotCheck for what keeps the image from being checked, unless the repair takes it away."""
    is_all = repairs is Repairs.ALL
    if header.snapshot_count > layout.MAX_SNAPSHOTS and not is_all:
        raise _too_many("snapshot table too large", header.snapshot_count - layout.MAX_SNAPSHOTS)
    if not header.has_snapshots_in_place:
        raise CannotCheck("snapshot table offset invalid", errno.EINVAL)
    offset, kept = header.snapshots_offset, 0
    try:
        for entry in snapshots_of(header, file.read):
            if entry.has_too_much and not is_all:
                break
            offset, kept = offset + entry.length, kept + 1
    except OSError as error:
        number = error.errno or 0
        raise CannotCheck(f"{_UNREAD}: Failed to read snapshot table: {errno_text(number)}", number) from None
    if is_all or kept == header.snapshot_count:
        return
    if not snapshot_at(offset, kept, file.read).has_too_much:
        raise _too_many(f"{_UNREAD}: Snapshot table is too big", header.snapshot_count - kept)
    hint = "You can force-remove this extra metadata with qsd check -r all\n"
    text = f"{_UNREAD}: Too much extra metadata in snapshot table entry {kept}"
    raise CannotCheck(text, errno.EFBIG, hint)


def _too_many(text: str, overhanging: int) -> CannotCheck:
    hint = f"You can force-remove all {overhanging} overhanging snapshots with qsd check -r all\n"
    return CannotCheck(text, errno.EFBIG, hint)


def _clear_unknown(file: File, header: layout.Header) -> None:
    """Nobody may rely on features that are not known here when the image has been written to."""
    known = header.autoclear & layout.KNOWN_AUTOCLEAR
    if known != header.autoclear:
        file.write(_AUTOCLEAR, known.to_bytes(8, "big"))
        file.flush()


def _clear_marks(file: File, header: layout.Header) -> None:
    """The image is consistent: it need not be repaired when it is opened next, and may be written to."""
    clean = attrs.evolve(header, **layout.unmarking(header))
    if clean.version == header.version:
        marks = clean.incompatible & ~layout.CORRUPT
        file.write(layout.V2_LENGTH, marks.to_bytes(8, "big"))
    else:
        file.write(0, layout.serialise_header(clean))
    file.flush()
