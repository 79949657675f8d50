"""The table of monitors, and the gate that keeps commands out while the daemon comes apart."""

from __future__ import annotations

import trio

from qsd.actors.core import Actor
from qsd.actors.events import EventBus
from qsd.actors.faces import MonitorFace
from qsd.actors.objects import Objects, check_identifier
from qsd.actors.supervisor import Floor, Supervisor
from qsd.errors import QmpError
from qsd.qapi.schema.control import MonitorMode, MonitorOptions
from qsd.servers.chardev.table import Chardevs
from qsd.servers.monitor.monitor import Leave, Monitor, MonitorInfo
from qsd.servers.monitor.session import Dispatch, Gate

_REMOVE_S = 2.0  # for the command a removed monitor runs


class CommandGate(Actor):
    """Stands on the highest floor: when it stops, no command runs any more and none is taken."""

    kind = "command gate"

    def __init__(self, gate: Gate, monitors: Monitors) -> None:
        super().__init__("command gate")
        self._gate = gate
        self._monitors = monitors

    async def stopping(self) -> None:
        self._gate.shut.set()
        try:
            for monitor in self._monitors.actors():
                await monitor.wait_idle()
        finally:
            # Only what did not end in time is still there: the floor's deadline has cut the wait off.
            for monitor in self._monitors.actors():
                monitor.abort_commands()


class Monitors:
    """All monitors. ``start`` must run before the first is added.

    ``dispatch`` runs a command: it is given the session, the name and the JSON arguments, and returns JSON. Nobody
    is greeted before ``up``.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        chardevs: Chardevs,
        objects: Objects,
        events: EventBus,
        dispatch: Dispatch,
        up: trio.Event | None = None,
    ) -> None:
        self._supervisor = supervisor
        self._chardevs = chardevs
        self._objects = objects
        self._events = events
        self._dispatch = dispatch
        self._gate = Gate(supervisor.stop_requested, up)
        self._monitors: dict[str, Monitor] = {}
        self._count = 0
        supervisor.failures[Monitor.kind] = self._crashed

    async def start(self) -> None:
        """Put the gate in its place."""
        await self._supervisor.start(CommandGate(self._gate, self), Floor.COMMANDS)

    async def add(self, options: MonitorOptions) -> MonitorInfo:
        """Serve QMP on a chardev. Raises QmpError and leaves nothing."""
        if options.mode is MonitorMode.READLINE:
            raise QmpError("Only QMP is supported")
        name = options.id
        if name is None:
            name = f"compat_monitor{self._count}"
            self._count += 1
        else:
            check_identifier(name)
        info = MonitorInfo(name, options.chardev, bool(options.pretty))
        monitor = Monitor(info, self._events, self._dispatch, self._gate)

        async def remove() -> None:
            await self.remove(name)

        face = MonitorFace(remove, info.chardev, info.pretty, monitor.set_pretty)
        self._objects.publish("objects", name, face)
        try:
            await self._supervisor.start(monitor, Floor.MONITORS)
            self._monitors[name] = monitor
            # Before it is attached: the first client may be greeted at once.
            monitor.offers_oob = self._chardevs.carries_oob(info.chardev)
            await self._chardevs.attach(info.chardev, monitor)
        except BaseException:
            self._objects.withdraw("objects", name)
            self._monitors.pop(name, None)
            await self._supervisor.stop(monitor, _REMOVE_S)
            raise
        return info

    async def remove(self, name: str) -> None:
        """End a monitor; its chardev, and a client that is connected to it, stay."""
        monitor = self._monitors.pop(name, None)
        if monitor is None:
            return
        await monitor.ref.ask(Leave())
        await self._supervisor.stop(monitor, _REMOVE_S)
        self._chardevs.detach(monitor.info.chardev, monitor)

    def infos(self) -> list[MonitorInfo]:
        """What monitors there are, oldest first."""
        return [monitor.info for monitor in self._monitors.values()]

    def actors(self) -> list[Monitor]:
        """The monitors themselves."""
        return [*self._monitors.values()]

    def _crashed(self, actor: Actor, _error: BaseException) -> None:
        for name, monitor in [*self._monitors.items()]:
            if monitor is actor:
                del self._monitors[name]
                self._objects.withdraw("objects", name)
                self._chardevs.detach(monitor.info.chardev, monitor)
