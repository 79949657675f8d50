"""All monitors: each an actor on a character device."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from qsd.actors.core import Actor
from qsd.actors.events import EventBus
from qsd.actors.faces import MonitorFace
from qsd.actors.objects import Objects
from qsd.actors.supervisor import Floor, Supervisor
from qsd.block.names import is_well_formed
from qsd.errors import QmpError
from qsd.servers.chardev.base import Chardev
from qsd.servers.chardev.streams import Stream
from qsd.servers.chardev.table import Chardevs
from qsd.servers.monitor.session import Execute, MonitorSession

# Seconds that pending answers have to reach their reader when the daemon goes down.
FLUSH_SECONDS = 1.0


class Monitor(Actor):
    """One monitor; its chardev calls ``serve`` for each client in turn."""

    kind = "monitor"

    def __init__(
        self,
        object_id: str,
        chardev: Chardev,
        events: EventBus,
        greeting: dict[str, Any],
        execute: Execute,
        *,
        is_pretty: bool,
    ) -> None:
        super().__init__(f"monitor {object_id}")
        self.object_id = object_id
        self.chardev = chardev
        self.is_pretty = is_pretty
        self._events = events
        self._greeting = greeting
        self._execute = execute
        self._session: MonitorSession | None = None
        self._over = trio.Event()
        self.clients = 0

    async def serve(self, stream: Stream) -> None:
        """Serve one client until it goes."""
        self.clients += 1
        session = MonitorSession(stream, self, self._events, self._greeting, self._execute)
        self._session = session
        try:
            await session.run()
        finally:
            self._session = None
            self._over.set()
            self._over = trio.Event()

    async def stopping(self) -> None:
        """Let the client have what it was told."""
        session = self._session
        if session is not None:
            session.is_quitting = True
            with trio.move_on_after(FLUSH_SECONDS):
                await session.flushed()

    def statistics(self) -> dict[str, Any]:
        """The actor's facts, and its clients."""
        return super().statistics() | {"chardev": self.chardev.label, "clients": self.clients}


class Monitors:
    """The table."""

    def __init__(
        self,
        supervisor: Supervisor,
        chardevs: Chardevs,
        objects: Objects,
        events: EventBus,
        greeting: dict[str, Any],
        execute: Callable[[MonitorSession, str, dict[str, Any]], Awaitable[Any]],
    ) -> None:
        self._supervisor = supervisor
        self._chardevs = chardevs
        self._objects = objects
        self._events = events
        self._greeting = greeting
        self._execute = execute
        self._count = 0

    async def add(self, options: Any) -> None:
        """--monitor. Raises QmpError."""
        if options.mode is not None and options.mode.value == "readline":
            raise QmpError("Only QMP is supported")
        name = options.id
        if name is None:
            name = f"compat_monitor{self._count}"
        elif not is_well_formed(name):
            raise QmpError(
                "Parameter 'id' expects an identifier",
                hint="Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
            )
        chardev = self._chardevs.find(options.chardev)
        if chardev is None:
            raise QmpError(f'chardev "{options.chardev}" not found')
        if chardev.frontend is not None:
            raise QmpError(f"chardev '{options.chardev}' is already in use")
        monitor = Monitor(
            name, chardev, self._events, self._greeting, self._execute, is_pretty=bool(options.pretty)
        )
        self._objects.publish(
            "objects", name, MonitorFace(options.chardev, bool(options.pretty), lambda: self._remove(monitor))
        )
        self._count += 1
        await self._supervisor.start(monitor, Floor.MONITORS)
        chardev.attach(monitor)

    async def _remove(self, monitor: Monitor) -> None:
        monitor.chardev.frontend = None
        await self._supervisor.stop(monitor)
