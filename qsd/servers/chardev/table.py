"""The table of character devices: who exists, who is used, and the commands' rules about both."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from qsd.actors.core import Actor
from qsd.actors.qom import QomObject
from qsd.actors.supervisor import Floor, Supervisor
from qsd.errors import ActorStopped, QmpError
from qsd.host.console import write_stdout
from qsd.qapi.schema.chardev import (
    ChardevBackend,
    ChardevBackendInfo,
    ChardevBackendKind,
    ChardevInfo,
    ChardevReturn,
)
from qsd.servers.chardev.base import Attach, Chardev, Describe, Detach, Facts, Frontend, Origin, Surroundings
from qsd.servers.chardev.files import FileChardev, PipeChardev, StdioChardev
from qsd.servers.chardev.memory import NullChardev, RingbufChardev, RingRead, RingWrite
from qsd.servers.chardev.pty import PtyChardev
from qsd.servers.chardev.sockets import SocketChardev

log = logging.getLogger("qsd.chardev")

BACKENDS: dict[ChardevBackendKind, Callable[[str, str, Any, Surroundings], Chardev]] = {
    ChardevBackendKind.FILE: FileChardev,
    ChardevBackendKind.PIPE: PipeChardev,
    ChardevBackendKind.SOCKET: SocketChardev,
    ChardevBackendKind.PTY: PtyChardev,
    ChardevBackendKind.NULL: NullChardev,
    ChardevBackendKind.STDIO: StdioChardev,
    ChardevBackendKind.RINGBUF: RingbufChardev,
    ChardevBackendKind.MEMORY: RingbufChardev,
}


def _log_info(text: str) -> None:
    log.warning("info: %s", text)


@attrs.define(eq=False)
class _Entry:
    chardev: Chardev
    user: Frontend | None = None


class Chardevs:
    """See the module. ``is_background``: the standard descriptors will go away, so stdio is refused."""

    def __init__(self, supervisor: Supervisor, *, is_background: bool = False) -> None:
        self._supervisor = supervisor
        self._is_background = is_background
        self._entries: dict[str, _Entry] = {}
        self._reserved: set[str] = set()
        supervisor.failures[Chardev.kind] = self._crashed

    async def add(
        self,
        label: str,
        backend: ChardevBackend,
        *,
        origin: Origin = Origin.QMP,
        inform: Callable[[str], None] = _log_info,
    ) -> ChardevReturn:
        """Make a chardev. A server with ``wait`` on waits here for its first client, and says so to ``inform``.

        Raises QmpError and leaves nothing.
        """
        if label in self._entries or label in self._reserved:
            if origin is Origin.QMP:
                raise QmpError(f"Chardev with id '{label}' already exists")
            raise QmpError(f"attempt to add duplicate property '{label}' to object (type 'container')")
        surroundings = Surroundings(origin, inform, self._is_background)
        chardev = BACKENDS[backend.type](label, backend.type.value, backend.data, surroundings)
        self._reserved.add(label)
        try:
            await self._supervisor.start(chardev, Floor.CHARDEVS)
        except QmpError as error:
            if origin is Origin.QMP:
                raise error.prefixed(f"Failed to add chardev '{label}': ") from None
            raise
        finally:
            self._reserved.discard(label)
        self._entries[label] = _Entry(chardev)
        pty = chardev.device if isinstance(chardev, PtyChardev) else None
        if pty is not None and origin is Origin.COMMAND_LINE:
            write_stdout(f"char device redirected to {pty} (label {label})\n")
        return ChardevReturn(pty=pty)

    async def remove(self, label: str) -> None:
        """Close a chardev nobody uses. Raises QmpError."""
        entry = self._entries.get(label)
        if entry is None:
            raise QmpError(f"Chardev '{label}' not found")
        if entry.user is not None:
            raise QmpError(f"Chardev '{label}' is busy")
        del self._entries[label]
        await self._supervisor.stop(entry.chardev)

    async def query(self) -> list[ChardevInfo]:
        """What exists, oldest first."""
        found = []
        for label, entry in list(self._entries.items()):
            try:
                facts: Facts = await entry.chardev.ref.ask(Describe())
            except ActorStopped:
                continue
            found.append(ChardevInfo(label=label, filename=facts.filename, frontend_open=facts.has_frontend))
        return found

    def backends(self) -> list[ChardevBackendInfo]:
        """The backends this build has."""
        return [ChardevBackendInfo(name=kind.value) for kind in BACKENDS]

    def faces(self) -> Mapping[str, QomObject]:
        """What hangs under ``/chardevs``."""
        return {label: entry.chardev.face() for label, entry in self._entries.items()}

    # -- use --------------------------------------------------------------------------------------------------

    def carries_oob(self, label: str) -> bool:
        """Whether out-of-band execution is offered on a chardev. Raises QmpError."""
        return self._usable(label).chardev.carries_oob

    async def attach(self, label: str, frontend: Frontend) -> None:
        """Become the user of a chardev; peers are handed to ``frontend`` from now on. Raises QmpError."""
        entry = self._usable(label)
        if entry.user is not None:
            raise QmpError(f"chardev '{label}' is already in use")
        entry.user = frontend
        await entry.chardev.ref.ask(Attach(frontend))

    def _usable(self, label: str) -> _Entry:
        entry = self._entries.get(label)
        if entry is None:
            raise QmpError(f'chardev "{label}" not found')
        return entry

    def detach(self, label: str, frontend: Frontend) -> None:
        """Stop being the user; a peer that is still connected stays so."""
        entry = self._entries.get(label)
        if entry is not None and entry.user is frontend:
            entry.user = None
            with contextlib.suppress(ActorStopped):
                entry.chardev.ref.tell(Detach())

    def check_ring(self, label: str) -> None:
        """Raise QmpError unless ``label`` is a ring buffer."""
        self._ring(label)

    async def write_ring(self, label: str, data: bytes) -> None:
        """Write to a ring buffer. Raises QmpError."""
        await self._ring(label).ref.ask(RingWrite(data))

    async def read_ring(self, label: str, size: int) -> bytes:
        """Take up to ``size`` bytes, oldest first, out of a ring buffer. Raises QmpError."""
        ring = self._ring(label)
        if size <= 0:
            raise QmpError("size must be greater than zero")
        data: bytes = await ring.ref.ask(RingRead(size))
        return data

    def _ring(self, label: str) -> RingbufChardev:
        entry = self._entries.get(label)
        if entry is None:
            raise QmpError(f"Device '{label}' not found")
        if not isinstance(entry.chardev, RingbufChardev):
            raise QmpError(f"{label} is not a ringbuf device")
        return entry.chardev

    def _crashed(self, actor: Actor, _error: BaseException) -> None:
        # Its stream is closed, so its user hears of it; the name is free again.
        for label, entry in list(self._entries.items()):
            if entry.chardev is actor:
                del self._entries[label]
