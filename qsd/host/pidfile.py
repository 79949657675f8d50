"""The pid file: written when start-up is done, locked while the daemon runs, unlinked at its end."""

from __future__ import annotations

import contextlib
import fcntl
import os

from qsd.errors import QmpError, errno_text


class PidFile:
    """A pid file this process holds. The lock is a POSIX record lock as the reference's: each sees the other's."""

    def __init__(self, descriptor: int, path: str) -> None:
        self._descriptor = descriptor
        self.path = path

    @classmethod
    def create(cls, path: str) -> PidFile:
        """Create (mode 0600) or reuse ``path``, lock it and write this process's id. Raises QmpError.

        The path is made absolute here, so that a later change of directory does not matter.
        """
        try:
            return cls(_locked(path), os.path.realpath(path))
        except QmpError as error:
            raise error.prefixed("cannot create PID file: ") from None

    def remove(self) -> None:
        """Unlink the file, if it is still ours, and let go of the lock. Never fails: it may be gone already."""
        with contextlib.suppress(OSError):
            if _is_same(self._descriptor, self.path):
                os.unlink(self.path)
        os.close(self._descriptor)


def _locked(path: str) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except (OSError, ValueError) as error:
            raise QmpError(f"Could not create '{path}': {_reason(error)}") from None
        try:
            if _fill(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # The previous owner unlinked it between our open and our lock: this is the file of nobody. Again.
        os.close(descriptor)


def _fill(descriptor: int, path: str) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise QmpError(f"Cannot lock pid file: {_reason(error)}") from None
    if not _is_same(descriptor, path):
        return False
    try:
        os.ftruncate(descriptor, 0)
    except OSError as error:
        raise QmpError(f"Failed to truncate pid file: {_reason(error)}") from None
    try:
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
    except OSError as error:
        raise QmpError(f"Failed to write pid file: {_reason(error)}") from None
    return True


def _is_same(descriptor: int, path: str) -> bool:
    try:
        there = os.stat(path)
    except OSError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _reason(error: OSError | ValueError) -> str:
    return errno_text(error.errno or 0) if isinstance(error, OSError) else "Invalid argument"
