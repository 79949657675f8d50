"""Making a file on a file system that is slow or poor, with a job of the test's own."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from qsd.drivers.file_create import PIECE, create_file
from qsd.host import files
from qsd.qapi.schema.block import BlockdevDriver
from qsd.qapi.schema.create import BlockdevCreateOptionsFile, PreallocMode

PIECES = 4


class Host:
    """The ``CreateHost`` of a job that is cancelled in the middle of the work."""

    def __init__(self) -> None:
        self.job = trio.CancelScope()
        self.seen: list[int] = []

    async def in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*args)

    def progress(self, done: int, total: int) -> None:
        assert total == PIECES * PIECE
        self.seen.append(done)

    def warn(self, text: str) -> None:
        raise AssertionError(text)


async def test_preallocation_that_the_c_library_writes_can_be_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was one call, which wrote all of the file before anybody else had a say."""
    host = Host()
    written: list[tuple[int, int]] = []

    def unknown(*_arguments: int) -> int:
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    def write(_fd: int, offset: int, length: int) -> None:
        written.append((offset, length))
        if len(written) == 2:
            host.job.cancel()

    monkeypatch.setattr(files, "_fallocate", unknown)
    monkeypatch.setattr(os, "posix_fallocate", write)
    options = BlockdevCreateOptionsFile(
        driver=BlockdevDriver.FILE,
        filename=str(tmp_path / "a"),
        size=PIECES * PIECE,
        preallocation=PreallocMode.FALLOC,
        extent_size_hint=0,
    )
    with host.job:
        await create_file(host, options)  # type: ignore[arg-type]  # nobody asks for nodes or secrets
    assert host.job.cancelled_caught
    assert written == [(0, PIECE), (PIECE, PIECE)]
    assert host.seen == [0, PIECE, 2 * PIECE]
