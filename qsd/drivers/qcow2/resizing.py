"""Another size of the disk: what is new reads as zeroes, what is cut off is given up.

Growing makes room in the L1 table and hides what would be seen in the new range (the backing file, or clusters that
something left there) before the header says the new size. Shrinking gives up clusters and whole L2 tables first,
the header follows, and the file is cut behind the last cluster in use. Interrupted anywhere, the image has one of
the two sizes and is consistent; after a shrink that was interrupted, what was to be cut off may be gone already.

The node is drained: nothing else changes the tables meanwhile.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

import attrs

from qsd.drivers.calls import call
from qsd.drivers.qcow2.geometry import COPIED, OFFSET_MASK
from qsd.drivers.qcow2.guarding import require_distinct
from qsd.drivers.qcow2.image import MOST_FREED, Freeing
from qsd.drivers.qcow2.layout import MAX_L1_BYTES
from qsd.drivers.qcow2.settings import settings_of
from qsd.drivers.qcow2.table_growth import grow_l1_table
from qsd.errors import QmpError, failing
from qsd.messages import Flag, Op

if TYPE_CHECKING:
    from qsd.drivers.qcow2.driver import Qcow2Driver
    from qsd.drivers.qcow2.image import Image

log = logging.getLogger("qsd.qcow2")

SECTOR: Final = 512
MAY_UNMAP: Final = Flag.MAY_UNMAP.value
# How many clusters are marked as zeroes beyond the end of a longer backing file: 8 MiB of tables.
MAX_MARKED: Final = 1 << 20


async def resize(driver: Qcow2Driver, size: int, *, exact: bool) -> None:
    """Let the disk have ``size`` bytes; ``exact``: as ``Driver.truncate`` means it. Raises QmpError."""
    header = driver.image.header
    if size % SECTOR:
        raise QmpError(f"The new size must be a multiple of {SECTOR}")
    if header.content_version < 3 and header.snapshot_count:
        raise QmpError("Can't resize a v2 image which has snapshots")
    if size > driver.length:
        await _grow(driver, size, exact=exact)
    elif size < driver.length:
        await _shrink(driver, size, exact=exact)


# -- growing ------------------------------------------------------------------------------------------------------


async def _grow(driver: Qcow2Driver, size: int, *, exact: bool) -> None:
    image, old = driver.image, driver.length
    geometry = image.geometry
    bits = geometry.cluster_bits
    first, last = -(-old >> bits), -(-size >> bits)
    backing = driver.backing
    hidden = first
    if backing is not None and backing.length > old:
        # To the end, as in the reference, where that is little: the backing file may become longer yet.
        hidden = max(first, min(last, max(-(-backing.length >> bits), first + MAX_MARKED)))
    entries = attrs.evolve(image.header, size=size).l1_needed
    if entries * 8 > MAX_L1_BYTES:
        raise QmpError("Failed to grow the L1 table: File too large")
    if hidden > first and geometry.version < 3:
        raise QmpError("Failed to zero out new clusters: Operation not supported")
    with failing("Failed to grow the L1 table"):
        await grow_l1_table(image, entries)
    if geometry.has_data_file:
        await driver.children["data-file"].truncate(size, exact=exact)
    with _expecting(driver, size), failing("Failed to zero out new clusters"):
        zeroer = driver.zeroer
        end = min(size, first << bits)
        if not await driver.settled(zeroer.reads_zero, old, end):
            # The rest of the last cluster: what was there before the disk was made smaller, or is below.
            await call(driver, Op.WRITE_ZEROES, old, end - old)
        if image.header.is_data_file_raw and not image.is_encrypted:
            await zeroer.walk(first, last, partial(_map_raw, image), skips_unmapped=False)
        else:
            hide = partial(zeroer.zero_clusters, flags=MAY_UNMAP)
            await zeroer.walk(first, hidden, hide, skips_unmapped=False)
            await zeroer.walk(hidden, last, partial(zeroer.discard_clusters, uncovers=True))
    await _take_size(driver, size)


@contextmanager
def _expecting(driver: Qcow2Driver, size: int) -> Iterator[None]:
    """Let the caches have what a disk of ``size`` bytes may take, though it has another size yet."""
    driver.image.expected_size = size
    _limit_caches(driver, size)
    try:
        yield
    finally:
        driver.image.expected_size = 0
        _limit_caches(driver, driver.image.header.size)


def _map_raw(image: Image, first: int, last: int) -> None:
    """Let clusters of one slice lie in a raw data file where the guest has them. Raises Cold, OSError."""
    geometry = image.geometry
    number = first >> geometry.slice_bits
    table = image.writable_slice(number)
    words, mask = geometry.words, geometry.slice_mask
    low, high = (first & mask) * words, ((last - 1 & mask) + 1) * words
    image.dirty.touch(number, table, low, high)
    size = geometry.cluster_size
    table[low:high:words] = array("Q", range(first * size | COPIED, last * size | COPIED, size))


# -- shrinking ----------------------------------------------------------------------------------------------------


async def _shrink(driver: Qcow2Driver, size: int, *, exact: bool) -> None:
    image = driver.image
    geometry = image.geometry
    first, last = -(-size >> geometry.cluster_bits), -(-driver.length >> geometry.cluster_bits)
    # L2 tables from this one on describe nothing that is left.
    tables = -(-first >> geometry.l2_bits)
    with failing("Failed to reduce the number of L2 tables"):
        await require_distinct(image.map.l1)
    with failing("Failed to discard cropped clusters"):
        give_up = partial(driver.zeroer.discard_clusters, uncovers=True, why=Freeing.ALWAYS)
        await driver.zeroer.walk(first, min(last, tables << geometry.l2_bits), give_up)
    with failing("Failed to reduce the number of L2 tables"):
        for index in range(tables, len(image.map.l1)):
            if image.map.l1[index] & OFFSET_MASK:
                await _drop_table(driver, index)
    await _settle(driver)
    if geometry.has_data_file:
        await driver.children["data-file"].truncate(size, exact=exact)
    await _take_size(driver, size)
    await _cut_file(driver)


async def _drop_table(driver: Qcow2Driver, index: int) -> None:
    """Give up an L2 table with everything that its entries lead to. Raises OSError."""
    image = driver.image
    geometry = image.geometry
    slices = 1 << geometry.l2_bits - geometry.slice_bits
    numbers = range(index * slices, (index + 1) * slices)
    entries: array[int] = array("Q")
    for number in numbers:
        entries.extend((await driver.settled(image.map.slice_at, number))[:: geometry.words])
    # A write-back that is under way gives up what slices do not lead to any more as soon as it has written them.
    async with image.tables_lock:
        # In here nothing waits: the entries and the table go together.
        for entry in entries:
            if entry:
                image.release_entry(entry, Freeing.ALWAYS)
        for number in numbers:
            image.cache.drop(number)
            image.dirty.drop(number)
        table = image.map.l1[index] & OFFSET_MASK
        image.map.l1[index] = 0
        image.dirty.touch_l1(index)
        image.metadata.remove(table, 1)
        image.release(table, 1, Freeing.ALWAYS)
    if len(image.pending) >= MOST_FREED:
        await _settle(driver)


async def _cut_file(driver: Qcow2Driver) -> None:
    """Let the file end behind the last cluster in use; one that stays longer is no harm."""
    image = driver.image
    try:
        end = await _end_of_use(driver) << image.geometry.cluster_bits
        if end < image.file.length:
            await image.file.truncate(end, exact=False)
            image.virgin = max(end, image.encryption_end)
            image.has_grown = False
    except (OSError, QmpError) as error:
        log.warning("%s: the image file stays longer than it has to be: %s", driver.node_name, error)


async def _end_of_use(driver: Qcow2Driver) -> int:
    """The cluster behind the last that is counted or holds metadata, inside the file. Raises OSError."""
    image = driver.image
    refs = image.refs
    end = -(-image.file.length >> image.geometry.cluster_bits)
    # Counts may be wrong, and what opens an encrypted image is usually the last in the file.
    least = min(end, image.metadata.end())
    while end > least:
        index = end - 1 >> refs.block_bits
        first = index << refs.block_bits
        block = await driver.settled(refs.block, index)
        if block is not None:
            for position in range(end - first - 1, -1, -1):
                if block[position]:
                    return max(least, first + position + 1)
        end = first
    return least


# -- both ---------------------------------------------------------------------------------------------------------


async def _settle(driver: Qcow2Driver) -> None:
    """Return when the file has everything and nothing waits to become free. Raises QmpError."""
    with failing("Failed to write the tables of the image"):
        await driver.writeback.finish()


async def _take_size(driver: Qcow2Driver, size: int) -> None:
    """Write the size into the header and go on with it. Raises QmpError."""
    await _settle(driver)
    image = driver.image
    with failing("Failed to update the image size"):
        await image.change_header(size=size)
    driver.length = size
    _limit_caches(driver, size)


def _limit_caches(driver: Qcow2Driver, size: int) -> None:
    """Let the caches take what they may for a disk of ``size`` bytes."""
    image = driver.image
    header = attrs.evolve(image.header, size=size)
    image.settings = settings_of(driver.options, header, discard_unmap=driver.mode.discard_unmap)
    image.cache.set_limit(image.settings.l2_cache)
    image.refs.cache.set_limit(image.settings.refcount_cache)
