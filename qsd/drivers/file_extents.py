"""Which parts of a file hold data and which are holes."""

from __future__ import annotations

import errno
from typing import Final

from qsd.drivers.base import Driver
from qsd.host import files
from qsd.messages import BlockState, Extent, Request

# Most extents one BLOCK_STATUS looks for, each of which is two lseek calls.
MAX_EXTENTS: Final = 4096


def answer_status(driver: Driver, fd: int, request: Request) -> None:
    """Answer a BLOCK_STATUS of the driver's file; what is behind its end counts as zeroes.

    Done on the spot: SEEK_DATA and SEEK_HOLE look at metadata that is in memory after the first time.
    """
    offset, end = request.offset, request.offset + request.length
    wanted = min(request.extents_wanted, MAX_EXTENTS)
    extents: list[Extent] = []
    try:
        if end > driver.length:
            # Its last sector may have been written since, which makes a file longer that ended in it.
            driver.refresh_length()
        while offset < end and len(extents) < wanted:
            if offset >= driver.length:
                extents.append(Extent(end - offset, BlockState.ZERO | BlockState.ALLOCATED))
                break
            is_data, length = files.seek_extent(fd, offset, min(end, driver.length))
            state = BlockState.DATA if is_data else BlockState.ZERO
            extents.append(Extent(length, state | BlockState.ALLOCATED))
            offset += length
    except OSError as error:
        request.complete(error.errno or errno.EIO)
        return
    request.result = extents
    request.complete(0)
