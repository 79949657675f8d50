"""All chardevs by label."""

from __future__ import annotations

import sys
from typing import Any

from qsd.actors.supervisor import Floor, Supervisor
from qsd.errors import QmpError
from qsd.servers.chardev.backends import (
    FileChardev,
    NullChardev,
    PipeChardev,
    PtyChardev,
    RingbufChardev,
    StdioChardev,
)
from qsd.servers.chardev.base import Chardev
from qsd.servers.chardev.socket import SocketChardev, address_text

BACKENDS: dict[str, type[Chardev]] = {
    "socket": SocketChardev,
    "stdio": StdioChardev,
    "null": NullChardev,
    "ringbuf": RingbufChardev,
    "memory": RingbufChardev,
    "file": FileChardev,
    "pipe": PipeChardev,
    "pty": PtyChardev,
}


class Chardevs:
    """The table. ``is_background``: the process has no standard descriptors to use."""

    def __init__(self, supervisor: Supervisor, *, is_background: bool) -> None:
        self._supervisor = supervisor
        self._is_background = is_background
        self._chardevs: dict[str, Chardev] = {}

    def all(self) -> list[Chardev]:
        """Every chardev, oldest first."""
        return list(self._chardevs.values())

    def find(self, label: str) -> Chardev | None:
        """The chardev of that label."""
        return self._chardevs.get(label)

    async def add(self, label: str, backend: Any, *, from_command_line: bool = False) -> Chardev:
        """Make one; a server socket that waits returns with its first client. Raises QmpError."""
        if label in self._chardevs:
            if from_command_line:
                raise QmpError(f"attempt to add duplicate property '{label}' to object (type 'container')")
            raise QmpError(f"Chardev with id '{label}' already exists")
        kind = str(backend.type.value)
        self._check_stdio(kind)
        made = BACKENDS[kind](label, kind, backend.data)
        if isinstance(made, SocketChardev):
            made.may_pass_fds = from_command_line
        # Reserved while it opens: the name is taken from now on.
        self._chardevs[label] = made
        try:
            await self._supervisor.start(made, Floor.CHARDEVS)
            await self._wait(made, backend.data)
        except BaseException:
            del self._chardevs[label]
            await self._supervisor.stop(made)
            raise
        if isinstance(made, PtyChardev):
            sys.stdout.write(f"char device redirected to {made.pty_name} (label {label})\n")
            sys.stdout.flush()
        return made

    def _check_stdio(self, kind: str) -> None:
        if kind != "stdio":
            return
        if self._is_background:
            raise QmpError("cannot use stdio with -daemonize")
        if any(isinstance(other, StdioChardev) for other in self._chardevs.values()):
            raise QmpError("cannot use stdio by multiple character devices")

    async def _wait(self, made: Chardev, data: Any) -> None:
        if isinstance(made, SocketChardev) and made.is_server and data.wait:
            where = address_text(made.address)
            sys.stderr.write(f"info: QEMU waiting for connection on: disconnected:{where},server=on\n")
            sys.stderr.flush()
            await made.wait_client()

    async def remove(self, label: str) -> None:
        """chardev-remove. Raises QmpError."""
        found = self._chardevs.get(label)
        if found is None:
            raise QmpError(f"Chardev '{label}' not found")
        if found.frontend is not None:
            raise QmpError(f"Chardev '{label}' is busy")
        del self._chardevs[label]
        await self._supervisor.stop(found)
