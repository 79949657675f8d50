"""Buffered writes: on the spot while nothing is under way, else through the engine, which has the inode's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qsd.drivers import file_io
from qsd.drivers.file_io import FileIo
from qsd.messages import Flag, Op, ReplyQueue, Request

SIZE = 512


class Engine:
    """An aio engine that ends nothing until it is told to."""

    def __init__(self) -> None:
        self.under_way: list[Callable[[], None]] = []

    def transfer(self, fd: int, requests: list[Request], places: Any, ended: Callable[[Any], None]) -> None:
        assert places is None
        for request in requests:
            self.under_way.append(partial(self._end, fd, request, ended))

    def _end(self, fd: int, request: Request, ended: Callable[[Any], None]) -> None:
        assert request.buffer is not None
        ended([(request, os.pwrite(fd, request.buffer, request.offset))])

    def write(self, fd: int, buffer: memoryview, offset: int, done: Callable[[int], None], *, dsync: bool) -> None:
        assert dsync
        self.under_way.append(lambda: done(os.pwrite(fd, buffer, offset)))

    def end_all(self) -> None:
        under_way, self.under_way = self.under_way, []
        for end in under_way:
            end()

    def flush(self) -> None:
        pass


class File:
    """A file of 64 KiB, and what was written to it."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(65536))
        self.path = path
        self.engine = Engine()
        self.driver = SimpleNamespace(
            host=SimpleNamespace(aio=self.engine),
            length=65536,
            in_flight=0,
            started=partial(self._count, 1),
            finished=self._finished,
        )
        driver: Any = self.driver
        self.io = FileIo(driver)
        self.io.fd = os.open(path, os.O_RDWR)
        self.ended: list[Request] = []
        self.replies = ReplyQueue(lambda: None)

    def _count(self, count: int) -> None:
        self.driver.in_flight += count

    def _finished(self, count: int = 1) -> None:
        self._count(-count)

    def write(self, *places: int, flags: int = 0) -> list[Request]:
        """One batch, each place filled with its number."""
        batch = [
            Request(Op.WRITE.value, place * SIZE, SIZE, memoryview(bytes([place]) * SIZE), self.replies, flags)
            for place in places
        ]
        self.io.submit(batch)
        return batch

    def holds(self, *places: int) -> bool:
        content = self.path.read_bytes()
        return all(content[place * SIZE : (place + 1) * SIZE] == bytes([place]) * SIZE for place in places)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[File]:
    monkeypatch.setattr(file_io, "HAS_OTHERS", True)
    made = File(tmp_path / "img")
    yield made
    os.close(made.io.fd)


def test_nothing_under_way_is_written_on_the_spot(file: File) -> None:
    batch = file.write(1, 2)
    assert not file.engine.under_way
    assert file.replies.ready == batch
    assert file.holds(1, 2)


def test_writes_go_where_the_one_before_is(file: File) -> None:
    first = file.write(1, flags=Flag.FUA.value)
    second = file.write(2)
    assert len(file.engine.under_way) == 2, "the loop does not wait for the first"
    assert not file.replies.ready
    file.engine.end_all()
    assert file.replies.ready == first + second
    assert file.driver.in_flight == 0
    assert file.holds(1, 2)
    file.write(3)
    assert not file.engine.under_way
    assert file.holds(3)


def test_a_single_processor_gains_nothing_from_that(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_io, "HAS_OTHERS", False)
    file.write(1, flags=Flag.FUA.value)
    second = file.write(2)
    assert file.replies.ready == second
