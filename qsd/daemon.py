"""The daemon: the one place where everything meets. Builds the services, each on the floor it belongs to."""

from __future__ import annotations

from typing import Any, NoReturn

import attrs

import qsd.commands.objects  # noqa: F401  # fills the table of commands
from qsd.actors.objects import Objects
from qsd.actors.supervisor import Supervisor
from qsd.cli_chardev import NewChardev
from qsd.commands.context import Context, Services
from qsd.commands.registry import COMMANDS
from qsd.errors import ErrorClass, QmpError
from qsd.qapi.schema.control import MonitorOptions
from qsd.qapi.schema.exports import NbdServerOptions


class Absent:
    """Stands for a service this build does not have: whatever is asked of it is refused by name."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __getattr__(self, name: str) -> NoReturn:
        raise QmpError(f"This build has no {self._what}")


@attrs.define(eq=False)
class Daemon:
    """The services, and what only the command line may ask of them."""

    services: Services
    monitors: Any

    async def command(self, name: str, arguments: Any) -> Any:
        """Run a QMP command's implementation with visited arguments. Raises QmpError."""
        implementation = COMMANDS.get(name)
        if implementation is None:
            raise QmpError(f"The command {name} has not been found", error_class=ErrorClass.COMMAND_NOT_FOUND)
        return await implementation(Context(self.services), arguments)

    async def add_chardev(self, new: NewChardev) -> None:
        """Make a character device; a server socket may wait here for its first client."""
        await self.services.chardevs.add(new.id, new.backend)

    async def add_monitor(self, options: MonitorOptions) -> None:
        """Serve QMP on a character device."""
        await self.monitors.add(options)

    async def start_nbd_server(self, options: NbdServerOptions) -> None:
        """Listen for NBD clients."""
        await self.services.nbd.start(options)


async def build(supervisor: Supervisor, *, is_background: bool) -> Daemon:
    """Build the daemon on its supervisor. ``is_background``: standard descriptors will go away."""
    del is_background  # for the character devices: stdio is refused then
    services = Services(
        supervisor=supervisor,
        events=_absent("events"),
        objects=Objects(),
        chardevs=_absent("character devices"),
        graph=_absent("block nodes"),
        exports=_absent("exports"),
        nbd=_absent("NBD server"),
    )
    return Daemon(services, _absent("monitors"))


def _absent(what: str) -> Any:
    return Absent(what)
