"""Writing clusters compressed: each is deflated beside the loop, then put behind the one before it in the file.

Compressed clusters are packed byte to byte; the host clusters they lie in are counted once for each (``Refcounts.
allocate_bytes``). As in the reference a compressed cluster goes only where the image has no data yet (EIO
otherwise), and one that would not get smaller is written as it is, over whatever there is. The L2 entry is changed
when the data has been written, as for every other write.
"""

from __future__ import annotations

import errno
from array import array
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from qsd.drivers.gather import Gather
from qsd.drivers.packed import LANES
from qsd.drivers.qcow2 import compressed
from qsd.drivers.qcow2.geometry import COMPRESSED, OFFSET_MASK
from qsd.drivers.qcow2.writing import FUA, WRITE, EntryChanger
from qsd.messages import ReplyQueue, Request

if TYPE_CHECKING:
    from qsd.drivers.qcow2.driver import Qcow2Driver
    from qsd.drivers.qcow2.image import Image
    from qsd.drivers.qcow2.writing import Writer

# Bytes that are deflated in one go: a thread is not worth it for less.
BATCH: Final = 64 << 10


class Storing(ReplyQueue):
    """A deflated cluster on its way to the file: the reply queue of that write."""

    __slots__ = ("entry", "number", "packer", "part", "table", "waiting")

    def __init__(self, packer: Packer, part: Request, number: int, table: array[int], entry: int) -> None:
        self.ready = []
        self.armed = True
        self.packer = packer
        self.part = part
        self.number = number
        self.table = table
        self.entry = entry
        self.waiting: list[Callable[[], None]] = []

    def notify(self) -> None:
        """It has been written."""
        self.packer.finish(self, self.ready.pop().error)


class Packer(EntryChanger):
    """See the module."""

    def __init__(self, driver: Qcow2Driver, image: Image, writer: Writer) -> None:
        super().__init__(driver, image, writer)
        self._type = image.header.compression_type
        self._batch = max(1, BATCH // self._size)
        self._queue: deque[Request] = deque()
        self._running = 0

    def write(self, request: Request) -> None:
        """Begin a compressed write, of whole clusters or up to the disk's end. Raises OSError."""
        if self._image.geometry.has_data_file:
            raise OSError(errno.EOPNOTSUPP, "no compressed clusters in an external data file")
        offset, end = request.offset, request.offset + request.length
        if offset % self._size or (end % self._size and end != self._driver.length):
            raise OSError(errno.EINVAL, "compressed writes are of whole clusters")
        buffer = request.buffer
        assert buffer is not None
        if request.flags & FUA:
            self._writer.make_durable(request)
        gather = Gather(self._driver, request)
        for start in range(offset, end, self._size):
            gather.left += 1
            length = min(self._size, end - start)
            self._queue.append(Request(WRITE, start, length, buffer[start - offset :][:length], gather))
        self._deflate_more()
        gather.end()

    def _deflate_more(self) -> None:
        queue = self._queue
        while queue and self._running <= LANES:
            self._running += 1
            self._deflate([queue.popleft() for _ in range(min(len(queue), self._batch))])

    def _deflate(self, parts: list[Request]) -> None:
        results: list[bytes | None] = []

        def work() -> int:
            results.extend([self._deflated(part.buffer) for part in parts])
            return 0

        def done(error: int) -> None:
            self._running -= 1
            for part, packed in zip(parts, results or [None] * len(parts), strict=True):
                if error:
                    part.complete(-error)
                elif packed is None:
                    self._driver.serve(part)
                else:
                    self._driver.serve_with(partial(self._store, packed), part)
            self._deflate_more()
            self._driver.send()

        self._driver.host.aio.call(work, done)

    def _deflated(self, data: memoryview | None) -> bytes | None:
        """On a thread: the bytes to store for a cluster, whose end is zeroes where the disk ends inside of it."""
        assert data is not None
        whole = data if len(data) == self._size else bytes(data).ljust(self._size, b"\0")
        return compressed.deflate(whole, self._type)

    def _store(self, packed: bytes, _driver: Qcow2Driver, part: Request) -> None:
        """Find room and write. Raises Cold and OSError with nothing changed."""
        image = self._image
        cluster = part.offset >> self._bits
        number = cluster >> self._slice_bits
        self._writer.require_free(cluster, cluster)
        table = image.writable_slice(number)
        if table[self._words * (cluster & self._slice_mask)] & (COMPRESSED | OFFSET_MASK):
            raise OSError(errno.EIO, "there is data already")
        host = image.refs.allocate_bytes(len(packed))
        try:
            entry = compressed.encode_entry(host, len(packed), self._bits)
        except OverflowError as error:
            self._give_back(host, len(packed))
            raise OSError(errno.EFBIG, str(error)) from None
        storing = Storing(self, part, number, table, entry)
        self._driver.in_flight += 1
        image.dirty.pin(number)
        self._writer.busy[cluster] = storing
        self._driver.post(image.file, Request(WRITE, host, len(packed), memoryview(packed), storing))

    def finish(self, storing: Storing, error: int) -> None:
        """The data has been written, or could not be."""
        driver, image = self._driver, self._image
        cluster = storing.part.offset >> self._bits
        del self._writer.busy[cluster]
        if error:
            host, length = compressed.decode_entry(storing.entry, self._bits)
            self._give_back(host, length)
        else:
            word = self._words * (cluster & self._slice_mask)
            image.dirty.touch(storing.number, storing.table, word, word + self._words)
            storing.table[word] = storing.entry
            if self._words == 2:
                storing.table[word + 1] = 0
        image.dirty.unpin(storing.number)
        driver.finished()
        for waiting in storing.waiting:
            driver.resume(waiting)
        storing.part.complete(error)
        driver.send_resumed()

    def _give_back(self, host: int, length: int) -> None:
        first = host >> self._bits
        last = host + length - 1 >> self._bits
        self._image.give_back(first << self._bits, last - first + 1)
