"""What one client has sent and nobody has parsed yet: a receive buffer, and where in it one is."""

from __future__ import annotations

import mmap
from typing import Final

from qsd.servers.nbd.buffers import Pool, Receive

# A partial request of more than this is received exactly to its end, so that the next one starts a fresh buffer.
EXACT = 64 << 10
# Less room than this in the receive buffer is not worth a system call.
MIN_ROOM = 16 << 10

# What is left of a buffer that was given back; of a size no pool keeps.
_NOTHING: Final = Receive(mmap.PAGESIZE)


class Incoming:
    """The bytes from ``position`` to ``end`` of ``buffer``.

    ``wanted`` is the length of the message that is being received, ``skip`` how many payload bytes of a refused
    write are still to be thrown away.
    """

    __slots__ = ("_pool", "buffer", "end", "position", "skip", "wanted")

    def __init__(self, pool: Pool, leftover: bytes, wanted: int) -> None:
        self._pool = pool
        self.buffer: Receive = pool.receive(len(leftover))
        self.buffer.view[: len(leftover)] = leftover
        self.position = 0
        self.end = len(leftover)
        self.wanted = wanted
        self.skip = 0

    def room(self) -> memoryview:
        """Where to receive, with room for the message that is being received."""
        buffer = self.buffer
        have = self.end - self.position
        if not have and not buffer.lent and self.wanted <= EXACT:
            self.position = self.end = 0
            return buffer.view
        wanted = max(self.wanted, have + 1)
        if not have and not buffer.lent:
            self.position = self.end = 0
        if wanted > buffer.size or (buffer.lent and self.position + wanted > buffer.size - MIN_ROOM):
            self._change_buffer(wanted, have)
        elif self.position + wanted > buffer.size - MIN_ROOM and not buffer.lent:
            buffer.view[:have] = buffer.view[self.position : self.end]
            self.position, self.end = 0, have
        limit = self.position + wanted if self.wanted > EXACT else self.buffer.size
        return self.buffer.view[self.end : limit]

    def _change_buffer(self, wanted: int, have: int) -> None:
        old = self.buffer
        new = self._pool.receive(wanted + MIN_ROOM)
        new.view[:have] = old.view[self.position : self.end]
        self.buffer = new
        self.position, self.end = 0, have
        if not old.lent:
            self._pool.give_back(old)

    def returned(self, buffer: Receive) -> None:
        """A write does not use its payload in ``buffer`` any more."""
        buffer.lent -= 1
        if not buffer.lent and buffer is not self.buffer:
            self._pool.give_back(buffer)

    def let_go(self) -> None:
        """The client has gone: give the buffer back, unless somebody still uses what it has sent. Idempotent."""
        if not self.buffer.lent:
            self._pool.give_back(self.buffer)
        self.buffer = _NOTHING
        self.position = self.end = 0

    def skipped(self, position: int) -> int:
        """Throw away what is to be skipped from ``position`` on, as far as it is there; where one is then."""
        taken = min(self.skip, self.end - position)
        self.skip -= taken
        return position + taken
