"""Errors that cross rooms: what a command answers, and what an I/O request ends with."""

from __future__ import annotations

import errno
from enum import Enum


class ErrorClass(str, Enum):
    """QMP error classes (QAPI ``QapiErrorClass``)."""

    GENERIC = "GenericError"
    COMMAND_NOT_FOUND = "CommandNotFound"
    DEVICE_NOT_ACTIVE = "DeviceNotActive"
    DEVICE_NOT_FOUND = "DeviceNotFound"
    KVM_MISSING_CAP = "KVMMissingCap"


class QmpError(Exception):
    """A command failed. ``desc`` is an interface: the reference's words, because tools match on them.

    ``hint`` is shown on the command line only (the reference drops it over QMP).
    """

    def __init__(self, desc: str, *, error_class: ErrorClass = ErrorClass.GENERIC, hint: str | None = None) -> None:
        super().__init__(desc)
        self.desc = desc
        self.error_class = error_class
        self.hint = hint

    def prefixed(self, prefix: str) -> QmpError:
        """The same error with ``prefix`` put before its description."""
        return QmpError(prefix + self.desc, error_class=self.error_class, hint=self.hint)


class ActorStopped(Exception):
    """The actor asked has ended, or ended before it could answer."""


def errno_text(number: int) -> str:
    """The C library's text of a positive errno, as the reference prints it (``No such file or directory``)."""
    return _TEXTS.get(number) or f"Unknown error {number}"


def _texts() -> dict[int, str]:
    # os.strerror lives in a room this one may not import; OSError's own text would need it as well.
    # The table holds what the block layer can answer; the rest is taken from the errno module's names.
    return {
        errno.EPERM: "Operation not permitted",
        errno.ENOENT: "No such file or directory",
        errno.EINTR: "Interrupted system call",
        errno.EIO: "Input/output error",
        errno.ENXIO: "No such device or address",
        errno.EBADF: "Bad file descriptor",
        errno.EAGAIN: "Resource temporarily unavailable",
        errno.ENOMEM: "Cannot allocate memory",
        errno.EACCES: "Permission denied",
        errno.EBUSY: "Device or resource busy",
        errno.EEXIST: "File exists",
        errno.ENODEV: "No such device",
        errno.ENOTDIR: "Not a directory",
        errno.EISDIR: "Is a directory",
        errno.EINVAL: "Invalid argument",
        errno.ENFILE: "Too many open files in system",
        errno.EMFILE: "Too many open files",
        errno.ENOTTY: "Inappropriate ioctl for device",
        errno.ETXTBSY: "Text file busy",
        errno.EFBIG: "File too large",
        errno.ENOSPC: "No space left on device",
        errno.ESPIPE: "Illegal seek",
        errno.EROFS: "Read-only file system",
        errno.EPIPE: "Broken pipe",
        errno.ERANGE: "Numerical result out of range",
        errno.ENAMETOOLONG: "File name too long",
        errno.ENOSYS: "Function not implemented",
        errno.ELOOP: "Too many levels of symbolic links",
        errno.EPROTO: "Protocol error",
        errno.EOVERFLOW: "Value too large for defined data type",
        errno.EBADMSG: "Bad message",
        errno.EOPNOTSUPP: "Operation not supported",
        errno.EADDRINUSE: "Address already in use",
        errno.EADDRNOTAVAIL: "Cannot assign requested address",
        errno.ENETUNREACH: "Network is unreachable",
        errno.ECONNABORTED: "Software caused connection abort",
        errno.ECONNRESET: "Connection reset by peer",
        errno.ENOTCONN: "Transport endpoint is not connected",
        errno.ESHUTDOWN: "Cannot send after transport endpoint shutdown",
        errno.ETIMEDOUT: "Connection timed out",
        errno.ECONNREFUSED: "Connection refused",
        errno.EHOSTUNREACH: "No route to host",
        errno.EALREADY: "Operation already in progress",
        errno.EINPROGRESS: "Operation now in progress",
        errno.ESTALE: "Stale file handle",
        errno.EDQUOT: "Disk quota exceeded",
        errno.ENOMEDIUM: "No medium found",
        errno.ECANCELED: "Operation canceled",
    }


_TEXTS = _texts()
