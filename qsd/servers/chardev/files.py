"""Chardevs on files: ``file``, ``pipe`` and ``stdio``."""

from __future__ import annotations

import contextlib
import os
import stat
import termios
from typing import ClassVar

from qsd.errors import QmpError, errno_text
from qsd.qapi.schema.chardev import ChardevFile, ChardevHostdev, ChardevStdio
from qsd.servers.chardev.base import Chardev, Surroundings
from qsd.servers.chardev.stream import FileStream


def _open(path: str, flags: int) -> int:
    try:
        # Non-blocking: opening a FIFO must not wait for its other end.
        return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise QmpError(f"Could not open '{path}': {errno_text(error.errno or 0)}") from None


class FileChardev(Chardev):
    """Output goes to a file; input, if wanted, comes from another."""

    def __init__(self, label: str, backend: str, options: ChardevFile, surroundings: Surroundings) -> None:
        super().__init__(label, backend, options, surroundings)
        self._options = options
        self.carries_oob = options.in_ is not None

    async def open(self) -> None:
        mode = os.O_APPEND if self._options.append else os.O_TRUNC
        write_fd = _open(self._options.out, os.O_WRONLY | os.O_CREAT | mode)
        read_fd = None
        if self._options.in_ is not None:
            try:
                read_fd = _open(self._options.in_, os.O_RDONLY)
            except QmpError:
                os.close(write_fd)
                raise
        self.spawn(self.serve, FileStream(read_fd, write_fd, self.log), name="file")

    def filename(self) -> str:
        return "file"


class PipeChardev(Chardev):
    """A pair of FIFOs PATH.in and PATH.out, or one path for both directions. They are kept open both ways, so
    that a client that closes its end does not end the stream."""

    def __init__(self, label: str, backend: str, options: ChardevHostdev, surroundings: Surroundings) -> None:
        super().__init__(label, backend, options, surroundings)
        self._path = options.device

    async def open(self) -> None:
        read_fd = None
        try:
            read_fd = _open(f"{self._path}.in", os.O_RDWR)
            write_fd = _open(f"{self._path}.out", os.O_RDWR)
        except QmpError:
            if read_fd is not None:
                os.close(read_fd)
            read_fd = write_fd = _open(self._path, os.O_RDWR)
        self.spawn(self.serve, FileStream(read_fd, write_fd, self.log), name="pipe")

    def filename(self) -> str:
        return "pipe"


class StdioChardev(Chardev):
    """The process's standard input and output. A terminal is switched to single characters meanwhile; ``signal``
    (on when absent) lets its interrupt key end the daemon."""

    _in_use: ClassVar[bool] = False

    def __init__(self, label: str, backend: str, options: ChardevStdio, surroundings: Surroundings) -> None:
        super().__init__(label, backend, options, surroundings)
        self._signal = options.signal is not False
        self._owner = False
        self._terminal: list[object] | None = None
        self._was_blocking: dict[int, bool] = {}

    async def open(self) -> None:
        if self.surroundings.is_background:
            raise QmpError("cannot use stdio with -daemonize")
        if StdioChardev._in_use:
            raise QmpError("cannot use stdio by multiple character devices")
        StdioChardev._in_use = self._owner = True
        read_fd = self._own(0, os.O_RDONLY)
        write_fd = self._own(1, os.O_WRONLY)
        self._set_terminal()
        self.spawn(self.serve, FileStream(read_fd, write_fd, self.log), name="stdio")

    def filename(self) -> str:
        return "stdio"

    def _own(self, fd: int, flags: int) -> int:
        """A descriptor of our own: O_NONBLOCK belongs to the open file, which others may share."""
        try:
            kind = os.fstat(fd).st_mode
        except OSError as error:
            raise QmpError(f"cannot use stdio: {errno_text(error.errno or 0)}") from None
        if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
            with contextlib.suppress(OSError):
                return os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        own = os.dup(fd)
        if not stat.S_ISREG(kind):
            self._was_blocking[fd] = os.get_blocking(fd)
            os.set_blocking(own, False)
        return own

    def _set_terminal(self) -> None:
        try:
            mode = termios.tcgetattr(0)
        except (termios.error, OSError):
            return
        self._terminal = list(mode)
        mode[0] &= ~(
            termios.IGNBRK
            | termios.BRKINT
            | termios.PARMRK
            | termios.ISTRIP
            | termios.INLCR
            | termios.IGNCR
            | termios.ICRNL
            | termios.IXON
        )
        mode[1] |= termios.OPOST
        mode[2] = mode[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        mode[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN)
        if not self._signal:
            mode[3] &= ~termios.ISIG
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        with contextlib.suppress(termios.error, OSError):
            termios.tcsetattr(0, termios.TCSANOW, mode)

    def release(self) -> None:
        if not self._owner:
            return
        self._owner = StdioChardev._in_use = False
        if self._terminal is not None:
            with contextlib.suppress(termios.error, OSError):
                termios.tcsetattr(0, termios.TCSANOW, self._terminal)  # type: ignore[arg-type]  # as it was read
        for fd, blocking in self._was_blocking.items():
            with contextlib.suppress(OSError):
                os.set_blocking(fd, blocking)
