"""What each option does: its argument in either syntax becomes a declared value, and that goes where QMP's goes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import attrs

from qsd import cli_chardev
from qsd.actors import qom
from qsd.actors.objects import creatable_types
from qsd.cli_getopt import Given, Option
from qsd.cli_report import Report, tell
from qsd.daemon import Daemon
from qsd.errors import QmpError
from qsd.qapi.schema.block import BlockdevOptions
from qsd.qapi.schema.control import MonitorMode, MonitorOptions
from qsd.qapi.schema.exports import BlockExportOptions, NbdServerOptions
from qsd.qapi.schema.objects import ObjectOptions
from qsd.qapi.visit import from_json, from_keyval
from qsd.wire import keyval
from qsd.wire.qmp_json import parse_one


class Finish(Exception):
    """Nothing is left to do: help was printed. ``code`` is the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@attrs.frozen
class _Argument:
    """An option's argument, parsed but not visited."""

    tree: dict[str, Any]
    is_json: bool
    wants_help: bool

    def visited(self, wanted: Any) -> Any:
        """The declared value. Raises QmpError."""
        return from_json(wanted, self.tree) if self.is_json else from_keyval(wanted, self.tree)


def _parsed(text: str, implied: str | None) -> _Argument:
    if text.startswith("{"):
        return _Argument(parse_one(text), is_json=True, wants_help=False)
    given = keyval.parse(text, implied)
    return _Argument(given.tree, is_json=False, wants_help=given.wants_help)


def _without_help(text: str, implied: str | None) -> _Argument:
    argument = _parsed(text, implied)
    if argument.wants_help:
        raise QmpError("Help is not available for this option")
    return argument


async def _blockdev(daemon: Daemon, text: str, _report: Report) -> None:
    await daemon.command("blockdev-add", _without_help(text, "driver").visited(BlockdevOptions))


async def _export(daemon: Daemon, text: str, _report: Report) -> None:
    argument = _without_help(text, "type")
    bitmap = argument.tree.get("bitmap")
    # The manual page's spelling; the declared member is a list.
    if not argument.is_json and isinstance(bitmap, str) and "bitmaps" not in argument.tree:
        del argument.tree["bitmap"]
        argument.tree["bitmaps"] = [bitmap]
    await daemon.command("block-export-add", argument.visited(BlockExportOptions))


def object_options(text: str) -> Any:
    """What an argument of ``--object`` says, as ``object-add`` takes it. Raises QmpError or Finish."""
    argument = _parsed(text, "qom-type")
    if argument.wants_help:
        raise Finish(tell(_object_help(argument.tree.get("qom-type"))))
    return argument.visited(ObjectOptions)


async def _object(daemon: Daemon, text: str, _report: Report) -> None:
    await daemon.command("object-add", object_options(text))


def _object_help(typename: Any) -> str:
    if not isinstance(typename, str) or typename not in creatable_types():
        return "List of user creatable objects:\n" + "".join(f"  {name}\n" for name in creatable_types())
    rows = sorted((row.name, row.kind) for row in qom.TYPES[typename].properties if row.write is not None)
    return f"{typename} options:\n" + "".join(f"  {name}=<{kind}>\n" for name, kind in rows)


async def _nbd_server(daemon: Daemon, text: str, _report: Report) -> None:
    await daemon.start_nbd_server(_without_help(text, None).visited(NbdServerOptions))


async def _monitor(daemon: Daemon, text: str, _report: Report) -> None:
    options = _without_help(text, "chardev").visited(MonitorOptions)
    if options.mode is MonitorMode.READLINE:
        raise QmpError("Only QMP is supported")
    await daemon.add_monitor(options)


async def _chardev(daemon: Daemon, text: str, report: Report) -> None:
    made = cli_chardev.read(text, report.warn)
    if isinstance(made, cli_chardev.Help):
        raise Finish(tell(made.text, made.code))
    await daemon.add_chardev(made, report.info)


async def _trace(_daemon: Daemon, text: str, report: Report) -> None:
    from qsd import cli_trace

    try:
        if cli_trace.apply(text, report.warn, report.plain):
            raise Finish(tell("".join(f"{name}\n" for name in cli_trace.event_names())))
    except cli_trace.EventsFileError as error:
        report.plain(str(error))
        raise Finish(1) from None


_ACTIONS: dict[Option, Callable[[Daemon, str, Report], Awaitable[None]]] = {
    Option.BLOCKDEV: _blockdev,
    Option.CHARDEV: _chardev,
    Option.EXPORT: _export,
    Option.MONITOR: _monitor,
    Option.NBD_SERVER: _nbd_server,
    Option.OBJECT: _object,
    Option.TRACE: _trace,
}


async def apply(daemon: Daemon, given: Given, report: Report) -> None:
    """Do what one option says. Raises QmpError or Finish."""
    if given.option is None:
        raise QmpError("Unexpected argument")
    action = _ACTIONS.get(given.option)
    if action is not None:  # the others were dealt with before anything started
        await action(daemon, given.argument, report)
