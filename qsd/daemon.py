"""The daemon: the one place where everything meets. Builds the services, each on the floor it belongs to."""

from __future__ import annotations

import sys
from typing import Any

import attrs

import qsd.commands.block
import qsd.commands.block_queries
import qsd.commands.chardev
import qsd.commands.control
import qsd.commands.exports
import qsd.commands.objects  # noqa: F401  # each fills the table of commands
from qsd.actors.core import Actor
from qsd.actors.dataplane import DataPlane
from qsd.actors.events import EventBus
from qsd.actors.graph import Graph
from qsd.actors.objects import Objects
from qsd.actors.supervisor import Floor, Supervisor
from qsd.cli_chardev import NewChardev
from qsd.commands.context import Context, Services
from qsd.commands.control import GREETING
from qsd.commands.dispatch import execute
from qsd.commands.registry import COMMANDS
from qsd.drivers.registry import find_driver
from qsd.errors import ErrorClass, QmpError
from qsd.qapi.schema.control import MonitorOptions
from qsd.qapi.schema.exports import NbdServerOptions
from qsd.servers.chardev.socket import face
from qsd.servers.chardev.table import Chardevs
from qsd.servers.exports import Exports
from qsd.servers.monitor.monitors import Monitors
from qsd.servers.monitor.session import MonitorSession
from qsd.servers.nbd.server import NbdService


@attrs.define(eq=False)
class Daemon:
    """The services, and what only the command line may ask of them."""

    services: Services
    monitors: Monitors

    async def command(self, name: str, arguments: Any) -> Any:
        """Run a QMP command's implementation with visited arguments. Raises QmpError."""
        implementation = COMMANDS.get(name)
        if implementation is None:
            raise QmpError(f"The command {name} has not been found", error_class=ErrorClass.COMMAND_NOT_FOUND)
        return await implementation(Context(self.services), arguments)

    async def add_chardev(self, new: NewChardev) -> None:
        """Make a character device; a server socket may wait here for its first client."""
        await self.services.chardevs.add(new.id, new.backend, from_command_line=True)

    async def add_monitor(self, options: MonitorOptions) -> None:
        """Serve QMP on a character device."""
        await self.monitors.add(options)

    async def start_nbd_server(self, options: NbdServerOptions) -> None:
        """Listen for NBD clients."""
        await self.services.nbd.start(options, allow_fd=True)


def _log_only(_actor: Actor, _error: BaseException) -> None:
    """The supervisor has logged it; the actor has let go of what it held."""


# What the crash of an actor means; a kind that is not listed (graph, data plane, NBD server) stops the daemon.
# What the crash of a node means is the graph's to say.
FAILURES = {
    "connection": _log_only,
    "export": _log_only,
    "chardev": _log_only,
    "monitor": _log_only,
}


def _warn(text: str) -> None:
    sys.stderr.write(f"{text}\n")


async def build(supervisor: Supervisor, *, is_background: bool) -> Daemon:
    """Build the daemon on its supervisor. ``is_background``: standard descriptors will go away."""
    supervisor.failures.update(FAILURES)
    events = EventBus()
    objects = Objects()
    plane = DataPlane()
    await supervisor.start(plane, Floor.CORE)
    graph = Graph(supervisor, find_driver, plane.aio, _warn)
    await supervisor.start(graph, Floor.GRAPH)
    exports = Exports(supervisor, graph, objects, events)
    nbd = NbdService(supervisor, plane.reactor, exports, _warn)
    await supervisor.start(nbd, Floor.EXPORTS)
    chardevs = Chardevs(supervisor, is_background=is_background)
    services = Services(
        supervisor=supervisor,
        events=events,
        objects=objects,
        chardevs=chardevs,
        graph=graph,
        exports=exports,
        nbd=nbd,
    )

    async def run(session: MonitorSession, name: str, arguments: dict[str, Any]) -> Any:
        return await execute(Context(services, session), name, arguments)

    objects.mount("chardevs", lambda: {item.label: face(item) for item in chardevs.all()})
    return Daemon(services, Monitors(supervisor, chardevs, objects, events, GREETING, run))
