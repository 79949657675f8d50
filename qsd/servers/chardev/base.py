"""What every chardev is: an actor with a label, a name to show, and at most one front end."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import trio

from qsd.actors.core import Actor
from qsd.errors import QmpError, errno_text
from qsd.servers.chardev.streams import Frontend, LoggedStream, Stream


def open_file(path: str, flags: int) -> int:
    """Open, or raise QmpError in the words of the file backends."""
    try:
        return os.open(path, flags | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise QmpError(f"Failed to open file '{path}': {errno_text(error.errno or 0)}") from None


class Chardev(Actor):
    """Base class. Subclasses open in ``prepare`` and serve the front end in ``run``."""

    kind: ClassVar[str] = "chardev"

    def __init__(self, label: str, backend: str, data: Any) -> None:
        super().__init__(f"chardev {label}")
        self.label = label
        self.backend = backend
        self.data = data
        self.frontend: Frontend | None = None
        self._attached = trio.Event()
        self._log_fd = -1
        self.is_connected = False

    async def prepare(self) -> None:
        """Open. Raises QmpError."""

    async def wait_client(self) -> None:
        """Return when there is a peer to talk to (a server socket that was told to wait)."""

    def filename(self) -> str:
        """What query-chardev shows."""
        return self.backend

    def result(self) -> dict[str, str]:
        """What chardev-add answers."""
        return {}

    def attach(self, frontend: Frontend) -> None:
        """Give the chardev its user. Raises QmpError when it has one."""
        if self.frontend is not None:
            raise QmpError(f"chardev '{self.label}' is already in use")
        self.frontend = frontend
        self._attached.set()

    async def started(self) -> None:
        """Open, then serve in a task."""
        if self.data.logtimestamp:
            raise QmpError("logtimestamp is not supported")
        if self.data.logfile is not None:
            how = os.O_APPEND if self.data.logappend else os.O_TRUNC
            self._log_fd = open_file(self.data.logfile, os.O_WRONLY | os.O_CREAT | how)
        await self.prepare()
        self.spawn(self._serve_frontend, name="connections")

    async def _serve_frontend(self) -> None:
        await self._attached.wait()
        await self.run()

    async def run(self) -> None:
        """Serve connections to the front end, one after the other."""

    async def connected(self, stream: Stream) -> None:
        """Let the front end serve one connection, and end it."""
        assert self.frontend is not None
        if self._log_fd >= 0:
            stream = LoggedStream(stream, self._log_fd)
        self.is_connected = True
        try:
            await self.frontend.serve(stream)
        finally:
            self.is_connected = False
            with trio.CancelScope(shield=True):
                await stream.aclose()

    def let_go(self) -> None:
        """Close what ``prepare`` opened."""

    async def stopping(self) -> None:
        """Let go of everything."""
        self.let_go()
        if self._log_fd >= 0:
            os.close(self._log_fd)
            self._log_fd = -1

    def statistics(self) -> dict[str, Any]:
        """The actor's facts, and what is connected."""
        return super().statistics() | {"filename": self.filename()}
