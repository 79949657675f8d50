"""The data plane as an actor: the reactor's task, and the engines whose completions it collects."""

from __future__ import annotations

import logging
import sys
from typing import Any

from qsd.actors.core import Actor
from qsd.drivers.base import Aio
from qsd.host.memory import keep_freed_memory
from qsd.host.reactor import Reactor
from qsd.host.threads import ThreadAio, ThreadPool
from qsd.host.uring import Uring

log = logging.getLogger("qsd.dataplane")

# How long a thread waits for the interpreter's lock until it asks for it. With Python's 5 ms one waits for a chance
# that lasts: the loop lets go of the lock for a moment with every system call, and has it back before a thread
# that slept is awake. Clusters of 64 KiB unpacked by the loop and one thread: 8.5 k/s and 8.75.
SWITCH_SECONDS = 50e-6


class DataPlane(Actor):
    """Runs the reactor. ``aio`` is io_uring where the kernel allows it, otherwise a pool of threads."""

    kind = "data plane"

    def __init__(self) -> None:
        super().__init__("data plane")
        keep_freed_memory()
        sys.setswitchinterval(SWITCH_SECONDS)
        self.reactor = Reactor()
        self._pool = ThreadPool()
        self._uring: Uring | None = None
        self.aio: Aio
        try:
            self.aio = self._uring = Uring(self._pool)
        except OSError as error:
            log.info("no io_uring (%s): file I/O on threads", error.strerror)
            self.aio = ThreadAio(self._pool)

    async def started(self) -> None:
        """Collect completions, and turn."""
        self.reactor.register(self._pool.fileno(), self._pool.reap, self._crashed)
        self.reactor.watch(self._pool)
        if self._uring is not None:
            self.reactor.register(self._uring.fileno(), self._uring.reap, self._crashed)
        self.spawn(self.reactor.run, name="reactor")

    def _crashed(self, error: Exception) -> None:
        # Completions can no longer be trusted to arrive: this ends the daemon, through the supervisor.
        self.spawn(_raise, error, name="crash")

    async def stopping(self) -> None:
        """Nodes have closed before, so nothing is in flight any more. Where that had to be forced, the kernel may
        still write to memory that was lent to it: then it keeps its ring."""
        self.reactor.close()
        for engine in (self._uring, self._pool):
            if engine is not None and not engine.in_flight:
                engine.close()

    def statistics(self) -> dict[str, Any]:
        """The actor's facts, the engine's and the reactor's."""
        return super().statistics() | {"engine": self.aio.name} | self.reactor.statistics()


async def _raise(error: Exception) -> None:
    raise error
