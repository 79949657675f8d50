"""Running a short program to its end, as if whoever started this process had started it.

``subprocess`` cannot say which signals are blocked without running Python in the forked child, which threads make
unsafe; ``posix_spawn`` can.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Mapping

from qsd.host.signals import mask_for_programs

# What the interpreter ignores, and programs expect to end by.
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
# Bytes of what it says that are kept.
_MOST = 1 << 16


def run_program(
    command: list[str], env: Mapping[str, str], seconds: float, fd: int | None = None
) -> tuple[int, str]:
    """Run ``command``, whose first word is a path, on a thread; its exit code (negative: a signal) and stderr.

    It inherits ``fd`` with its number. Raises OSError, and TimeoutError when it was killed after ``seconds``.
    """
    # Not to block at either end: what has no room in the pipe is lost.
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        try:
            pid = _spawn(command, env, writing, fd)
        finally:
            os.close(writing)
        end = select.poll()
        end.register(reading, 0)  # hang-up: it has ended
        has_ended = bool(end.poll(seconds * 1000))
        if not has_ended:
            os.kill(pid, signal.SIGKILL)
        try:
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        except ChildProcessError:
            code = 0  # started with SIGCHLD ignored: nobody will ever know
        if not has_ended:
            raise TimeoutError
        return code, os.read(reading, _MOST).decode(errors="replace")
    finally:
        os.close(reading)


def _spawn(command: list[str], env: Mapping[str, str], stderr: int, fd: int | None) -> int:
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_DUP2, stderr, 2),
    ]
    if fd is not None:
        # On itself: that clears its close-on-exec flag, in the child alone.
        actions.append((os.POSIX_SPAWN_DUP2, fd, fd))
    return os.posix_spawn(
        command[0], command, env, file_actions=actions, setsigmask=mask_for_programs(), setsigdef=_IGNORED_BY_PYTHON
    )
