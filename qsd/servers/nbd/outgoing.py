"""What one client is still owed: pieces of slabs and loans in the order they are sent, and the account of them."""

from __future__ import annotations

import errno
import itertools
import os
import socket
from collections import deque

from qsd.messages import Loan, Pieces
from qsd.servers.nbd.buffers import Pool, Slab

MAX_SEGMENTS = 512
# What a file system without splice support answers to sendfile(2).
_NO_SENDFILE = (errno.EINVAL, errno.ENOSYS)
# Bytes of a loan copied at a time then.
COPY = 256 << 10


class Outgoing:
    """The output ``queue``. ``requests`` have been parsed and their reply has not been sent whole; ``reply_bytes``
    are laid out or queued and not sent. ``slab`` is the one that replies are laid out in now.
    """

    __slots__ = ("_pool", "_sock", "bytes_sent", "queue", "reply_bytes", "requests", "slab")

    def __init__(self, sock: socket.socket, pool: Pool) -> None:
        self._sock = sock
        self._pool = pool
        self.queue: deque[tuple[memoryview | Loan, Slab | None, int]] = deque()
        self.requests = 0
        self.reply_bytes = 0
        self.bytes_sent = 0
        self.slab: Slab | None = None

    def add(self, view: memoryview, slab: Slab | None, slots: int) -> None:
        """Queue ``slots`` replies that lie one behind the other in ``view``."""
        self.queue.append((view, slab, slots))

    def add_laid(self, slab: Slab, first: int, end: int, slots: int) -> None:
        """Queue and count ``slots`` replies laid out in the slab from ``first`` to ``end``."""
        self.requests += slots
        slab.outstanding += slots
        self.reply_bytes += end - first
        self.queue.append((slab.view[first:end], slab, slots))

    def add_loan(self, head: memoryview, loan: Loan, slab: Slab) -> None:
        """Queue a reply whose data is lent: its header, then the loan in place of the room behind it."""
        self.queue.append((head, slab, 0))
        self.queue.append((loan, slab, 1))

    def add_pieces(self, head: memoryview, pieces: Pieces, slab: Slab) -> None:
        """Queue a reply whose data is in pieces: its header, then these in place of the room behind it."""
        queue = self.queue
        for view in (head, *pieces.views[:-1]):
            queue.append((view, slab, 0))
        queue.append((pieces.views[-1], slab, 1))

    def add_bytes(self, data: bytes) -> None:
        """Queue one reply that was not laid out in a slab."""
        self.reply_bytes += len(data)
        self.queue.append((memoryview(data), None, 1))

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
        while self.queue:
            piece, slab, slots = self.queue.popleft()
            self.reply_bytes -= len(piece)
            self._sent(slab, slots)
            if isinstance(piece, Loan):
                piece.give_back()

    def send(self) -> None:
        """Send until the socket is full or all is sent; raises OSError when the client has gone."""
        queue = self.queue
        while queue:
            try:
                first = queue[0][0]
                if isinstance(first, Loan):
                    whole = len(first)
                    count = self._send_loan(first)
                elif len(queue) == 1:
                    whole = len(first)
                    count = self._sock.send(first)
                else:
                    views, flags = self._views()
                    whole = sum(map(len, views))
                    count = self._sock.sendmsg(views, (), flags)
            except (BlockingIOError, InterruptedError):
                return
            self.bytes_sent += count
            is_short = count < whole
            self._account(count)
            if is_short:
                return

    def _views(self) -> tuple[list[memoryview], int]:
        """The pieces in memory up to the next loan, and how to send them."""
        views: list[memoryview] = []
        for piece, _slab, _slots in itertools.islice(self.queue, MAX_SEGMENTS):
            if isinstance(piece, Loan):
                # Its first bytes fit into the packet of the header.
                return views, socket.MSG_MORE
            views.append(piece)
        return views, 0

    def _send_loan(self, loan: Loan) -> int:
        try:
            count = os.sendfile(self._sock.fileno(), loan.fd, loan.offset, loan.length)
        except OSError as error:
            if error.errno not in _NO_SENDFILE:
                raise
            data = os.pread(loan.fd, min(loan.length, COPY), loan.offset)
            count = self._sock.send(data) if data else 0
        if count:
            return count
        # The file has been cut short since: what is beyond its end reads as zeroes.
        return self._sock.send(bytes(min(loan.length, COPY)))

    def _account(self, count: int) -> None:
        self.reply_bytes -= count
        queue = self.queue
        while count:
            piece, slab, slots = queue[0]
            length = len(piece)
            if count < length:
                if isinstance(piece, Loan):
                    piece.advance(count)
                else:
                    queue[0] = (piece[count:], slab, slots)
                return
            count -= length
            queue.popleft()
            if slots:
                self._sent(slab, slots)
            if isinstance(piece, Loan):
                piece.give_back()

    def _sent(self, slab: Slab | None, slots: int) -> None:
        self.requests -= slots
        if slab is not None:
            self._let_go(slab, slots)

    def _let_go(self, slab: Slab, slots: int) -> None:
        slab.outstanding -= slots
        if not slab.outstanding:
            slab.used = 0
            if slab is not self.slab:
                self._pool.give_back(slab)
