"""Work on threads is answered, whatever becomes of it."""

from __future__ import annotations

import errno
import select

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
