"""An open qcow2 image: its tables, its host clusters, and the changes of them that everything else is made of.

Changes are made in memory, on the spot; ``writeback`` brings them to the file in an order that keeps the image
consistent at every moment. What cannot be done on the spot is ``Cold``. Host clusters that are no longer referred
to are only noted (``release``): they become free once the file does not refer to them either.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from qsd.drivers.base import Child
from qsd.drivers.gather import Callback
from qsd.drivers.prompt import PromptLock
from qsd.drivers.qcow2 import compressed
from qsd.drivers.qcow2.dirty import DirtyTables
from qsd.drivers.qcow2.geometry import COPIED, OFFSET_MASK, Geometry, empty_table
from qsd.drivers.qcow2.guarding import guard, used_twice
from qsd.drivers.qcow2.header_change import HeaderChanges
from qsd.drivers.qcow2.layout import DIRTY, Header
from qsd.drivers.qcow2.loading import read_table
from qsd.drivers.qcow2.mapping import ClusterMap
from qsd.drivers.qcow2.metadata_map import (
    ACTIVE_L1,
    ACTIVE_L2,
    INACTIVE_L2,
    REFCOUNT_BLOCK,
    REFCOUNT_TABLE,
    MetadataMap,
    checks_of,
)
from qsd.drivers.qcow2.refcount_store import write_refcounts
from qsd.drivers.qcow2.refcounts import BLOCK_OFFSET, Refcounts
from qsd.drivers.qcow2.settings import Settings
from qsd.drivers.qcow2.snapshot_table import StoredSnapshot
from qsd.drivers.qcow2.table_growth import grow_refcount_table
from qsd.drivers.qcow2.tables import SliceCache
from qsd.drivers.runs import Cold
from qsd.errors import QmpError
from qsd.messages import Op, Request

if TYPE_CHECKING:
    from qsd.drivers.qcow2.driver import Qcow2Driver
    from qsd.drivers.qcow2.encryption import Encryption

# How far the file is grown ahead of what is allocated: an eighth of it, within these bounds.
GROW_MIN: Final = 1 << 20
GROW_MAX: Final = 64 << 20
# Runs of clusters that may wait to become free: who would free more lets that happen first. With half of them a
# write-back begins that nobody has asked for.
MOST_FREED: Final = 2048


class Freeing(Enum):
    """Why host clusters are given up: decides whether the file is told (the options pass-discard-...)."""

    REQUEST = "request"
    SNAPSHOT = "snapshot"
    OTHER = "other"
    ALWAYS = "always"


class Freed(NamedTuple):
    """Host clusters nobody refers to any more, each to lose one reference."""

    first: int
    clusters: int
    why: Freeing


class Image:
    """See the module. ``refs`` exists while the image can be written."""

    refs: Refcounts

    def __init__(
        self, driver: Qcow2Driver, header: Header, settings: Settings, options: Any, l1: array[int], file: Child
    ) -> None:
        self.driver = driver
        self.header = header
        self.settings = settings
        self.file = file
        self.geometry = geometry = Geometry.of(header, settings.slice_bytes)
        self.dirty = DirtyTables(driver.resume)
        self.cache = SliceCache(geometry.slice_bytes, settings.l2_cache, self.dirty.is_pinned)
        self.map = ClusterMap(geometry, l1, self.cache, file, driver.fetch, driver.corrupt)
        self.metadata = MetadataMap(geometry.cluster_bits, checks_of(options.overlap_check))
        # Bytes of the disk that is being grown to that; 0 when none is.
        self.expected_size = 0
        self.snapshots: tuple[StoredSnapshot, ...] = ()
        # What their table takes.
        self.snapshot_clusters = 0
        self.pending: list[Freed] = []
        # Everything in the file from here on has never been written and reads as zeroes.
        self.virgin = 0
        self.has_grown = False
        # Counts and flags do not agree: an operation is at work on them, or has failed. The mark is for a repair.
        self.needs_repair = False
        # A read may be answered with pages of the file, as long as no cluster has ever changed its owner.
        self.lends = True
        self._making: dict[int, Cold] = {}
        # The cluster that the next refcount block is to stand in, once the disk has given room for it; and those to
        # which zeroes are on their way for that, which nobody has taken yet.
        self._secured: int | None = None
        self._securing: dict[int, Cold] = {}
        self.encryption: Encryption | None = None
        self.inflater = compressed.Inflater(header.cluster_size, header.compression_type)
        # An entry alone says where a cluster is, and how to read it.
        self.is_hot = geometry.words == 1
        self.header_changes = HeaderChanges(self)
        self._extending = PromptLock()
        # Held while tables are written or moved.
        self.tables_lock = PromptLock()

    @property
    def is_encrypted(self) -> bool:
        """Whether the guest's data goes through a cipher."""
        return self.encryption is not None

    @property
    def encryption_end(self) -> int:
        """Bytes that the file has at least when what opens the image is all there."""
        places = [] if self.encryption is None else self.encryption.places(self.header)
        return max((offset + length for offset, length in places), default=0)

    def take_snapshots(self, snapshots: tuple[StoredSnapshot, ...], table_length: int) -> None:
        """The internal snapshots, and how many bytes the image's table of them has."""
        self.snapshots = snapshots
        self.snapshot_clusters = -(-table_length >> self.geometry.cluster_bits)

    def let_go(self) -> None:
        """The image is not used any more: free the tables at once, whoever still refers to it."""
        self.map.l1 = array("Q")
        self.cache.clear()
        self.dirty = DirtyTables(self.driver.resume)
        self.metadata.clusters = {}
        self.snapshots = ()
        if hasattr(self, "refs"):
            self.refs.let_go()
        if self.encryption is not None:
            self.encryption.sealer.let_go()

    # -- becoming writable ------------------------------------------------------------------------------------

    async def begin_writing(self) -> None:
        """Load what only writers need: the image can be written from now on. Raises QmpError."""
        header, file, cluster = self.header, self.file, self.geometry.cluster_size
        size = header.refcount_table_clusters * cluster // 8
        table = await read_table(file, header.refcount_table_offset, size, "Could not read refcount table")
        await guard(self, table)
        shared = await used_twice(table, BLOCK_OFFSET)
        limit = self.settings.refcount_cache
        self.refs = Refcounts(file, header.cluster_bits, header.refcount_order, table, limit, self, shared)
        self.virgin = max(-(-file.length // cluster) * cluster, self.encryption_end)

    # -- the host of ``Refcounts`` ----------------------------------------------------------------------------

    def fetch(self, child: Child, offset: int, buffer: memoryview, done: Callable[[int], None]) -> None:
        """Read metadata."""
        self.driver.fetch(child, offset, buffer, done)

    def store(self, offset: int, data: bytes | memoryview, done: Callable[[int], None]) -> None:
        """Write metadata into the image file; ``done(errno)``."""
        reply = Callback(lambda request: done(request.error))
        self.driver.post(self.file, Request(Op.WRITE.value, offset, len(data), memoryview(data), reply))
        self.driver.send()

    def corrupt(self, text: str) -> OSError:
        """The image is broken; the error to raise."""
        self.driver.corrupt(text)
        return OSError(errno.EIO, text)

    def claim(self, first: int, count: int) -> None:
        """Make free clusters fit for use: the file reaches that far, and they hold no metadata."""
        if self.settings.lazy_refcounts and not self.header.incompatible & DIRTY:
            raise Cold("dirty bit", self._set_dirty)
        for cluster, cold in self._securing.items():
            if first <= cluster < first + count:
                # The zeroes might come after what is written there.
                raise cold
        bits = self.geometry.cluster_bits
        kind = self.metadata.find(range(first, first + count))
        if kind is not None:
            self.overlap(kind, first << bits, count << bits)
        end = first + count << bits
        self.reach(self.file, end)
        self.virgin = max(self.virgin, end)

    def overlap(self, kind: str, offset: int, length: int) -> None:
        """Refuse a write that would destroy metadata. Raises OSError."""
        text = f"Preventing invalid write on metadata (overlaps with {kind})"
        self.driver.corrupt(text, offset=offset, size=length)
        raise OSError(errno.EIO, text)

    def check_block(self, offset: int) -> None:
        """Raise OSError when the refcount block that stands there is other metadata too."""
        self._check_kind(offset, REFCOUNT_BLOCK)

    def _check_kind(self, offset: int, wanted: str) -> None:
        """Metadata of a kind is going to be changed; refuse where it would destroy metadata of another."""
        kind = self.metadata.clusters.get(offset >> self.geometry.cluster_bits)
        if kind is not None and kind not in (wanted, INACTIVE_L2):
            self.overlap(kind, offset, self.geometry.cluster_size)

    def reach(self, child: Child, end: int) -> None:
        """Let a child that is written to be at least ``end`` bytes long. Raises Cold, OSError.

        An image may end in the middle of a cluster: its last one was never written to the end.
        """
        if end <= child.length:
            return
        if end > 1 << 56:
            raise OSError(errno.EFBIG, "host offset beyond what L2 entries can hold")
        wanted = end
        if child is self.file or not self.geometry.has_data_file:
            self.has_grown = True
            ahead = min(max(child.length >> 3, GROW_MIN), GROW_MAX)
            wanted = -(-(end + ahead) // GROW_MIN) * GROW_MIN
        try:
            has_grown = child.grow(wanted)
        except OSError:
            wanted = end
            has_grown = child.grow(end)
        if not has_grown:
            raise Cold(("length", child), partial(self._reach_later, child, wanted))

    def _reach_later(self, child: Child, size: int, done: Callable[[int], None]) -> None:
        async def grow() -> None:
            error = 0
            try:
                await self.extend(child, size)
            except OSError as problem:
                error = problem.errno or errno.ENOSPC
            done(error)

        self.driver.host.spawn(grow, name="grow the file")

    async def extend(self, child: Child, end: int) -> None:
        """Let a child be at least ``end`` bytes long; one at a time, so that no one shrinks it. Raises OSError."""
        async with self._extending:
            if end > child.length and not child.grow(end):
                try:
                    await child.truncate(end, exact=False)
                except QmpError:
                    raise OSError(errno.ENOSPC, "the file cannot grow") from None

    async def cut_room_ahead(self) -> None:
        """Let the file end where nothing has ever been written. Raises QmpError."""
        if self.has_grown and self.file.length > self.virgin:
            await self.file.truncate(self.virgin, exact=False)
            self.has_grown = False

    def _set_dirty(self, done: Callable[[int], None]) -> None:
        async def set_dirty() -> None:
            error = 0
            try:
                await self.set_incompatible(DIRTY)
            except OSError as problem:
                error = problem.errno or errno.EIO
            done(error)

        self.driver.host.spawn(set_dirty, name="set the dirty bit")

    def grow_refcount_table(self, done: Callable[[int], None]) -> None:
        """Make a larger refcount table."""

        async def grow() -> None:
            error = 0
            try:
                await grow_refcount_table(self)
            except OSError as problem:
                error = problem.errno or errno.EIO
            done(error)

        self.driver.host.spawn(grow, name="grow the refcount table")

    # -- host clusters ----------------------------------------------------------------------------------------

    def allocate(self, count: int) -> tuple[int, int, bool]:
        """Host clusters in a row: offset of the first, how many (1 to ``count``), and whether they read as zeroes.

        Raises Cold, OSError.
        """
        virgin = self.virgin
        first, got = self.driver.writeback.take(count) or self.refs.allocate(count)
        offset = first << self.geometry.cluster_bits
        return offset, got, offset >= virgin

    def give_back(self, offset: int, count: int) -> None:
        """Free clusters just allocated that nothing has ever referred to."""
        try:
            self.refs.add(offset >> self.geometry.cluster_bits, count, -1)
        except Cold:
            self.release(offset, count, Freeing.OTHER)

    def release(self, offset: int, count: int, why: Freeing) -> None:
        """``count`` host clusters from ``offset`` on lose a reference once the file does not refer to them."""
        first = offset >> self.geometry.cluster_bits
        pending = self.pending
        if pending:
            last = pending[-1]
            if last.first + last.clusters == first and last.why is why:
                pending[-1] = Freed(last.first, last.clusters + count, why)
                return
        pending.append(Freed(first, count, why))

    def release_entry(self, entry: int, why: Freeing) -> None:
        """What an L2 entry referred to loses a reference."""
        if entry & compressed.COMPRESSED:
            bits = self.geometry.cluster_bits
            offset, length = compressed.decode_entry(entry, bits)
            self.driver.unpacker.forget(entry)
            first = offset >> bits
            self.release(first << bits, (offset + length - 1 >> bits) - first + 1, why)
        elif entry & OFFSET_MASK and not self.geometry.has_data_file:
            self.release(entry & OFFSET_MASK, 1, why)

    def give_up(self, offset: int, count: int) -> None:
        """Clusters of a table the header no longer leads to."""
        self.release(offset, count, Freeing.OTHER)
        self.driver.writeback.start()

    def passes_discard(self, why: Freeing) -> bool:
        """Whether the file is told that clusters have become free."""
        settings = self.settings
        return {
            Freeing.REQUEST: settings.discard_request,
            Freeing.SNAPSHOT: settings.discard_snapshot,
            Freeing.OTHER: settings.discard_other,
            Freeing.ALWAYS: True,
        }[why]

    def make_way(self) -> None:
        """Before more clusters are freed: see to it that those that wait for it get fewer. Raises Cold."""
        writeback = self.driver.writeback
        if writeback.is_behind:
            raise Cold("give up", writeback.catch_up)
        if 2 * len(self.pending) >= MOST_FREED:
            writeback.start()

    # -- refcounts in the file --------------------------------------------------------------------------------

    @property
    def is_lazy(self) -> bool:
        """True while refcounts need not be written: the image is marked dirty, and there are not too many."""
        refs = self.refs
        return (
            self.settings.lazy_refcounts
            and bool(self.header.incompatible & DIRTY)
            and len(refs.dirty) < refs.cache.limit
        )

    @property
    def has_dirty_refcounts(self) -> bool:
        """True when the file lacks refcounts that have to be there."""
        return bool(self.refs.dirty or self.refs.dirty_table) and not self.is_lazy

    async def write_refcounts(self) -> None:
        """Write changed refcounts. Raises OSError."""
        # Not while the file may have a header that leads to what they say is free.
        await self.header_changes.restore()
        refs = self.refs
        await self.extend(
            self.file, max(map(refs.block_offset, refs.dirty), default=0) + self.geometry.cluster_size
        )
        await write_refcounts(self.refs, self.file, self.header.refcount_table_offset)

    # -- L2 tables --------------------------------------------------------------------------------------------

    def writable_slice(self, number: int) -> array[int]:
        """The slice, in a table that is this image's alone. Raises Cold, OSError."""
        geometry = self.geometry
        index = number >> geometry.l2_bits - geometry.slice_bits
        entry = self.map.l1[index]
        if not entry & COPIED or not entry & OFFSET_MASK:
            self._own_table(index, number)
        return self.changeable_slice(number)

    def changeable_slice(self, number: int) -> array[int]:
        """The slice of a table that exists, whoever else uses it, with room to keep it. Raises Cold, OSError."""
        table = self.map.slice_at(number)
        dirty = self.dirty
        if not dirty.is_pinned(number):
            self._check_kind(self.map.slice_offset(number), ACTIVE_L2)
            if not self._holds_all:
                if dirty.pinned >= self.cache.limit:
                    raise Cold("write-back", self._make_room)
                if len(dirty.slices) >= self.cache.limit >> 1:
                    self.driver.writeback.start()
        return table

    def _make_room(self, done: Callable[[int], None]) -> None:
        if self.dirty.slices or self.dirty.frozen:
            self.driver.writeback.request(done)
        else:
            # All have to stay for writes that are under way, and have nothing yet that could be written.
            self.dirty.when_unpinned(done)

    @property
    def _holds_all(self) -> bool:
        """Whether there is room for every slice: then none has to be written for another's sake."""
        reach = self.cache.limit << self.geometry.cluster_bits + self.geometry.slice_bits
        return max(self.header.size, self.expected_size) <= reach

    def _own_table(self, index: int, number: int) -> None:
        """Make the L2 table of L1 entry ``index``: a new one, or a copy of one that is shared."""
        making = self._making.get(index)
        if making is not None:
            raise making
        self._check_kind(self.header.l1_offset + index * 8, ACTIVE_L1)
        # Also where it would read as zeroes: a disk that gets full must not let us down when data has been written.
        offset = self.allocate(1)[0]
        self._making[index] = cold = Cold(("own table", index), partial(self._fill_table, index, number, offset))
        raise cold

    def _fill_table(self, index: int, number: int, offset: int, done: Callable[[int], None]) -> None:
        old = self.map.l1[index] & OFFSET_MASK
        content = bytearray(self.geometry.cluster_size)

        def stored(error: int) -> None:
            del self._making[index]
            if error:
                self.release(offset, 1, Freeing.OTHER)
            else:
                self._link_table(index, offset)
                if old:
                    self.metadata.remove(old, 1)
                    if self._has_snapshot_of(old):
                        self.metadata.add(INACTIVE_L2, old, 1)
                    self.release(old, 1, Freeing.OTHER)
                elif self.cache.peek(number) is None:
                    self.cache.insert(number, empty_table(self.geometry.slice_bytes))
            done(error)

        def fetched(error: int) -> None:
            if error:
                stored(error)
            else:
                self.store(offset, memoryview(content), stored)

        if old:
            self.fetch(self.file, old, memoryview(content), fetched)
        else:
            fetched(0)

    def _has_snapshot_of(self, table: int) -> bool:
        """Whether somebody else refers to an L2 table of ours; False also when it takes waiting to know."""
        try:
            return self.refs.get(table >> self.geometry.cluster_bits) > 1
        except (Cold, OSError):
            return False

    def secure(self, cluster: int) -> None:
        """Write zeroes to a cluster that is to be a refcount block, for the same reason as to a new L2 table."""
        if cluster == self._secured:
            return

        def secure(done: Callable[[int], None]) -> None:
            def stored(error: int) -> None:
                del self._securing[cluster]
                if not error:
                    self._secured = cluster
                done(error)

            self.store(cluster << self.geometry.cluster_bits, bytes(self.geometry.cluster_size), stored)

        self._securing[cluster] = cold = Cold(("room", cluster), secure)
        raise cold

    def block_made(self, cluster: int, index: int) -> None:
        """A new refcount block stands there."""
        self._secured = None
        self._check_kind(self.header.refcount_table_offset + index * 8, REFCOUNT_TABLE)
        self.metadata.add(REFCOUNT_BLOCK, cluster << self.geometry.cluster_bits, 1)

    def _link_table(self, index: int, offset: int) -> None:
        self.map.l1[index] = offset | COPIED
        self.dirty.touch_l1(index)
        self.metadata.add(ACTIVE_L2, offset, 1)

    # -- the header -------------------------------------------------------------------------------------------

    async def change_header(self, **changes: Any) -> None:
        """Let the header have other values: see ``HeaderChanges``. Raises OSError."""
        await self.header_changes.change(lambda _header: changes)

    async def set_incompatible(self, bit: int) -> None:
        """Set an incompatible feature bit, whatever else becomes of the header meanwhile. Raises OSError."""
        await self.header_changes.change(lambda header: {"incompatible": header.incompatible | bit})
