"""What the L2 tables of an image in a file say, in words short enough to be written down."""

from __future__ import annotations

from array import array

from qsd.drivers.qcow2.geometry import (
    ALL_ALLOCATED,
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    ZERO_FLAG,
    Geometry,
    swap,
)
from qsd.drivers.qcow2.layout import parse_header


def entries(data: bytes) -> str:
    """A word for every guest cluster: "-" for none; or H for a place, H+ for one nobody else has, then z for zero.

    With extended entries the subclusters that are data and those that are zeroes follow.
    """
    header = parse_header(data[: 1 << 21])
    geometry = Geometry.of(header, header.cluster_size)
    l1 = _words(data, header.l1_offset, header.l1_size)
    found = []
    for cluster in range(-(-header.size // header.cluster_size)):
        table = l1[cluster >> geometry.l2_bits] & OFFSET_MASK
        place = table + (cluster & (1 << geometry.l2_bits) - 1) * geometry.words * 8
        entry, bitmap = _words(data, place, 2) if table else (0, 0)
        found.append(_word(entry, bitmap if geometry.words == 2 else None, has_data_file=header.has_data_file))
    return " ".join(found)


def _words(data: bytes, offset: int, count: int) -> array[int]:
    words = array("Q", data[offset : offset + 8 * count].ljust(8 * count, b"\0"))
    swap(words)
    return words


def _word(entry: int, bitmap: int | None, *, has_data_file: bool) -> str:
    if entry & COMPRESSED:
        return "C"
    has_place = entry & OFFSET_MASK or (has_data_file and entry & COPIED)
    word = ("H+" if entry & COPIED else "H") if has_place else ""
    if entry & ZERO_FLAG:
        word += "z"
    if bitmap:
        word += f"{bitmap & ALL_ALLOCATED:x}/{bitmap >> 32:x}"
    return word or "-"
