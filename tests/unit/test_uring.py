"""io_uring with more to do than its rings hold."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qsd.host import uring
from qsd.host.threads import ThreadPool
from qsd.host.uring import Uring

BLOCK = 512
MANY = 5000
PAGE = 4096


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


def test_holes_are_where_they_were_asked_for(ring: Uring, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (8 * PAGE))
    results: list[int] = []
    fd = os.open(path, os.O_RDWR)
    try:
        for at in (1, 4):
            ring.punch_hole(fd, at * PAGE, 2 * PAGE, results.append)
        ring.punch_hole(fd, 7 * PAGE, 0, results.append)
        ring.flush()
        while ring.in_flight:
            ring.reap()
    finally:
        os.close(fd)
    assert sorted(results) == [-errno.EINVAL, 0, 0]
    full, empty = b"x" * PAGE, bytes(2 * PAGE)
    assert path.read_bytes() == full + empty + full + empty + full + full


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


def test_kernel_short_of_memory_while_completions_are_told_loses_none(
    ring: Uring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taking completions to make room, from within taking them, told the same ones twice."""
    refusals = [errno.EAGAIN]
    original: Callable[..., int] = uring._syscall

    def enter(number: int, *rest: object) -> int:
        if not ring._is_reaping or not refusals:
            return original(number, *rest)
        ctypes.set_errno(refusals.pop())
        return -1

    monkeypatch.setattr(uring, "_syscall", enter)
    results: list[int] = []
    told: list[int] = []
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    block = memoryview(bytes(BLOCK))

    def done(result: int) -> None:
        results.append(result)
        if len(results) == 1:
            ring.defer(lambda: told.append(len(results)))
            ring.write(fd, block, 0, results.append)
            ring.flush()

    try:
        for number in range(4):
            ring.write(fd, block, number * BLOCK, done)
        monkeypatch.setattr(ring, "_is_reaping", True)  # so that they pile up
        refusals.clear()
        ring.flush()
        ring._is_reaping = False
        while ring._words[ring._cq_tail] != 4:
            pass
        refusals.append(errno.EAGAIN)
        ring.reap()
        while ring.in_flight:
            ring.reap()
    finally:
        os.close(fd)
    assert results == [BLOCK] * 5
    assert not refusals
    assert len(told) == 1
    assert told[0] >= 4, "deferred until all that had ended were told"
