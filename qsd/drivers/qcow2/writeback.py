"""Bringing changed metadata to the file, in an order that keeps the image consistent at every moment.

One cycle, with what was dirty when it began:

1. refcounts are written (new blocks before the table that leads to them), and with the data that has been written
   so far they reach the disk;
2. L2 slices and L1 sectors, as they were when the cycle began, are written and reach the disk. New L2 tables were
   written when they were made, so 1 has brought them to the disk before the L1 entry that leads to them;
3. only then are host clusters that nothing refers to any more given up: what may still be on its way to them is
   waited for, the file is told of the discard, and their refcounts go down.

Cut off anywhere, this leaves clusters that are counted and not used, never the reverse. With lazy refcounts step 1
is left out while the image is marked dirty.

A file may take a millisecond for each hole, so step 3 lets the next cycle come in between, and who would free more
while much waits (``is_behind``) waits too: otherwise the image would grow by what it has given up.
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Callable
from itertools import chain
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

import trio

from qsd.drivers.gather import Callback
from qsd.drivers.qcow2.dirty import L1_SECTOR
from qsd.drivers.qcow2.image import MOST_FREED, Freed, Freeing
from qsd.drivers.qcow2.metadata_map import INACTIVE_L1, INACTIVE_L2
from qsd.drivers.qcow2.storing import write_all
from qsd.errors import errno_text
from qsd.messages import Op, Request

if TYPE_CHECKING:
    from qsd.drivers.qcow2.image import Image

log = logging.getLogger("qsd.qcow2")

Done = Callable[[int], None]
# Clusters of one run given up at once (10 ms), and the nanoseconds between two chances for the next cycle.
CLUSTERS: Final = 8192
SLICE_NS: Final = 2_000_000
# Runs that the file is told of at once.
TOGETHER: Final = 16


class WriteBack:
    """See the module. One cycle runs at a time; whoever asks meanwhile is served by the next."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._driver = image.driver
        self._waiting: list[Done] = []
        # What no table in the file leads to any more, and who waits for it to become less.
        self._backlog: deque[Freed] = deque()
        # Nothing is on its way to any of those any more.
        self._is_at_rest = False
        self._behind: list[Done] = []
        # The last attempt to give something up has failed.
        self._is_stuck = False
        self._is_wanted = False
        self._is_running = False
        # How often freed clusters could not be given up.
        self._failures = 0
        self._is_idle = trio.Event()

    @property
    def is_clean(self) -> bool:
        """True when the file has everything."""
        image = self._image
        return not (
            image.dirty
            or image.dirty.frozen
            or image.pending
            or self._backlog
            or self._is_running
            or image.has_dirty_refcounts
            or not image.header_changes.is_certain
        )

    @property
    def freed(self) -> int:
        """Runs of clusters that wait to become free."""
        return len(self._image.pending) + len(self._backlog)

    @property
    def is_behind(self) -> bool:
        """Whether to ``catch_up`` before more is freed. Where nothing can be given up that would not help."""
        return self.freed >= MOST_FREED and not self._is_stuck

    def catch_up(self, done: Done) -> None:
        """Call ``done(errno)`` when more may wait to become free."""
        self._behind.append(done)
        self.start()

    def _relieve_in_time(self) -> None:
        if self._behind and not self.is_behind:
            self._relieve()

    def _relieve(self, error: int = 0) -> None:
        behind, self._behind = self._behind, []
        for done in behind:
            done(error)

    def request(self, done: Done) -> None:
        """Call ``done(errno)`` when everything that has been completed so far is on the disk."""
        self._waiting.append(done)
        self.start()

    async def settle(self) -> None:
        """Wait for one cycle. Raises OSError."""
        done = trio.Event()
        errors: list[int] = []

        def ended(error: int) -> None:
            errors.append(error)
            done.set()

        self.request(ended)
        await done.wait()
        if errors[0]:
            raise OSError(errors[0], errno_text(errors[0]))

    async def finish(self) -> None:
        """Return when the file has everything and nothing waits to be given up. Raises OSError."""
        failures = self._failures
        while not self.is_clean:
            await self.settle()
            # Whoever asked again would interrupt what is given up.
            await self._is_idle.wait()
            # What has failed is tried once more.
            if self._failures > failures + 1:
                raise OSError(errno.EIO, "clusters could not be given up")

    def start(self) -> None:
        """Write what is dirty, soon."""
        self._is_wanted = True
        if not self._is_running:
            self._is_running = True
            self._is_idle = trio.Event()
            self._driver.started()
            self._driver.host.spawn(self._run, name="write back metadata")

    async def _run(self) -> None:
        driver = self._driver
        try:
            while self._is_wanted:
                self._is_wanted = False
                waiting, self._waiting = self._waiting, []
                error = await self._cycle()
                for done in waiting:
                    done(error)
                if error:
                    self._relieve(error)
                driver.send()
                if self._backlog:
                    await self._give_up()
                self._relieve_in_time()
                # More may have been freed meanwhile.
                self._is_wanted = self._is_wanted or bool(self._behind)
        finally:
            self._is_running = False
            self._is_idle.set()
            driver.finished()
            for done in self._waiting:  # only after a crash
                done(errno.EIO)
            self._relieve(errno.EIO)

    async def _cycle(self) -> int:
        image = self._image
        async with image.tables_lock:
            dirty = image.dirty
            freed, image.pending = image.pending, []
            dirty.freeze(image.map.l1, image.cache.peek)
            try:
                await image.header_changes.restore()
                if not image.is_lazy:
                    await image.write_refcounts()
                await self._sync()
                if dirty.frozen or dirty.frozen_l1:
                    await self._write_tables()
                    await image.file.flush()
            except OSError as error:
                dirty.thaw()
                image.pending[:0] = freed
                return error.errno or errno.EIO
            dirty.frozen.clear()
            dirty.frozen_l1.clear()
            self._is_at_rest = self._is_at_rest and not freed
            self._backlog.extend(_joined(freed))
            return 0

    async def _sync(self) -> None:
        image = self._image
        if image.geometry.has_data_file:
            await image.map.data.flush()
        await image.file.flush()

    async def _write_tables(self) -> None:
        image = self._image
        places = []
        for number, frozen in image.dirty.frozen.items():
            first = frozen.first // L1_SECTOR * L1_SECTOR
            last = min(len(frozen.table), -(-frozen.last // L1_SECTOR) * L1_SECTOR)
            places.append((image.map.slice_offset(number) + first * 8, frozen, first, last))
        sectors = image.dirty.frozen_l1.items()
        pieces = [(image.header.l1_offset + sector * L1_SECTOR * 8, words) for sector, words in sectors]
        ends = [offset + (last - first) * 8 for offset, _frozen, first, last in places]
        # A table may be cut short by the end of the file.
        await image.extend(image.file, max([*ends, *(offset + len(words) for offset, words in pieces)]))
        # One after the other, as they are written: together they may be as large as the cache.
        words_of = ((offset, frozen.words(first, last)) for offset, frozen, first, last in places)
        await write_all(image.file, chain(words_of, pieces))

    # -- freed clusters ---------------------------------------------------------------------------------------

    async def _give_up(self) -> None:
        image, backlog = self._image, self._backlog
        image.lends = False
        # Requests that were sent to these clusters when they were still in use must not meet a new owner, nor those
        # that are still to be sent: packed clusters are fetched when it is their turn.
        await self._driver.caught_up()
        for child in {image.file, image.map.data}:
            await child.quiesce()
        self._is_at_rest = True
        refused: list[OSError] = []
        self._is_stuck = False
        end = perf_counter_ns() + SLICE_NS
        while backlog:
            group, are_last_uses = await self._next_group()
            try:
                if are_last_uses:
                    await self._give_up_group(group)
                else:
                    await self._give_up_run(*group[0])
            except OSError as error:
                if error.errno == errno.EINVAL:
                    refused.append(error)
                    del group[0]
                else:
                    # They stay counted until the next cycle.
                    self._failures += 1
                    self._is_stuck = True
                backlog.extendleft(reversed(group))
                if self._is_stuck:
                    break
            self._relieve_in_time()
            if perf_counter_ns() >= end:
                # All of a disk may have been discarded, which takes seconds.
                await trio.lowlevel.checkpoint()
                if self._waiting:
                    # The rest comes after the next cycle.
                    break
                end = perf_counter_ns() + SLICE_NS
        if refused:
            # In one line: there are as many as a broken image wants.
            more = f" (and {len(refused) - 1} like it)" if len(refused) > 1 else ""
            log.error("%s: %s%s", self._driver.node_name, refused[0], more)

    def _next_freed(self) -> Freed:
        """What is given up next: long runs in pieces, with not more counts in memory than there is room for."""
        freed = self._backlog.popleft()
        if freed.clusters > CLUSTERS:
            self._backlog.appendleft(Freed(freed.first + CLUSTERS, freed.clusters - CLUSTERS, freed.why))
        return Freed(freed.first, min(CLUSTERS, freed.clusters), freed.why)

    async def _next_group(self) -> tuple[list[Freed], bool]:
        """What is given up next: runs that the file is told of and that are free then (True), or any single one."""
        group = [self._next_freed()]
        if not await self._is_last_use(group[0]):
            return group, False
        while self._backlog and len(group) < TOGETHER:
            following = self._backlog[0]
            # In the order of the file: so no cluster is there twice.
            is_behind = following.first >= group[-1].first + group[-1].clusters
            if not is_behind or following.clusters > CLUSTERS or not await self._is_last_use(following):
                break
            if not self._backlog or self._backlog[0] is not following:
                # Somebody has it already.
                break
            group.append(self._backlog.popleft())
        return group, True

    def take(self, count: int) -> tuple[int, int] | None:
        """At most ``count`` clusters that wait to become free, if many do: the first, and how many. Raises Cold.

        They are new ones from now on, and nobody has to make a hole of them.
        """
        image, backlog = self._image, self._backlog
        if 2 * self.freed < MOST_FREED or not backlog or not self._is_at_rest:
            return None
        first, clusters, why = backlog[-1]
        count = min(count, clusters, image.refs.entries - first % image.refs.entries)
        try:
            is_last_use = image.refs.are_one(first, count)
        except OSError:
            is_last_use = False
        if not is_last_use or image.metadata.find(range(first, first + count)) is not None:
            return None
        image.claim(first, count)
        image.refs.seal(first, count)
        backlog.pop()
        if clusters > count:
            backlog.append(Freed(first + count, clusters - count, why))
        if self._behind:
            self._driver.resume(self._relieve_in_time)
        return first, count

    async def _is_last_use(self, freed: Freed) -> bool:
        """Whether the file is told that the clusters become free, and every one of them does."""
        image, (first, count, why) = self._image, freed
        if not image.passes_discard(why) or image.metadata.find(range(first, first + count)) is not None:
            return False
        entries, end = image.refs.entries, first + count
        try:
            # Block by block, however few there is room for.
            while first < end:
                stop = min(end, (first // entries + 1) * entries)
                if not await self._driver.settled(image.refs.are_one, first, stop - first):
                    return False
                first = stop
        except OSError:
            return False
        return True

    async def _give_up_group(self, group: list[Freed]) -> None:
        """Give up what the file is told of; what is done is taken out of the list. Raises OSError."""
        image = self._image
        for first, count, _why in group:
            # Packed behind what was there, it would be discarded along with it.
            image.refs.seal(first, count)
        await self._discard(group)
        while group:
            await self._driver.settled(image.refs.add, group[0].first, group[0].clusters, -1)
            del group[0]

    async def _discard(self, group: list[Freed]) -> None:
        """Tell the file of all at once: it waits for one hole at a time, and we for all of them."""
        file, bits = self._image.file, self._image.geometry.cluster_bits
        done = trio.Event()
        left = len(group)

        def ended(_request: Request) -> None:
            # It is advice: where it fails, the clusters are free all the same.
            nonlocal left
            left -= 1
            if not left:
                done.set()

        reply = Callback(ended)
        batch = []
        for first, count, _why in group:
            length = max(0, min(count << bits, file.length - (first << bits)))
            batch.append(Request(Op.DISCARD.value, first << bits, length, None, reply))
        file.submit(batch)
        await done.wait()

    async def _give_up_run(self, first: int, count: int, why: Freeing) -> None:
        image = self._image
        await self._refuse_metadata(first, count)
        if image.passes_discard(why):
            # Packed behind what was there, it would be discarded along with it.
            image.refs.seal(first, count)
            cluster = first
            while cluster < first + count:
                is_last = await self._driver.settled(image.refs.get, cluster) == 1
                run = 1
                while cluster + run < first + count:
                    if (await self._driver.settled(image.refs.get, cluster + run) == 1) is not is_last:
                        break
                    run += 1
                if is_last:
                    await self._discard([Freed(cluster, run, why)])
                cluster += run
        await self._driver.settled(image.refs.add, first, count, -1)

    async def _refuse_metadata(self, first: int, count: int) -> None:
        """Raise OSError (EINVAL) where clusters would lose their last reference that metadata stands in.

        An L2 entry of a broken image leads there: a discard would make a hole in the image's own tables, or in what
        its keys are in. (Tables of snapshots lose theirs one by one, and the last while they are guarded still.)
        """
        known, bits = self._image.metadata, self._image.geometry.cluster_bits
        run = range(first, first + count)
        for cluster in run if known.find(run) is not None else ():
            kind = known.clusters.get(cluster)
            if kind in (None, INACTIVE_L1, INACTIVE_L2):
                continue
            if await self._driver.settled(self._image.refs.get, cluster) == 1:
                text = f"Preventing freeing of metadata ({kind})"
                self._driver.corrupt(text, offset=cluster << bits, size=1 << bits)
                raise OSError(errno.EINVAL, text)


def _joined(freed: list[Freed]) -> list[Freed]:
    """The same in the order they lie in the file, with neighbours as one: a hole is as much work as a large one."""
    joined: list[Freed] = []
    for first, count, why in sorted(freed, key=lambda each: (each.why.value, each.first)):
        if joined and joined[-1].why is why and joined[-1].first + joined[-1].clusters == first:
            joined[-1] = Freed(joined[-1].first, joined[-1].clusters + count, why)
        else:
            joined.append(Freed(first, count, why))
    return joined
