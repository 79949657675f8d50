"""Signals as data: blocked in every thread, and read from a signalfd(2), which makes this a thing of Linux alone.

Python's handlers run between any two instructions, those of a handler included: in a flood each is interrupted by
the next until the stack ends, and what stands there then is the death of the process. A blocked signal waits, once
for each number, until it is read, and those that come while the interpreter ends disturb nobody.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from collections.abc import Collection

_libc = ctypes.CDLL(None, use_errno=True)
_libc.signalfd.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_libc.sigaddset.argtypes = (ctypes.c_void_p, ctypes.c_int)
# sigset_t: 1024 bits in every C library, whatever the kernel takes of them.
_SigSet = ctypes.c_ulong * (1024 // (8 * ctypes.sizeof(ctypes.c_ulong)))
# struct signalfd_siginfo: 128 bytes, the number first.
_INFO = struct.Struct("=I124x")
_AT_ONCE = 8

# What programs that are started here are to block: what this process did when it was started. None: as we do.
_inherited: set[int] | None = None


def block(numbers: Collection[int]) -> None:
    """Let these signals wait for an ``Arrivals`` from now on, to the very end of the process.

    Before the first thread starts: each has a mask of its own, which it takes over from who starts it.
    """
    global _inherited
    _inherited = set(signal.pthread_sigmask(signal.SIG_BLOCK, numbers))


def mask_for_programs() -> set[int]:
    """The signals a program is to be started with blocked: it would be deaf with ours."""
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, ())) if _inherited is None else _inherited


def open_signalfd(numbers: Collection[int]) -> int:
    """A descriptor that is readable while one of these signals, which are blocked, waits. Raises OSError."""
    wanted = _SigSet()
    for number in numbers:
        _libc.sigaddset(wanted, number)
    fd: int = _libc.signalfd(-1, wanted, os.O_CLOEXEC | os.O_NONBLOCK)  # SFD_CLOEXEC, SFD_NONBLOCK
    if fd < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return fd


class Arrivals:
    """The signals that come for the process or the thread that reads. Use as a context manager.

    They are blocked meanwhile, ignored ones included; what is left unread at the end is dropped, then the thread's
    mask is what it was.
    """

    def __init__(self, numbers: Collection[int]) -> None:
        self._numbers = numbers
        self._before: set[int] = set()
        self._fd = -1

    def __enter__(self) -> Arrivals:
        self._fd = open_signalfd(self._numbers)
        self._before = set(signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers))
        return self

    def __exit__(self, *_raised: object) -> None:
        while self.take():
            pass
        os.close(self._fd)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)

    def fileno(self) -> int:
        """Readable when there is something to take."""
        return self._fd

    def take(self) -> list[int]:
        """Take numbers that have come: some of them, none only when there are none."""
        try:
            read = os.read(self._fd, _AT_ONCE * _INFO.size)
        except BlockingIOError:
            return []
        return [number for (number,) in _INFO.iter_unpack(read)]
