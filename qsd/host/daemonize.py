"""Going into the background: fork first, come up, and only then let the parent say how it went.

The fork comes before the event loop exists. Until ``Background.ready`` the child keeps the caller's directory and
standard descriptors, so relative names work and its errors are seen; the parent's exit code is 0 only after it.
"""

from __future__ import annotations

import os
import signal

_UP = b"\0"


class Background:
    """The child's end: holds the pipe the parent waits on."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def ready(self) -> None:
        """Detach: directory ``/``, standard descriptors to /dev/null; then tell the parent that all is up.

        Raises BrokenPipeError when it was killed meanwhile: who started us believes that nothing runs.
        """
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        if null > 2:
            os.close(null)
        os.write(self._pipe, _UP)
        os.close(self._pipe)


def fork() -> Background | None:
    """Fork into a new session. Returns ``Background`` in the child; the parent never returns from here: it exits
    with 0 once the child is ready, or 1 when the child ends before. Raises OSError.
    """
    reading, writing = os.pipe()
    if os.fork() != 0:
        os.close(writing)
        _exit_like_child(reading)
    os.close(reading)
    os.setsid()
    # A second fork: who leads no session never gets a controlling terminal by opening one.
    if os.fork() != 0:
        os._exit(0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    return Background(writing)


def _exit_like_child(reading: int) -> None:
    said = os.read(reading, 1)
    os._exit(0 if said == _UP else 1)
