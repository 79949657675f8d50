"""Chardevs without a peer: ``null``, and ``ringbuf`` (old name ``memory``), which keeps what was written last."""

from __future__ import annotations

import attrs
import trio

from qsd.actors.core import receives
from qsd.errors import QmpError
from qsd.qapi.schema.chardev import ChardevCommon, ChardevRingbuf
from qsd.servers.chardev.base import Chardev, Surroundings
from qsd.servers.chardev.logfile import LogFile
from qsd.servers.chardev.stream import Stream

_DEFAULT_BYTES = 64 << 10


class NullChardev(Chardev):
    """Nobody is ever there."""

    carries_oob = False

    def __init__(self, label: str, backend: str, options: ChardevCommon, surroundings: Surroundings) -> None:
        super().__init__(label, backend, options, surroundings)

    async def open(self) -> None:
        pass

    def filename(self) -> str:
        return "null"


class Ring:
    """The last ``size`` bytes written and not read yet."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._held = bytearray()

    def write(self, data: bytes) -> None:
        """Append; the oldest bytes make room."""
        self._held += data[-self._size :]
        del self._held[: -self._size]

    def read(self, size: int) -> bytes:
        """Take up to ``size`` of the oldest bytes."""
        data = bytes(self._held[:size])
        del self._held[:size]
        return data


class RingStream(Stream):
    """The peer of a ring buffer's user: takes everything, says nothing."""

    def __init__(self, ring: Ring, log: LogFile | None) -> None:
        super().__init__(log)
        self._ring = ring

    async def wait_writable(self) -> None:
        await trio.lowlevel.checkpoint()

    def _receive(self) -> bytes:
        raise BlockingIOError

    def _send(self, data: bytes | memoryview) -> int:
        self._ring.write(bytes(data))
        return len(data)

    async def _wait_readable(self) -> None:
        await self.closed.wait()
        raise trio.ClosedResourceError

    def _close(self) -> None:
        return


@attrs.frozen
class RingWrite:
    """Append ``data``."""

    data: bytes


@attrs.frozen
class RingRead:
    """Take and answer up to ``size`` bytes."""

    size: int


class RingbufChardev(Chardev):
    """``size`` bytes, a power of two (64 KiB when absent or 0)."""

    carries_oob = False

    def __init__(self, label: str, backend: str, options: ChardevRingbuf, surroundings: Surroundings) -> None:
        super().__init__(label, backend, options, surroundings)
        self._size = options.size or _DEFAULT_BYTES
        self._ring = Ring(self._size)

    async def open(self) -> None:
        if self._size < 0 or self._size & (self._size - 1):
            raise QmpError("size of ringbuf chardev must be power of two")
        self.spawn(self.serve, RingStream(self._ring, self.log), name="ring")

    def filename(self) -> str:
        return self.backend

    @receives(RingWrite)
    async def write(self, message: RingWrite) -> None:
        self._ring.write(message.data)

    @receives(RingRead)
    async def read(self, message: RingRead) -> bytes:
        return self._ring.read(message.size)
