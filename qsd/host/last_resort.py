"""Ending the process where nothing else does: a system call on storage that hangs cannot be called off."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable, Collection
from functools import partial

from qsd.host.console import write_stderr
from qsd.host.signals import open_signalfd


class LastResort:
    """A context manager. Once armed, it ends the process as a failure if the block is not over in ``seconds``.

    ``clean_up`` runs before, on another thread. One of these signals arms it where it comes while the loop hangs.
    """

    def __init__(self, seconds: float, signals: Collection[int], clean_up: Callable[[], None]) -> None:
        self._signals = signals
        self._timer = threading.Timer(seconds, partial(_end, seconds, clean_up))
        self._timer.daemon = True
        self._lock = threading.Lock()
        self._is_armed = False
        self._over = -1
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> LastResort:
        self._over = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            pending = open_signalfd(self._signals)
        except BaseException:
            os.close(self._over)
            raise
        watcher = threading.Thread(target=self._watch, args=(pending,), name="qsd-end", daemon=True)
        try:
            watcher.start()
        except RuntimeError:  # no thread to be had: then without
            os.close(pending)
        else:
            self._watcher = watcher
        return self

    def __exit__(self, *_raised: object) -> None:
        with self._lock:
            self._is_armed = True
        self._timer.cancel()
        os.eventfd_write(self._over, 1)
        if self._watcher is not None:
            self._watcher.join()
        os.close(self._over)

    def arm(self) -> None:
        """Let the time run. Idempotent; any thread may call this."""
        with self._lock:
            if not self._is_armed:
                self._is_armed = True
                with contextlib.suppress(RuntimeError):
                    self._timer.start()

    def _watch(self, pending: int) -> None:
        """See whether a signal comes, without taking it. The loop has mostly taken it when this thread runs."""
        poll = select.poll()
        poll.register(pending, select.POLLIN)
        poll.register(self._over, select.POLLIN)
        found = poll.poll()
        os.close(pending)
        if all(fd != self._over for fd, _events in found):
            self.arm()


def _end(seconds: float, clean_up: Callable[[], None]) -> None:
    write_stderr(f"qsd: still waiting for something after {seconds:g} s: ending without it\n")
    clean_up()
    os._exit(1)
