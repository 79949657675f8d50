"""Awaiting a single request: the bridge from the data path to ordinary trio code."""

from __future__ import annotations

from typing import Protocol

import trio

from qsd.errors import errno_text
from qsd.messages import Op, ReplyQueue, Request


class Submitter(Protocol):
    """A node or a child edge."""

    def submit(self, batch: list[Request]) -> None:
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
