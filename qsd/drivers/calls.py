"""Awaiting a single request: the bridge from the data path to ordinary trio code."""

from __future__ import annotations

from typing import Protocol

import trio

from qsd.drivers.spot import Spot
from qsd.errors import errno_text
from qsd.messages import Extent, Op, ReplyQueue, Request


class Submitter(Protocol):
    """A node or a child edge."""

    def submit(self, batch: list[Request], /) -> None:
        """Take every request of the batch."""


async def call(
    target: Submitter,
    op: Op,
    offset: int,
    length: int,
    buffer: memoryview | None = None,
    flags: int = 0,
    extents: int = 1,
) -> Request:
    """Submit one request and wait for its end; raises OSError with the request's errno.

    The buffer stays lent to whoever serves the request when the wait is cancelled.
    """
    done = trio.Event()
    reply = ReplyQueue(done.set)
    request = Request(op.value, offset, length, buffer, reply, int(flags))
    request.extents_wanted = extents
    target.submit([request])
    if not reply.ready:
        reply.armed = True
        await done.wait()
    if request.error:
        raise OSError(request.error, errno_text(request.error))
    return request


class SlowPath:
    """The requests as methods to await, for whatever takes batches. All raise OSError."""

    __slots__ = ()

    def spot(self) -> Spot | None:
        """How reads are found on the spot; None: not at all."""
        return None

    async def read(self: Submitter, offset: int, length: int) -> bytes:
        """Read ``length`` bytes."""
        buffer = bytearray(length)
        await call(self, Op.READ, offset, length, memoryview(buffer))
        return bytes(buffer)

    async def write(self: Submitter, offset: int, data: bytes | bytearray | memoryview, flags: int = 0) -> None:
        """Write ``data``."""
        await call(self, Op.WRITE, offset, len(data), memoryview(data), flags)

    async def write_zeroes(self: Submitter, offset: int, length: int, flags: int = 0) -> None:
        """Make the range read as zeroes."""
        await call(self, Op.WRITE_ZEROES, offset, length, None, flags)

    async def discard(self: Submitter, offset: int, length: int) -> None:
        """Tell that the range is not needed."""
        await call(self, Op.DISCARD, offset, length)

    async def flush(self: Submitter) -> None:
        """Make everything that was completed before reach stable storage."""
        await call(self, Op.FLUSH, 0, 0)

    async def block_status(self: Submitter, offset: int, length: int, extents: int = 1) -> list[Extent]:
        """What the range is made of: at most ``extents`` extents from ``offset`` on."""
        request = await call(self, Op.BLOCK_STATUS, offset, length, extents=extents)
        result: list[Extent] = request.result
        return result
