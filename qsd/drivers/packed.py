"""Compressed clusters: fetched many at a time, unpacked beside the loop, and kept for whoever reads on.

Unpacking lets go of the interpreter's lock, so threads unpack while the loop does, one for every further processor.
All take from one queue: a thread until it is empty, because it takes as long to wake up as to unpack a cluster; the
loop a little in every round, so that everybody else has a turn. Who unpacks a cluster also copies it to where it is
wanted, while it is in the processor's cache. Clusters that lie side by side in the file are fetched with one
request. The last ones of which only a part was wanted stay in memory (``BUDGET`` bytes), because a reader of 4 KiB
would otherwise unpack each cluster many times over.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from qsd.drivers.base import Child
from qsd.drivers.gather import Gather
from qsd.host.memory import AlignedPool

if TYPE_CHECKING:
    from qsd.drivers.mapped import MappedDriver

# Bytes of unpacked clusters one node keeps.
BUDGET: Final = 4 << 20
# Packed bytes fetched with one request, and what may lie between two clusters fetched together.
FETCH: Final = 512 << 10
GAP: Final = 4096
# Bytes of buffers for packed clusters one node keeps: new ones would be zeroed first.
KEPT: Final = 2 << 20
# Threads of one node that unpack or pack.
LANES: Final = min(len(os.sched_getaffinity(0)) - 1, 8)
# The packed bytes the loop unpacks itself at a time: waking up a thread for less would take as long.
AT_ONCE: Final = 64 << 10

Unpack = Callable[[int, memoryview], bytes | bytearray]


class Cluster:
    """One that is being unpacked. ``waiting``: from which of its bytes on, where they go, as a part of what.

    The first ``filled`` of these have their bytes. It ``is_used_up`` when somebody wanted all of it: who reads
    whole clusters does not come back for one.
    """

    __slots__ = (
        "child",
        "data",
        "error",
        "fetch",
        "filled",
        "is_used_up",
        "length",
        "offset",
        "packed",
        "waiting",
        "where",
    )

    def __init__(self, where: int, child: Child, offset: int, length: int) -> None:
        self.where = where
        self.child = child
        self.offset = offset
        self.length = length
        self.waiting: list[tuple[int, memoryview, Gather]] = []
        self.fetch: Fetch | None = None
        self.packed: memoryview | None = None
        self.data: bytes | bytearray | None = None
        self.error = 0
        self.filled = 0
        self.is_used_up = False

    def fill(self) -> None:
        """Copy the bytes to where they are wanted, as far as that has not been done."""
        assert self.data is not None
        data = memoryview(self.data)
        for skip, view, _gather in self.waiting[self.filled :]:
            self.filled += 1
            if len(view) == len(data):
                view[:] = data
                self.is_used_up = True
            else:
                view[:] = data[skip : skip + len(view)]


class Fetch:
    """The packed bytes of clusters that were fetched together; ``left`` of them are still to be unpacked."""

    __slots__ = ("item", "left")

    def __init__(self, item: tuple[memoryview, int], left: int) -> None:
        self.item = item
        self.left = left


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
        # What threads have unpacked and the loop has not told yet.
        self._unpacked: deque[Cluster] = deque()
        self._pool = AlignedPool(KEPT)
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

    def let_go(self) -> None:
        """Forget everything, and free the buffers that are kept."""
        self.clear()
        self._pool.clear()

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
        size = last.offset + last.length - base
        fetch = Fetch(self._pool.take(size), len(group))
        packed = fetch.item[0][:size]

        def fetched(error: int) -> None:
            if error and len(group) > 1:
                # Only those whose own bytes cannot be read fail.
                self._pool.give_back(fetch.item)
                for cluster in group:
                    self._fetch([cluster])
                return
            for cluster in group:
                cluster.fetch = fetch
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
        """Let every lane that is free begin; the loop is one of them, a little at a time."""
        fetched = self._fetched
        aio = self._driver.host.aio
        if fetched and self._running < LANES and (self._running or not self._is_little()):
            for _ in range(min(LANES - self._running, len(fetched))):
                self._running += 1
                aio.call(self._unpack_all, self._lane_ended)
        size = self.at_once
        cluster = self._take(size, is_any=not LANES)
        if cluster is None:
            return
        while cluster is not None:
            size -= cluster.length
            self._unpack_one(cluster)
            self._ended(cluster)
            cluster = self._take(size)
        if fetched and not self._goes_on:
            self._goes_on = True
            aio.soon(self._go_on)

    def _take(self, size: int, *, is_any: bool = False) -> Cluster | None:
        """The next cluster, if it has ``size`` packed bytes at most or ``is_any`` size. A thread may be faster."""
        try:
            return self._fetched.popleft() if is_any or self._fetched[0].length <= size else None
        except IndexError:
            return None

    def _is_little(self) -> bool:
        """Whether the loop is done sooner than a thread would have woken up. No thread is at the queue."""
        return sum(cluster.length for cluster in self._fetched) <= self.at_once

    def _go_on(self) -> None:
        self._goes_on = False
        self._unpack_more()

    def _unpack_all(self) -> int:
        """Unpack, on a thread, until nothing is left. Who begins to wait meanwhile is left to ``_ended``."""
        fetched, unpacked = self._fetched, self._unpacked
        while True:
            try:
                cluster = fetched.popleft()
            except IndexError:
                return 0
            self._unpack_one(cluster)
            unpacked.append(cluster)
            if len(unpacked) == 1:
                self._driver.host.aio.soon(self._tell)

    def _tell(self) -> None:
        unpacked = self._unpacked
        while unpacked:
            self._ended(unpacked.popleft())

    def _lane_ended(self, _result: int) -> None:
        self._running -= 1
        self._tell()
        self._unpack_more()

    def _unpack_one(self, cluster: Cluster) -> None:
        assert cluster.packed is not None
        try:
            cluster.data = self._unpack(cluster.where, cluster.packed)
            cluster.fill()
        except OSError as error:
            cluster.error = error.errno or errno.EIO

    def _ended(self, cluster: Cluster) -> None:
        fetch, data = cluster.fetch, cluster.data
        assert fetch is not None
        fetch.left -= 1
        if not fetch.left:
            self._pool.give_back(fetch.item)
        if data is not None:
            cluster.fill()
        if self._clusters.get(cluster.where) is cluster:
            del self._clusters[cluster.where]
            if data is not None and not cluster.is_used_up:
                self._keep(cluster.where, data)
        for _skip, _view, gather in cluster.waiting:
            gather.end(cluster.error)

    def _keep(self, where: int, data: bytes | bytearray) -> None:
        cache = self._cache
        cache[where] = data
        self._size += len(data)
        # At least two: a request that ends in one cluster and the next that begins there.
        while self._size > BUDGET and len(cache) > 2:
            oldest = next(iter(cache))
            self._size -= len(cache.pop(oldest))


def _joins(group: list[Cluster], cluster: Cluster) -> bool:
    """Whether a cluster is fetched along with those of ``group``: it lies behind them, close by."""
    first, last = group[0], group[-1]
    return (
        cluster.child is first.child
        and last.offset < cluster.offset <= last.offset + last.length + GAP
        and last.offset + last.length <= cluster.offset + cluster.length
        and cluster.offset + cluster.length - first.offset <= FETCH
    )
