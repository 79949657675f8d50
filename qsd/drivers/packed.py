"""Compressed clusters: fetched many at a time, unpacked beside the loop, and kept for whoever reads on.

Unpacking lets go of the interpreter's lock, so threads unpack while the loop does, one for every further processor.
All take from one queue: a thread until it is empty, because it takes as long to wake up as to unpack a cluster; the
loop one in every round, and only what the threads do not get to soon, because nobody else gives them work. Who may
be lent what he wants, most of a cluster, gets no copy. For others, who unpacks a cluster also copies it to where it
is wanted, while it is in the processor's cache. Clusters that lie side by side in the file are fetched with one
request. The last ones of which only a part was wanted stay in memory (``BUDGET`` bytes), because a reader of 4 KiB
would otherwise unpack each cluster many times over.
"""

from __future__ import annotations

import errno
import os
import sys
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from qsd.drivers.base import Child
from qsd.drivers.gather import MAY_LEND, Gather, Lending, gather_read
from qsd.drivers.spot import Finder, read_now
from qsd.host.memory import AlignedPool
from qsd.messages import Pieces, ReplyQueue, Request

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
# Fetched clusters that the loop leaves to every thread at work while it has other things to do: a thread that finds
# none goes to sleep.
AHEAD: Final = 3

Unpack = Callable[[int, memoryview], bytes | bytearray]


class Cluster:
    """One that is being unpacked. ``waiting``: from which of its bytes on, where they go, as which part of what.

    The first ``filled`` of these have their bytes. ``takers`` are requests that may be lent all they want, with the
    byte that begins at. It ``is_used_up`` when somebody wanted all of it: who reads whole clusters does not come
    back for one.
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
        "takers",
        "waiting",
        "where",
    )

    def __init__(self, where: int, child: Child, offset: int, length: int) -> None:
        self.where = where
        self.child = child
        self.offset = offset
        self.length = length
        self.waiting: list[tuple[int, memoryview, Gather, int]] = []
        self.takers: list[tuple[int, Request]] = []
        self.fetch: Fetch | None = None
        self.packed: memoryview | None = None
        self.data: bytes | bytearray | None = None
        self.error = 0
        self.filled = 0
        self.is_used_up = False

    def fill(self) -> None:
        """Copy the bytes to where they are wanted, as far as that has not been done."""
        if self.filled == len(self.waiting):
            return
        assert self.data is not None
        data = memoryview(self.data)
        for skip, view, gather, position in self.waiting[self.filled :]:
            self.filled += 1
            _fill(data, skip, view, gather, position)
            if len(view) == len(data):
                self.is_used_up = True


class Fetch(ReplyQueue):
    """The packed bytes of clusters that are fetched together; ``left`` of them are still to be unpacked.

    It is the reply queue of the request that fetches them.
    """

    __slots__ = ("fetched", "group", "item", "left")

    def __init__(
        self, group: list[Cluster], item: tuple[memoryview, int], fetched: Callable[[Fetch, int], None]
    ) -> None:
        self.ready = []
        self.armed = True
        self.group = group
        self.item = item
        self.fetched = fetched
        self.left = len(group)

    def notify(self) -> None:
        """The bytes are there, or cannot be had."""
        self.armed = True
        self.fetched(self, self.ready.pop().error)


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
        self._finder: Finder | None = None
        self._running = 0
        # Whether ``_go_on`` is called in the next round; what had been fetched and unpacked when that was said.
        self._goes_on = False
        self._moves = self._seen = 0
        self.at_once = AT_ONCE

    @property
    def size(self) -> int:
        """Bytes kept."""
        return self._size

    def serve(self, request: Request, where: int, skip: int) -> None:
        """Serve a READ of what the cluster holds from its byte ``skip`` on."""
        if request.flags & MAY_LEND and where not in self._cache:
            # What large reads are, as a rule. Nothing has to be gathered.
            self._driver.in_flight += 1
            self._wait_for(where).takers.append((skip, request))
            return
        gather = gather_read(self._driver, request)
        assert request.buffer is not None
        self.read(where, skip, request.buffer, gather)
        gather.end()

    def read(self, where: int, skip: int, view: memoryview, gather: Gather, position: int = 0) -> None:
        """Fill ``view`` with what the cluster holds from its byte ``skip`` on, or lend that.

        It is the part at ``position`` of what ``gather`` gathers.
        """
        data = self._cache.get(where)
        if data is not None:
            _fill(memoryview(data), skip, view, gather, position)
            return
        gather.left += 1
        self._wait_for(where).waiting.append((skip, view, gather, position))

    def _wait_for(self, where: int) -> Cluster:
        cluster = self._clusters.get(where)
        if cluster is None:
            cluster = self._clusters[where] = Cluster(where, *self._driver.locate(where))
            if not self._wanted:
                self._driver.resume(self._fetch_wanted)
            self._wanted.append(cluster)
        return cluster

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
        try:
            item = self._pool.take(size)
        except OSError as error:
            self._not_fetched(group, error.errno or errno.ENOMEM)
            return
        buffer = item[0][:size]
        fetch = Fetch(group, item, self._fetched_later)
        finder = self._finder
        if finder is None or finder.target is not first.child:
            finder = self._finder = Finder(first.child)
        if read_now(first.child, finder.find(), base, buffer):
            self._have(fetch, 0)
        else:
            self._driver.fetch_for(fetch, first.child, base, buffer)

    def _fetched_later(self, fetch: Fetch, error: int) -> None:
        self._have(fetch, error)
        self._driver.send()

    def _have(self, fetch: Fetch, error: int) -> None:
        # What is unpacked refers to its fetch: a circle would keep it until Python looks for circles.
        group, fetch.group = fetch.group, []
        if error:
            self._pool.give_back(fetch.item)
            self._not_fetched(group, error)
            return
        self._moves += 1
        memory = fetch.item[0]
        base = group[0].offset
        for cluster in group:
            cluster.fetch = fetch
            start = cluster.offset - base
            cluster.packed = memory[start : start + cluster.length]
            if not self._fetched:
                # When all that ends at the same time is there, to be shared out.
                self._driver.resume(self._unpack_more)
            self._fetched.append(cluster)

    def _not_fetched(self, group: list[Cluster], error: int) -> None:
        """Only those whose own bytes cannot be had fail."""
        if len(group) > 1:
            for cluster in group:
                self._fetch([cluster])
        else:
            group[0].error = error
            self._ended(group[0])

    # -- unpacking --------------------------------------------------------------------------------------------

    def _unpack_more(self, *, is_idle: bool = False) -> None:
        """Let every lane that is free begin; the loop is one of them, a little at a time.

        It leaves alone what the others will take soon, unless it ``is_idle``.
        """
        fetched = self._fetched
        aio = self._driver.host.aio
        if fetched and self._running < LANES and (self._running or not self._is_little()):
            for _ in range(min(LANES - self._running, len(fetched))):
                self._running += 1
                aio.call(self._unpack_all, self._lane_ended)
        most = self.at_once if LANES else sys.maxsize
        # What one client is answered meanwhile, it asks for the next.
        size = self.at_once // 4 if self._running else self.at_once
        ahead = 0 if is_idle else AHEAD * self._running
        cluster = self._take(most, ahead)
        while cluster is not None:
            size -= cluster.length
            self._unpack_one(cluster)
            self._ended(cluster)
            cluster = self._take(size, ahead)
        if not self._goes_on and self._is_next_within(most):
            self._goes_on = True
            self._seen = self._moves
            aio.soon(self._go_on)

    def _take(self, size: int, ahead: int) -> Cluster | None:
        """The next cluster, if ``ahead`` are left then and it has ``size`` packed bytes at most."""
        try:
            return self._fetched.popleft() if len(self._fetched) > ahead and self._is_next_within(size) else None
        except IndexError:
            # A thread was faster.
            return None

    def _is_next_within(self, size: int) -> bool:
        """Whether there is a next cluster, of ``size`` packed bytes at most."""
        try:
            return self._fetched[0].length <= size
        except IndexError:
            return False

    def _is_little(self) -> bool:
        """Whether the loop is done sooner than a thread would have woken up. No thread is at the queue."""
        return sum(cluster.length for cluster in self._fetched) <= self.at_once

    def _go_on(self) -> None:
        self._goes_on = False
        self._unpack_more(is_idle=self._running > 0 and self._seen == self._moves)

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
        self._unpack_more()

    def _lane_ended(self, _result: int) -> None:
        self._running -= 1
        self._tell()

    def _unpack_one(self, cluster: Cluster) -> None:
        assert cluster.packed is not None
        try:
            cluster.data = self._unpack(cluster.where, cluster.packed)
            cluster.fill()
        except OSError as error:
            cluster.error = error.errno or errno.EIO
        except MemoryError:
            cluster.error = errno.ENOMEM

    def _ended(self, cluster: Cluster) -> None:
        self._moves += 1
        fetch, data = cluster.fetch, cluster.data
        if fetch is not None:
            fetch.left -= 1
            if not fetch.left:
                self._pool.give_back(fetch.item)
        if data is not None:
            cluster.fill()
            for skip, request in cluster.takers:
                cluster.is_used_up |= _lend(data, skip, request)
        if self._clusters.get(cluster.where) is cluster:
            del self._clusters[cluster.where]
            if data is not None and not cluster.is_used_up:
                self._keep(cluster.where, data)
        for _skip, _view, gather, _position in cluster.waiting:
            gather.end(cluster.error)
        for _skip, request in cluster.takers:
            self._driver.finished()
            request.complete(cluster.error)

    def _keep(self, where: int, data: bytes | bytearray) -> None:
        cache = self._cache
        cache[where] = data
        self._size += len(data)
        # At least two: a request that ends in one cluster and the next that begins there.
        while self._size > BUDGET and len(cache) > 2:
            oldest = next(iter(cache))
            self._size -= len(cache.pop(oldest))


def _lend(data: bytes | bytearray, skip: int, request: Request) -> bool:
    """Lend a request its bytes, or copy them where it wants little of the cluster; True when it wants all."""
    length = request.length
    view = memoryview(data)
    is_all = length == len(data)
    if _is_most(length, data):
        request.result = Pieces([view if is_all else view[skip : skip + length]])
    else:
        assert request.buffer is not None
        request.buffer[:] = view[skip : skip + length]
    return is_all


def _is_most(length: int, data: bytes | bytearray | memoryview) -> bool:
    """Whether so much of a cluster is worth lending: what is lent keeps all of it in memory."""
    return 2 * length >= len(data)


def _fill(data: memoryview, skip: int, view: memoryview, gather: Gather, position: int) -> None:
    length = len(view)
    part = data if length == len(data) else data[skip : skip + length]
    if isinstance(gather, Lending) and _is_most(length, data):
        gather.lent.append((position, part))
    else:
        view[:] = part


def _joins(group: list[Cluster], cluster: Cluster) -> bool:
    """Whether a cluster is fetched along with those of ``group``: it lies behind them, close by."""
    first, last = group[0], group[-1]
    return (
        cluster.child is first.child
        and last.offset < cluster.offset <= last.offset + last.length + GAP
        and last.offset + last.length <= cluster.offset + cluster.length
        and cluster.offset + cluster.length - first.offset <= FETCH
    )
