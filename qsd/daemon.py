"""The daemon: the one place where everything meets. Builds the services, each on the floor it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import attrs

import qsd.commands.bitmaps
import qsd.commands.block
import qsd.commands.block_jobs
import qsd.commands.block_queries
import qsd.commands.chardev
import qsd.commands.control
import qsd.commands.exports
import qsd.commands.jobs
import qsd.commands.objects
import qsd.commands.snapshots  # noqa: F401  # each fills the table of commands
from qsd.actors.core import Actor
from qsd.actors.dataplane import DataPlane
from qsd.actors.events import EventActor, EventBus
from qsd.actors.graph import Graph
from qsd.actors.jobs.create import CreateServices
from qsd.actors.jobs.table import Jobs
from qsd.actors.objects import Objects
from qsd.actors.supervisor import Floor, Supervisor
from qsd.cli_chardev import NewChardev
from qsd.commands.context import Context, Services
from qsd.commands.dispatch import execute, run
from qsd.drivers.registry import find_driver
from qsd.host.console import write_stderr
from qsd.qapi.schema.control import MonitorOptions
from qsd.qapi.schema.exports import NbdServerOptions
from qsd.qapi.schema.objects import QsdViewProperties
from qsd.servers.chardev.base import Origin
from qsd.servers.chardev.table import Chardevs
from qsd.servers.exports import Exports
from qsd.servers.fuse.export import FuseService
from qsd.servers.monitor.session import Session
from qsd.servers.monitor.table import Monitors
from qsd.servers.nbd.server import NbdService

if TYPE_CHECKING:
    import trio

    from qsd.servers.view.view import Views


@attrs.define(eq=False)
class Daemon:
    """The services, and what only the command line may ask of them."""

    services: Services
    monitors: Monitors

    async def command(self, name: str, arguments: Any) -> Any:
        """Run a QMP command's implementation with visited arguments. Raises QmpError."""
        return await run(Context(self.services), name, arguments)

    async def add_chardev(self, new: NewChardev, inform: Callable[[str], None]) -> None:
        """Make a character device; a server socket may wait here for its first client, and tells ``inform`` so."""
        chardevs = self.services.chardevs
        await chardevs.add(new.id, new.backend, origin=Origin.COMMAND_LINE, inform=inform)

    async def add_monitor(self, options: MonitorOptions) -> None:
        """Serve QMP on a character device."""
        await self.monitors.add(options)

    async def start_nbd_server(self, options: NbdServerOptions) -> None:
        """Listen for NBD clients."""
        await self.services.nbd.start(options, allow_fd=True)


def _log_only(_actor: Actor, _error: BaseException) -> None:
    """The supervisor has logged it; the actor has let go of what it held."""


# What the crash of an actor means; a kind that is not listed (graph, data plane, NBD server) stops the daemon.
FAILURES = {
    "connection": _log_only,
    "export": _log_only,
}


def _warn(text: str) -> None:
    write_stderr(f"{text}\n")


async def build(supervisor: Supervisor, *, is_background: bool, up: trio.Event | None = None) -> Daemon:
    """Build the daemon on its supervisor. ``is_background``: standard descriptors will go away.

    Clients that come before ``up`` wait: they would miss what the rest of the command line makes. None: it is up.
    """
    supervisor.failures.update(FAILURES)
    events = EventBus()
    await supervisor.start(EventActor(events), Floor.CORE)
    objects = Objects()
    plane = DataPlane()
    await supervisor.start(plane, Floor.CORE)

    graph = Graph(supervisor, find_driver, plane.aio, _warn, objects.secrets.password, events.emit)
    await supervisor.start(graph, Floor.GRAPH)
    jobs = Jobs(supervisor, events)
    await supervisor.start(jobs, Floor.JOBS)
    exports = Exports(supervisor, graph, objects, events)
    nbd = NbdService(supervisor, plane.reactor, exports, _warn, up)
    await supervisor.start(nbd, Floor.EXPORTS)
    FuseService(plane.reactor, exports, _warn)
    chardevs = Chardevs(supervisor, is_background=is_background)
    services = Services(
        supervisor=supervisor,
        events=events,
        objects=objects,
        chardevs=chardevs,
        graph=graph,
        exports=exports,
        nbd=nbd,
        jobs=jobs,
        creating=CreateServices(graph, objects.secrets.password, _warn),
    )

    async def dispatch(session: Session, name: str, arguments: dict[str, Any]) -> Any:
        return await execute(Context(services, session), name, arguments)

    async def ask(name: str, arguments: dict[str, Any]) -> Any:
        return await execute(Context(services), name, arguments)

    @cache
    def views() -> Views:
        # Imported when there is a view to show: few daemons have one.
        from qsd.servers.view.contents import Sources
        from qsd.servers.view.view import Views

        return Views(Sources(ask, graph, exports, supervisor), lambda name: objects.withdraw("objects", name))

    objects.makers[QsdViewProperties] = lambda options: lambda: views().make(options)
    objects.mount("chardevs", chardevs.faces)
    monitors = Monitors(supervisor, chardevs, objects, events, dispatch, up)
    await monitors.start()
    return Daemon(services, monitors)
