"""Reads on file systems that know no RWF_NOWAIT: from memory at once, else by the aio engine."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qsd.drivers import file_io
from qsd.drivers.base import Limits
from qsd.drivers.file_io import FileIo
from qsd.host import files
from qsd.messages import Op, ReplyQueue, Request

DATA = os.urandom(8192)


class Engine:
    """An aio engine that is done at once and counts its reads."""

    def __init__(self) -> None:
        self.reads = 0

    def read(self, fd: int, buffer: memoryview, offset: int, done: Callable[[int], None]) -> None:
        self.reads += 1
        done(os.preadv(fd, [buffer], offset))

    def flush(self) -> None:
        pass


class ShortEngine(Engine):
    """Takes the transfers of O_DIRECT, and ends the next ones with the ``counts`` it is given."""

    def __init__(self, *counts: int) -> None:
        super().__init__()
        self.counts = list(counts)
        self.under_way: list[Callable[[], None]] = []

    def transfer(self, fd: int, requests: list[Request], places: Any, ended: Callable[[Any], None]) -> None:
        for request, (buffer, _address) in zip(requests, places, strict=True):
            self.reads += 1
            most = self.counts.pop(0) if self.counts else request.length
            if most > 0:
                most = os.preadv(fd, [buffer[: min(most, request.length)]], request.offset)
            self.under_way.append(partial(ended, [(request, most)]))

    def end_all(self) -> None:
        while self.under_way:
            self.under_way.pop(0)()


@pytest.mark.parametrize(
    ("size", "counts", "reads"),
    [
        (8192, (4096,), 2),  # in the middle: where an extent ends, on kernels before 6.0
        (8192, (512,) * 9, 10),
        (8192, (-errno.EINTR, 4096, -errno.EINTR), 4),
        (5000, (), 1),  # the end of the file, in the last sector
        (8192, (4096, 0), 2),  # it has been cut off since
        (8192, (700,), 1),  # so it has
    ],
)
def test_short_direct_read_is_the_end_of_the_file_only_at_its_end(
    tmp_path: Path, size: int, counts: tuple[int, ...], reads: int
) -> None:
    """The rest of what was read was zeroes otherwise, without an error."""
    path = tmp_path / "img"
    path.write_bytes(DATA[:size])
    engine = ShortEngine(*counts)
    driver: Any = SimpleNamespace(
        host=SimpleNamespace(aio=engine),
        length=size,
        limits=Limits(request_alignment=512, min_mem_alignment=512),
        in_flight=0,
    )
    driver.finished = lambda count=1: setattr(driver, "in_flight", driver.in_flight - count)
    io = FileIo(driver)
    io.direct = True
    io.fd = os.open(path, os.O_RDONLY)
    try:
        replies = ReplyQueue(lambda: None)
        buffer = memoryview(bytearray(b"?" * 8192))
        request = Request(Op.READ.value, 0, 8192, buffer, replies)
        io.submit([request])
        engine.end_all()
    finally:
        os.close(io.fd)
    assert replies.ready == [request]
    assert not request.error
    assert not driver.in_flight
    cut = sum(count for count in counts if count > 0) if counts[-1:] in ((0,), (700,)) else size
    assert buffer == DATA[:cut] + bytes(8192 - cut)
    assert engine.reads == reads


def no_nowait(
    fd: int, buffers: Sequence[Any], offset: int, flags: int = 0, _real: Callable[..., int] = os.preadv
) -> int:
    if flags & os.RWF_NOWAIT:
        raise OSError(errno.EOPNOTSUPP, "not supported")
    return _real(fd, buffers, offset)


@pytest.mark.parametrize(("in_memory", "engine_reads"), [(True, 1), (False, 3)])
def test_reads_where_the_file_system_knows_no_nowait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool, engine_reads: int
) -> None:
    path = tmp_path / "img"
    path.write_bytes(DATA)
    monkeypatch.setattr(file_io.os, "preadv", no_nowait)
    monkeypatch.setattr(files, "is_memory", lambda _fd: in_memory)
    engine = Engine()
    driver: Any = SimpleNamespace(
        host=SimpleNamespace(aio=engine),
        length=len(DATA),
        in_flight=0,
        started=lambda: None,
        finished=lambda: None,
    )
    io = FileIo(driver)
    io.fd = os.open(path, os.O_RDONLY)
    try:
        replies = ReplyQueue(lambda: None)
        for offset in (0, 4096, 100):
            request = Request(Op.READ.value, offset, 512, memoryview(bytearray(512)), replies)
            io.submit([request])
            assert replies.ready.pop() is request
            assert not request.error
            assert request.buffer == DATA[offset : offset + 512]
    finally:
        os.close(io.fd)
    assert engine.reads == engine_reads


def test_tmpfs_is_memory(tmp_path: Path) -> None:
    kinds = {line.split()[1]: line.split()[2] for line in Path("/proc/mounts").read_text().splitlines()}
    if kinds.get("/dev/shm") != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs")
    fd = os.open("/dev/shm", os.O_RDONLY)
    try:
        assert files.is_memory(fd)
    finally:
        os.close(fd)
    fd = os.open("/proc", os.O_RDONLY)
    try:
        assert not files.is_memory(fd)
    finally:
        os.close(fd)
