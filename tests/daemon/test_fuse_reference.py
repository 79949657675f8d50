"""What the calls on a mounted file answer: ours beside the reference, call for call."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from fuse_mounts import KEEP_SIZE, KIB, MIB, PUNCH_HOLE, ZERO_RANGE, Start, fallocate, needs_fuse

pytestmark = needs_fuse

SIZE = MIB
HUGE = 1 << 62


@attrs.frozen
class Place:
    """The mounted file while it is tried."""

    path: Path
    fd: int

    @property
    def size(self) -> int:
        return os.fstat(self.fd).st_size


def outcome(function: Callable[[], Any]) -> Any:
    """What a call returns, or the name of its errno."""
    try:
        return function()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def opened(path: Path, flags: int, function: Callable[[int], Any]) -> Any:
    """What a call on a file of its own returns. Raises OSError."""
    fd = os.open(path, flags)
    try:
        return function(fd)
    finally:
        os.close(fd)


def facts(place: Place) -> tuple[int, ...]:
    found = os.fstat(place.fd)
    return found.st_mode, found.st_ino, found.st_nlink, found.st_size, found.st_blocks, found.st_uid, found.st_gid


def transfers(place: Place) -> Iterator[Any]:
    fd = place.fd
    for offset in (SIZE - 10, SIZE, 2 * SIZE):
        yield outcome(lambda offset=offset: os.pread(fd, 100, offset))
    for offset in (5, SIZE - 7, SIZE, SIZE + 10_000):
        yield outcome(lambda offset=offset: os.pwrite(fd, b"abc" * 10, offset)), place.size
    yield outcome(lambda: os.pread(fd, 40, 0))
    yield (
        outcome(lambda: opened(place.path, os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, b"abc"))),
        place.size,
    )


def allocations(place: Place) -> Iterator[Any]:
    modes = (0, KEEP_SIZE, PUNCH_HOLE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE, 8, 32, 64)
    for mode in modes:
        for offset, length in ((0, 4096), (100, 50), (place.size - 10, 4096), (place.size + 4096, 4096), (0, HUGE)):
            if offset < place.size or not mode & KEEP_SIZE or length != HUGE:
                yield (
                    mode,
                    outcome(lambda m=mode, o=offset, n=length: fallocate(place.fd, m, o, n) if n != HUGE else None),
                    place.size,
                )
    yield outcome(lambda: fallocate(place.fd, 0, HUGE, HUGE))


def lengths(place: Place) -> Iterator[Any]:
    for size in (3 * MIB, 2 * MIB + 5, SIZE, HUGE):
        yield outcome(lambda size=size: os.ftruncate(place.fd, size)), place.size
    yield outcome(lambda: os.truncate(place.path, SIZE)), place.size


def holes(place: Place) -> Iterator[Any]:
    for offset in (0, 1, 64 * KIB, 128 * KIB, 200_000, SIZE - 1, SIZE, SIZE + 5):
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            yield outcome(lambda o=offset, w=whence: os.lseek(place.fd, o, w))


def attributes(place: Place) -> Iterator[Any]:
    for mode in (0o644, 0o400, 0o600, 0o777, 0o4755, 0, 0o600):
        yield outcome(lambda mode=mode: os.fchmod(place.fd, mode)), facts(place)[0]
    for owner in ((1, 1), (0, -1), (-1, 5), (0, 0)):
        yield outcome(lambda owner=owner: os.fchown(place.fd, *owner)), facts(place)[5:]
    yield outcome(lambda: os.utime(place.path, (1, 1)))
    yield outcome(lambda: os.utime(place.path))


def others(place: Place) -> Iterator[Any]:
    fd, path = place.fd, place.path
    yield outcome(lambda: os.fsync(fd)), outcome(lambda: os.fdatasync(fd))
    yield outcome(lambda: os.getxattr(path, "user.a")), outcome(lambda: os.setxattr(path, "user.a", b"1"))
    yield outcome(lambda: os.listxattr(path)), outcome(lambda: os.unlink(path)), outcome(lambda: os.listdir(path))
    yield outcome(lambda: os.rename(path, path.with_name("x"))), outcome(lambda: os.link(path, path.with_name("x")))
    yield outcome(lambda: os.copy_file_range(fd, fd, 4096, 0, 64 * KIB))
    yield outcome(lambda: fcntl.flock(fd, fcntl.LOCK_EX)), outcome(lambda: fcntl.lockf(fd, fcntl.LOCK_SH))
    yield outcome(lambda: fcntl.ioctl(fd, 0x1277, 0)), outcome(lambda: fcntl.ioctl(fd, 0x80081272, bytes(8)))
    yield outcome(lambda: mmap.mmap(fd, 4096, prot=mmap.PROT_READ)[:5])
    yield outcome(lambda: mmap.mmap(fd, 4096)[:5])
    yield outcome(
        lambda: opened(path, os.O_RDONLY | os.O_DIRECT, lambda fd: os.preadv(fd, [mmap.mmap(-1, 4096)], 4096))
    )
    yield outcome(lambda: opened(path, os.O_RDWR | os.O_TRUNC, lambda _: None)), place.size


GROUPS = (transfers, allocations, lengths, holes, attributes, others)


def image(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(SIZE)
        file.write(b"x" * 64 * KIB)
        file.seek(128 * KIB)
        file.write(b"y" * 4096)


def answers(path: Path, flags: int) -> list[Any]:
    fd = os.open(path, flags)
    try:
        place = Place(path, fd)
        return [("facts", facts(place))] + [(group.__name__, list(group(place))) for group in GROUPS]
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("export", "flags"),
    [
        ("writable=off,allow-other=auto", os.O_RDONLY),
        ("writable=on,allow-other=off", os.O_RDWR),
        ("writable=on,growable=on,allow-other=on", os.O_RDWR),
        ("growable=on", os.O_RDONLY),
    ],
)
def test_calls_answer_as_the_reference_s(
    daemon: Start, reference: Path, tmp_path: Path, export: str, flags: int
) -> None:
    found = []
    for name, program in (("ours", None), ("theirs", (str(reference),))):
        place = tmp_path / name
        place.mkdir()
        image(place / "disk.img")
        (place / "mp").touch()
        arguments = (
            *("--blockdev", "driver=file,node-name=f,filename=disk.img", "--blockdev", "raw,node-name=r,file=f"),
            *("--export", f"fuse,id=e,node-name=r,mountpoint=mp,{export}"),
        )
        if program is None:
            running = daemon(*arguments, place=place)
            found.append(answers(place / "mp", flags))
            running.terminate()
        else:
            with served_by(program, arguments, place):
                found.append(answers(place / "mp", flags))
    ours, theirs = found
    assert ours == theirs


@contextlib.contextmanager
def served_by(program: tuple[str, ...], arguments: tuple[str, ...], place: Path) -> Iterator[None]:
    """The reference while it serves. How it ends is not compared, and it may hang on SIGTERM: it is killed."""
    pid_file = place / "d.pid"
    with subprocess.Popen([*program, *arguments, "--pidfile", pid_file.name], cwd=place) as process:
        try:
            while not pid_file.exists():  # the reference says that it is up by its pid file only
                assert process.poll() is None
                os.sched_yield()
            yield
        finally:
            process.kill()
            process.wait()
            subprocess.run(["umount", "-l", place / "mp"], check=False)
