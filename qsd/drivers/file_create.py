"""blockdev-create for ``file``: the file, its attributes and its space."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

from qsd.block.permissions import Perm
from qsd.drivers.creating import CreateHost
from qsd.errors import QmpError, errno_text
from qsd.host import files, locks, served

if TYPE_CHECKING:
    from qsd.qapi.schema.create import BlockdevCreateOptionsFile

MAX_HINT = 0xFFFFFFFF
DEFAULT_HINT = 1 << 20
# How much is written between two looks at whether the job was cancelled.
PIECE = 32 << 20
# The first block is written, so that what probes a file's alignment by reading from it later meets no hole.
FIRST_BLOCK = 4096
SECTOR = 512


async def create_file(host: CreateHost, options: BlockdevCreateOptionsFile) -> None:
    """Make the file, or empty the one there is. Raises QmpError in the reference's words; the file stays then."""
    hint = DEFAULT_HINT if options.extent_size_hint is None else options.extent_size_hint
    if hint > MAX_HINT:
        raise QmpError("Extent size hint is too large")
    try:
        served.refuse_own(options.filename)
        fd = os.open(options.filename, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise QmpError(f"Could not create '{options.filename}': {errno_text(error.errno or 0)}") from None
    with contextlib.closing(os.fdopen(fd, "r+b", buffering=0)):
        if locks.is_supported(fd):
            # The descriptor's end releases them.
            locks.ByteLocks(options.filename).acquire(fd, Perm.WRITE | Perm.RESIZE, Perm.ALL & ~Perm.RESIZE)
        await host.in_thread(_resize, fd, 0)
        if options.nocow:
            files.set_no_copy_on_write(fd)
        if hint:
            _set_hint(host, fd, hint)
        await _give_space(host, fd, options)


def remove_file(filename: str) -> None:
    """Take away what was made for an image that could not be written; a device stays."""
    with contextlib.suppress(OSError):
        if stat.S_ISREG(os.stat(filename).st_mode):
            os.unlink(filename)


def _set_hint(host: CreateHost, fd: int, hint: int) -> None:
    result = files.set_extent_size_hint(fd, hint)
    if result and result != -errno.EOPNOTSUPP:
        host.warn(f"Failed to set extent size hint: {errno_text(-result)}")


def _resize(fd: int, size: int) -> None:
    # An unsigned number of the contract, a signed one of the kernel's.
    signed = size - (1 << 64) if size >= 1 << 63 else size
    try:
        os.ftruncate(fd, signed)
    except OSError as error:
        raise QmpError(f"Could not resize file: {errno_text(error.errno or 0)}") from None


async def _give_space(host: CreateHost, fd: int, options: BlockdevCreateOptionsFile) -> None:
    mode = "off" if options.preallocation is None else options.preallocation.value
    size = options.size
    if mode == "metadata":
        raise QmpError("Unsupported preallocation mode: metadata")
    if mode == "off":
        await host.in_thread(_resize, fd, size)
    elif mode == "falloc":
        await _allocate(host, fd, size)
    else:
        await _fill(host, fd, size)
        return
    if size:
        await host.in_thread(_write_first_block, fd, size)


async def _allocate(host: CreateHost, fd: int, size: int) -> None:
    if not size:
        return
    try:
        result = await host.in_thread(files.allocate, fd, 0, size)
        if result not in (0, -errno.EOPNOTSUPP):
            raise OSError(-result, errno_text(-result))
        if result:
            # The C library writes to every block then, which takes as long as that.
            for start in range(0, size, PIECE):
                host.progress(start, size)
                await host.in_thread(os.posix_fallocate, fd, start, min(PIECE, size - start))
    except OSError as error:
        os.ftruncate(fd, 0)
        raise QmpError(f"Could not preallocate new data: {errno_text(error.errno or 0)}") from None


def _write_first_block(fd: int, size: int) -> None:
    # Best effort: a disk that is full has room for the holes.
    with contextlib.suppress(OSError):
        os.pwrite(fd, bytes(min(FIRST_BLOCK, max(SECTOR, size))), 0)


async def _fill(host: CreateHost, fd: int, size: int) -> None:
    await host.in_thread(_resize, fd, size)
    try:
        for start in range(0, size, PIECE):
            host.progress(start, size)
            await host.in_thread(_write_zeroes, fd, start, min(PIECE, size - start))
    except OSError as error:
        os.ftruncate(fd, 0)
        raise QmpError(f"Could not write zeros for preallocation: {errno_text(error.errno or 0)}") from None
    try:
        await host.in_thread(os.fsync, fd)
    except OSError as error:
        os.ftruncate(fd, 0)
        raise QmpError(f"Could not flush file to disk: {errno_text(error.errno or 0)}") from None


def _write_zeroes(fd: int, start: int, length: int) -> None:
    piece = memoryview(bytes(1 << 20))
    end = start + length
    while start < end:
        start += os.pwrite(fd, piece[: min(len(piece), end - start)], start)
