"""What one client is still owed: pieces of slabs in the order they are sent, and the account of what they hold."""

from __future__ import annotations

import itertools
import socket
from collections import deque

from qsd.servers.nbd.buffers import Pool, Slab

MAX_SEGMENTS = 512


class Outgoing:
    """The output queue. ``requests`` have been parsed and their reply has not been sent whole; ``reply_bytes`` are
    laid out in slabs and not sent. ``slab`` is the one that replies are laid out in now.
    """

    __slots__ = ("_pool", "_queue", "_sock", "bytes_sent", "reply_bytes", "requests", "slab")

    def __init__(self, sock: socket.socket, pool: Pool) -> None:
        self._sock = sock
        self._pool = pool
        self._queue: deque[tuple[memoryview, Slab | None, int]] = deque()
        self.requests = 0
        self.reply_bytes = 0
        self.bytes_sent = 0
        self.slab: Slab | None = None

    def __bool__(self) -> bool:
        return bool(self._queue)

    def add(self, view: memoryview, slab: Slab | None, slots: int) -> None:
        """Queue ``slots`` replies that lie one behind the other in ``view``."""
        self._queue.append((view, slab, slots))

    def add_bytes(self, data: bytes) -> None:
        """Queue one reply that was not laid out in a slab."""
        self._queue.append((memoryview(data), None, 1))

    def fresh_slab(self, size: int) -> Slab:
        """Another slab for the replies to come; the one before goes back when its last reply has been sent."""
        old = self.slab
        if old is not None and not old.outstanding:
            old.used = 0
            if old.size >= size:
                return old
            self._pool.give_back(old)
        self.slab = slab = self._pool.slab(size)
        return slab

    def forget_slot(self, slab: Slab, length: int) -> None:
        """A reply that was laid out is not sent: its request failed."""
        self.reply_bytes -= length
        self._let_go(slab, 1)

    def rest(self) -> None:
        """Give the slab back while there is nothing to answer."""
        if self.slab is not None and not self.slab.outstanding:
            self._pool.give_back(self.slab)
            self.slab = None

    def drop(self) -> None:
        """Forget everything: the client has gone."""
        while self._queue:
            view, slab, slots = self._queue.popleft()
            self._sent(slab, slots, len(view))

    def send(self) -> None:
        """Send until the socket is full or all is sent; raises OSError when the client has gone."""
        queue = self._queue
        while queue:
            try:
                if len(queue) == 1:
                    whole = len(queue[0][0])
                    count = self._sock.send(queue[0][0])
                else:
                    views = [entry[0] for entry in itertools.islice(queue, MAX_SEGMENTS)]
                    whole = sum(map(len, views))
                    count = self._sock.sendmsg(views)
            except (BlockingIOError, InterruptedError):
                return
            self.bytes_sent += count
            is_short = count < whole
            self._account(count)
            if is_short:
                return

    def _account(self, count: int) -> None:
        queue = self._queue
        while count:
            view, slab, slots = queue[0]
            length = len(view)
            if count < length:
                queue[0] = (view[count:], slab, slots)
                if slab is not None:
                    self.reply_bytes -= count
                return
            count -= length
            queue.popleft()
            self._sent(slab, slots, length)

    def _sent(self, slab: Slab | None, slots: int, length: int) -> None:
        self.requests -= slots
        if slab is not None:
            self.reply_bytes -= length
            self._let_go(slab, slots)

    def _let_go(self, slab: Slab, slots: int) -> None:
        slab.outstanding -= slots
        if not slab.outstanding:
            slab.used = 0
            if slab is not self.slab:
                self._pool.give_back(slab)
