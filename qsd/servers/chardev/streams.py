"""Byte streams a chardev hands to its front end, one per connection."""

from __future__ import annotations

import errno
import os
from typing import Protocol

import trio


class Stream(Protocol):
    """One connection."""

    async def receive_some(self, limit: int) -> bytes:
        """What has arrived, at most ``limit`` bytes; b"" at the end."""

    async def send_all(self, data: bytes) -> None:
        """Send everything. Raises trio.BrokenResourceError when the peer has gone."""

    async def aclose(self) -> None:
        """End the connection."""


class Frontend(Protocol):
    """Who uses a chardev."""

    async def serve(self, stream: Stream) -> None:
        """Serve one connection until it ends."""


class SocketStream:
    """A connected socket."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock

    async def receive_some(self, limit: int) -> bytes:
        """See ``Stream``."""
        try:
            return await self._sock.recv(limit)
        except OSError:
            return b""

    async def send_all(self, data: bytes) -> None:
        """See ``Stream``."""
        view = memoryview(data)
        try:
            while view:
                view = view[await self._sock.send(view) :]
        except OSError as error:
            raise trio.BrokenResourceError from error

    async def aclose(self) -> None:
        """See ``Stream``."""
        self._sock.close()
        await trio.lowlevel.checkpoint()


class FdStream:
    """Descriptors of a terminal, pipe or pty; made non-blocking while in use, as they were afterwards.

    ``read_fd`` is -1 where nothing can be read: the stream then has no end of its own.
    """

    def __init__(self, read_fd: int, write_fd: int, *, close: bool) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._close = close
        self._fds = [fd for fd in {read_fd, write_fd} if fd >= 0]
        self._blocking = {fd: os.get_blocking(fd) for fd in self._fds}
        for fd in self._fds:
            os.set_blocking(fd, False)

    async def receive_some(self, limit: int) -> bytes:
        """See ``Stream``."""
        if self._read_fd < 0:
            await trio.sleep_forever()
        while True:
            try:
                return os.read(self._read_fd, limit)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._read_fd)
            except OSError as error:
                if error.errno == errno.EIO:
                    return b""
                raise

    async def send_all(self, data: bytes) -> None:
        """See ``Stream``."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._write_fd, view) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._write_fd)
            except OSError as error:
                raise trio.BrokenResourceError from error
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """See ``Stream``."""
        for fd in self._fds:
            trio.lowlevel.notify_closing(fd)
            if self._close:
                os.close(fd)
            else:
                os.set_blocking(fd, self._blocking[fd])
        self._fds = []
        await trio.lowlevel.checkpoint()


class LoggedStream:
    """A stream whose output also goes to a log file."""

    def __init__(self, inner: Stream, log_fd: int) -> None:
        self._inner = inner
        self._log_fd = log_fd

    async def receive_some(self, limit: int) -> bytes:
        """See ``Stream``."""
        return await self._inner.receive_some(limit)

    async def send_all(self, data: bytes) -> None:
        """See ``Stream``."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._log_fd, view) :]
        await self._inner.send_all(data)

    async def aclose(self) -> None:
        """See ``Stream``."""
        await self._inner.aclose()
