"""Reads on file systems that know no RWF_NOWAIT: from memory at once, else by the aio engine."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qsd.drivers import file_io
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
