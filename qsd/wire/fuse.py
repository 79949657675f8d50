"""The kernel's FUSE protocol (<linux/fuse.h>, version 7): layouts, and bytes to values and back. Sans-IO.

A message from the kernel is a header and the opcode's structure; a write's data lies behind it. An answer is a
header with the length, a negative errno or 0, and the request's ``unique``. Numbers are in host order.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Final, NamedTuple

import attrs

MAJOR: Final = 7
# The oldest minor version whose structures are those below (FUSE_LSEEK; Linux 4.5), and the newest we say we speak.
MINOR_MIN: Final = 24
MINOR: Final = 38
ROOT: Final = 1
# The most bytes one READ or WRITE may carry. The kernel's default for ``fs.fuse.max_pages_limit`` allows 1 MiB.
MAX_TRANSFER: Final = 1 << 20
PAGE: Final = 4096

IN_HEADER: Final = struct.Struct("=IIQQIIIHH")  # len opcode unique nodeid uid gid pid total_extlen padding
OUT_HEADER: Final = struct.Struct("=IiQ")  # len error unique
# READ and WRITE: fh offset size flags lock_owner flags padding
TRANSFER: Final = struct.Struct("=QQIIQII")
HEAD_LENGTH: Final = IN_HEADER.size + TRANSFER.size

_INIT_IN = struct.Struct("=IIII")  # major minor max_readahead flags; flags2 follows where flags say so
_INIT_OUT = struct.Struct("=IIIIHHIIHHI7I")
_GETATTR_IN = struct.Struct("=IIQ")
_SETATTR_IN = struct.Struct("=IIQQQQQQIIIIIIII")
_FALLOCATE_IN = struct.Struct("=QQQII")
_LSEEK_IN = struct.Struct("=QQII")
_OPEN_IN = struct.Struct("=II")

_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
_ATTR_HEAD = struct.Struct("=QII")  # valid seconds, nanoseconds, padding
_OPEN_OUT = struct.Struct("=QII")
_WRITE_OUT = struct.Struct("=II")
_STATFS_OUT = struct.Struct("=QQQQQIIII6I")
_LSEEK_OUT = struct.Struct("=Q")
_NOTIFY_INODE = struct.Struct("=Qqq")
_NOTIFY_INVAL_INODE = 2


class Opcode(IntEnum):
    """What the kernel asks, as far as a mounted regular file is asked."""

    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    LSEEK = 46


# What is never answered.
SILENT: Final = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET})

# INIT flags.
ASYNC_READ: Final = 1 << 0
BIG_WRITES: Final = 1 << 5
AUTO_INVAL_DATA: Final = 1 << 12
ASYNC_DIO: Final = 1 << 15
PARALLEL_DIROPS: Final = 1 << 18
MAX_PAGES: Final = 1 << 22
_WANTED = ASYNC_READ | BIG_WRITES | AUTO_INVAL_DATA | ASYNC_DIO | PARALLEL_DIROPS | MAX_PAGES
# Requests the kernel may have under way in the background (direct I/O of many, readahead).
_MAX_BACKGROUND = 256
_CONGESTION = 192

# OPEN flags of the answer: direct writes that do not extend the file need not wait for each other.
PARALLEL_DIRECT_WRITES: Final = 1 << 6

# SETATTR: which members are valid.
SET_MODE: Final = 1 << 0
SET_UID: Final = 1 << 1
SET_GID: Final = 1 << 2
SET_SIZE: Final = 1 << 3
SET_FH: Final = 1 << 6
SET_LOCK_OWNER: Final = 1 << 9
SET_KILL_SUIDGID: Final = 1 << 11
# Say who asks, not what is to change.
SET_CONTEXT: Final = SET_FH | SET_LOCK_OWNER | SET_KILL_SUIDGID

# fallocate(2) modes.
KEEP_SIZE: Final = 1
PUNCH_HOLE: Final = 2
ZERO_RANGE: Final = 16

SEEK_DATA: Final = 3
SEEK_HOLE: Final = 4


class ProtocolError(Exception):
    """The kernel said something that is not the protocol as we know it."""


class Header(NamedTuple):
    """The header of a request: its whole length in bytes, the opcode, and what the answer carries back."""

    length: int
    opcode: int
    unique: int
    node: int
    uid: int
    gid: int
    pid: int
    extensions: int
    padding: int


@attrs.frozen
class Init:
    """The kernel's offer."""

    major: int
    minor: int
    max_readahead: int
    flags: int


@attrs.frozen
class SetAttr:
    """Attributes to change: ``valid`` says which. ``size`` in bytes."""

    valid: int
    size: int
    mode: int
    uid: int
    gid: int


@attrs.frozen
class Fallocate:
    """fallocate(2): bytes, and the mode."""

    offset: int
    length: int
    mode: int


@attrs.frozen
class Lseek:
    """lseek(2) with SEEK_DATA or SEEK_HOLE."""

    offset: int
    whence: int


@attrs.frozen
class Plain:
    """A request whose body says nothing we need."""


Body = Init | SetAttr | Fallocate | Lseek | Plain


@attrs.frozen(kw_only=True)
class Attributes:
    """What stat(2) shows of the file. Sizes in bytes, ``time`` in nanoseconds since 1970."""

    size: int
    allocated: int
    mode: int
    uid: int
    gid: int
    block_size: int
    time: int


# -- from the kernel ------------------------------------------------------------------------------------------


def parse_header(data: bytes | bytearray | memoryview) -> Header:
    """The header of a message of ``len(data)`` bytes. Raises ProtocolError."""
    if len(data) < IN_HEADER.size:
        raise ProtocolError(f"a request of {len(data)} bytes")
    header = Header(*IN_HEADER.unpack_from(data))
    if header.length != len(data):
        raise ProtocolError(f"a request of {len(data)} bytes says it has {header.length}")
    return header


def parse_body(header: Header, data: bytes | bytearray | memoryview) -> Body:
    """What the message says behind its header. READ and WRITE are the session's own. Raises ProtocolError."""
    row = _BODIES.get(header.opcode)
    if row is None:
        return Plain()
    layout, make = row
    if len(data) < IN_HEADER.size + layout.size:
        raise ProtocolError(f"opcode {header.opcode} with a body of {len(data) - IN_HEADER.size} bytes")
    return make(layout.unpack_from(data, IN_HEADER.size))


def _init(fields: tuple[int, ...]) -> Init:
    return Init(*fields)


def _setattr(fields: tuple[int, ...]) -> SetAttr:
    return SetAttr(valid=fields[0], size=fields[3], mode=fields[11], uid=fields[13], gid=fields[14])


def _fallocate(fields: tuple[int, ...]) -> Fallocate:
    return Fallocate(fields[1], fields[2], fields[3])


def _lseek(fields: tuple[int, ...]) -> Lseek:
    return Lseek(fields[1], fields[2])


_BODIES: dict[int, tuple[struct.Struct, Callable[[tuple[int, ...]], Body]]] = {
    Opcode.INIT: (_INIT_IN, _init),
    Opcode.SETATTR: (_SETATTR_IN, _setattr),
    Opcode.FALLOCATE: (_FALLOCATE_IN, _fallocate),
    Opcode.LSEEK: (_LSEEK_IN, _lseek),
}


# -- to the kernel --------------------------------------------------------------------------------------------


def answer(unique: int, body: bytes = b"") -> bytes:
    """A successful answer."""
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body


def refuse(unique: int, number: int) -> bytes:
    """An answer with a positive errno."""
    return OUT_HEADER.pack(OUT_HEADER.size, -number, unique)


def negotiate(offer: Init) -> bytes:
    """The body of INIT's answer. Raises ProtocolError for a kernel that is too old.

    A kernel with another major version is told ours and asks again (its header says how).
    """
    if offer.major < MAJOR or (offer.major == MAJOR and offer.minor < MINOR_MIN):
        raise ProtocolError(f"the kernel speaks FUSE {offer.major}.{offer.minor}, which is too old")
    flags = offer.flags & _WANTED
    readahead = min(offer.max_readahead, MAX_TRANSFER)
    pages = MAX_TRANSFER // PAGE if flags & MAX_PAGES else 0
    return _INIT_OUT.pack(
        *(MAJOR, MINOR, readahead, flags, _MAX_BACKGROUND, _CONGESTION, MAX_TRANSFER, 1, pages, 0, 0),
        *(0,) * 7,
    )


def pack_attributes(attributes: Attributes, valid_seconds: int) -> bytes:
    """The body of GETATTR's and SETATTR's answers."""
    seconds, nanoseconds = divmod(attributes.time, 1_000_000_000)
    blocks = -(-attributes.allocated // 512)
    return _ATTR_HEAD.pack(valid_seconds, 0, 0) + _ATTR.pack(
        *(ROOT, attributes.size, blocks, seconds, seconds, seconds, nanoseconds, nanoseconds, nanoseconds),
        *(attributes.mode, 1, attributes.uid, attributes.gid, 0, attributes.block_size, 0),
    )


def pack_open(flags: int) -> bytes:
    """The body of OPEN's answer."""
    return _OPEN_OUT.pack(0, flags, 0)


def pack_written(count: int) -> bytes:
    """The body of WRITE's answer: bytes written."""
    return _WRITE_OUT.pack(count, 0)


def pack_statfs(size: int, allocated: int) -> bytes:
    """The body of STATFS's answer: the disk as a file system, what is not allocated being free. Bytes."""
    blocks, free = -(-size // PAGE), max(0, size - allocated) // PAGE
    return _STATFS_OUT.pack(blocks, free, free, 1, 0, PAGE, 255, PAGE, 0, *(0,) * 6)


def pack_offset(offset: int) -> bytes:
    """The body of LSEEK's answer."""
    return _LSEEK_OUT.pack(offset)


def forget_attributes() -> bytes:
    """A notification: ask for the attributes again (the length has changed).

    The cached pages stay: dropping them here would wait for reads that only we can answer.
    """
    body = _NOTIFY_INODE.pack(ROOT, -1, 0)
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), _NOTIFY_INVAL_INODE, 0) + body
