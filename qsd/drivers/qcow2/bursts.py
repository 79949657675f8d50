"""Small writes into clusters that do not exist yet, several at a time.

What arrives together is given host clusters in a row. Where there is a backing file, its content for all of them
is read into one buffer, the data is put in, and one write takes the whole to the file; without one the clusters
read as zeroes already, and every request is written by itself. Then all L2 entries are set.

Only the plain case is served: anything else, whatever was Cold and whatever failed goes through ``Writer``, request
by request, as if it had never been here.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from qsd.drivers.mapped import READ, fill_zeroes
from qsd.drivers.qcow2.geometry import COPIED
from qsd.drivers.qcow2.writing import WRITE, EntryChanger
from qsd.drivers.runs import Cold
from qsd.drivers.spot import Finder
from qsd.host.memory import AlignedPool
from qsd.messages import Flag, ReplyQueue, Request

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable

    from qsd.drivers.base import Child
    from qsd.drivers.qcow2.driver import Qcow2Driver
    from qsd.drivers.qcow2.image import Image
    from qsd.drivers.qcow2.writing import Writer

ASIDE: Final = Flag.ASIDE.value
# Bytes of clusters put together for one write, and the most clusters.
TOGETHER: Final = 512 << 10
MOST: Final = 32
# Buffers kept for the next bursts.
KEPT: Final = 4 << 20


class Burst(ReplyQueue):
    """Writes that get clusters in a row from ``host`` on, one each. The reply queue of its own parts."""

    __slots__ = (
        "bursts",
        "error",
        "host",
        "is_writing",
        "item",
        "left",
        "places",
        "requests",
        "tables",
        "waiting",
    )

    def __init__(self, bursts: Bursts, requests: list[Request]) -> None:
        self.ready = []
        self.armed = True
        self.bursts = bursts
        self.requests = requests
        self.waiting: list[Callable[[], None]] = []
        self.tables: dict[int, array[int]] = {}
        # Where the guest wants them, and who waits for their ends.
        self.places: list[tuple[int, ReplyQueue]] = []
        self.host = 0
        self.left = 0
        self.error = 0
        self.is_writing = False
        self.item: tuple[memoryview, int] | None = None

    def notify(self) -> None:
        """A part has ended."""
        self.armed = True
        error = self.ready.pop().error
        if error:
            self.error = error
        self.left -= 1
        if not self.left:
            self.bursts.go_on(self)


class Bursts(EntryChanger):
    """See the module."""

    def __init__(self, driver: Qcow2Driver, image: Image, writer: Writer) -> None:
        super().__init__(driver, image, writer)
        # Guest cluster -> who is about to change its entry.
        self._busy = writer.busy
        self._mask = self._size - 1
        self._pool = AlignedPool(KEPT)
        is_plain = self._words == 1 and not image.geometry.has_data_file and not image.is_encrypted
        self._finder: Finder | None = None
        # Requests one burst takes; 0 for an image whose clusters are never plain enough.
        self.most = min(TOGETHER >> self._bits, MOST) if is_plain else 0

    def take(self, burst: Burst | None, request: Request, cluster: int) -> Burst:
        """Put a request into ``burst``, or into another that begins when there is no more room in it.

        The request lies within ``cluster``, which has no entry and is not busy, nor beyond the disk's end or that
        of the backing file. It has no flags.
        """
        if burst is None:
            burst = Burst(self, [request])
        elif len(burst.requests) < self.most:
            burst.requests.append(request)
        else:
            self.begin(burst)
            burst = Burst(self, [request])
        self._busy[cluster] = burst
        return burst

    def begin(self, burst: Burst) -> None:
        """Give the requests their clusters, and start."""
        image, requests, shift = self._image, burst.requests, self._bits + self._slice_bits
        try:
            for request in requests:
                number = request.offset >> shift
                if number not in burst.tables:
                    burst.tables[number] = image.writable_slice(number)
                    image.dirty.pin(number)
            burst.host, count, is_fresh = image.allocate(len(requests))
        except (Cold, OSError):
            self._unpin(burst)
            self._dissolve(burst)
            return
        others = requests[count:]
        if others:
            # The row ends with its refcount block, or before clusters in use.
            del requests[count:]
            rest = Burst(self, others)
            for request in others:
                self._busy[request.offset >> self._bits] = rest
            # Who waits for one of the others looks again when the first have ended.
            self._start(burst, is_fresh)
            self.begin(rest)
        else:
            self._start(burst, is_fresh)

    def _start(self, burst: Burst, is_fresh: bool) -> None:
        requests, size, mask = burst.requests, self._size, self._mask
        burst.left = count = len(requests)
        burst.places = [(request.offset, request.reply) for request in requests]
        self._driver.in_flight += count
        backing = self._driver.backing
        if backing is None and is_fresh:
            host = burst.host
            for request in requests:
                request.offset = host + (request.offset & mask)
                request.reply = burst
                host += size
            burst.is_writing = True
            self._image.map.data.submit(requests)
            return
        try:
            burst.item = self._pool.take(count * size)
        except OSError:
            # No memory for all of them at once.
            self._give_up(burst)
            return
        view = burst.item[0]
        if backing is None:
            fill_zeroes(view[: count * size])
            self._write(burst)
            return
        reads = self._not_cached(burst, backing, view)
        burst.left = len(reads)
        if reads:
            backing.submit(reads)
        else:
            self._write(burst)

    def _not_cached(self, burst: Burst, backing: Child, view: memoryview) -> list[Request]:
        """Read the content below as far as that goes on the spot; what has to be read in the usual way."""
        size, mask = self._size, self._mask
        if self._finder is None or self._finder.target is not backing:
            self._finder = Finder(backing)
        find = self._finder.find()
        reads = []
        start = 0
        for request in burst.requests:
            low, part = request.offset & ~mask, view[start : start + size]
            start += size
            place = find(low, size) if find is not None else None
            if place is not None:
                fd, where, flags = place
                try:
                    if os.preadv(fd, (part,), where, flags) == size:
                        continue
                except OSError:
                    find = None
            reads.append(Request(READ, low, size, part, burst))
        return reads

    def go_on(self, burst: Burst) -> None:
        """All parts of a step have ended."""
        if burst.is_writing or burst.error:
            self._finish(burst)
        else:
            self._write(burst)

    def _write(self, burst: Burst) -> None:
        """The content is there: put the data in, and let one request take all of it to the file."""
        assert burst.item is not None
        view = burst.item[0]
        start = 0
        for request in burst.requests:
            low = start + (request.offset & self._mask)
            view[low : low + request.length] = request.buffer  # type: ignore[assignment]  # a write's
            start += self._size
        burst.is_writing = True
        burst.left = 1
        # Another processor copies it to the page cache while this one reads for the next burst.
        flags = ASIDE if len(burst.requests) > 1 else 0
        self._driver.post(self._image.map.data, Request(WRITE, burst.host, start, view[:start], burst, flags))
        self._driver.send()

    def _finish(self, burst: Burst) -> None:
        driver = self._driver
        if burst.item is not None:
            self._pool.give_back(burst.item)
        for request, (offset, reply) in zip(burst.requests, burst.places, strict=True):
            request.offset = offset
            request.reply = reply
        if burst.error:
            self._give_up(burst)
        else:
            self._link(burst)
            self._unpin(burst)
            self._let_go(burst)
            for request in burst.requests:
                request.complete()
            driver.finished(len(burst.requests))
        driver.send()

    def _give_up(self, burst: Burst) -> None:
        """Nothing has come of it but the clusters' allocation."""
        self._unpin(burst)
        self._image.give_back(burst.host, len(burst.requests))
        self._dissolve(burst)
        self._driver.finished(len(burst.requests))

    def _link(self, burst: Burst) -> None:
        image, bits, slice_bits, slice_mask = self._image, self._bits, self._slice_bits, self._slice_mask
        entry, clusters = burst.host | COPIED, [request.offset >> bits for request in burst.requests]
        for number, table in burst.tables.items():
            indexes = [cluster & slice_mask for cluster in clusters if cluster >> slice_bits == number]
            if indexes:
                image.dirty.touch(number, table, min(indexes), max(indexes) + 1)
        for cluster in clusters:
            burst.tables[cluster >> slice_bits][cluster & slice_mask] = entry
            entry += self._size

    def _unpin(self, burst: Burst) -> None:
        for number in burst.tables:
            self._image.dirty.unpin(number)

    def _let_go(self, burst: Burst) -> None:
        """The entries are no longer about to change; who waited for that looks again."""
        for request in burst.requests:
            del self._busy[request.offset >> self._bits]
        for waiting in burst.waiting:
            self._driver.resume(waiting)

    def _dissolve(self, burst: Burst) -> None:
        """Let the writer serve the requests one by one. Whoever calls this sees to ``send``."""
        self._let_go(burst)
        for request in burst.requests:
            self._driver.serve(request)
