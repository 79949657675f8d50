"""Where a qcow2 image keeps dirty bitmaps: loading, marking them in use, storing, removing.

While the image can be written, every bitmap stored in it is marked in use, as it is not up to date in the file.
Storing writes the bitmaps of that moment to clusters of their own, then a directory that leads to them, and then
the header that leads to the directory; whatever goes wrong before that leaves the old ones, marked in use. What
the old directory led to is given up last.
"""

from __future__ import annotations

import errno
import logging
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import attrs
import trio

from qsd.block.bitmap import DirtyBitmap
from qsd.block.dirty import NamedBitmap
from qsd.drivers.qcow2 import bitmap_layout as layout
from qsd.drivers.qcow2.bitmap_layout import DirectoryEntry, Run
from qsd.drivers.qcow2.extensions import MAX_BITMAP_DIRECTORY, MAX_BITMAPS, BitmapsExtension
from qsd.drivers.qcow2.geometry import big_endian, empty_table
from qsd.drivers.qcow2.layout import BITMAPS, EXT_BITMAPS, Header
from qsd.errors import QmpError, errno_text
from qsd.host.shield import shield
from qsd.qapi.rows import Rows

log = logging.getLogger("qsd.qcow2")

# Bytes in memory of all bitmaps of an image together, where the file is not as long itself: all entries of tables
# may lead to one cluster, or say that all bits are set.
MAX_TOTAL = 1 << 30
# What is all set takes so little of what it stands for.
ONES_SHARE = 32
# Bytes of bits read or written at a time (1 ms).
PIECE = 1 << 18
# Entries of the directory looked at between two chances for others to run (1 ms).
ENTRIES = 256
# Clusters and bytes of bits looked at, and runs of clusters given up, between two chances for others to run.
STEPS = 1024
LOOKED_AT = 32 << 20
RUNS = 64

_STALE = (
    "warning: a program lacking bitmap support modified this file, so all bitmaps are now considered inconsistent",
    "Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix.",
)


class BitmapImage(Protocol):
    """What the store needs of the image. Offsets and lengths are bytes of the image file; all raise OSError.

    As long as the image cannot be written, only ``header``, ``length`` and ``read`` are used.
    """

    @property
    def header(self) -> Header:
        """The header as it is in the file."""

    @property
    def length(self) -> int:
        """Bytes of the file."""

    async def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file; beyond its end they are zeroes."""

    async def write(self, pieces: Iterable[tuple[int, bytes]]) -> None:
        """Write pieces (offset, bytes), in any order, to clusters that were allocated here."""

    async def allocate(self, count: int) -> int:
        """The offset of ``count`` free clusters in a row, which have one reference from now on."""

    async def release(self, offset: int, count: int) -> None:
        """Take a reference from ``count`` clusters that the file does not refer to any more.

        Refuses clusters that hold other metadata or have no reference: tables of hostile images lead anywhere.
        """

    async def change_header(self, **changes: Any) -> None:
        """Let the header have other values, on stable storage; it is as before where that fails."""

    async def flush(self) -> None:
        """Everything done so far, reference counts included, reaches stable storage."""


class Qcow2Bitmaps:
    """The store (``qsd.drivers.base.BitmapStore``); see the module. ``warn`` prints one line on stderr."""

    def __init__(self, image: BitmapImage, warn: Callable[[str], None]) -> None:
        self._image = image
        self._warn = warn
        self._entries: list[DirectoryEntry] = []
        self._directory = Run(0, 0, 0)  # where the entries are in the file: clusters
        self._is_stale = False
        self._is_loaded = False
        self._room = 0  # bytes that bitmaps may still take while they are loaded

    # -- facts ------------------------------------------------------------------------------------------------

    def facts(self) -> Rows[Any]:
        """``Qcow2BitmapInfo`` of what is in the file."""
        return Rows(self._entries, _facts_of)

    def check(self, name: str, length: int, others: Iterable[NamedBitmap]) -> None:
        """Raise QmpError unless a new bitmap of ``length`` bytes can be stored along with ``others``."""
        if self._image.header.content_version < 3:
            raise QmpError("Cannot store dirty bitmaps in qcow2 v2 files")
        stored_name = _encoded(name)
        if len(stored_name) > layout.MAX_NAME:
            raise QmpError(f"Name length exceeds maximum ({layout.MAX_NAME} characters)")
        if length > layout.MAX_DATA:
            raise QmpError("Too much space will be occupied by the bitmap. Use larger granularity")
        known = list(others)
        if len(known) >= MAX_BITMAPS:
            raise QmpError("Maximum number of persistent bitmaps is already reached")
        # A quick look first: nearly always there is room whatever the names are.
        if (len(known) + 1) * layout.entry_size(layout.MAX_NAME) > MAX_BITMAP_DIRECTORY:
            sizes = (layout.entry_size(len(_stored_name(other))) for other in known)
            if sum(sizes) + layout.entry_size(len(stored_name)) > MAX_BITMAP_DIRECTORY:
                raise QmpError("Not enough space in the bitmap directory")

    # -- loading ----------------------------------------------------------------------------------------------

    async def load(self, size: int) -> list[NamedBitmap]:
        """What the image holds, for a disk of ``size`` bytes. Raises QmpError."""
        self._is_loaded = self._is_stale = False
        self._entries, self._directory = [], Run(0, 0, 0)
        header = self._image.header
        data = header.extension(EXT_BITMAPS) if header.version >= 3 else None
        if data is not None and not header.autoclear & BITMAPS:
            for line in _STALE:
                self._warn(line)
            self._is_stale = True
        elif data is not None:
            extension = layout.parse_extension(data, header.cluster_size)
            try:
                directory = await self._image.read(extension.offset, extension.size)
            except OSError as error:
                raise QmpError(f"Failed to read bitmap directory: {errno_text(error.errno or 0)}") from None
            entries = []
            for entry in layout.parse_directory(directory, extension.count, header.cluster_size):
                entries.append(entry)
                if not len(entries) % ENTRIES:
                    await trio.lowlevel.checkpoint()
            self._entries = entries
            self._directory = Run(0, self._clusters(extension.size), extension.offset)
        found = []
        self._room = max(MAX_TOTAL, self._image.length)
        for entry in self._entries:
            found.append(await self._load(entry, size))
            await trio.lowlevel.checkpoint()
        self._is_loaded = True
        return found

    async def _load(self, entry: DirectoryEntry, size: int) -> NamedBitmap:
        is_inconsistent = bool(entry.flags & layout.IN_USE)
        granularity = 1 << entry.granularity_bits
        needed = DirtyBitmap.data_length_of(size, granularity)
        if not is_inconsistent and entry.table_entries != self._clusters(needed):
            raise QmpError(f"Could not read bitmap '{entry.text}' from image: {errno_text(errno.EINVAL)}")
        bits = DirtyBitmap(size, granularity)
        if not is_inconsistent:
            await self._read_bits(entry, bits)
        is_recording = bool(entry.flags & layout.AUTO) and not is_inconsistent
        return NamedBitmap(
            entry.text, bits, is_recording=is_recording, is_persistent=True, is_inconsistent=is_inconsistent
        )

    async def _read_bits(self, entry: DirectoryEntry, bits: DirtyBitmap) -> None:
        try:
            runs = await self._read_table(entry)
        except (OSError, ValueError) as error:
            number = error.errno or errno.EIO if isinstance(error, OSError) else errno.EINVAL
            raise QmpError(
                f"Could not read bitmap_table table from image for bitmap '{entry.text}': {errno_text(number)}"
            ) from None
        cluster = self._image.header.cluster_size
        loaded = 0
        try:
            for run in runs:
                start, stop = run.first * cluster, min(bits.data_length, (run.first + run.count) * cluster)
                if run.offset != layout.ALL_ZEROES:
                    self._room -= (stop - start) // (ONES_SHARE if run.offset == layout.ALL_ONES else 1)
                    if self._room < 0:
                        raise OSError(errno.ENOMEM, "an image with little in it asks for much memory")
                if run.offset == layout.ALL_ONES:
                    # Half a gigabyte of ones is nothing in the file.
                    for first in range(start, stop, PIECE):
                        bits.fill(first, min(stop, first + PIECE))
                        await trio.lowlevel.checkpoint()
                elif run.offset != layout.ALL_ZEROES:
                    bits.load(start, await self._image.read(run.offset, stop - start))
                    loaded += stop - start
                    if loaded >= PIECE:
                        await trio.lowlevel.checkpoint()
                        loaded = 0
        except OSError as error:
            raise QmpError(
                f"Could not read bitmap '{entry.text}' from image: {errno_text(error.errno or 0)}"
            ) from None

    async def _read_table(self, entry: DirectoryEntry) -> list[Run]:
        cluster = self._image.header.cluster_size
        data = await self._image.read(entry.table_offset, entry.table_entries * 8)
        return layout.runs_of(layout.parse_table(data, cluster), cluster, max(1, PIECE // cluster))

    # -- while the image is written ---------------------------------------------------------------------------

    async def mark_in_use(self) -> None:
        """What is in the file is out of date from now on. Raises OSError."""
        if self._is_stale:
            await self._change_header(None)
            self._is_stale = False
        if all(entry.flags & layout.IN_USE for entry in self._entries):
            return
        entries: list[DirectoryEntry] = []
        data = bytearray()
        for start in range(0, len(self._entries), ENTRIES):
            some = self._entries[start : start + ENTRIES]
            entries += [attrs.evolve(entry, flags=entry.flags | layout.IN_USE) for entry in some]
            data += layout.pack_directory(entries[start:])
            await trio.lowlevel.checkpoint()
        if entries != self._entries:
            # In place: the flags are all that changes, and every one of them may be there without the others.
            await self._image.write([(self._directory.offset, bytes(data))])
            await self._image.flush()
            self._entries = entries

    async def remove(self, name: str) -> None:
        """Remove a bitmap from the file, if it is there. Raises OSError."""
        gone = [entry for entry in self._entries if entry.text == name]
        if gone:
            rest = [entry for entry in self._entries if entry.text != name]
            async with _Allocations(self._image) as made:
                await self._switch(rest, made)
            await self._give_up(gone)

    async def store(self, bitmaps: Iterable[NamedBitmap]) -> None:
        """Make ``bitmaps`` those of the file, not in use. Inconsistent ones stay as they are there.

        Raises QmpError; the file then has what it had before, in use.
        """
        if not self._is_loaded:
            return
        wanted = {bitmap.name: bitmap for bitmap in bitmaps}
        if not wanted and not self._directory.count and not self._is_stale:
            return
        kept = [entry for entry in self._entries if (b := wanted.get(entry.text)) is not None and b.is_inconsistent]
        entries: dict[str, DirectoryEntry | None] = {entry.text: None for entry in self._entries}
        entries |= {entry.text: entry for entry in kept}
        last: NamedBitmap | None = None
        async with _Allocations(self._image) as made:
            # As the reference does it: what is new comes behind what was there, the newest first.
            for bitmap in reversed(wanted.values()):
                if not bitmap.is_inconsistent:
                    with _naming(bitmap):
                        entry = await self._write_bitmap(bitmap, made)
                    entries[entry.text] = entry
                    last = bitmap
            if last is not None:
                with _naming(last):
                    await made.write_rest()
            replaced = [entry for entry in self._entries if entry not in kept]
            try:
                await self._switch([entry for entry in entries.values() if entry is not None], made)
            except OSError as error:
                raise QmpError(f"Failed to update bitmap extension: {errno_text(error.errno or 0)}") from None
        await self._give_up(replaced)

    async def _write_bitmap(self, bitmap: NamedBitmap, made: _Allocations) -> DirectoryEntry:
        """Allocate and write a bitmap. Raises OSError, also when an earlier one could not be written."""
        bits = bitmap.bits
        if not bits.data_length:
            raise OSError(errno.ENOMEM, "the disk is empty")
        table = await self._write_bits(bits, made)
        offset = await made.allocate(self._clusters(len(table) * 8))
        await made.write(offset, big_endian(table))
        flags = layout.AUTO if bitmap.is_recording else 0
        return DirectoryEntry(_stored_name(bitmap), offset, len(table), bits.shift, flags)

    async def _write_bits(self, bits: DirtyBitmap, made: _Allocations) -> array[int]:
        """Write the clusters whose bits are not all equal; the table."""
        cluster = self._image.header.cluster_size
        table = empty_table(self._clusters(bits.data_length) * 8)
        longest = max(1, PIECE // cluster)
        first = 0
        for number in range(len(table)):
            value = bits.uniform(number * cluster, min(bits.data_length, (number + 1) * cluster))
            if value is not None:
                table[number] = value
            if value is not None or number - first == longest:
                await self._write_clusters(bits, table, first, number, made)
                first = number if value is None else number + 1
            if not number % min(STEPS, LOOKED_AT // cluster):
                await trio.lowlevel.checkpoint()
        await self._write_clusters(bits, table, first, len(table), made)
        return table

    async def _write_clusters(
        self, bits: DirtyBitmap, table: array[int], first: int, last: int, made: _Allocations
    ) -> None:
        if first == last:
            return
        cluster = self._image.header.cluster_size
        offset = await made.allocate(last - first)
        data = bits.read(first * cluster, min(bits.data_length, last * cluster))
        await made.write(offset, data.ljust((last - first) * cluster, b"\0"))
        for number in range(first, last):
            table[number] = offset + (number - first) * cluster

    async def _switch(self, entries: list[DirectoryEntry], made: _Allocations) -> None:
        """Let the header lead to a directory of ``entries``, and give the old one up. Raises OSError."""
        image = self._image
        old = self._directory
        new = Run(0, 0, 0)
        extension = None
        if entries:
            data = layout.pack_directory(entries)
            count = self._clusters(len(data))
            new = Run(0, count, await made.allocate(count))
            await image.write([(new.offset, data)])
            extension = BitmapsExtension(len(entries), len(data), new.offset)
        await image.flush()
        await self._change_header(extension)
        made.keep()
        self._entries, self._directory = entries, new
        if old.count:
            await self._release(old)

    async def _change_header(self, extension: BitmapsExtension | None) -> None:
        header = self._image.header
        data = extension.serialise() if extension is not None else None
        autoclear = header.autoclear | BITMAPS if extension is not None else header.autoclear & ~BITMAPS
        await self._image.change_header(
            extensions=header.with_extension(EXT_BITMAPS, data).extensions, autoclear=autoclear
        )

    async def _give_up(self, entries: Iterable[DirectoryEntry]) -> None:
        """Free what entries that are not in the file any more led to. What cannot be read stays allocated."""
        for entry in entries:
            try:
                runs = await self._read_table(entry)
            except (OSError, ValueError) as error:
                log.warning("clusters of bitmap '%s' stay allocated: %s", entry.text, error)
                continue
            for number, run in enumerate(runs):
                if run.offset > layout.ALL_ONES:
                    await self._release(run)
                if number % RUNS == RUNS - 1:
                    await trio.lowlevel.checkpoint()
            await self._release(Run(0, self._clusters(entry.table_entries * 8), entry.table_offset))

    async def _release(self, run: Run) -> None:
        try:
            await self._image.release(run.offset, run.count)
        except OSError as error:
            log.warning("%d clusters at %d stay allocated: %s", run.count, run.offset, error)

    def _clusters(self, length: int) -> int:
        return -(-length // self._image.header.cluster_size)


@contextmanager
def _naming(bitmap: NamedBitmap) -> Iterator[None]:
    """Say of which bitmap it is that it cannot be written. (It may be one shortly before.)"""
    try:
        yield
    except OSError as error:
        text = errno_text(error.errno or 0)
        raise QmpError(f"Failed to write bitmap '{bitmap.name}' to file: {text}") from None


class _Allocations:
    """Clusters allocated inside the scope; they are given back unless ``keep`` was called before it ends.

    What is written to them goes to the file when there is ``PIECE`` of it, and with ``write_rest``.
    """

    def __init__(self, image: BitmapImage) -> None:
        self._image = image
        self._made: list[tuple[int, int]] = []
        self._pieces: list[tuple[int, bytes]] = []
        self._size = 0

    async def allocate(self, count: int) -> int:
        """As ``BitmapImage.allocate``."""
        offset = await self._image.allocate(count)
        self._made.append((offset, count))
        return offset

    async def write(self, offset: int, data: bytes) -> None:
        """Write some time before ``write_rest`` returns. Raises OSError, also for what came before."""
        self._pieces.append((offset, data))
        self._size += len(data)
        if self._size >= PIECE:
            await self.write_rest()

    async def write_rest(self) -> None:
        """Write what has not been written yet. Raises OSError."""
        pieces, self._pieces, self._size = self._pieces, [], 0
        if pieces:
            await self._image.write(pieces)
            await trio.lowlevel.checkpoint()

    def keep(self) -> None:
        """What was allocated is referred to."""
        self._made.clear()

    async def __aenter__(self) -> _Allocations:
        return self

    async def __aexit__(self, *_error: object) -> None:
        with shield():
            for offset, count in self._made:
                try:
                    await self._image.release(offset, count)
                except OSError as error:
                    log.warning("%d clusters at %d stay allocated: %s", count, offset, error)


def _facts_of(entry: DirectoryEntry) -> dict[str, Any]:
    return {
        "name": entry.text,
        "granularity": 1 << entry.granularity_bits,
        "flags": [name for flag, name in layout.FLAG_NAMES if entry.flags & flag],
    }


def _stored_name(bitmap: NamedBitmap) -> bytes:
    assert bitmap.name is not None
    return _encoded(bitmap.name)


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
