"""Buffered writes: on the spot while nothing is under way, else through the engine, which has the inode's lock."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from qsd.drivers import file_io
from qsd.drivers.base import Mode
from qsd.drivers.file import FileDriver
from qsd.drivers.file_io import FileIo
from qsd.host.memory import AlignedPool
from qsd.messages import BlockState, Flag, Op, ReplyQueue, Request

SIZE = 512


class Engine:
    """An aio engine that ends nothing until it is told to. ``error``, if not 0, is how its writes and syncs end."""

    def __init__(self) -> None:
        self.error = self.syncs = 0
        self.under_way: list[Callable[[], None]] = []

    def transfer(self, fd: int, requests: list[Request], places: Any, ended: Callable[[Any], None]) -> None:
        assert places is None
        for request in requests:
            self.under_way.append(partial(self._end, fd, request, ended))

    def _end(self, fd: int, request: Request, ended: Callable[[Any], None]) -> None:
        assert request.buffer is not None
        ended([(request, os.pwrite(fd, request.buffer, request.offset))])

    def write(
        self, fd: int, buffer: memoryview, offset: int, done: Callable[[int], None], *, dsync: bool = False
    ) -> None:
        self.under_way.append(lambda: done(self.error or os.pwrite(fd, buffer, offset)))

    def call(self, function: Callable[[], int], done: Callable[[int], None]) -> None:
        self.under_way.append(partial(self._call, function, done))

    @staticmethod
    def _call(function: Callable[[], int], done: Callable[[int], None]) -> None:
        try:
            result = function()
        except OSError as error:
            result = -(error.errno or errno.EIO)
        done(result)

    def punch_hole(self, _fd: int, _offset: int, _length: int, done: Callable[[int], None]) -> None:
        self.under_way.append(lambda: done(self.error))

    def fsync(self, fd: int, done: Callable[[int], None]) -> None:
        self.syncs += 1
        self.under_way.append(lambda: done(self.error))

    def end_one(self) -> None:
        self.under_way.pop(0)()

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

    def request(self, op: Op, length: int = 0, flags: int = 0) -> Request:
        """One of another kind, from the start of the file on."""
        request = Request(op.value, 0, length, None, self.replies, flags)
        self.io.submit([request])
        return request

    def flush(self) -> int:
        """The error of a flush."""
        request = self.request(Op.FLUSH)
        self.engine.end_all()
        assert request in self.replies.ready
        return request.error

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


# -- reaching the disk --------------------------------------------------------------------------------------------


@pytest.fixture
def no_zeroing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot zero a range: zero bytes are written."""

    def refuse(*_args: object, **_options: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "no such thing here")

    monkeypatch.setattr(file_io.files, "zero_range", refuse)


@pytest.mark.usefixtures("no_zeroing")
def test_zero_bytes_that_a_flush_has_overtaken_reach_the_disk_with_the_next(file: File) -> None:
    zeroes = file.request(Op.WRITE_ZEROES, 4 * SIZE)
    file.engine.end_one()
    assert len(file.engine.under_way) == 1, "zero bytes are on their way"
    flush = file.request(Op.FLUSH)
    file.engine.under_way.reverse()
    file.engine.end_all()
    assert file.replies.ready == [flush, zeroes]
    assert file.flush() == 0
    assert file.engine.syncs == 2


@pytest.mark.usefixtures("no_zeroing")
def test_zero_bytes_that_were_interrupted_are_written_again(file: File) -> None:
    file.write(1)
    zeroes = file.request(Op.WRITE_ZEROES, 4 * SIZE)
    file.engine.end_one()
    file.engine.error = -errno.EINTR
    file.engine.end_one()
    file.engine.error = 0
    file.engine.end_all()
    assert zeroes in file.replies.ready
    assert not zeroes.error
    assert file.path.read_bytes() == bytes(65536)


def test_new_length_reaches_the_disk_with_the_next_flush(tmp_path: Path) -> None:
    """A flush had nothing to do after it: cut off, the file had its old length, of which a client had been told."""
    engine = Engine()
    host: Any = SimpleNamespace(aio=engine)
    driver = FileDriver("file", None, Mode(), host)
    driver.io.fd = os.open(tmp_path / "img", os.O_RDWR | os.O_CREAT)
    replies = ReplyQueue(lambda: None)

    def syncs() -> int:
        driver.submit([Request(Op.FLUSH.value, 0, 0, None, replies)])
        engine.end_all()
        assert not replies.ready.pop().error
        return engine.syncs

    try:
        assert syncs() == 0
        assert driver.grow(4096)
        assert syncs() == 1
        assert driver.grow(512)
        assert syncs() == 1
        trio.run(driver.truncate, 1024)
        assert syncs() == 2
    finally:
        os.close(driver.io.fd)


def test_status_tells_of_data_in_the_last_sector_of_a_file_that_ended_in_it(tmp_path: Path) -> None:
    """The sector was written whole, and still told as zeroes behind the old end: a copy left them out."""
    path = tmp_path / "img"
    path.write_bytes(b"x" * 600)
    host: Any = SimpleNamespace(aio=Engine())
    driver = FileDriver("file", None, Mode(), host)
    driver.io.fd = os.open(path, os.O_RDWR)
    driver.refresh_length()
    replies = ReplyQueue(lambda: None)

    def ask(op: Op, data: bytes = b"") -> Any:
        request = Request(op.value, 512, 512, memoryview(data), replies)
        request.extents_wanted = 5
        driver.submit([request])
        assert not replies.ready.pop().error
        return request.result

    try:
        assert [(one.length, bool(one.state & BlockState.ZERO)) for one in ask(Op.BLOCK_STATUS)] == [
            (88, False),
            (424, True),
        ]
        ask(Op.WRITE, b"y" * 512)
        assert [(one.length, bool(one.state & BlockState.ZERO)) for one in ask(Op.BLOCK_STATUS)] == [(512, False)]
    finally:
        os.close(driver.io.fd)


def _write(file: File) -> Request:
    return file.write(1, flags=Flag.FUA.value)[0]


def _zero(file: File) -> Request:
    return file.request(Op.WRITE_ZEROES, SIZE, Flag.FUA.value)


@pytest.mark.parametrize("change", [_write, _zero])
def test_no_flush_claims_success_once_something_was_lost_on_the_way_to_the_disk(
    file: File, change: Callable[[File], Request]
) -> None:
    """The kernel tells of it once, and not whose page it was."""
    file.write(2)
    file.engine.error = -errno.EIO
    request = change(file)
    while file.engine.under_way:
        file.engine.end_one()
    assert request.error == errno.EIO
    file.engine.error = 0
    assert file.flush() == errno.EIO


@pytest.mark.parametrize("change", [_write, _zero])
@pytest.mark.parametrize(("second", "flush"), [(-errno.ENOSPC, 0), (0, errno.EIO)])
@pytest.mark.usefixtures("no_zeroing")
def test_full_disk_loses_nothing_unless_what_was_in_memory_found_no_room(
    file: File, change: Callable[[File], Request], second: int, flush: int
) -> None:
    """A thin volume tells of that when pages are brought to it: once, and not whose they were."""
    file.write(2)
    request = change(file)
    if request.op == Op.WRITE_ZEROES:
        file.engine.end_one()
    file.engine.error = -errno.ENOSPC
    file.engine.end_one()
    file.engine.error = second
    file.engine.end_all()
    assert request.error == errno.ENOSPC
    assert file.driver.in_flight == 0
    file.engine.error = 0
    file.write(3)
    assert file.flush() == flush


@pytest.mark.parametrize("flags", [0, Flag.FUA.value])
def test_direct_write_without_memory_to_align_it_fails(
    file: File, monkeypatch: pytest.MonkeyPatch, flags: int
) -> None:
    """It was counted before there was any: draining the node waited for ever."""

    def take(_pool: AlignedPool, _length: int) -> tuple[memoryview, int]:
        raise OSError(errno.ENOMEM, "as arranged")

    monkeypatch.setattr(AlignedPool, "take", take)
    file.io.direct = True
    # No buffer lies at such an address.
    file.driver.limits = SimpleNamespace(min_mem_alignment=1 << 60)
    batch = file.write(1, 2, flags=flags)
    assert file.replies.ready == batch
    assert [request.error for request in batch] == [errno.ENOMEM] * 2
    assert not file.driver.in_flight
    assert not file.engine.under_way


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_that_cannot_have_holes_takes_discards(file: File, number: int) -> None:
    file.engine.error = -number
    request = file.request(Op.DISCARD, 4096)
    file.engine.end_all()
    assert request in file.replies.ready
    assert not request.error
    assert file.io.discard_failed == 1
    assert not file.driver.in_flight


@pytest.mark.parametrize("then", [0, errno.EIO])
def test_a_hole_that_was_interrupted_is_made_again(file: File, then: int) -> None:
    file.engine.error = -errno.EINTR
    request = file.request(Op.DISCARD, 4096)
    file.engine.end_one()
    assert request not in file.replies.ready
    file.engine.error = -then
    file.engine.end_one()
    assert request in file.replies.ready
    assert request.error == then
    assert not file.driver.in_flight
