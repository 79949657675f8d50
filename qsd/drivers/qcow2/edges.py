"""Zeroing less than a cluster: the whole of it becomes zero in the L2 table where that is what the guest sees then.

That is so where nothing of the cluster (with extended entries: of the subcluster) is stored here, and the rest of
it reads as zeroes, wherever that comes from. Everywhere else zero bytes are written. The choice is the reference's.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from qsd.drivers.calls import call
from qsd.drivers.gather import Gather
from qsd.drivers.mapped import ZEROES
from qsd.drivers.qcow2.geometry import COMPRESSED
from qsd.drivers.qcow2.planning import subclusters
from qsd.drivers.qcow2.writing import WRITE, EntryChanger
from qsd.drivers.runs import UNALLOCATED, ZERO
from qsd.messages import BlockState, Flag, Op, Request

if TYPE_CHECKING:
    from qsd.drivers.qcow2.driver import Qcow2Driver
    from qsd.drivers.qcow2.image import Image
    from qsd.drivers.qcow2.writing import Writer

NO_FALLBACK: Final = Flag.NO_FALLBACK.value
# Extents of the backing file that are asked for at a time.
EXTENTS: Final = 64

# Start and end of a part of a request.
Range = tuple[int, int]


class EdgeZeroer(EntryChanger):
    """See the module. ``zero_cluster(cluster, flags)`` marks a whole cluster that is not about to change."""

    def __init__(
        self, driver: Qcow2Driver, image: Image, writer: Writer, zero_cluster: Callable[[int, int], None]
    ) -> None:
        super().__init__(driver, image, writer)
        self._zero_cluster = zero_cluster
        self._unit = 1 << image.geometry.subcluster_bits

    def zero(self, gather: Gather, parts: list[Range]) -> None:
        """Zero parts of a request, none of which has a whole cluster inside, as parts of ``gather``."""
        request = gather.request
        for start, end in parts:
            if start < end:
                gather.left += 1
                part = Request(Op.WRITE_ZEROES.value, start, end - start, None, gather, request.flags)
                self._driver.resume(partial(self._driver.serve_with, self._zero_part, part))

    def zero_in_order(self, request: Request, parts: list[Range]) -> None:
        """Zero the parts of a request one after the other, up to the first that cannot be."""
        self._driver.started()
        self._driver.host.spawn(self._zero_in_order, request, parts, name="write zeroes in order")

    async def _zero_in_order(self, request: Request, parts: list[Range]) -> None:
        error = 0
        try:
            for start, end in parts:
                if start < end:
                    await call(self._driver, Op.WRITE_ZEROES, start, end - start, None, request.flags)
        except OSError as problem:
            error = problem.errno or errno.EIO
        self._driver.finished()
        request.complete(error)
        self._driver.send()

    def _zero_part(self, _driver: Qcow2Driver, part: Request, rest_is_zero: bool | None = None) -> None:
        """Zero what has no whole cluster inside. Raises Cold, OSError.

        ``rest_is_zero``: what the backing file has said of the rest of the unit the part is in.
        """
        offset, end, unit = part.offset, part.offset + part.length, self._unit
        first = min(end, -(-offset // unit) * unit)
        last = end if end >= self._driver.length else max(first, end // unit * unit)
        middle = (offset // self._size + 1) * self._size
        parts = [(offset, middle), (middle, end)] if middle < end else [(offset, first), (first, last), (last, end)]
        if sum(start < stop for start, stop in parts) > 1:
            self._zero_parts(part, parts)
            return
        cluster = offset >> self._bits
        if self._writer.is_blocked(part, cluster, cluster):
            return
        is_whole = first < last
        start = offset // unit * unit
        kind, _run, _where, _child = self._image.map.lookup(start, 1)
        if not is_whole and kind == UNALLOCATED and rest_is_zero is None:
            rest = self._below(start, offset), self._below(end, start + unit)
            if any(low < high for low, high in rest):
                self._driver.started()
                self._driver.host.spawn(self._ask_below, part, rest, name="look at the rest of a cluster")
                return
        if (is_whole or kind == ZERO or (kind == UNALLOCATED and rest_is_zero is not False)) and self._mark(
            cluster, start, last if is_whole else start + unit, part.flags
        ):
            part.complete()
        elif part.flags & NO_FALLBACK:
            part.complete(errno.EOPNOTSUPP)
        else:
            self._write_bytes(part)

    def _zero_parts(self, part: Request, parts: list[Range]) -> None:
        if part.flags & NO_FALLBACK:
            self.zero_in_order(part, parts)
            return
        gather = Gather(self._driver, part)
        self.zero(gather, parts)
        gather.end()

    # -- marking ----------------------------------------------------------------------------------------------

    def _mark(self, cluster: int, start: int, end: int, flags: int) -> bool:
        """Let whole units of a cluster read as zeroes; False where an entry cannot say so. Raises Cold, OSError."""
        if self._words == 1:
            self._zero_cluster(cluster, flags)
            return True
        bits = self._image.geometry.subcluster_bits
        base = cluster << self._bits
        number, word = cluster >> self._slice_bits, 2 * (cluster & self._slice_mask)
        table = self._image.writable_slice(number)
        entry, bitmap = table[word], table[word + 1]
        if entry & COMPRESSED:
            return False
        marked = subclusters(start - base >> bits, end - base - 1 >> bits)
        self._image.dirty.touch(number, table, word, word + 2)
        table[word + 1] = bitmap & ~marked | marked << 32
        return True

    def _write_bytes(self, part: Request) -> None:
        part.op = WRITE
        length = part.length
        part.buffer = ZEROES[:length] if length <= len(ZEROES) else memoryview(bytes(length))
        part.flags = 0
        self._writer.write(part)

    # -- the backing file -------------------------------------------------------------------------------------

    def _below(self, start: int, end: int) -> Range:
        """The part of a range, up to the disk's end, that the backing file has."""
        backing = self._driver.backing
        return start, start if backing is None else min(end, self._driver.length, backing.length)

    async def _ask_below(self, part: Request, rest: tuple[Range, ...]) -> None:
        try:
            is_zero = await self._is_zero_below(rest)
        except OSError:
            # Then it is no zeroes for all we know: writing bytes reads it, and fails for the client if that does.
            is_zero = False
        finally:
            self._driver.finished()
        # The backing file cannot change meanwhile, this layer can: it is looked at again.
        handler = partial(self._zero_part, rest_is_zero=is_zero)
        self._driver.resume(partial(self._driver.serve_with, handler, part))
        self._driver.send()

    async def _is_zero_below(self, rest: tuple[Range, ...]) -> bool:
        backing = self._driver.backing
        assert backing is not None
        for start, end in rest:
            position = start
            while position < end:
                for extent in await backing.block_status(position, end - position, EXTENTS):
                    if not extent.state & BlockState.ZERO:
                        return False
                    position += extent.length
        return True
