"""Commands about the monitor itself: negotiation, version, introspection, the end."""

from __future__ import annotations

import functools
from typing import Any

from qsd.commands.context import Context
from qsd.commands.registry import COMMANDS, command
from qsd.errors import QmpError
from qsd.qapi.core import SCHEMA
from qsd.qapi.introspect import introspect
from qsd.qapi.schema.control import CommandInfo, QmpCapabilitiesArgs, VersionInfo
from qsd.servers.monitor.version import VERSION


@command("qmp_capabilities")
async def qmp_capabilities(context: Context, args: QmpCapabilitiesArgs) -> None:
    """End the negotiation of the session that asks."""
    if context.session is None:
        raise QmpError("There is nothing to negotiate without a monitor")
    context.session.negotiate(args.enable or ())


@command("quit")
async def quit_daemon(context: Context, _args: None) -> None:
    """Ask the daemon to stop; no monitor takes a command from here on."""
    context.services.supervisor.stop_daemon()


@command("query-version")
async def query_version(_context: Context, _args: None) -> VersionInfo:
    """The interface level clients may count on, and who provides it."""
    return VERSION


@command("query-commands")
async def query_commands(_context: Context, _args: None) -> list[CommandInfo]:
    """The names of all commands."""
    return [CommandInfo(name=name) for name in SCHEMA.commands if name in COMMANDS]


@functools.cache
def _schema() -> list[dict[str, Any]]:
    return introspect()


@command("query-qmp-schema")
async def query_qmp_schema(_context: Context, _args: None) -> list[dict[str, Any]]:
    """The whole contract; it does not change while the daemon lives."""
    return _schema()
