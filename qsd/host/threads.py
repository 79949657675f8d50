"""A small pool of threads for system calls that have no other way of not blocking the loop.

Work goes in through a queue, results come back through a deque and one eventfd, so a burst of results costs one
wake-up. Threads start when they are needed and end after they were idle for a while. ``ThreadAio`` is the
``Aio`` engine for kernels without io_uring.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from qsd.host import files
from qsd.messages import Op, Request

log = logging.getLogger("qsd.threads")

Done = Callable[[int], None]

MAX_THREADS = 16
IDLE_SECONDS = 10.0

_RWF_DSYNC = getattr(os, "RWF_DSYNC", 2)


class ThreadPool:
    """Runs blocking functions; ``fileno`` becomes readable when results wait, ``reap`` delivers them."""

    def __init__(self, limit: int = MAX_THREADS) -> None:
        self._limit = limit
        self._work: queue.SimpleQueue[tuple[Callable[[], int], Done] | None] = queue.SimpleQueue()
        # Callbacks of functions that have ended, and what else is to run in the next round.
        self._results: deque[tuple[Done, int] | Callable[[], None]] = deque()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._threads = 0
        # Threads that wait for work, and work that no thread has taken: what both say is compared under the lock.
        self._idle = 0
        self._untaken = 0
        self._pending = 0
        self._is_reaping = False
        self._deferred: list[Callable[[], None]] = []
        self._closed = False
        self.is_watched = False

    @property
    def has_news(self) -> bool:
        """Whether there is something to deliver."""
        return bool(self._results)

    def fileno(self) -> int:
        """The eventfd."""
        return self._event

    @property
    def in_flight(self) -> int:
        """Functions that have not been reported yet."""
        return self._pending

    def call(self, function: Callable[[], int], done: Done) -> None:
        """Run ``function`` on a thread; its result, or minus the errno of its OSError, goes to ``done``.

        Another exception is told in the log, and -EIO to ``done``.
        """
        self._pending += 1
        with self._lock:
            self._untaken += 1
            is_short = self._idle < self._untaken and self._threads < self._limit
            self._threads += is_short
        self._work.put((function, done))
        if is_short:
            self._add_thread()

    def _add_thread(self) -> None:
        try:
            threading.Thread(target=self._serve, name="qsd-io", daemon=True).start()
        except RuntimeError as error:
            with self._lock:
                self._threads -= 1
                is_alone = not self._threads
                self._untaken -= is_alone
            log.error("no thread for file I/O: %s", error)
            if is_alone:
                # Nobody else would ever do it: better that the loop waits than that the request does.
                item = self._work.get_nowait()
                assert item is not None
                self._do(*item)

    def _serve(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            try:
                item = self._work.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                item = None
            with self._lock:
                self._idle -= 1
                if item is not None:
                    self._untaken -= 1
                elif self._closed or not self._untaken:
                    self._threads -= 1
                    return
            # Without: work came when the time was up, and counts on this thread.
            if item is not None:
                self._do(*item)

    def _do(self, function: Callable[[], int], done: Done) -> None:
        try:
            result = function()
        except OSError as error:
            result = -(error.errno or errno.EIO)
        except Exception as error:  # noqa: BLE001  # somebody waits for the reply
            log.error("work on a thread failed: %r", error)
            result = -errno.EIO
        self._results.append((done, result))
        self._wake()

    def _wake(self) -> None:
        if self.is_watched:
            return
        with self._lock:  # the result may be taken, and the pool closed, before this is written
            if not self._closed:
                os.eventfd_write(self._event, 1)

    def reap(self, _events: int = 0) -> None:
        """Deliver every result there is, when the eventfd says so."""
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            return
        self.deliver()

    def deliver(self) -> None:
        """Deliver every result there is."""
        results = self._results
        self._is_reaping = True
        try:
            # Not what is added meanwhile: that is for the next round.
            for _ in range(len(results)):
                item = results.popleft()
                if isinstance(item, tuple):
                    done, result = item
                    self._pending -= 1
                    done(result)
                else:
                    item()
        finally:
            self._is_reaping = False
        while self._deferred:
            self._deferred.pop()()

    def defer(self, function: Callable[[], None]) -> None:
        """Run ``function`` when the results being delivered have been delivered; at once when none are."""
        if self._is_reaping:
            self._deferred.append(function)
        else:
            function()

    def soon(self, function: Callable[[], None]) -> None:
        """Run ``function`` in the loop's next round. Any thread may call this."""
        self._results.append(function)
        self._wake()

    def close(self) -> None:
        """Let the threads go. Nothing may be in flight."""
        with self._lock:
            self._closed = True
            os.close(self._event)
            threads = self._threads
        for _ in range(threads):
            self._work.put(None)


# Requests and the results of their system calls.
Transfers = list[tuple[Request, int]]


# Buffers with their addresses.
Places = list[tuple[memoryview, int]]


class _Engine(Protocol):
    def read(self, fd: int, buffer: memoryview, offset: int, done: Done) -> None: ...
    def write(self, fd: int, buffer: memoryview, offset: int, done: Done) -> None: ...


def transfer_singly(
    engine: _Engine,
    fd: int,
    requests: list[Request],
    places: Places | None,
    ended: Callable[[Transfers], None],
) -> None:
    """``Aio.transfer`` for an engine that has no better way, or no room for a batch."""
    for index, request in enumerate(requests):
        buffer = request.buffer if places is None else places[index][0][: request.length]
        assert buffer is not None
        start = engine.read if request.op == Op.READ else engine.write
        start(fd, buffer, request.offset, partial(_tell_one, ended, request))


def _tell_one(ended: Callable[[Transfers], None], request: Request, result: int) -> None:
    ended([(request, result)])


class ThreadAio:
    """The ``Aio`` engine on a pool of threads."""

    name = "threads"

    def __init__(self, pool: ThreadPool) -> None:
        self._pool = pool

    @property
    def in_flight(self) -> int:
        """Operations that have not been reported yet."""
        return self._pool.in_flight

    def transfer(
        self, fd: int, requests: list[Request], places: Places | None, ended: Callable[[Transfers], None]
    ) -> None:
        """Whole requests, all READ or all WRITE without FUA."""
        transfer_singly(self, fd, requests, places, ended)

    def read(self, fd: int, buffer: memoryview, offset: int, done: Done) -> None:
        """preadv into ``buffer``; ``done`` gets the count, which may be short, or a negative errno."""
        self._pool.call(lambda: os.preadv(fd, [buffer], offset), done)

    def write(self, fd: int, buffer: memoryview, offset: int, done: Done, *, dsync: bool = False) -> None:
        """pwritev from ``buffer``; ``dsync`` makes it stable before ``done``."""
        flags = _RWF_DSYNC if dsync else 0
        self._pool.call(lambda: os.pwritev(fd, [buffer], offset, flags), done)

    def fsync(self, fd: int, done: Done) -> None:
        """fdatasync."""

        def sync() -> int:
            os.fdatasync(fd)
            return 0

        self._pool.call(sync, done)

    def punch_hole(self, fd: int, offset: int, length: int, done: Done) -> None:
        """Deallocate a range of a file."""
        self._pool.call(lambda: files.punch_hole(fd, offset, length), done)

    def call(self, function: Callable[[], int], done: Done) -> None:
        """Run a blocking function on a thread."""
        self._pool.call(function, done)

    def defer(self, function: Callable[[], None]) -> None:
        """Run ``function`` when the results being delivered have been delivered; at once when none are."""
        self._pool.defer(function)

    def soon(self, function: Callable[[], None]) -> None:
        """Run ``function`` in the loop's next round."""
        self._pool.soon(function)

    def flush(self) -> None:
        """Nothing is held back."""
