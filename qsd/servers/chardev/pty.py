"""The ``pty`` chardev: a pseudo terminal whose other end anybody may open."""

from __future__ import annotations

import contextlib
import os
import select
import tty

import trio

from qsd.actors.core import receives
from qsd.errors import QmpError, errno_text
from qsd.qapi.schema.chardev import ChardevPty
from qsd.servers.chardev.base import Chardev, Describe, Facts, Surroundings
from qsd.servers.chardev.stream import FileStream

# The kernel does not tell when somebody opens the other end; it has to be looked at.
_LOOK_S = 0.2


class PtyChardev(Chardev):
    """A peer is there while somebody has the other end open. ``path`` becomes a symbolic link to it."""

    def __init__(self, label: str, backend: str, options: ChardevPty, surroundings: Surroundings) -> None:
        super().__init__(label, backend, options, surroundings)
        # Absolute, because a background daemon changes its working directory.
        self._link = os.path.abspath(options.path) if options.path else options.path
        self._has_link = False
        self._master = -1
        self.device = ""

    async def open(self) -> None:
        try:
            self._master, slave = os.openpty()
        except OSError as error:
            raise QmpError(f"Failed to create PTY: {errno_text(error.errno or 0)}") from None
        self.device = os.ttyname(slave)
        tty.setraw(slave)
        os.close(slave)
        os.set_blocking(self._master, False)
        if self._link is not None:
            try:
                os.symlink(self.device, self._link)
            except OSError as error:
                raise QmpError(f"Failed to create PTY symlink: {errno_text(error.errno or 0)}") from None
            self._has_link = True
        self.spawn(self._serve_peers, name="terminal")

    def filename(self) -> str:
        return f"pty:{self.device}"

    def release(self) -> None:
        if self._has_link and self._link is not None:
            with contextlib.suppress(OSError):
                if os.readlink(self._link) == self.device:
                    os.unlink(self._link)
            self._has_link = False
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    async def _serve_peers(self) -> None:
        while True:
            while self._is_hung_up():  # noqa: ASYNC110  # the kernel has no event for it
                await trio.sleep(_LOOK_S)
            await self.serve(FileStream(*self._descriptors(), self.log))

    def _descriptors(self) -> tuple[int, int]:
        copy = os.dup(self._master)  # the stream closes what it is given
        return copy, copy

    def _is_hung_up(self) -> bool:
        poll = select.poll()
        poll.register(self._master, select.POLLIN)
        return any(events & select.POLLHUP for _, events in poll.poll(0))

    @receives(Describe)
    async def describe(self, message: Describe) -> Facts:
        facts = await super().describe(message)
        return Facts(facts.filename, facts.has_frontend, self.device)
