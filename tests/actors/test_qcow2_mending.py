"""Images that were not closed, repaired when they are opened: at any moment of that the power may go again."""

from __future__ import annotations

import os
import random
from typing import Any, Final

import pytest
from qcow2_builder import DATA, EXTENDED_KINDS, KINDS, PACKED, Built, build
from qcow2_damage import MENDED, Damage
from qcow2_fakes import MemoryFile, check, cut, opened_on, read

from qsd.drivers.qcow2.layout import DIRTY, EXTENDED_L2, Header
from qsd.drivers.qcow2.snapshot_table import ENTRY
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


@pytest.mark.parametrize("damage", MENDED)
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


async def test_snapshot_table_is_completed() -> None:
    """Who goes on with the image has it as it stands in the file."""
    built = build(HEADERS["plain"], random.Random(1), kinds=(DATA,), has_snapshot=True)
    image = Damage(built.image, random.Random(1))
    place = image.header.snapshots_offset
    fields = ENTRY.unpack_from(image.data, place)
    entry = ENTRY.pack(*fields[:8], 0) + b"1snap"
    image.data[place : place + len(entry)] = entry
    file = MemoryFile(image.data)
    async with opened_on(file) as driver:
        await assert_mended(driver, built)
        (snapshot,) = driver.image.snapshots
        assert (snapshot.name, snapshot.disk_size) == (b"snap", driver.length)
        assert driver.image.header.snapshots_offset != place
        await driver.create_snapshot("more", 1)
        await driver.delete_snapshot("1")
        await driver.close()
    assert check(file) == (0, 0)


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
