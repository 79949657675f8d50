"""Zeroes and discards: whole clusters change in the L2 tables, the rest of a range is written as bytes.

Within one slice that is done on the spot; a longer range is a task that goes from slice to slice, so that neither
the loop nor memory has to hold all of it. What the entries become is the choice of the reference: zeroing keeps
the space unless it may be unmapped, discarding gives it up, and both read as zeroes where the format can say so
(version 3).
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from qsd.drivers.calls import call
from qsd.drivers.gather import Callback, Gather
from qsd.drivers.mapped import ZEROES as ZERO_BYTES
from qsd.drivers.qcow2.edges import NO_FALLBACK, EdgeZeroer, Range
from qsd.drivers.qcow2.geometry import ALL_ALLOCATED, ALL_ZERO, COMPRESSED, COPIED, OFFSET_MASK, ZERO_FLAG
from qsd.drivers.qcow2.image import Freeing
from qsd.drivers.qcow2.writing import FUA, Claim, EntryChanger
from qsd.drivers.runs import UNALLOCATED, ZERO
from qsd.messages import Flag, Op, Request

if TYPE_CHECKING:
    from qsd.drivers.qcow2.driver import Qcow2Driver
    from qsd.drivers.qcow2.image import Image
    from qsd.drivers.qcow2.writing import Writer

MAY_UNMAP: Final = Flag.MAY_UNMAP.value

# Runs of host clusters that lost what they held and keep their place: offset, bytes.
Kept = list[tuple[int, int]]


class Zeroer(EntryChanger):
    """See the module."""

    def __init__(self, driver: Qcow2Driver, image: Image, writer: Writer) -> None:
        super().__init__(driver, image, writer)
        self._edges = EdgeZeroer(driver, image, writer, self._zero_one)

    # -- requests ---------------------------------------------------------------------------------------------

    def write_zeroes(self, request: Request) -> None:
        """Make a range read as zeroes. Raises Cold and OSError with nothing changed that would not be again."""
        if request.flags & FUA:
            self._writer.make_durable(request)
        offset, end = request.offset, request.offset + request.length
        first, last = -(-offset // self._size), self._end_cluster(end)
        if self._is_raw or (not self._can_mark_zero and self._image.driver.backing is not None):
            # A raw data file holds what is seen; version 2 cannot say that a cluster hides the backing file.
            if not self._writer.is_blocked(request, offset >> self._bits, end - 1 >> self._bits):
                self._zero_stored(request, first, last)
            return
        if first >= last:
            self._zero_edges(request, [(offset, end)])
            return
        edges = [(offset, first << self._bits), (min(end, last << self._bits), end)]
        if request.flags & NO_FALLBACK and any(start < stop for start, stop in edges):
            # What fails must not have changed the rest.
            head, tail = edges
            self._edges.zero_in_order(request, [head, (head[1], tail[0]), tail])
            return
        if self._writer.is_blocked(request, first, last - 1):
            return
        if first >> self._slice_bits != last - 1 >> self._slice_bits:
            self._driver.started()
            self._driver.host.spawn(self._zero_long, request, first, last, edges, name="write zeroes")
            return
        kept = self._unmapped_data(request.flags, first, last)
        self.zero_clusters(first, last, request.flags, kept=kept)
        self._zero_edges(request, edges, kept)

    def discard(self, request: Request) -> None:
        """Give up whole clusters. Raises Cold and OSError with nothing changed that would not be again."""
        first = -(-request.offset // self._size)
        last = self._end_cluster(request.offset + request.length)
        if first >= last or (not self._can_mark_zero and self._image.driver.backing is not None):
            # Nothing to give up; or a guest that was promised zeroes would see the backing file again.
            request.complete()
            return
        if self._writer.is_blocked(request, first, last - 1):
            return
        if self._is_raw:
            self._discard_raw(request, first, last)
            return
        if first >> self._slice_bits != last - 1 >> self._slice_bits:
            self._driver.started()
            self._driver.host.spawn(self._discard_long, request, first, last, name="discard")
            return
        kept: Kept = []
        self.discard_clusters(first, last, kept=kept)
        self._discard_data(request, first, last, kept)

    def _end_cluster(self, end: int) -> int:
        """The cluster behind the last whole one before ``end``; the disk's last cluster is whole at its end."""
        return -(-end // self._size) if end >= self._driver.length else end // self._size

    @property
    def _can_mark_zero(self) -> bool:
        return self._image.geometry.version >= 3

    @property
    def _is_raw(self) -> bool:
        return self._image.header.is_data_file_raw

    # -- edges ------------------------------------------------------------------------------------------------

    def _zero_edges(self, request: Request, edges: list[Range], kept: Kept | None = None) -> None:
        """Zero what is less than a cluster, tell the file of clusters that were kept, complete the request."""
        gather = Gather(self._driver, request)
        self._pass_discards(gather, kept or [])
        self._edges.zero(gather, edges)
        gather.end()

    def _zero_one(self, cluster: int, flags: int) -> None:
        self.zero_clusters(cluster, cluster + 1, flags)

    def reads_zero(self, start: int, end: int) -> bool:
        """Whether nothing is stored there, in this image or below. Raises Cold."""
        backing = self._image.driver.backing
        while start < end:
            kind, run, _where, _child = self._image.map.lookup(start, end - start)
            if kind != ZERO and (kind != UNALLOCATED or (backing is not None and start < backing.length)):
                return False
            start += run
        return True

    # -- where bytes have to be written -----------------------------------------------------------------------

    def _zero_stored(self, request: Request, first: int, last: int) -> None:
        if not self._is_raw and request.flags & NO_FALLBACK:
            raise OSError(errno.EOPNOTSUPP, "version 2 has no zero clusters")
        if self._is_raw:
            self._begin_raw(request, first, last)
        else:
            self._driver.started()
            self._driver.host.spawn(self._write_zero_bytes, request, name="write zero bytes")

    async def _write_zero_bytes(self, request: Request) -> None:
        """Clusters that read as zeroes already stay as they are; the others are written."""
        offset, end = request.offset, request.offset + request.length
        error = 0
        try:
            while offset < end:
                stop = min(end, (offset // self._size + 1) * self._size, offset + len(ZERO_BYTES))
                if not await self._driver.settled(self.reads_zero, offset, stop):
                    await call(self._driver, Op.WRITE, offset, stop - offset, ZERO_BYTES[: stop - offset])
                offset = stop
                await trio.lowlevel.checkpoint()
        except OSError as problem:
            error = problem.errno or errno.EIO
        self._ended(request, error)

    def _discard_raw(self, request: Request, first: int, last: int) -> None:
        """A discard may leave anything, but a raw data file has what the guest sees: both are zeroed, or none."""
        # Zeroes are stored as noise where data is encrypted: that would be no discard.
        if self._image.is_encrypted or not self._image.settings.discard_request:
            request.complete()
            return
        end = min(last << self._bits, self._driver.length)
        request.offset, request.flags = first << self._bits, MAY_UNMAP | NO_FALLBACK
        request.length = end - request.offset
        self._begin_raw(request, first, last)

    def _begin_raw(self, request: Request, first: int, last: int) -> None:
        """Zero a range that nobody is about to change, and a raw data file along with the entries."""
        claim = self._writer.claim(request.offset >> self._bits, request.offset + request.length - 1 >> self._bits)
        self._driver.started()
        self._driver.host.spawn(self._zero_raw, request, first, last, claim, name="zero a raw data file")

    async def _zero_raw(self, request: Request, first: int, last: int, claim: Claim) -> None:
        """The data file reads as zeroes first, whatever the entries are; then those of whole clusters say so.

        Writes on their way to the file come before that, later ones afterwards: one that came between the two would
        be in the file, and nowhere for the guest.
        """
        data = self._image.map.data
        error = 0
        try:
            await self._driver.caught_up()
            await data.quiesce()
            inside = max(0, min(request.length, data.length - request.offset))
            if inside:
                await call(data, Op.WRITE_ZEROES, request.offset, inside, None, request.flags & ~FUA)
            await self.walk(first, last, partial(self.zero_clusters, flags=request.flags), is_claimed=True)
        except OSError as problem:
            error = problem.errno or errno.EIO
            if request.op == Op.DISCARD and error == errno.EOPNOTSUPP:
                error = 0
        finally:
            self._writer.release(claim)
        self._ended(request, error)

    # -- whole clusters ---------------------------------------------------------------------------------------

    async def _zero_long(self, request: Request, first: int, last: int, edges: list[Range]) -> None:
        kept = self._unmapped_data(request.flags, first, last)
        zero = partial(self.zero_clusters, flags=request.flags, kept=kept)
        if await self._walk(request, first, last, zero, skips_unmapped=not self._can_mark_zero):
            self._zero_edges(request, edges, kept)
            self._driver.send()

    async def _discard_long(self, request: Request, first: int, last: int) -> None:
        kept: Kept = []
        discard = partial(self.discard_clusters, kept=kept)
        if await self._walk(request, first, last, discard, skips_unmapped=self._image.driver.backing is None):
            self._discard_data(request, first, last, kept)
            self._driver.send()

    async def _walk(
        self, request: Request, first: int, last: int, change: Callable[[int, int], None], *, skips_unmapped: bool
    ) -> bool:
        """Change clusters slice by slice, with chances for others to run; False when the request ended in error."""
        try:
            await self.walk(first, last, change, skips_unmapped=skips_unmapped)
        except OSError as problem:
            self._ended(request, problem.errno or errno.EIO)
            return False
        self._driver.finished()
        return True

    async def walk(
        self,
        first: int,
        last: int,
        change: Callable[[int, int], None],
        *,
        skips_unmapped: bool = True,
        is_claimed: bool = False,
    ) -> None:
        """Call ``change(first, stop)`` for the clusters ``first`` to ``last`` (excluded), slice by slice.

        ``skips_unmapped``: not for those that no L2 table describes. ``is_claimed``: nobody else may change any of
        them. Others run in between. Raises OSError.
        """
        check = None if is_claimed else self._writer.require_free
        cluster = first
        while cluster < last:
            stop = min(last, (cluster >> self._slice_bits) + 1 << self._slice_bits)
            cluster = await self._driver.settled(
                self._change_slice, cluster, stop, last, change, check, skips_unmapped
            )
            await trio.lowlevel.checkpoint()

    def _change_slice(
        self,
        cluster: int,
        stop: int,
        last: int,
        change: Callable[[int, int], None],
        check: Callable[[int, int], None] | None,
        skips_unmapped: bool,
    ) -> int:
        """Change clusters of one slice; the cluster to go on with. Raises Cold, OSError."""
        if skips_unmapped:
            missing = self._image.map.unmapped(cluster, last - cluster)
            if missing:
                return cluster + missing
        if check is not None:
            check(cluster, stop - 1)
        change(cluster, stop)
        return stop

    def _ended(self, request: Request, error: int) -> None:
        self._driver.finished()
        request.complete(error)
        self._driver.send()

    def _pass_discards(self, gather: Gather, kept: Kept) -> None:
        """Let the file give up space of clusters, as parts of a request. Where that fails, nothing is lost.

        As zeroes, not as a discard, which may leave anything: the entries may not be on the disk yet that hide it.
        """
        for offset, length in kept:
            gather.left += 1
            # It ends before the request does: a write that comes after that is not discarded.
            reply = Callback(lambda _part: gather.end())
            part = Request(Op.WRITE_ZEROES.value, offset, length, None, reply, MAY_UNMAP | NO_FALLBACK)
            self._driver.post(self._image.map.data, part)

    def _unmapped_data(self, flags: int, first: int, last: int) -> Kept:
        """What the external data file is to give up where zeroes may unmap: its clusters are not counted.

        What is encrypted would read as noise where it is zeroes.
        """
        image = self._image
        offset = first << self._bits
        length = min(last << self._bits, image.map.data.length) - offset
        hears = flags & MAY_UNMAP and image.settings.discard_request and not image.is_encrypted
        return [(offset, length)] if hears and image.geometry.has_data_file and length > 0 else []

    def _keep(self, entry: int, kept: Kept | None) -> None:
        """A cluster reads as zeroes and keeps its place (discard-no-unref)."""
        image, host = self._image, entry & OFFSET_MASK
        # What is encrypted would read as noise where it is zeroes.
        hears = image.settings.discard_request and not image.geometry.has_data_file and not image.is_encrypted
        if kept is None or not host or not hears:
            return
        kind = image.metadata.kind_at(host, self._size)
        if kind is not None:
            # An entry of a broken image: zeroes would be written over the image's own tables.
            image.overlap(kind, host, self._size)
        if kept and kept[-1][0] + kept[-1][1] == host:
            kept[-1] = kept[-1][0], kept[-1][1] + self._size
        else:
            kept.append((host, self._size))

    def _discard_data(self, request: Request, first: int, last: int, kept: Kept) -> None:
        """The external data file hears of a discard itself: its clusters are not counted."""
        if kept:
            gather = Gather(self._driver, request)
            self._pass_discards(gather, kept)
            gather.end()
            return
        data = self._image.map.data
        offset = first << self._bits
        length = min(last << self._bits, data.length) - offset
        if not self._image.geometry.has_data_file or not self._image.settings.discard_request or length <= 0:
            request.complete()
            return
        request.offset, request.length = offset, length
        self._driver.post(data, request)

    def zero_clusters(self, first: int, last: int, flags: int, kept: Kept | None = None) -> None:
        """Let the clusters ``first`` to ``last`` (excluded) of one slice read as zeroes. Raises Cold, OSError.

        ``kept`` takes up those that keep their place although they might be unmapped.
        """
        image = self._image
        if not self._can_mark_zero and image.map.unmapped(first, last - first) >= last - first:
            return
        number = first >> self._slice_bits
        table = image.writable_slice(number)
        unmaps = bool(flags & MAY_UNMAP) and not image.settings.discard_no_unref
        change = self._zero_plain if self._words == 1 else self._zero_extended
        low, high = first & self._slice_mask, (last - 1 & self._slice_mask) + 1
        self._make_way(table, low, high, keeps=self._can_mark_zero and not unmaps)
        if flags & MAY_UNMAP and not unmaps:
            for entry in table[low * self._words : high * self._words : self._words]:
                if entry & COPIED:
                    self._keep(entry, kept)
        change(number, table, low, high, unmaps)

    def _make_way(self, table: array[int], low: int, high: int, *, keeps: bool) -> None:
        """Before entries are changed: wait where that frees clusters and many are free already. Raises Cold.

        ``keeps``: only packed ones are given up.
        """
        frees = COMPRESSED if keeps else COMPRESSED | OFFSET_MASK
        if any(map(frees.__and__, table[low * self._words : high * self._words : self._words])):
            self._image.make_way()

    def _zero_plain(self, number: int, table: array[int], first: int, last: int, unmaps: bool) -> None:
        image = self._image
        zero = ZERO_FLAG if self._can_mark_zero else 0
        image.dirty.touch(number, table, first, last)
        for index in range(first, last):
            entry = table[index]
            if not entry:
                table[index] = zero
            elif entry & ZERO_FLAG and not entry & COMPRESSED and not (unmaps and entry & OFFSET_MASK):
                continue
            elif zero and not unmaps and not entry & COMPRESSED:
                # Shared with a snapshot or not: what is written there later finds its place, or moves.
                table[index] = entry | zero
            else:
                image.release_entry(entry, Freeing.REQUEST)
                table[index] = zero

    def _zero_extended(self, number: int, table: array[int], first: int, last: int, unmaps: bool) -> None:
        image = self._image
        image.dirty.touch(number, table, 2 * first, 2 * last)
        for word in range(2 * first, 2 * last, 2):
            entry, bitmap = table[word], table[word + 1]
            if bitmap == ALL_ZERO and not entry & COMPRESSED and not (unmaps and entry & OFFSET_MASK):
                continue
            if unmaps or entry & COMPRESSED:
                image.release_entry(entry, Freeing.REQUEST)
                table[word] = 0
            table[word + 1] = ALL_ZERO

    def discard_clusters(
        self,
        first: int,
        last: int,
        *,
        uncovers: bool = False,
        why: Freeing = Freeing.REQUEST,
        kept: Kept | None = None,
    ) -> None:
        """Give up the clusters ``first`` to ``last`` (excluded) of one slice. Raises Cold, OSError.

        They read as zeroes afterwards; with ``uncovers`` as nothing this layer has. ``kept`` takes up those that
        keep their place.
        """
        image = self._image
        if image.map.unmapped(first, last - first) >= last - first and (uncovers or image.driver.backing is None):
            return
        number = first >> self._slice_bits
        table = image.writable_slice(number)
        hides = image.driver.backing is not None and not uncovers
        # Zeroes of subclusters may stay where zeroes are wanted.
        changes = ALL_ALLOCATED | (ALL_ZERO if uncovers else 0)
        low, high = first & self._slice_mask, (last - 1 & self._slice_mask) + 1
        words = self._words
        if words == 1 and not uncovers and table[low:high].count(ZERO_FLAG) == high - low:
            # They read as zeroes and have nothing to give up: a whole disk of them may be discarded.
            return
        keeps = image.settings.discard_no_unref and not uncovers
        self._make_way(table, low, high, keeps=keeps)
        image.dirty.touch(number, table, words * low, words * high)
        zero = ZERO_FLAG if self._can_mark_zero and words == 1 and not uncovers else 0
        for word in range(words * low, words * high, words):
            entry = table[word]
            bitmap = table[word + 1] if words == 2 else 0
            if not entry and not bitmap & changes and not hides:
                continue
            if keeps and entry & (OFFSET_MASK | COPIED) and not entry & COMPRESSED:
                if entry & COPIED:
                    self._keep(entry, kept)
                table[word] = entry | zero
            else:
                image.release_entry(entry, why)
                table[word] = zero
            if words == 2:
                table[word + 1] = 0 if uncovers else ALL_ZERO
