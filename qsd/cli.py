"""The command line: what the reference's first pass decides, then a daemon that takes the rest in order."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qsd.cli_getopt import Given, Option, UsageError, options
from qsd.cli_report import Report, tell
from qsd.errors import QmpError, errno_text
from qsd.host.console import write_stderr

if TYPE_CHECKING:
    from qsd.host.daemonize import Background


def main(words: Sequence[str] | None = None) -> int:
    """Run the program with ``words`` (the process's own when None); return its exit code."""
    # Until ``block``, when the daemon listens for them, signals simply end the process: nothing to clean up yet.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    prog = os.path.basename(sys.argv[0])
    if not prog or prog == "__main__.py":
        prog = "qsd"
    _open_standard_descriptors()
    words = sys.argv[1:] if words is None else words
    if words and words[0] == "check":
        # No option of the daemon begins like that; it takes no words besides options.
        from qsd.cli_check import check

        return check(prog, words[1:])
    return _main(prog, words)


def _open_standard_descriptors() -> None:
    """Put /dev/null where a standard descriptor is closed: else the next socket or image would get its number, and
    messages with it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def _main(prog: str, words: Sequence[str]) -> int:
    given: list[Given] = []
    pidfile: str | None = None
    daemonize = False
    try:
        for item in options(words):
            if item.option in (Option.HELP, Option.VERSION):
                return _tell(prog, item.option)
            if item.option is Option.DAEMONIZE:
                daemonize = True
            elif item.option is Option.PIDFILE:
                pidfile = item.argument
            else:
                given.append(item)
    except UsageError as error:
        Report(prog).error(QmpError(str(error)))
        return 1
    background = None
    if daemonize:
        from qsd.host import daemonize as daemonizing

        try:
            background = daemonizing.fork()
        except OSError as error:
            Report(prog).error(QmpError(f"Cannot fork: {errno_text(error.errno or 0)}"))
            return 1
    return _run(prog, given, pidfile, background)


def _tell(prog: str, what: Option) -> int:
    from qsd import cli_help

    return tell(cli_help.help_text(prog) if what is Option.HELP else cli_help.version_text(prog))


def _run(prog: str, given: list[Given], pidfile: str | None, background: Background | None) -> int:
    # Imported late: the help must not wait for the daemon's modules. What they make lives as long as the process,
    # so the garbage collector need not look at it, neither now nor in any later round.
    gc.disable()
    import logging

    import trio

    from qsd import cli_options
    from qsd.actors.depth import RECURSION_LIMIT
    from qsd.actors.supervisor import Supervisor
    from qsd.daemon import build
    from qsd.host.signals import block
    from qsd.life import SIGNALS, Process, run

    gc.freeze()
    gc.enable()
    sys.setrecursionlimit(RECURSION_LIMIT)

    class Stderr(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            write_stderr(self.format(record) + "\n")

    logging.basicConfig(format=f"{prog}: %(message)s", level=logging.WARNING, handlers=[Stderr()])

    async def start(supervisor: Supervisor) -> int | None:
        up = trio.Event()
        daemon = await build(supervisor, is_background=background is not None, up=up)
        for item in given:
            report = Report(prog, item.where)
            try:
                await cli_options.apply(daemon, item, report)
            except QmpError as error:
                report.error(error)
                return 1
            except cli_options.Finish as finish:
                return finish.code
        up.set()
        return None

    def came_up() -> None:
        if background is not None:
            background.ready()

    block(SIGNALS)
    return trio.run(run, start, Process(pidfile, came_up, Report(prog).error))
