"""Streams: the bytes to and from one peer of a character device.

Whoever is given a stream owns it until it closes it. Only one task may receive, only one may wait to send. A stream
that is closed while a task waits on it raises ``trio.ClosedResourceError`` there; everything that is wrong with the
peer is an ``OSError`` when sending and the end of the stream when receiving.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from abc import ABC, abstractmethod

import trio

from qsd.servers.chardev.logfile import LogFile

RECEIVE_SIZE = 64 << 10


class Stream(ABC):
    """One peer. ``log`` records what is sent."""

    def __init__(self, log: LogFile | None) -> None:
        self._log = log
        self.closed = trio.Event()

    async def receive_some(self) -> bytes:
        """Wait for bytes; ``b""`` when the peer has gone. A checkpoint even when bytes are there already."""
        waited = False
        while not self.closed.is_set():
            try:
                data = self._receive()
            except (BlockingIOError, InterruptedError):
                await self._wait_readable()
                waited = True
                continue
            except OSError:
                data = b""
            if not waited:
                await trio.lowlevel.checkpoint()
            return data
        raise trio.ClosedResourceError

    def send_nowait(self, data: bytes | memoryview) -> int:
        """Send what the peer takes now and return how much that was (0: it is full). Raises OSError."""
        if self.closed.is_set():
            raise trio.ClosedResourceError
        try:
            sent = self._send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        if self._log is not None and sent:
            self._log.write(bytes(data[:sent]))
        return sent

    async def send_all(self, data: bytes) -> None:
        """Send all of it, however long the peer takes. Raises OSError."""
        await trio.lowlevel.checkpoint()
        view = memoryview(data)
        while view:
            view = view[self.send_nowait(view) :]
            if view:
                await self.wait_writable()

    def close(self) -> None:
        """Give the peer up. Idempotent."""
        if not self.closed.is_set():
            self.closed.set()
            self._close()

    async def wait_hangup(self) -> None:
        """For a stream nobody reads: return when the peer has gone, or has sent something; consumes nothing."""
        await self._wait_readable()

    @property
    def is_hung_up(self) -> bool:
        """Whether the peer has gone without leaving anything to read."""
        return False

    @property
    def is_gone(self) -> bool:
        """Whether nobody could receive anything any more, as far as that can be told without reading."""
        return False

    @abstractmethod
    async def wait_writable(self) -> None:
        """Wait until the peer may take more."""

    @abstractmethod
    def _receive(self) -> bytes:
        """Receive now; raises BlockingIOError when nothing is there."""

    @abstractmethod
    def _send(self, data: bytes | memoryview) -> int:
        """Send now; raises BlockingIOError when nothing is taken."""

    @abstractmethod
    async def _wait_readable(self) -> None:
        """Wait until ``_receive`` may have something."""

    @abstractmethod
    def _close(self) -> None:
        """Let go; called once."""


class SocketStream(Stream):
    """A connected socket, non-blocking."""

    def __init__(self, sock: socket.socket, log: LogFile | None) -> None:
        super().__init__(log)
        self.socket = sock

    async def wait_writable(self) -> None:
        await trio.lowlevel.wait_writable(self.socket)

    @property
    def is_hung_up(self) -> bool:
        try:
            return not self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    @property
    def is_gone(self) -> bool:
        if self.socket.fileno() < 0:
            return True
        poll = select.poll()
        poll.register(self.socket, 0)  # errors and hang-ups are always told
        return bool(poll.poll(0))

    def _receive(self) -> bytes:
        return self.socket.recv(RECEIVE_SIZE)

    def _send(self, data: bytes | memoryview) -> int:
        return self.socket.send(data, socket.MSG_NOSIGNAL)

    async def _wait_readable(self) -> None:
        await trio.lowlevel.wait_readable(self.socket)

    def _close(self) -> None:
        trio.lowlevel.notify_closing(self.socket)
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # others may hold a copy of an inherited descriptor
        self.socket.close()


class FileStream(Stream):
    """Descriptors to read from (None: nothing ever comes) and write to, non-blocking where that means something.

    What cannot be written (a full disk, a pipe whose reader has gone) is lost, as with the reference: input may
    still come, and the way to end the daemon may be among it.
    """

    def __init__(self, read_fd: int | None, write_fd: int, log: LogFile | None) -> None:
        super().__init__(log)
        self._read_fd = read_fd
        self._write_fd = write_fd

    async def wait_writable(self) -> None:
        await trio.lowlevel.wait_writable(self._write_fd)

    async def wait_hangup(self) -> None:
        await self.closed.wait()  # regular files cannot be waited for

    def _receive(self) -> bytes:
        if self._read_fd is None:
            raise BlockingIOError
        return os.read(self._read_fd, RECEIVE_SIZE)

    def _send(self, data: bytes | memoryview) -> int:
        try:
            return os.write(self._write_fd, data)
        except BlockingIOError:
            raise
        except OSError:
            return len(data)

    async def _wait_readable(self) -> None:
        if self._read_fd is None:
            await self.closed.wait()
            raise trio.ClosedResourceError
        await trio.lowlevel.wait_readable(self._read_fd)

    def _close(self) -> None:
        for fd in {self._write_fd, self._write_fd if self._read_fd is None else self._read_fd}:
            trio.lowlevel.notify_closing(fd)
            os.close(fd)
