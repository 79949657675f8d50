"""Commands about the monitor itself."""

from __future__ import annotations

from typing import Any

from qsd import __version__
from qsd.commands.context import Context
from qsd.commands.registry import command
from qsd.errors import ErrorClass, QmpError
from qsd.qapi.core import SCHEMA
from qsd.qapi.introspect import introspect

# The interface level clients may count on: commands, events and texts are those of this release of the reference.
VERSION = {"qemu": {"micro": 3, "minor": 1, "major": 11}, "package": f"qsd {__version__}"}

GREETING = {"QMP": {"version": VERSION, "capabilities": ["oob"]}}


@command("qmp_capabilities")
async def qmp_capabilities(_context: Context, _args: Any) -> None:
    """Negotiation is the session's own; anywhere else it is over."""
    raise QmpError(
        "Capabilities negotiation is already complete, command ignored", error_class=ErrorClass.COMMAND_NOT_FOUND
    )


@command("quit")
async def quit_daemon(context: Context, _args: Any) -> None:
    """Ask the daemon to stop; this session takes no further command."""
    if context.session is not None:
        context.session.is_quitting = True
    context.services.supervisor.stop_daemon()


@command("query-version")
async def query_version(_context: Context, _args: Any) -> dict[str, Any]:
    """The interface level, and who provides it."""
    return VERSION


@command("query-commands")
async def query_commands(_context: Context, _args: Any) -> list[dict[str, str]]:
    """The names of all commands."""
    return [{"name": name} for name in SCHEMA.commands]


@command("query-qmp-schema")
async def query_qmp_schema(_context: Context, _args: Any) -> list[dict[str, Any]]:
    """The whole contract."""
    return introspect()
