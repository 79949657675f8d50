"""Changes to qcow2 images: fields of the header and entries of every table that say something else.

Not all of it is damage: some changes mean nothing, some keep the image from being opened.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final

from qsd.drivers.qcow2.bitmap_layout import ENTRY as ENTRY_OF_BITMAP
from qsd.drivers.qcow2.extensions import EXT_CRYPTO
from qsd.drivers.qcow2.geometry import OFFSET_MASK
from qsd.drivers.qcow2.layout import Header, parse_header
from qsd.drivers.qcow2.side_tables import snapshots_of

# Offset and bytes of a field.
Place = tuple[int, int]
HEADER: Final = ((24, 8), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4), (64, 8))
HEADER_3: Final = ((72, 8), (88, 8), (96, 4), (100, 4))
# From an entry's start: L1 table, id, name, VM state, extra data.
SNAPSHOT: Final = ((0, 8), (8, 4), (12, 2), (14, 2), (32, 4), (36, 4), (36, 4), (36, 4))
# Table, its entries, flags, name, extra data.
BITMAP: Final = ((0, 8), (8, 4), (12, 4), (18, 2), (20, 4))


class Mutator:
    """Changes of one image, the same for each seed."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        self.header = parse_header(image[: 1 << 21])
        self.size = self.header.cluster_size
        self.places = {name: places for name, places in self._find().items() if places}

    def mutate(self, seed: str) -> tuple[bytes, str]:
        """The changed image, and what was changed."""
        rng = random.Random(seed)
        data, told = bytearray(self.image), []
        for _ in range(rng.choice((1, 1, 1, 2))):
            kind = rng.choice([*self.places, "end"])
            if kind == "end":
                length = rng.choice((1, 512, self.size, 2 * self.size))
                del data[max(self.size, len(data) - length) :]
                told.append(f"{length} bytes less")
                continue
            at, length = rng.choice(self.places[kind])
            before = int.from_bytes(data[at : at + length], "big")
            value = self._value(rng, before, length)
            if kind == "refcount table":
                # The reference makes the file so long, and counts all of it.
                value &= 0x3FFF_FFFF
            if at + length <= len(data):
                data[at : at + length] = value.to_bytes(length, "big")
                told.append(f"{kind} {at:#x}: {before:#x} to {value:#x}")
        return bytes(data), ", ".join(told)

    def _value(self, rng: random.Random, before: int, length: int) -> int:
        clusters = len(self.image) // self.size
        values = [0, before ^ 1 << rng.randrange(8 * length), before ^ 1 << rng.randrange(8 * length)]
        values += [before + rng.choice((-1, 1, 8, 512)), rng.choice((1, 15, 16, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF))]
        if length == 8:
            inside, near = rng.randrange(clusters) * self.size, (clusters + rng.randrange(8)) * self.size
            values += [inside, inside | 1 << 63, near, near | 1 << 63, 1 << 40, rng.randrange(clusters * 8) * 512]
        return rng.choice(values) & (1 << 8 * length) - 1

    def _word(self, at: int) -> int:
        return int.from_bytes(self.image[at : at + 8], "big")

    def _find(self) -> dict[str, list[Place]]:
        header = self.header
        snapshots = list(snapshots_of(header, self._read))
        tables = [(each.l1_offset, each.l1_size) for each in snapshots]
        return {
            "header": [*HEADER, *(HEADER_3 if header.version > 2 else ())],
            "L1": self._entries(header.l1_offset, header.l1_size),
            "L2": list(self._l2(header.l1_offset, header.l1_size)),
            "refcount table": self._entries(header.refcount_table_offset, 3),
            "refcount": [(at, 1) for at in self._counts(header)],
            "snapshot": [(each.offset + at, length) for each in snapshots for at, length in SNAPSHOT],
            "snapshot's L1": [place for table in tables for place in self._entries(*table)],
            "snapshot's L2": [place for table in tables for place in self._l2(*table)],
            "encryption": [(at + 8 * field, 8) for at in self._extension(EXT_CRYPTO) for field in (0, 1)],
            **self._bitmaps(header),
        }

    def _extension(self, kind: int) -> Iterator[int]:
        """Where the content of a header extension stands."""
        at = self.image.find(kind.to_bytes(4, "big"), self.header.header_length, self.size)
        if at >= 0:
            yield at + 8

    def _read(self, offset: int, length: int) -> bytes:
        return self.image[offset : offset + length].ljust(length, b"\0")

    def _entries(self, offset: int, count: int) -> list[Place]:
        return [(offset + 8 * index, 8) for index in range(count)]

    def _l2(self, offset: int, count: int) -> Iterator[Place]:
        for at, _length in self._entries(offset, count):
            table = self._word(at) & OFFSET_MASK
            if table:
                # All that say something, and some that do not.
                places = self._entries(table, self.size // 8)
                yield from (place for place in places if self._word(place[0]))
                yield from places[:: max(1, len(places) // 4)]

    def _counts(self, header: Header) -> range:
        block = self._word(header.refcount_table_offset)
        counted = min(self.size * 8 >> header.refcount_order, len(self.image) // self.size + 3)
        return range(block, block + (counted << header.refcount_order) // 8)

    def _bitmaps(self, header: Header) -> dict[str, list[Place]]:
        found: dict[str, list[Place]] = {"bitmap": [], "bitmap table": []}
        where = header.bitmaps_extension()
        at = where.offset if where else 0
        for _ in range(where.count if where else 0):
            table, entries, *_, name, extra = ENTRY_OF_BITMAP.unpack_from(self.image, at)
            found["bitmap"] += [(at + offset, length) for offset, length in BITMAP]
            found["bitmap table"] += self._entries(table, entries)
            at += -(-(ENTRY_OF_BITMAP.size + name + extra) // 8) * 8
        return found
