"""The dirty bitmaps of one node: their names, states and rules. Texts and the order of checks are the reference's.

A bitmap that is not there, busy, read-only or inconsistent is refused by ``find`` and ``check``, in this order.
What a bitmap records is marked when a request is taken, not when it ends; whoever clears, enables or adds one
therefore does it while the node is drained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Flag, auto

import attrs

from qsd.block.bitmap import MIN_GRANULARITY, DirtyBitmap
from qsd.errors import QmpError
from qsd.messages import Request

MAX_NAME = 1023
# Bytes of the bits of one bitmap: 4 TiB at the finest granularity, 512 TiB at the usual one. The reference sets no
# bound, and runs out of memory.
MAX_BYTES = 1 << 30
# What a bitmap gets that names no granularity: the image's cluster size within these bounds.
DEFAULT_GRANULARITY = 65536
SMALLEST_DEFAULT = 4096


class Bar(Flag):
    """What forbids an operation."""

    BUSY = auto()
    READ_ONLY = auto()
    INCONSISTENT = auto()
    # Using a bitmap as a source, exporting it, or switching it on and off leaves its content alone.
    UNUSABLE = BUSY | INCONSISTENT
    ANY = BUSY | READ_ONLY | INCONSISTENT


@attrs.define(eq=False)
class NamedBitmap:
    """One dirty bitmap. ``name`` is None for what records while a job uses the bitmap of that name.

    ``is_busy``: an export or a job holds it. ``is_read_only``: it is stored in an image that cannot be written.
    ``is_inconsistent``: it was not stored when its image was last used, and can only be removed; its bits mean
    nothing.
    """

    name: str | None
    bits: DirtyBitmap
    is_recording: bool = True
    is_persistent: bool = False
    is_busy: bool = False
    is_read_only: bool = False
    is_inconsistent: bool = False

    def check(self, bars: Bar) -> None:
        """Raise QmpError for the first of ``bars`` that holds."""
        if Bar.BUSY in bars and self.is_busy:
            raise QmpError(f"Bitmap '{self.name}' is currently in use by another operation and cannot be used")
        if Bar.READ_ONLY in bars and self.is_read_only:
            raise QmpError(f"Bitmap '{self.name}' is readonly and cannot be modified")
        if Bar.INCONSISTENT in bars and self.is_inconsistent:
            raise QmpError(f"Bitmap '{self.name}' is inconsistent and cannot be used")


def check_granularity(granularity: int) -> int:
    """The granularity itself; raises QmpError for what none can be."""
    if granularity < MIN_GRANULARITY or granularity & (granularity - 1):
        raise QmpError(f"Granularity must be power of 2 and at least {MIN_GRANULARITY}")
    return granularity


def check_size(size: int, granularity: int) -> None:
    """Raise QmpError when the bitmap of a disk of ``size`` bytes would be too large."""
    if DirtyBitmap.data_length_of(size, granularity) > MAX_BYTES:
        raise QmpError("Too much memory will be occupied by the bitmap. Use larger granularity")


def default_granularity(cluster_size: int | None) -> int:
    """Bytes, from the cluster size of the image, if it has any."""
    return max(SMALLEST_DEFAULT, min(DEFAULT_GRANULARITY, cluster_size or DEFAULT_GRANULARITY))


def check_mergeable(target: NamedBitmap, source: NamedBitmap) -> None:
    """Raise QmpError unless what ``source`` has recorded can be added to ``target``."""
    target.check(Bar.ANY)
    source.check(Bar.UNUSABLE)
    if target.bits.size != source.bits.size:
        raise QmpError(
            f"Bitmaps are of different sizes (destination size is {target.bits.size}, "
            f"source size is {source.bits.size}) and can't be merged"
        )


class BitmapSet:
    """The bitmaps of a node, oldest first; ``recording`` are those that writes are marked in, for the hot path.

    ``has_adopted``: what the node's image holds is among them.
    """

    __slots__ = ("_bitmaps", "has_adopted", "recording")

    def __init__(self) -> None:
        self.has_adopted = False
        self._bitmaps: list[NamedBitmap] = []
        self.recording: tuple[DirtyBitmap, ...] = ()

    def __iter__(self) -> Iterator[NamedBitmap]:
        return iter(self._bitmaps)

    def __len__(self) -> int:
        return len(self._bitmaps)

    def get(self, name: str) -> NamedBitmap | None:
        """The bitmap of that name."""
        return next((bitmap for bitmap in self._bitmaps if bitmap.name == name), None)

    def find(self, name: str) -> NamedBitmap:
        """The bitmap of that name; raises QmpError."""
        found = self.get(name)
        if found is None:
            raise QmpError(f"Dirty bitmap '{name}' not found")
        return found

    # -- changing ---------------------------------------------------------------------------------------------

    def check_new(self, name: str) -> None:
        """Raise QmpError when a name is taken or no name."""
        if self.get(name) is not None:
            raise QmpError(f"Bitmap already exists: {name}")
        if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME:
            raise QmpError(f"Bitmap name too long: {name}")

    def add(self, bitmap: NamedBitmap) -> None:
        """Take a bitmap in. Raises QmpError when its name is taken or no name."""
        if bitmap.name is not None:
            self.check_new(bitmap.name)
        self._bitmaps.append(bitmap)
        if bitmap.is_recording:
            self.recording += (bitmap.bits,)

    def adopt(self, bitmaps: Iterable[NamedBitmap]) -> None:
        """Take in what an image holds. Raises QmpError when a name is taken, and takes none."""
        new = list(bitmaps)
        taken = {bitmap.name for bitmap in self._bitmaps}
        for bitmap in new:
            if bitmap.name in taken:
                raise QmpError(f"Bitmap already exists: {bitmap.name}")
            taken.add(bitmap.name)
        self._bitmaps.extend(new)
        self.has_adopted = True
        self.refresh()

    def disown(self) -> None:
        """Forget what the image holds."""
        self.has_adopted = False
        self._bitmaps = [bitmap for bitmap in self._bitmaps if not bitmap.is_persistent]
        self.refresh()

    def remove(self, bitmap: NamedBitmap) -> None:
        """Forget a bitmap."""
        self._bitmaps.remove(bitmap)
        self.refresh()

    def record(self, bitmap: NamedBitmap, *, enabled: bool) -> None:
        """Let a bitmap record from now on, or no longer."""
        bitmap.is_recording = enabled
        self.refresh()

    def refresh(self) -> None:
        """Look again at what records."""
        self.recording = tuple(bitmap.bits for bitmap in self._bitmaps if bitmap.is_recording)

    def resize(self, size: int) -> None:
        """The node has another size in bytes; what is new is clean."""
        for bitmap in self._bitmaps:
            if bitmap.bits.size != size:
                bitmap.bits.resize(size)

    @property
    def persistent(self) -> list[NamedBitmap]:
        """Those that are kept in the image."""
        return [bitmap for bitmap in self._bitmaps if bitmap.is_persistent]

    def check_resizable(self, size: int) -> None:
        """Raise QmpError when a bitmap forbids that the user resizes the node to ``size`` bytes.

        The reference asserts on a busy bitmap that is not stored; it is answered like the others here.
        """
        for bitmap in self._bitmaps:
            bitmap.check(Bar.ANY if bitmap.is_persistent else Bar.BUSY)
            check_size(size, bitmap.bits.granularity)

    # -- recording --------------------------------------------------------------------------------------------

    def mark(self, batch: Iterable[Request]) -> None:
        """Mark the WRITE requests of a batch."""
        for bits in self.recording:
            bits.mark(batch)

    def mark_range(self, offset: int, length: int) -> None:
        """Mark a range that something else than a WRITE changes."""
        for bits in self.recording:
            bits.set(offset, length)
