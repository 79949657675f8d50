"""io_uring with more to do than its rings hold."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qsd.host.threads import ThreadPool
from qsd.host.uring import Uring

BLOCK = 512
MANY = 5000


@pytest.fixture
def ring() -> Iterator[Uring]:
    pool = ThreadPool()
    try:
        ring = Uring(pool)
    except OSError as error:
        pool.close()
        pytest.skip(f"no io_uring: {error.strerror}")
    yield ring
    assert not ring.in_flight
    ring.close()
    pool.close()


def depth() -> int:
    """How many frames are under way."""
    frame, count = sys._getframe(), 0
    while frame.f_back is not None:
        frame, count = frame.f_back, count + 1
    return count


def test_a_long_backlog_ends_and_is_looked_at_once(
    ring: Uring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each eight completions put all of it off again, from within the call before: for 8192 writes that held the
    loop for three seconds, two thousand frames deep.
    """
    queued = 0
    original: Callable[..., None] = Uring._queue

    def counting(self: Uring, *item: object) -> None:
        nonlocal queued
        queued += 1
        original(self, *item)

    monkeypatch.setattr(Uring, "_queue", counting)
    results: list[int] = []
    deepest = 0

    def done(result: int) -> None:
        nonlocal deepest
        deepest = max(deepest, depth())
        results.append(result)

    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        for number in range(MANY):
            ring.write(fd, memoryview(number.to_bytes(BLOCK, "little")), number * BLOCK, done)
        ring.flush()
        while ring.in_flight:
            ring.reap()
    finally:
        os.close(fd)
    assert results == [BLOCK] * MANY
    assert queued < 3 * MANY
    assert deepest < depth() + 20
    data = (tmp_path / "file").read_bytes()
    assert all(int.from_bytes(data[at * BLOCK : (at + 1) * BLOCK], "little") == at for at in range(MANY))
