"""Ending the process where nothing else does: a system call on storage that hangs cannot be called off."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from functools import partial

from qsd.host.console import write_stderr


class LastResort:
    """Once armed, ends the process as a failure after ``seconds``, the loop's own hanging included.

    ``clean_up`` runs before, on another thread.
    """

    def __init__(self, seconds: float, clean_up: Callable[[], None]) -> None:
        end = partial(_end, seconds, clean_up)
        self._timer = threading.Timer(seconds, end)
        self._timer.daemon = True
        self._is_armed = False

    def arm(self) -> None:
        """Let the time run. Idempotent."""
        if not self._is_armed:
            self._is_armed = True
            with contextlib.suppress(RuntimeError):  # no thread to be had: then without
                self._timer.start()

    def disarm(self) -> None:
        """The process is about to end, or goes on."""
        self._is_armed = True
        self._timer.cancel()


def _end(seconds: float, clean_up: Callable[[], None]) -> None:
    write_stderr(f"qsd: still waiting for something after {seconds:g} s: ending without it\n")
    clean_up()
    os._exit(1)
