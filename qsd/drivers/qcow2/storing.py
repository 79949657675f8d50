"""Writing many small pieces of metadata at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import trio

from qsd.drivers.base import Child
from qsd.drivers.gather import Callback
from qsd.messages import Op, Request

# Bytes on their way at once, and pieces: tables of 512 bytes take the loop 7 us each.
BATCH: Final = 4 << 20
PIECES: Final = 256


async def write_all(child: Child, pieces: Iterable[tuple[int, bytes]]) -> None:
    """Write pieces, many at once; return when all have ended. Raises OSError."""
    waiting: list[Request] = []
    size = 0
    for offset, data in pieces:
        waiting.append(Request(Op.WRITE.value, offset, len(data), memoryview(data), _NOWHERE))
        size += len(data)
        if size >= BATCH or len(waiting) == PIECES:
            await _write_batch(child, waiting)
            waiting, size = [], 0
    if waiting:
        await _write_batch(child, waiting)


async def _write_batch(child: Child, batch: list[Request]) -> None:
    done = trio.Event()
    left = len(batch)
    failed = 0

    def ended(request: Request) -> None:
        nonlocal left, failed
        left -= 1
        failed = failed or request.error
        if not left:
            done.set()

    reply = Callback(ended)
    for request in batch:
        request.reply = reply
    child.submit(batch)
    if left:
        await done.wait()
    if failed:
        raise OSError(failed, "metadata could not be written")


_NOWHERE: Final = Callback(lambda _request: None)
