"""The ``--trace`` option: which events print, and where to."""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
from collections.abc import Callable

import qsd
from qsd.errors import QmpError, errno_text
from qsd.host.console import write_stderr
from qsd.trace import REGISTRY, nowhere
from qsd.wire.qemuopts import OptionKind, OptionTable, parse

TABLE = OptionTable(
    {"enable": OptionKind.STRING, "events": OptionKind.STRING, "file": OptionKind.STRING}, implied="enable"
)


class EventsFileError(Exception):
    """The file named by ``events=`` cannot be read; the text is the whole message behind the program's name."""


def load_all_events() -> None:
    """Import every module of the package, which declares every event. Only done when tracing: it takes its time."""
    for module in pkgutil.walk_packages(qsd.__path__, "qsd."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            # What stands on an extra that is not installed never runs, so it has nothing to trace.
            if (error.name or "").startswith("qsd"):
                raise


def event_names() -> list[str]:
    """The names of all events, sorted."""
    load_all_events()
    return sorted(REGISTRY.events)


def apply(text: str, warn: Callable[[str], None], warn_plain: Callable[[str], None]) -> bool:
    """Follow one ``--trace`` argument; True when it asks for the list of events instead.

    ``warn`` prints a warning about the option, ``warn_plain`` one that names its own place (a line of the events
    file). Raises QmpError and EventsFileError.
    """
    given = parse(text, TABLE, warn)
    enable = given.text("enable")
    if enable in ("help", "?"):
        return True
    if REGISTRY.sink is nowhere:
        REGISTRY.sink = _to_stderr
    load_all_events()
    if enable is not None:
        unknown = REGISTRY.apply(enable)
        if unknown is not None:
            warn(f"trace event '{unknown}' does not exist")
    events = given.text("events")
    if events is not None:
        _apply_file(events, warn_plain)
    file = given.text("file")
    if file is not None:
        _open_sink(file)
    return False


def _apply_file(path: str, warn_plain: Callable[[str], None]) -> None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise EventsFileError(f"{path}: {errno_text(error.errno or 0)}") from None
    for number, line in enumerate(lines, 1):
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        unknown = REGISTRY.apply(pattern)
        if unknown is not None:
            warn_plain(f"{path}:{number}: warning: trace event '{unknown}' does not exist")


def _open_sink(template: str) -> None:
    """Send events to a file; ``%d`` in its name is the process's id. Raises QmpError."""
    path = template
    if "%" in template:
        if template.count("%") != 1 or "%d" not in template:
            raise QmpError(f"Bad logfile template: {template}")
        path = template.replace("%d", str(os.getpid()))
    try:
        REGISTRY.sink = FileSink(path)
    except OSError as error:
        raise QmpError(f"Error opening logfile {path}: {errno_text(error.errno or 0)}") from None


class FileSink:
    """Writes each event to a file at once. Raises OSError when it cannot be opened."""

    def __init__(self, path: str) -> None:
        # Non-blocking: a FIFO that nobody reads, or not fast enough, must hold up nobody.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK
        self._descriptor = os.open(path, flags, 0o666)

    def __call__(self, line: str) -> None:
        with contextlib.suppress(OSError):  # a full disk or FIFO loses lines, and must not fail what is traced
            os.write(self._descriptor, line.encode("utf-8", "surrogateescape") + b"\n")

    def close(self) -> None:
        os.close(self._descriptor)


def _to_stderr(line: str) -> None:
    write_stderr(line + "\n")
