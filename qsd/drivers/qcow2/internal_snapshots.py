"""Making and deleting internal snapshots: a second L1 table that leads to the same L2 tables and clusters.

Everything that two L1 tables lead to is counted once more and loses its COPIED flags, so that who writes next gets
clusters of their own. Making one writes counts first, then tables, and the header, which leads to the snapshot,
last. Deleting is the reverse: the header first, then counts, then the flags of what is left alone.

Counts and flags cannot change at the same instant. In between the image is marked dirty (of version 2: see
``layout.marking``): interrupted there, it is repaired when it is next opened, and no data is concerned.

The node is drained: nobody else changes the tables meanwhile.
"""

from __future__ import annotations

import errno
import logging
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

import trio

from qsd.drivers.qcow2 import compressed, snapshot_table
from qsd.drivers.qcow2.geometry import COMPRESSED, COPIED, OFFSET_MASK, big_endian, swap
from qsd.drivers.qcow2.guarding import require_distinct
from qsd.drivers.qcow2.image import MOST_FREED, Freeing
from qsd.drivers.qcow2.layout import DIRTY, MAX_L1_BYTES, MAX_SNAPSHOTS, marking, unmarking
from qsd.drivers.qcow2.loading import ENTRIES, read_table
from qsd.drivers.qcow2.metadata_map import INACTIVE_L1, INACTIVE_L2, SNAPSHOT_TABLE
from qsd.drivers.qcow2.snapshot_table import StoredSnapshot
from qsd.drivers.runs import Cold
from qsd.errors import QmpError, errno_text

if TYPE_CHECKING:
    from qsd.drivers.qcow2.driver import Qcow2Driver
    from qsd.drivers.qcow2.image import Image

log = logging.getLogger("qsd.qcow2")


async def create(driver: Qcow2Driver, name: str, now_ns: int) -> str:
    """Keep what the disk holds now as a snapshot; its id. Raises OSError and leaves nothing of it."""
    image = driver.image
    if len(image.snapshots) >= MAX_SNAPSHOTS:
        raise OSError(errno.EFBIG, "too many snapshots")
    await require_distinct(image.map.l1)
    await driver.writeback.finish()
    needed_repair = await _mark(image)
    walk = _Walk(driver, image.map.l1)
    # The reference's clocks have microseconds, and the guest's, where there is no guest, is the same.
    moment = now_ns // 1000 * 1000
    made: list[tuple[int, int]] = []
    try:
        await walk.add(1)
        await set_flags(driver)
        offset, clusters = await _write_l1(driver, made)
        snapshot = StoredSnapshot(
            l1_offset=offset,
            l1_size=len(image.map.l1),
            id=snapshot_table.next_id(image.snapshots),
            name=name.encode("utf-8", "surrogateescape")[: snapshot_table.MAX_NAME],
            date_ns=moment,
            vm_clock_ns=moment,
            disk_size=driver.length,
        )
        await _switch(driver, (*image.snapshots, snapshot), made)
    except OSError:
        await _undo(driver, walk, made, needed_repair=needed_repair)
        raise
    await _unmark(driver, needed_repair=needed_repair)
    image.metadata.add(INACTIVE_L1, offset, clusters << image.geometry.cluster_bits)
    return snapshot.shown.id


async def _undo(
    driver: Qcow2Driver, walk: _Walk | None, made: list[tuple[int, int]], *, needed_repair: bool
) -> None:
    """After a failure: everything is counted as before. What cannot be undone is left for a repair."""
    image = driver.image
    try:
        for offset, clusters in made:
            image.give_up(offset, clusters)
        if walk is not None:
            await walk.take_back()
            await set_flags(driver)
        await driver.writeback.finish()
        await _unmark(driver, needed_repair=needed_repair)
    except OSError as error:
        log.error("%s: clusters stay counted for a change that was not made: %s", driver.node_name, error)


async def delete(driver: Qcow2Driver, snapshot_id: str) -> None:
    """Delete the first snapshot with that id. Raises QmpError."""
    image = driver.image
    gone = snapshot_table.find(image.snapshots, snapshot_id, None)
    assert gone is not None
    if gone.l1_size * 8 > MAX_L1_BYTES:
        raise QmpError("Snapshot L1 table too large")
    if gone.l1_offset & image.geometry.cluster_size - 1:
        raise QmpError("Snapshot L1 table offset invalid")
    l1 = await read_table(image.file, gone.l1_offset, gone.l1_size, "Failed to read snapshot L1 table")
    try:
        await require_distinct(l1)
        await require_distinct(image.map.l1)
    except OSError as error:
        raise QmpError(f"Failed to remove snapshot from snapshot list: {errno_text(error.errno or 0)}") from None
    made: list[tuple[int, int]] = []
    try:
        await driver.writeback.finish()
        needed_repair = await _mark(image)
        try:
            rest = tuple(snapshot for snapshot in image.snapshots if snapshot is not gone)
            await _switch(driver, rest, made)
        except OSError:
            await _undo(driver, None, made, needed_repair=needed_repair)
            raise
    except OSError as error:
        raise QmpError(f"Failed to remove snapshot from snapshot list: {errno_text(error.errno or 0)}") from None
    try:
        await _release(driver, gone, l1)
        await set_flags(driver)
        await driver.writeback.finish()
        await _unmark(driver, needed_repair=needed_repair)
    except OSError as error:
        text = errno_text(error.errno or 0)
        raise QmpError(f"Failed to free the cluster and L1 table: {text}") from None


async def _release(driver: Qcow2Driver, gone: StoredSnapshot, l1: array[int]) -> None:
    """Everything that only the snapshot led to becomes free. Raises OSError."""
    image = driver.image
    bits = image.geometry.cluster_bits
    for entry in l1:
        table = entry & OFFSET_MASK
        if not table:
            continue
        for word in (await _read_l2(image, table))[:: image.geometry.words]:
            if word:
                image.release_entry(word, Freeing.SNAPSHOT)
        # What another snapshot still has is guarded no more; it stays counted.
        image.metadata.forget(INACTIVE_L2, table)
        image.release(table, 1, Freeing.SNAPSHOT)
        await trio.lowlevel.checkpoint()
        if len(image.pending) >= MOST_FREED:
            await driver.writeback.finish()
    clusters = -(-gone.l1_size * 8 >> bits)
    if clusters:
        image.metadata.remove(gone.l1_offset, clusters << bits)
        image.release(gone.l1_offset, clusters, Freeing.SNAPSHOT)
    await driver.writeback.finish()


# -- the table ----------------------------------------------------------------------------------------------------


async def _write_l1(driver: Qcow2Driver, made: list[tuple[int, int]]) -> tuple[int, int]:
    """A copy of the active L1 table: its offset, and how many clusters. Raises OSError."""
    image = driver.image
    words = array("Q", [entry & ~COPIED for entry in image.map.l1])
    return await _write_new(driver, big_endian(words), made)


async def _write_new(driver: Qcow2Driver, data: bytes, made: list[tuple[int, int]]) -> tuple[int, int]:
    """Write ``data`` to clusters of its own, which ``made`` takes up; offset 0 for nothing. Raises OSError."""
    image = driver.image
    bits = image.geometry.cluster_bits
    clusters = -(-len(data) >> bits)
    if not clusters:
        return 0, 0
    first = await driver.settled(image.refs.allocate_contiguous, clusters)
    made.append((first << bits, clusters))
    await image.file.write(first << bits, data.ljust(clusters << bits, b"\0"))
    return first << bits, clusters


async def _switch(driver: Qcow2Driver, snapshots: tuple[StoredSnapshot, ...], made: list[tuple[int, int]]) -> None:
    """Write a table of ``snapshots`` and let the header lead to it. Raises OSError.

    ``made`` takes up what is allocated for it; it is empty when the header leads there.
    """
    image = driver.image
    data = await _packed(snapshots, driver.length)
    if len(data) > snapshot_table.MAX_TABLE:
        raise OSError(errno.EFBIG, "the snapshot table would be too large")
    offset, clusters = await _write_new(driver, data, made)
    await driver.writeback.finish()
    await image.file.flush()
    old, old_clusters = image.header.snapshots_offset, image.snapshot_clusters
    await image.change_header(snapshots_offset=offset, snapshot_count=len(snapshots))
    made.clear()
    bits = image.geometry.cluster_bits
    image.snapshots, image.snapshot_clusters = snapshots, clusters
    image.metadata.remove(old, old_clusters << bits)
    image.metadata.add(SNAPSHOT_TABLE, offset, clusters << bits)
    if old_clusters:
        image.give_up(old, old_clusters)


async def _packed(snapshots: tuple[StoredSnapshot, ...], disk_size: int) -> bytes:
    """The table's bytes; others run meanwhile, for it may have tens of megabytes."""
    data = bytearray()
    for start in range(0, len(snapshots), ENTRIES):
        data += snapshot_table.pack(snapshots[start : start + ENTRIES], disk_size)
        await trio.lowlevel.checkpoint()
    return bytes(data)


# -- counts -------------------------------------------------------------------------------------------------------


class _Walk:
    """Goes along everything an L1 table leads to, and knows how far it has come."""

    def __init__(self, driver: Qcow2Driver, l1: array[int]) -> None:
        self._driver = driver
        self._image = driver.image
        self._tables = [entry & OFFSET_MASK for entry in l1 if entry & OFFSET_MASK]
        self._difference = 0
        # What has been counted: so many tables as a whole, and so many runs of the next.
        self._done = 0
        self._runs = 0

    async def add(self, difference: int) -> None:
        """Add to every count. Raises OSError, with what was done until then done."""
        self._difference = difference
        for table in self._tables:
            for first, count in _runs(self._image, table, await _read_l2(self._image, table)):
                await self._count(first, count, difference)
                self._runs += 1
            self._done += 1
            self._runs = 0
            await self._relieve()

    async def take_back(self) -> None:
        """Undo what ``add`` has done. Raises OSError."""
        whole, runs = self._done, self._runs
        self._done = self._runs = 0
        for number, table in enumerate(self._tables[: whole + 1]):
            for position, (first, count) in enumerate(
                _runs(self._image, table, await _read_l2(self._image, table))
            ):
                if number == whole and position >= runs:
                    break
                await self._count(first, count, -self._difference)
            await self._relieve()

    async def _count(self, first: int, count: int, difference: int) -> None:
        await self._driver.settled(self._image.refs.add, first, count, difference)

    async def _relieve(self) -> None:
        """Let others run, and write counts before there are more of them than the cache may hold."""
        await trio.lowlevel.checkpoint()
        image = self._image
        if len(image.refs.dirty) > image.refs.cache.limit:
            async with image.tables_lock:
                await image.write_refcounts()


async def _read_l2(image: Image, table: int) -> array[int]:
    """An L2 table as it is in the file; beyond its end it is zeroes. Raises OSError."""
    size = image.geometry.cluster_size
    if table & size - 1:
        raise image.corrupt(f"L2 table offset {table:#x} unaligned")
    inside = max(0, min(size, image.file.length - table))
    data = await image.file.read(table, inside) if inside else b""
    words = array("Q", data.ljust(size, b"\0"))
    swap(words)
    return words


def _runs(image: Image, table: int, words: array[int]) -> Iterator[tuple[int, int]]:
    """The clusters that an L2 table's entries lead to and its own, as runs: first, how many. Raises OSError."""
    bits, mask = image.geometry.cluster_bits, image.geometry.cluster_size - 1
    first, count = table >> bits, 1
    for entry in words[:: image.geometry.words]:
        if not entry & (OFFSET_MASK | COMPRESSED):
            continue
        if entry & COMPRESSED:
            offset, length = compressed.decode_entry(entry, bits)
            cluster, more = offset >> bits, (offset + length - 1 >> bits) - (offset >> bits) + 1
        else:
            if entry & OFFSET_MASK & mask:
                raise image.corrupt(f"Cluster allocation offset {entry & OFFSET_MASK:#x} unaligned")
            cluster, more = (entry & OFFSET_MASK) >> bits, 1
        if cluster == first + count:
            count += more
        else:
            yield first, count
            first, count = cluster, more
    yield first, count


# -- flags --------------------------------------------------------------------------------------------------------


async def set_flags(driver: Qcow2Driver) -> None:
    """Let COPIED say in the active tables which clusters nobody else refers to. Raises OSError."""
    image = driver.image
    geometry = image.geometry
    slices = 1 << geometry.l2_bits - geometry.slice_bits
    l1 = image.map.l1
    for index in range(len(l1)):
        if not l1[index] & OFFSET_MASK:
            continue
        right = await _flagged(driver, l1[index])
        if right != l1[index]:
            l1[index] = right
            image.dirty.touch_l1(index)
        for number in range(index * slices, (index + 1) * slices):
            await _set_slice_flags(driver, number, is_alone=bool(right & COPIED))
        await trio.lowlevel.checkpoint()


async def _set_slice_flags(driver: Qcow2Driver, number: int, *, is_alone: bool) -> None:
    """The same for a slice of an L2 table, which is nobody else's if ``is_alone``."""
    image = driver.image
    changes: list[tuple[int, int]] = []
    table = await driver.settled(image.changeable_slice, number)
    for position in range(0, len(table), image.geometry.words):
        entry = table[position]
        if entry & COMPRESSED or not entry & OFFSET_MASK:
            continue
        # What a shared table leads to is shared.
        right = await _flagged(driver, entry) if is_alone else entry & ~COPIED
        if right != entry:
            changes.append((position, right))
    if changes:
        table = await driver.settled(image.changeable_slice, number)
        image.dirty.touch(number, table, changes[0][0], changes[-1][0] + 1)
        for position, right in changes:
            table[position] = right


async def _flagged(driver: Qcow2Driver, entry: int) -> int:
    refs = driver.image.refs
    cluster = (entry & OFFSET_MASK) >> driver.image.geometry.cluster_bits
    try:
        count = refs.get(cluster)
    except Cold:
        count = await driver.settled(refs.get, cluster)
    return entry | COPIED if count == 1 else entry & ~COPIED


# -- the mark -----------------------------------------------------------------------------------------------------


async def _mark(image: Image) -> bool:
    """Counts and flags may not agree from now on; whether they did not before. Raises OSError."""
    if not image.header.incompatible & DIRTY and marking(image.header):
        await image.header_changes.change(marking)
    needed_repair, image.needs_repair = image.needs_repair, True
    return needed_repair


async def _unmark(driver: Qcow2Driver, *, needed_repair: bool) -> None:
    """They agree as before, and unless counts are lazy as well. What cannot be written now is when it is closed."""
    image = driver.image
    image.needs_repair = needed_repair
    if image.header.incompatible & DIRTY and not image.settings.lazy_refcounts and not image.needs_repair:
        try:
            await image.header_changes.change(unmarking)
        except OSError as error:
            log.warning("%s stays marked as dirty: %s", driver.node_name, error)
