"""Images that were not closed, repaired when they are opened: at any moment of that the power may go again."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from typing import Any, Final

import attrs
import pytest
from qcow2_builder import DATA, EXTENDED_KINDS, KINDS, PACKED, Built, build
from qcow2_fakes import MemoryFile, check, cut, opened_on, read

from qsd.drivers.qcow2 import refcount_codec
from qsd.drivers.qcow2.geometry import COPIED, OFFSET_MASK
from qsd.drivers.qcow2.layout import DIRTY, EXTENDED_L2, Header, parse_header, serialise_header
from qsd.errors import QmpError

EFFORT: Final = int(os.environ.get("QSD_EFFORT", "1"))
KIB: Final = 1 << 10
HEADERS: Final = {
    "plain": Header(size=160 * KIB, cluster_bits=12, incompatible=DIRTY),
    "small": Header(size=40 * KIB, cluster_bits=9, incompatible=DIRTY),
    "narrow": Header(size=80 * KIB, cluster_bits=10, incompatible=DIRTY, refcount_order=1),
    "wide": Header(size=80 * KIB, cluster_bits=9, incompatible=DIRTY, refcount_order=6),
    "extended": Header(size=256 * KIB, cluster_bits=14, incompatible=DIRTY | EXTENDED_L2),
}


class Damage:
    """An image's refcounts and flags, to be made wrong."""

    def __init__(self, image: bytes, rng: random.Random) -> None:
        self.data, self.rng = bytearray(image), rng
        self.header = header = parse_header(image[: 2 << 20])
        self.size, self.order = header.cluster_size, header.refcount_order
        table = struct.unpack_from(f">{self.size // 8}Q", self.data, header.refcount_table_offset)
        self.blocks = [entry for entry in table if entry]

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
        header = self.header
        step = 16 if header.has_extended_l2 else 8
        for index in range(header.l1_size):
            place = header.l1_offset + index * 8
            (entry,) = struct.unpack_from(">Q", self.data, place)
            table = entry & OFFSET_MASK
            for each in (place, *range(table, table + self.size, step)) if table else ():
                (entry,) = struct.unpack_from(">Q", self.data, each)
                if entry & OFFSET_MASK and self.rng.random() < 0.3:
                    struct.pack_into(">Q", self.data, each, entry ^ COPIED)

    def all(self) -> None:
        self.both()
        self.flags()

    def table(self) -> None:
        """Nothing is counted: the structure is built anew."""
        self.all()
        struct.pack_into(">Q", self.data, self.header.refcount_table_offset, 0)

    def block(self) -> None:
        """A block is behind the file's end."""
        self.all()
        struct.pack_into(">Q", self.data, self.header.refcount_table_offset, len(self.data) + 8 * self.size)

    def outside(self) -> None:
        """The table is behind the file's end."""
        start = serialise_header(attrs.evolve(self.header, refcount_table_offset=len(self.data) + 64 * self.size))
        self.data[: len(start)] = start


DAMAGES: Final = ("leaks", "lows", "both", "flags", "all", "table", "block", "outside")


def opened(data: bytes, **options: Any) -> Any:
    return opened_on(MemoryFile(data), **options)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", HEADERS)
async def test_repair_cut_off_anywhere(name: str, damage: str) -> None:
    header = HEADERS[name]
    kinds = EXTENDED_KINDS if header.has_extended_l2 else KINDS[3]
    for seed in range(EFFORT):
        rng = random.Random(f"{name} {damage} {seed}")
        # Reading what is compressed takes an engine.
        built = build(
            header, rng, kinds=tuple(each for each in (*kinds, DATA) if each != PACKED), has_snapshot=True
        )
        broken = Damage(built.image, rng)
        getattr(broken, damage)()
        before = bytes(broken.data)
        file = MemoryFile(before)
        async with opened_on(file) as driver:
            await assert_mended(driver, built)
            await driver.close()
        for number, data in enumerate(cut(before, file.log)):
            if EFFORT == 1 and rng.random() < 0.85:
                continue
            again = MemoryFile(data)
            async with opened_on(again) as driver:
                await assert_mended(driver, built)
                await driver.close()
            assert check(again) == (0, 0), (seed, number)


@pytest.mark.parametrize("name", HEADERS)
async def test_repair_that_cannot_write(name: str) -> None:
    """The image is not opened then; when there is room again it is."""
    rng = random.Random(name)
    plain = tuple(each for each in (*EXTENDED_KINDS, DATA) if each != PACKED)
    header = HEADERS[name]
    built = build(header, rng, kinds=plain if header.has_extended_l2 else (DATA,), has_snapshot=True)
    broken = Damage(built.image, rng)
    broken.table()
    for room in range(1, 40):
        file = MemoryFile(broken.data)
        file.room = room
        try:
            async with opened_on(file) as driver:
                await driver.close()
        except* QmpError as group:
            (error,) = group.exceptions
            assert str(error) == "Could not repair dirty image: No space left on device"
        if file.room > 0:
            break
        async with opened_on(file) as driver:
            await assert_mended(driver, built)
            await driver.close()
        assert check(file) == (0, 0)
    assert room > 3


async def assert_mended(driver: Any, built: Built) -> None:
    header = driver.image.header
    assert not header.incompatible & DIRTY
    content = await read(driver, 0, driver.length)
    size = header.cluster_size
    for cluster, wanted in enumerate(built.guest):
        expected = bytearray(size if wanted is None else wanted)
        for part in built.holes.get(cluster, ()):
            expected[part * size // 32 : (part + 1) * size // 32] = bytes(size // 32)
        found = content[cluster * size : (cluster + 1) * size]
        assert found == expected[: len(found)], cluster
