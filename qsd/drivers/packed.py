"""Compressed clusters: fetched many at a time, unpacked beside the loop, and kept for whoever reads on.

Unpacking lets go of the interpreter's lock, so threads unpack while the loop does, one for every further processor;
each takes several clusters, because a thread takes as long to wake up as to unpack one. The loop takes a little in
every round, so that everybody else has a turn. Clusters that lie side by
side in the file are fetched with one request. The last clusters stay in memory (``BUDGET`` bytes), because a
reader of 4 KiB would otherwise unpack each cluster many times over.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from qsd.drivers.base import Child
from qsd.drivers.gather import Gather

if TYPE_CHECKING:
    from qsd.drivers.mapped import MappedDriver

# Bytes of unpacked clusters one node keeps.
BUDGET: Final = 4 << 20
# Packed bytes fetched with one request, and what may lie between two clusters fetched together.
FETCH: Final = 512 << 10
GAP: Final = 4096
# Threads of one node that unpack or pack, and the packed bytes one unpacks at a time (in a millisecond or less).
LANES: Final = min(len(os.sched_getaffinity(0)) - 1, 8)
PORTION: Final = 256 << 10
# The packed bytes the loop unpacks itself at a time: waking up a thread for less would take as long.
AT_ONCE: Final = 64 << 10

Unpack = Callable[[int, memoryview], bytes | bytearray]


class Cluster:
    """One that is being unpacked. ``waiting``: where its bytes go, from which of them on, as a part of what."""

    __slots__ = ("child", "data", "error", "length", "offset", "packed", "waiting", "where")

    def __init__(self, where: int, child: Child, offset: int, length: int) -> None:
        self.where = where
        self.child = child
        self.offset = offset
        self.length = length
        self.waiting: list[tuple[int, memoryview, Gather]] = []
        self.packed: memoryview | None = None
        self.data: bytes | bytearray | None = None
        self.error = 0


class Unpacker:
    """The unpacked clusters of one node; ``where`` is what its ``locate`` and ``unpack`` take."""

    def __init__(self, driver: MappedDriver, unpack: Unpack) -> None:
        self._driver = driver
        self._unpack = unpack
        self._cache: dict[int, bytes | bytearray] = {}
        self._size = 0
        # What is being unpacked, what is to be fetched with the next batch, what has been fetched.
        self._clusters: dict[int, Cluster] = {}
        self._wanted: list[Cluster] = []
        self._fetched: deque[Cluster] = deque()
        self._running = 0
        self._goes_on = False
        self.at_once = AT_ONCE

    @property
    def size(self) -> int:
        """Bytes kept."""
        return self._size

    def read(self, where: int, skip: int, view: memoryview, gather: Gather) -> None:
        """Fill ``view`` with what the cluster holds from its byte ``skip`` on, as a part of ``gather``."""
        data = self._cache.get(where)
        if data is not None:
            view[:] = memoryview(data)[skip : skip + len(view)]
            return
        gather.left += 1
        cluster = self._clusters.get(where)
        if cluster is None:
            cluster = self._clusters[where] = Cluster(where, *self._driver.locate(where))
            if not self._wanted:
                self._driver.resume(self._fetch_wanted)
            self._wanted.append(cluster)
        cluster.waiting.append((skip, view, gather))

    def forget(self, where: int) -> None:
        """What is stored there will be something else. Reads under way get what it was, and later ones do not."""
        self._clusters.pop(where, None)
        data = self._cache.pop(where, None)
        if data is not None:
            self._size -= len(data)

    def clear(self) -> None:
        """Forget everything."""
        self._clusters.clear()
        self._cache.clear()
        self._size = 0

    # -- fetching ---------------------------------------------------------------------------------------------

    def _fetch_wanted(self) -> None:
        wanted, self._wanted = self._wanted, []
        group: list[Cluster] = []
        for cluster in wanted:
            if group and not _joins(group, cluster):
                self._fetch(group)
                group = []
            group.append(cluster)
        self._fetch(group)

    def _fetch(self, group: list[Cluster]) -> None:
        first, last = group[0], group[-1]
        base = first.offset
        packed = memoryview(bytearray(last.offset + last.length - base))

        def fetched(error: int) -> None:
            if error and len(group) > 1:
                # Only those whose own bytes cannot be read fail.
                for cluster in group:
                    self._fetch([cluster])
                return
            for cluster in group:
                if error:
                    cluster.error = error
                    self._ended(cluster)
                else:
                    start = cluster.offset - base
                    cluster.packed = packed[start : start + cluster.length]
                    if not self._fetched:
                        # When all that ends at the same time is there, to be shared out.
                        self._driver.resume(self._unpack_more)
                    self._fetched.append(cluster)
            self._driver.send()

        self._driver.fetch(first.child, base, packed, fetched)

    # -- unpacking --------------------------------------------------------------------------------------------

    def _unpack_more(self) -> None:
        """Let every lane that is free have its share; the loop is one of them, a little at a time."""
        fetched = self._fetched
        aio = self._driver.host.aio
        is_little = not self._running and sum(cluster.length for cluster in fetched) <= self.at_once
        while fetched and self._running < LANES and not is_little:
            lanes = LANES - self._running + (self.at_once > 0)
            portion = _portion(fetched, -(-len(fetched) // lanes), PORTION, is_any=True)
            self._running += 1
            aio.call(partial(self._unpack_all, portion), partial(self._unpacked, portion))
        own = _portion(fetched, len(fetched), self.at_once, is_any=not LANES)
        self._unpack_all(own)
        self._tell(own)
        if fetched and own and not self._goes_on:
            self._goes_on = True
            aio.soon(self._go_on)

    def _go_on(self) -> None:
        self._goes_on = False
        self._unpack_more()

    def _unpack_all(self, portion: list[Cluster]) -> int:
        """Unpack; on a thread, or on the loop."""
        for cluster in portion:
            assert cluster.packed is not None
            try:
                cluster.data = self._unpack(cluster.where, cluster.packed)
            except OSError as error:
                cluster.error = error.errno or errno.EIO
        return 0

    def _unpacked(self, portion: list[Cluster], _result: int) -> None:
        self._running -= 1
        self._tell(portion)
        self._unpack_more()

    def _tell(self, portion: list[Cluster]) -> None:
        for cluster in portion:
            self._ended(cluster)

    def _ended(self, cluster: Cluster) -> None:
        data = cluster.data
        if self._clusters.get(cluster.where) is cluster:
            del self._clusters[cluster.where]
            if data is not None:
                self._keep(cluster.where, data)
        whole = None if data is None else memoryview(data)
        for skip, view, gather in cluster.waiting:
            if whole is not None:
                view[:] = whole[skip : skip + len(view)]
            gather.end(cluster.error)

    def _keep(self, where: int, data: bytes | bytearray) -> None:
        cache = self._cache
        cache[where] = data
        self._size += len(data)
        # At least two: a request that ends in one cluster and the next that begins there.
        while self._size > BUDGET and len(cache) > 2:
            oldest = next(iter(cache))
            self._size -= len(cache.pop(oldest))


def _portion(fetched: deque[Cluster], most: int, size: int, *, is_any: bool) -> list[Cluster]:
    """Take clusters from the queue, ``most`` and ``size`` packed bytes at most; the first is ``is_any``'s size."""
    portion: list[Cluster] = []
    while fetched and len(portion) < most and (fetched[0].length <= size or (is_any and not portion)):
        size -= fetched[0].length
        portion.append(fetched.popleft())
    return portion


def _joins(group: list[Cluster], cluster: Cluster) -> bool:
    """Whether a cluster is fetched along with those of ``group``: it lies behind them, close by."""
    first, last = group[0], group[-1]
    return (
        cluster.child is first.child
        and last.offset < cluster.offset <= last.offset + last.length + GAP
        and last.offset + last.length <= cluster.offset + cluster.length
        and cluster.offset + cluster.length - first.offset <= FETCH
    )
