"""Errors that cross rooms: what a command answers, and what an I/O request ends with."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Final


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


# How a step may fail behind which others are taken all the same.
FAILURES: Final = (QmpError, OSError, MemoryError)


class ActorStopped(Exception):
    """The actor asked has ended, or ended before it could answer."""


def errno_text(number: int) -> str:
    """The C library's text of a positive errno, as the reference prints it (``No such file or directory``)."""
    return _TEXTS.get(number) or f"Unknown error {number}"


@contextmanager
def failing(text: str) -> Iterator[None]:
    """Name the step that failed: an OSError from within becomes a QmpError."""
    try:
        yield
    except OSError as error:
        raise QmpError(f"{text}: {errno_text(error.errno or 0)}") from None


def _texts() -> dict[int, str]:
    # os.strerror lives in a room this one may not import; a test compares the table with it.
    return {
        errno.EPERM: "Operation not permitted",
        errno.ENOENT: "No such file or directory",
        errno.ESRCH: "No such process",
        errno.EINTR: "Interrupted system call",
        errno.EIO: "Input/output error",
        errno.ENXIO: "No such device or address",
        errno.E2BIG: "Argument list too long",
        errno.ENOEXEC: "Exec format error",
        errno.EBADF: "Bad file descriptor",
        errno.ECHILD: "No child processes",
        errno.EAGAIN: "Resource temporarily unavailable",
        errno.ENOMEM: "Cannot allocate memory",
        errno.EACCES: "Permission denied",
        errno.EFAULT: "Bad address",
        errno.ENOTBLK: "Block device required",
        errno.EBUSY: "Device or resource busy",
        errno.EEXIST: "File exists",
        errno.EXDEV: "Invalid cross-device link",
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
        errno.EMLINK: "Too many links",
        errno.EPIPE: "Broken pipe",
        errno.EDOM: "Numerical argument out of domain",
        errno.ERANGE: "Numerical result out of range",
        errno.EDEADLOCK: "Resource deadlock avoided",
        errno.EDEADLK: "Resource deadlock avoided",
        errno.ENAMETOOLONG: "File name too long",
        errno.ENOLCK: "No locks available",
        errno.ENOSYS: "Function not implemented",
        errno.ENOTEMPTY: "Directory not empty",
        errno.ELOOP: "Too many levels of symbolic links",
        errno.ENOMSG: "No message of desired type",
        errno.EIDRM: "Identifier removed",
        errno.ECHRNG: "Channel number out of range",
        errno.EL2NSYNC: "Level 2 not synchronized",
        errno.EL3HLT: "Level 3 halted",
        errno.EL3RST: "Level 3 reset",
        errno.ELNRNG: "Link number out of range",
        errno.EUNATCH: "Protocol driver not attached",
        errno.ENOCSI: "No CSI structure available",
        errno.EL2HLT: "Level 2 halted",
        errno.EBADE: "Invalid exchange",
        errno.EBADR: "Invalid request descriptor",
        errno.EXFULL: "Exchange full",
        errno.ENOANO: "No anode",
        errno.EBADRQC: "Invalid request code",
        errno.EBADSLT: "Invalid slot",
        errno.EBFONT: "Bad font file format",
        errno.ENOSTR: "Device not a stream",
        errno.ENODATA: "No data available",
        errno.ETIME: "Timer expired",
        errno.ENOSR: "Out of streams resources",
        errno.ENONET: "Machine is not on the network",
        errno.ENOPKG: "Package not installed",
        errno.EREMOTE: "Object is remote",
        errno.ENOLINK: "Link has been severed",
        errno.EADV: "Advertise error",
        errno.ESRMNT: "Srmount error",
        errno.ECOMM: "Communication error on send",
        errno.EPROTO: "Protocol error",
        errno.EMULTIHOP: "Multihop attempted",
        errno.EDOTDOT: "RFS specific error",
        errno.EBADMSG: "Bad message",
        errno.EOVERFLOW: "Value too large for defined data type",
        errno.ENOTUNIQ: "Name not unique on network",
        errno.EBADFD: "File descriptor in bad state",
        errno.EREMCHG: "Remote address changed",
        errno.ELIBACC: "Can not access a needed shared library",
        errno.ELIBBAD: "Accessing a corrupted shared library",
        errno.ELIBSCN: ".lib section in a.out corrupted",
        errno.ELIBMAX: "Attempting to link in too many shared libraries",
        errno.ELIBEXEC: "Cannot exec a shared library directly",
        errno.EILSEQ: "Invalid or incomplete multibyte or wide character",
        errno.ERESTART: "Interrupted system call should be restarted",
        errno.ESTRPIPE: "Streams pipe error",
        errno.EUSERS: "Too many users",
        errno.ENOTSOCK: "Socket operation on non-socket",
        errno.EDESTADDRREQ: "Destination address required",
        errno.EMSGSIZE: "Message too long",
        errno.EPROTOTYPE: "Protocol wrong type for socket",
        errno.ENOPROTOOPT: "Protocol not available",
        errno.EPROTONOSUPPORT: "Protocol not supported",
        errno.ESOCKTNOSUPPORT: "Socket type not supported",
        errno.ENOTSUP: "Operation not supported",
        errno.EPFNOSUPPORT: "Protocol family not supported",
        errno.EAFNOSUPPORT: "Address family not supported by protocol",
        errno.EADDRINUSE: "Address already in use",
        errno.EADDRNOTAVAIL: "Cannot assign requested address",
        errno.ENETDOWN: "Network is down",
        errno.ENETUNREACH: "Network is unreachable",
        errno.ENETRESET: "Network dropped connection on reset",
        errno.ECONNABORTED: "Software caused connection abort",
        errno.ECONNRESET: "Connection reset by peer",
        errno.ENOBUFS: "No buffer space available",
        errno.EISCONN: "Transport endpoint is already connected",
        errno.ENOTCONN: "Transport endpoint is not connected",
        errno.ESHUTDOWN: "Cannot send after transport endpoint shutdown",
        errno.ETOOMANYREFS: "Too many references: cannot splice",
        errno.ETIMEDOUT: "Connection timed out",
        errno.ECONNREFUSED: "Connection refused",
        errno.EHOSTDOWN: "Host is down",
        errno.EHOSTUNREACH: "No route to host",
        errno.EALREADY: "Operation already in progress",
        errno.EINPROGRESS: "Operation now in progress",
        errno.ESTALE: "Stale file handle",
        errno.EUCLEAN: "Structure needs cleaning",
        errno.ENOTNAM: "Not a XENIX named type file",
        errno.ENAVAIL: "No XENIX semaphores available",
        errno.EISNAM: "Is a named type file",
        errno.EREMOTEIO: "Remote I/O error",
        errno.EDQUOT: "Disk quota exceeded",
        errno.ENOMEDIUM: "No medium found",
        errno.EMEDIUMTYPE: "Wrong medium type",
        errno.ECANCELED: "Operation canceled",
        errno.ENOKEY: "Required key not available",
        errno.EKEYEXPIRED: "Key has expired",
        errno.EKEYREVOKED: "Key has been revoked",
        errno.EKEYREJECTED: "Key was rejected by service",
        errno.EOWNERDEAD: "Owner died",
        errno.ENOTRECOVERABLE: "State not recoverable",
        errno.ERFKILL: "Operation not possible due to RF-kill",
    }


_TEXTS = _texts()
