"""The backends that are not sockets: null, ringbuf, stdio, file, pipe, pty."""

from __future__ import annotations

import os
import stat
import termios
import tty
from collections import deque
from typing import Any

from qsd.errors import QmpError, errno_text
from qsd.servers.chardev.base import Chardev, open_file
from qsd.servers.chardev.streams import FdStream


class NullChardev(Chardev):
    """Swallows everything; nobody ever connects."""


class RingbufChardev(Chardev):
    """Keeps the last ``size`` bytes written to it, for ringbuf-read."""

    async def prepare(self) -> None:
        """Check the size."""
        size = self.data.size or 65536
        if size & (size - 1):
            raise QmpError("size of ringbuf chardev must be power of two")
        self.content: deque[int] = deque(maxlen=size)

    def write(self, data: bytes) -> None:
        """Add bytes; the oldest give way."""
        self.content.extend(data)

    def take(self, count: int) -> bytes:
        """Remove and return at most ``count`` bytes, oldest first."""
        return bytes(self.content.popleft() for _ in range(min(count, len(self.content))))


class StdioChardev(Chardev):
    """The process's standard input and output. The terminal is left as it was found."""

    async def prepare(self) -> None:
        """Let control characters through as bytes when signals are not wanted."""
        self._saved: list[Any] | None = None
        if os.isatty(0):
            self._saved = termios.tcgetattr(0)
            if self.data.signal is False:
                mode = termios.tcgetattr(0)
                mode[3] &= ~termios.ISIG
                termios.tcsetattr(0, termios.TCSANOW, mode)

    async def run(self) -> None:
        """One connection, until end of file."""
        await self.connected(FdStream(0, 1, close=False))

    def let_go(self) -> None:
        """Put the terminal back."""
        if self._saved is not None:
            termios.tcsetattr(0, termios.TCSANOW, self._saved)


class FileChardev(Chardev):
    """Output to a file, input from another if given."""

    async def prepare(self) -> None:
        """Open both."""
        how = os.O_APPEND if self.data.append else os.O_TRUNC
        self._out = open_file(self.data.out, os.O_WRONLY | os.O_CREAT | how)
        self._in = -1
        if self.data.in_ is not None:
            self._in = open_file(self.data.in_, os.O_RDONLY)

    async def run(self) -> None:
        """One connection for the chardev's life."""
        in_fd, out_fd = self._in, self._out
        self._in = self._out = -1
        if in_fd >= 0 and stat.S_ISREG(os.fstat(in_fd).st_mode):
            os.close(in_fd)
            in_fd = -1
        await self.connected(FdStream(in_fd, out_fd, close=True))

    def let_go(self) -> None:
        """Close what was not handed on."""
        for fd in (self._in, self._out):
            if fd >= 0:
                os.close(fd)


class PipeChardev(Chardev):
    """A pair of FIFOs, ``device.in`` and ``device.out``, or one file opened both ways."""

    async def prepare(self) -> None:
        """Open; both ends are opened read-write so that a peer's coming and going is no end of file."""
        path = self.data.device
        try:
            self._fds = (open_file(f"{path}.in", os.O_RDWR), open_file(f"{path}.out", os.O_RDWR))
        except QmpError:
            fd = open_file(path, os.O_RDWR)
            self._fds = (fd, fd)

    async def run(self) -> None:
        """One connection for the chardev's life."""
        fds, self._fds = self._fds, (-1, -1)
        await self.connected(FdStream(*fds, close=True))

    def let_go(self) -> None:
        """Close what was not handed on."""
        for fd in {*self._fds} - {-1}:
            os.close(fd)


class PtyChardev(Chardev):
    """A pseudo-terminal; ``path`` makes a link to its name, removed with the chardev."""

    async def prepare(self) -> None:
        """Make the pair; our end of the other side stays open, so that a peer's leaving is no error."""
        self._link = self.data.path
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave)
        self.pty_name = os.ttyname(self._slave)
        if self._link is not None:
            try:
                os.symlink(self.pty_name, self._link)
            except OSError as error:
                self._link = None
                raise QmpError(f"Failed to create PTY symlink: {errno_text(error.errno or 0)}") from None

    def filename(self) -> str:
        """The name a peer opens."""
        return f"pty:{self.pty_name}"

    def result(self) -> dict[str, str]:
        """Its name."""
        return {"pty": self.pty_name}

    async def run(self) -> None:
        """One connection for the chardev's life."""
        await self.connected(FdStream(self._master, self._master, close=False))

    def let_go(self) -> None:
        """Close the pair, remove the link."""
        os.close(self._master)
        os.close(self._slave)
        if self._link is not None and os.path.islink(self._link):
            os.unlink(self._link)
