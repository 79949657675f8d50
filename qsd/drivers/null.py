"""null-co and null-aio: a node of any size that stores nothing. Reads are zeroes, never old memory."""

from __future__ import annotations

import errno
import json
from typing import ClassVar

import trio

from qsd.drivers.base import SECTOR, Driver, Limits
from qsd.drivers.filenames import object_text
from qsd.errors import QmpError, errno_text
from qsd.messages import BlockState, Extent, Op, Request

DEFAULT_SIZE = 1 << 30
MAX_SIZE = (1 << 63) - (1 << 30)  # of any node in the reference: room for every alignment


class NullDriver(Driver):
    """Both drivers: null-co answers on the spot, null-aio from a task; ``latency-ns`` delays a batch."""

    name: ClassVar[str] = "null-co"
    is_asynchronous: ClassVar[bool] = False
    lasting: ClassVar[tuple[str, ...]] = ("read_zeroes", "size", "latency_ns")
    fixed: ClassVar[frozenset[str]] = frozenset(lasting)

    async def open(self) -> None:
        """Take the size."""
        size = DEFAULT_SIZE if self.options.size is None else self.options.size
        if size < 0:
            raise QmpError(f"Value '{size}' is out of range for parameter 'size'")
        if size > MAX_SIZE:
            raise QmpError(f"Could not refresh total sector count: {errno_text(errno.EFBIG)}")
        self._latency = self.options.latency_ns or 0
        if self._latency >= 1 << 63:
            raise QmpError("latency-ns is invalid")
        self.length = size
        self.limits = Limits(min_mem_alignment=SECTOR)

    def submit(self, batch: list[Request]) -> None:
        """Answer; later when there is a latency."""
        if self._latency or self.is_asynchronous:
            self.in_flight += len(batch)
            self.host.spawn(self._later, batch, name="latency")
        else:
            for request in batch:
                self._answer(request)

    async def _later(self, batch: list[Request]) -> None:
        try:
            if self._latency:
                await trio.sleep(self._latency / 1e9)
            else:
                await trio.lowlevel.checkpoint()
        finally:
            for request in batch:
                self.finished()
                self._answer(request)

    def _answer(self, request: Request) -> None:
        if request.op == Op.READ and request.buffer is not None:
            request.buffer[:] = bytes(request.length)
        elif request.op == Op.BLOCK_STATUS:
            state = BlockState.ALLOCATED
            state |= BlockState.ZERO if self.options.read_zeroes else BlockState.DATA
            request.result = [Extent(request.length, state)]
        request.complete(0)

    def allocated_size(self) -> int:
        """Nothing."""
        return 0

    def filename(self) -> str:
        """``null-co://`` unless options must be named."""
        shown: dict[str, str] = {}
        if self.options.size is not None:
            shown["size"] = json.dumps(self.options.size)
        if self.options.read_zeroes is not None:
            shown["read-zeroes"] = json.dumps(self.options.read_zeroes)
        return "json:" + object_text(self.name, shown) if shown else f"{self.name}://"


class NullAioDriver(NullDriver):
    """Answers from a task."""

    name = "null-aio"
    is_asynchronous = True
