"""Transfers with O_DIRECT: whole batches through the aio engine, bounced where a buffer's address is not aligned.

An NBD payload lies where the client's header ended, so writes are bounced as a rule; reads lie in a slab that was
laid out for the node's alignment.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from qsd.drivers.base import Aio, Driver
from qsd.drivers.gather import Callback
from qsd.host.memory import AlignedPool, address_of
from qsd.messages import Op, Request

WRITE = Op.WRITE.value
# Free bounce buffers a node keeps: what one busy NBD client has under way.
POOL_BYTES = 4 << 20

Transfers = list[tuple[Request, int]]


class DirectIo:
    """``ended`` gets requests with the results of their system calls, as from ``Aio.transfer``."""

    def __init__(self, aio: Aio, ended: Callable[[Transfers], None]) -> None:
        self._aio = aio
        self._ended = ended
        self._pool = AlignedPool(POOL_BYTES)
        self._bounced: dict[Request, tuple[memoryview, int]] = {}
        # Where the rests of short reads end: the last one ends the whole.
        self._rests = Callback(lambda rest: rest.tag.complete(rest.error))

    def transfer(self, fd: int, requests: list[Request], alignment: int) -> None:
        """Queue requests, all READ or all WRITE without FUA. ``alignment`` is that of buffers' addresses."""
        mask = alignment - 1
        places = []
        try:
            for request in requests:
                buffer = request.buffer
                assert buffer is not None
                address = address_of(buffer)
                places.append(self._bounce(request, buffer) if address & mask else (buffer, address))
        except OSError as error:
            # No memory.
            result = -(error.errno or errno.ENOMEM)
            self._done([(request, result) for request in requests])
            return
        self._aio.transfer(fd, requests, places, self._done)

    def _bounce(self, request: Request, buffer: memoryview) -> tuple[memoryview, int]:
        bounce = self._bounced[request] = self._pool.take(request.length)
        if request.op == WRITE:
            bounce[0][: request.length] = buffer
        return bounce

    def _done(self, transfers: Transfers) -> None:
        if self._bounced:
            for request, result in transfers:
                bounce = self._bounced.pop(request, None)
                if bounce is not None:
                    if request.op != WRITE and result > 0:
                        request.buffer[:result] = bounce[0][:result]  # type: ignore[index]  # lent: never None
                    self._pool.give_back(bounce)
        self._ended(transfers)

    def rest(self, request: Request, have: int) -> Request:
        """What is left to read of a request, or of the rest of one, when ``have`` bytes of it are there."""
        assert request.buffer is not None
        whole = request.tag if request.reply is self._rests else request
        length, buffer = request.length - have, request.buffer[have:]
        return Request(request.op, request.offset + have, length, buffer, self._rests, 0, whole)

    def let_go(self) -> None:
        """Free the buffers that are kept."""
        self._pool.clear()


def is_end(driver: Driver, position: int) -> bool:
    """Whether a read that ended at ``position`` met the end of the file, which may have been cut off meanwhile.

    Anywhere else there is more: before Linux 6.0 io_uring ended reads where an extent does (btrfs).
    """
    return position >= driver.length or position % driver.limits.request_alignment != 0


def aligned(buffer: memoryview, alignment: int) -> memoryview:
    """The buffer itself, or a copy of it that lies well."""
    if address_of(buffer) % alignment == 0:
        return buffer
    copy = AlignedPool(0).take(len(buffer))[0][: len(buffer)]
    copy[:] = buffer
    return copy
