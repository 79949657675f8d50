"""The daemon's life: come up, wait, go down.

Going down is the same path for SIGTERM, SIGINT, SIGHUP, ``quit`` and a failed start: the supervisor closes the
floors from the inside, each within its deadline; the pid file goes last. What cannot be called off, as a thread's
system call, is not waited for beyond that (``LastResort``).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable

import attrs
import trio

from qsd.actors.supervisor import LONGEST_CLOSE, Supervisor
from qsd.errors import QmpError
from qsd.host.console import write_stderr
from qsd.host.last_resort import LastResort
from qsd.host.notify import notify
from qsd.host.pidfile import PidFile
from qsd.host.signals import Arrivals

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# For the ``host.signals.block`` of who calls ``run`` and ends with it.
SIGNALS = (*_STOPPING, signal.SIGUSR1)


@attrs.frozen
class Process:
    """What surrounds the daemon.

    ``came_up`` runs when everything works, before that is announced: it detaches a background daemon, and raises
    BrokenPipeError when nobody waits for it any more. ``failed`` prints why the daemon cannot come up.
    """

    pidfile: str | None
    came_up: Callable[[], None]
    failed: Callable[[QmpError], None]


Start = Callable[[Supervisor], Awaitable[int | None]]


async def run(start: Start, process: Process) -> int:
    """Live until someone asks to stop; return the exit code.

    ``start`` builds everything on the supervisor it is given; it returns None when all is up, or the exit code if
    there is nothing to wait for (it has printed why). A signal that comes meanwhile cancels it.
    """
    supervisor = Supervisor()
    pidfile: list[PidFile] = []

    def clean_up() -> None:
        for held in pidfile:
            held.remove()

    try:
        with Arrivals(SIGNALS) as arrivals, LastResort(LONGEST_CLOSE, _STOPPING, clean_up) as last_resort:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_obey, arrivals, supervisor, name="signals")
                nursery.start_soon(_arm, supervisor, last_resort, name="last resort")
                async with supervisor:
                    code = await _live(supervisor, start, process, pidfile)
                    last_resort.arm()
                    notify("STOPPING=1")
                nursery.cancel_scope.cancel()
    finally:
        clean_up()
    return code


async def _live(supervisor: Supervisor, start: Start, process: Process, pidfile: list[PidFile]) -> int:
    code: int | None = 0
    async with trio.open_nursery() as nursery:

        async def give_up() -> None:
            await supervisor.stop_requested.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(give_up, name="stop during start-up")
        code = await start(supervisor)
        nursery.cancel_scope.cancel()
    if code is not None or supervisor.stop_requested.is_set():
        return _exit_code(supervisor) or code or 0
    try:
        if process.pidfile is not None:
            pidfile.append(PidFile.create(process.pidfile))
    except QmpError as error:
        process.failed(error)
        return 1
    try:
        process.came_up()
    except BrokenPipeError:
        return 1
    notify(f"READY=1\nMAINPID={os.getpid()}")
    await supervisor.stop_requested.wait()
    return _exit_code(supervisor)


def _exit_code(supervisor: Supervisor) -> int:
    return 0 if supervisor.fatal is None else 1


async def _arm(supervisor: Supervisor, last_resort: LastResort) -> None:
    await supervisor.stop_requested.wait()
    last_resort.arm()


async def _obey(arrivals: Arrivals, supervisor: Supervisor) -> None:
    while True:
        await trio.lowlevel.wait_readable(arrivals.fileno())
        for number in arrivals.take():
            if number == signal.SIGUSR1:
                write_stderr(supervisor.tree())
            else:
                supervisor.stop_daemon()
