"""Mounted files under test: a daemon with FUSE exports, the calls Python lacks, and real programs run on them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Qmp, RunningDaemon

Start = Callable[..., RunningDaemon]

needs_fuse = pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="no access to /dev/fuse")

KIB, MIB = 1 << 10, 1 << 20
KEEP_SIZE, PUNCH_HOLE, NO_HIDE_STALE, COLLAPSE, ZERO_RANGE, INSERT, UNSHARE = 1, 2, 4, 8, 16, 32, 64

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2). Raises OSError."""
    if _fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def leave_dead_mount(path: Path) -> None:
    """Mount what nobody serves any more, under a name that is not ours. Root only."""
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=100000,user_id=0,group_id=0".encode()
    assert _libc.mount(b"theirs", os.fsencode(path), b"fuse", ctypes.c_ulong(0), options) == 0
    os.close(device)


def need(program: str) -> str:
    """The program's path; skips the test when it is not installed."""
    found = shutil.which(program, path=f"{os.environ['PATH']}:/sbin:/usr/sbin")
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


def client(*command: str | Path) -> str:
    """Run a program on a mounted file; a daemon that does not answer would hang it for ever."""
    done = subprocess.run(
        [need(str(command[0])), *map(str, command[1:])], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def error_of(function: Callable[..., Any], *args: Any) -> str:
    """The name of the errno with which a call fails."""
    with pytest.raises(OSError) as caught:  # noqa: PT011  # the errno is compared
        function(*args)
    return errno.errorcode[caught.value.errno or 0]


class Mounted:
    """A daemon with one export ``e`` of the node ``disk``; ``path`` is the file, ``image`` what is behind it."""

    def __init__(self, start: Start, place: Path, data: bytes, export: str, node: str, **options: Any) -> None:
        self.image = place / "disk.img"
        self.image.write_bytes(data)
        self.path = place / "mp"
        self.path.touch()
        self.daemon = start(
            *("--blockdev", f"file,node-name=disk,filename={self.image},{node}"),
            *("--export", f"fuse,id=e,node-name=disk,mountpoint={self.path},{export}"),
            **options,
        )
        self.qmp: Qmp = self.daemon.qmp()
        self._descriptors: list[int] = []

    def open(self, flags: int = os.O_RDWR) -> int:
        """Open the file; it is closed after the test."""
        self._descriptors.append(os.open(self.path, flags))
        return self._descriptors[-1]

    def close(self) -> None:
        for descriptor in self._descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)


MakeMounted = Callable[..., Mounted]


def mounted_files(start: Start, place: Path) -> Iterator[MakeMounted]:
    """For a fixture: makes ``Mounted`` and closes what a test has opened."""
    made: list[Mounted] = []

    def make(data: bytes, export: str = "writable=on", node: str = "discard=unmap", **options: Any) -> Mounted:
        made.append(Mounted(start, place, data, export, node, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()
