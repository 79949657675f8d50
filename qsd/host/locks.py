"""Byte locks on image files, as QEMU's own processes take them, so that both refuse each other's images.

Open-file-description locks, one byte each, always shared. Byte 100+n says "permission n is used here", byte 200+n
"permission n is not shared"; n is the permission's bit. A user places its bytes, then asks for each whether an
exclusive lock on the opposite byte would conflict.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from qsd.block.permissions import PERM_NAMES, Perm
from qsd.errors import QmpError, errno_text

F_OFD_GETLK = 36
F_OFD_SETLK = 37
_FLOCK = struct.Struct("hhqqi4x")

USED = 100
UNSHARED = 200


def _bytes_of(perm: Perm, shared: Perm) -> set[int]:
    wanted: set[int] = set()
    for number, (bit, _name) in enumerate(PERM_NAMES):
        if perm & bit:
            wanted.add(USED + number)
        if not shared & bit:
            wanted.add(UNSHARED + number)
    return wanted


def _set(fd: int, kind: int, byte: int) -> None:
    fcntl.fcntl(fd, F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _place(fd: int, byte: int) -> None:
    try:
        _set(fd, fcntl.F_RDLCK, byte)
    except OSError as error:
        raise QmpError(f"Failed to lock byte {byte}: {errno_text(error.errno or 0)}") from None


def _is_locked_elsewhere(fd: int, byte: int) -> bool:
    answer = fcntl.fcntl(fd, F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def is_supported(fd: int) -> bool:
    """True when the file system knows these locks."""
    try:
        _is_locked_elsewhere(fd, 0)
    except OSError as error:
        return error.errno != errno.EINVAL
    return True


class ByteLocks:
    """The bytes held on one descriptor. ``filename`` is for the hint."""

    def __init__(self, filename: str) -> None:
        self._filename = filename
        self.held: set[int] = set()

    def acquire(self, fd: int, perm: Perm, shared: Perm) -> None:
        """Add what ``perm`` and ``shared`` need to what is held, or raise QmpError and add nothing."""
        wanted = _bytes_of(perm, shared)
        added: list[int] = []
        try:
            for byte in sorted(wanted - self.held):
                _place(fd, byte)
                added.append(byte)
            self._check(fd, perm, shared)
        except QmpError:
            for byte in added:
                _set(fd, fcntl.F_UNLCK, byte)
            raise
        self.held |= wanted

    def _check(self, fd: int, perm: Perm, shared: Perm) -> None:
        for number, (bit, name) in enumerate(PERM_NAMES):
            if perm & bit and _is_locked_elsewhere(fd, UNSHARED + number):
                raise self._conflict(f'Failed to get "{name}" lock')
        for number, (bit, name) in enumerate(PERM_NAMES):
            if not shared & bit and _is_locked_elsewhere(fd, USED + number):
                raise self._conflict(f'Failed to get shared "{name}" lock')

    def _conflict(self, text: str) -> QmpError:
        return QmpError(text, hint=f"Is another process using the image [{self._filename}]?")

    def shrink(self, fd: int, perm: Perm, shared: Perm) -> None:
        """Let go of what ``perm`` and ``shared`` do not need."""
        wanted = _bytes_of(perm, shared)
        for byte in self.held - wanted:
            _set(fd, fcntl.F_UNLCK, byte)
        self.held &= wanted

    def copy(self, fd: int) -> None:
        """Place the same bytes on another descriptor of the file, which will take over. Raises QmpError."""
        for byte in sorted(self.held):
            _place(fd, byte)

    def restore(self, fd: int, held: set[int]) -> None:
        """Go back to an earlier, smaller set."""
        for byte in self.held - held:
            _set(fd, fcntl.F_UNLCK, byte)
        self.held &= held
