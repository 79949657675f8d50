"""What a monitor has to say to its client, in bounded memory.

A message is sent at once while the client keeps up. What it does not take is kept: beyond ``SOFT_LIMIT`` no further
command of this client is run (``wait_room``), and events, which come unasked, end the connection beyond
``HARD_LIMIT``.
"""

from __future__ import annotations

import logging

import trio
from trio_util import RepeatedEvent

from qsd.servers.chardev.stream import Stream

log = logging.getLogger("qsd.monitor")

# Bytes. One answer may be larger than either: it was asked for, and no second one is made before it is sent.
SOFT_LIMIT = 1 << 20
HARD_LIMIT = 8 << 20


class Output:
    """The sending side of one connection. ``run`` is the task that sends what could not be sent at once."""

    def __init__(self, stream: Stream, label: str) -> None:
        self._stream = stream
        self._label = label
        self._held = bytearray()
        self._changed = RepeatedEvent()

    @property
    def held(self) -> int:
        """Bytes not sent yet."""
        return len(self._held)

    @property
    def has_room(self) -> bool:
        """Whether less than ``SOFT_LIMIT`` is held."""
        return len(self._held) < SOFT_LIMIT

    def put(self, data: bytes | bytearray) -> None:
        """Send, or keep for later. What is said to a client that has gone is lost. An array is given away."""
        if self._stream.closed.is_set():
            return
        try:
            if not self._held:
                sent = self._stream.send_nowait(memoryview(data))
                if sent == len(data):
                    return
                # Nothing is copied of an answer of many megabytes.
                self._held = data if isinstance(data, bytearray) else bytearray(data)
                del self._held[:sent]
            else:
                self._held += data
        except (OSError, MemoryError):
            # Without the rest of it, nothing that is said afterwards can be understood.
            self._held.clear()
            self._stream.close()
        self._notify()

    def put_unasked(self, data: bytes) -> None:
        """``put`` for events: a client that has not read ``HARD_LIMIT`` bytes is disconnected instead."""
        if len(self._held) + len(data) > HARD_LIMIT:
            log.warning("%s: the client does not read its events: disconnected", self._label)
            self._held.clear()
            self._stream.close()
            return
        self.put(data)

    async def wait_room(self) -> None:
        """Wait until less than ``SOFT_LIMIT`` is held, or the client has gone."""
        await self._wait_below(SOFT_LIMIT)

    async def flush(self) -> None:
        """Wait until nothing is held, or the client has gone."""
        await self._wait_below(1)

    async def run(self) -> None:
        """Send what is held. Ends when the client has gone."""
        try:
            while True:
                while not self._held:
                    await self._changed.wait()
                await self._stream.wait_writable()
                # No view: the array must be free to grow meanwhile.
                sent = self._stream.send_nowait(bytes(self._held[: 256 << 10]))
                del self._held[:sent]
                self._notify()
        except (OSError, MemoryError, trio.ClosedResourceError):
            self._held.clear()
            self._stream.close()
            self._notify()

    async def _wait_below(self, limit: int) -> None:
        while len(self._held) >= limit and not self._stream.closed.is_set():
            await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
