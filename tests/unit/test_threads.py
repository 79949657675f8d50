"""Work on threads is answered, whatever becomes of it."""

from __future__ import annotations

import errno
import queue
import select
import threading

import pytest

from qsd.host.threads import ThreadPool


def test_work_that_fails_in_any_way_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    pool = ThreadPool(limit=1)
    results: list[int] = []

    def fail() -> int:
        raise MemoryError

    for work in (fail, fail, lambda: 7):
        pool.call(work, results.append)
    while pool.in_flight:
        select.select([pool], [], [])
        pool.reap()
    pool.close()
    assert results == [-errno.EIO, -errno.EIO, 7]
    assert caplog.text.count("work on a thread failed: MemoryError()") == 2


class LateQueue:
    """A queue whose second ``get`` runs out of time just when something has been put into it."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._gets = 0
        self.is_late = threading.Event()
        self.has_come = threading.Event()
        self.put = self._items.put
        self.qsize = self._items.qsize
        self.get_nowait = self._items.get_nowait

    def get(self, timeout: float) -> object:
        self._gets += 1
        if self._gets != 2:
            return self._items.get(timeout=timeout)
        self.is_late.set()
        self.has_come.wait()
        raise queue.Empty


def test_work_that_comes_as_the_only_thread_gives_up_waiting_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread counted as idle and left: the work lay there until somebody had more."""
    pool = ThreadPool()
    late = LateQueue()
    monkeypatch.setattr(pool, "_work", late)
    results: list[int] = []
    pool.call(lambda: 1, results.append)
    late.is_late.wait()
    pool.call(lambda: 2, results.append)
    late.has_come.set()
    while pool.in_flight:
        assert select.select([pool], [], [], 10)[0], "nobody does it"
        pool.reap()
    pool.close()
    assert results == [1, 2]


def test_work_is_done_where_no_thread_can_be_made(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The process may have as many threads as it is allowed already."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool = ThreadPool()
    results: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        pool.call(lambda: 1, results.append)
    assert not results, "told in the next round, as ever"
    pool.reap()
    assert results == [1]
    pool.call(lambda: 2, results.append)
    while pool.in_flight:
        select.select([pool], [], [])
        pool.reap()
    pool.close()
    assert results == [1, 2]
    assert "no thread for file I/O" in caplog.text
