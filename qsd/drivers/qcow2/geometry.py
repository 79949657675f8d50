"""The numbers that follow from a header: how offsets split into table indices, and what an entry's bits mean.

Pure. Follows the qcow2 specification ("Cluster mapping", "Extended L2 Entries"). A cluster is addressed by its
number (guest or host offset shifted right by ``cluster_bits``); an L2 table is cached in slices.
"""

from __future__ import annotations

import sys
from array import array
from typing import Final

import attrs

from qsd.drivers.qcow2.layout import Header

COPIED: Final = 1 << 63
COMPRESSED: Final = 1 << 62
ZERO_FLAG: Final = 1
OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
# Bits that the entry of an ordinary cluster has none of, besides those below its cluster size.
ODD: Final = ~(OFFSET_MASK | COPIED) & ((1 << 64) - 1)
# In an extended entry's second word: what a subcluster's two bits are when all 32 are set.
ALL_ALLOCATED: Final = 0xFFFF_FFFF
ALL_ZERO: Final = 0xFFFF_FFFF << 32
SUBCLUSTERS: Final = 32

_IS_LITTLE: Final = sys.byteorder == "little"


@attrs.frozen
class Geometry:
    """Sizes in bytes, bits as shifts. ``words``: 64-bit words of an L2 entry (2 when extended)."""

    cluster_bits: int
    words: int
    slice_bytes: int
    has_data_file: bool
    version: int
    cluster_size: int = attrs.field(init=False)
    l2_bits: int = attrs.field(init=False)
    slice_bits: int = attrs.field(init=False)
    slice_mask: int = attrs.field(init=False)
    subcluster_bits: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "cluster_size", 1 << self.cluster_bits)
        set_(self, "l2_bits", self.cluster_bits - 2 - self.words)
        set_(self, "slice_bits", (self.slice_bytes // (8 * self.words)).bit_length() - 1)
        set_(self, "slice_mask", (1 << self.slice_bits) - 1)
        set_(self, "subcluster_bits", self.cluster_bits - (5 if self.words == 2 else 0))

    @classmethod
    def of(cls, header: Header, slice_bytes: int) -> Geometry:
        """The geometry of an image whose L2 tables are cached in slices of that many bytes."""
        return cls(
            header.cluster_bits,
            2 if header.has_extended_l2 else 1,
            slice_bytes,
            header.has_data_file,
            header.content_version,
        )


def big_endian(words: array[int]) -> bytes:
    """The table as it stands in the image."""
    if _IS_LITTLE:
        words = words[:]
        words.byteswap()
    return words.tobytes()


def swap(words: array[int]) -> None:
    """Turn words just read from the image into numbers, in place."""
    if _IS_LITTLE:
        words.byteswap()


_ONE_ZERO: Final = array("Q", [0])


def empty_table(size: int) -> array[int]:
    """A table of zeroes of ``size`` bytes."""
    return _ONE_ZERO * (size // 8)


_CHUNK: Final = 64
_NOTHING: Final = bytes(8 * _CHUNK)


def zero_words(words: array[int], start: int, stop: int) -> int:
    """How many words from ``start`` on are 0, at most up to ``stop``."""
    position = start
    while position < stop:
        chunk = words[position : min(stop, position + _CHUNK)]
        if chunk.tobytes() != _NOTHING[: 8 * len(chunk)]:
            while not words[position]:
                position += 1
            break
        position += len(chunk)
    return max(0, min(position, stop) - start)
