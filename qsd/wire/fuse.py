"""The kernel's FUSE protocol, as the server of a single file needs it: messages to values, values to replies.

A message is one ``read`` of /dev/fuse: a header, the call's structure, and a WRITE's data; a reply is one
``write``. Source: <linux/fuse.h>, whose names are kept; numbers are the host's. The kernel is trusted no further
than the bytes it sent: ``decode`` bounds every length and raises ``ProtocolError``, nothing else.

``TRANSFER`` is public because the hot loop unpacks READ and WRITE with it: their structures are alike.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum, IntFlag
from typing import Any

import attrs

KERNEL_VERSION = 7
# The newest minor version whose structures are known here, and the oldest whose INIT reply has today's length.
KERNEL_MINOR = 45
OLDEST_MINOR = 23
ROOT_ID = 1
# What the kernel wants the daemon to be able to read at least, whatever was negotiated.
MIN_READ_BUFFER = 8192
PAGE = 4096
# Without FUSE_MAX_PAGES a request has at most 32 pages.
DEFAULT_PAGES = 32

IN_HEADER = struct.Struct("=IIQQIIIHH")  # len opcode unique nodeid uid gid pid total_extlen padding
# A header and fuse_read_in or fuse_write_in: fh offset size read_flags/write_flags lock_owner flags padding.
TRANSFER = struct.Struct("=IIQQIIIHHQQIIQII")
OUT_HEADER = struct.Struct("=IiQ")  # len error unique
OUT_WRITE = struct.Struct("=IiQII")  # ... and fuse_write_out: size padding

_INIT_IN = struct.Struct("=IIII")
_INIT_IN_EXT = struct.Struct("=IIIII44x")
_INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
_ATTR_OUT = struct.Struct("=QI4xQQQQQQIIIIIIIIII")
_SETATTR_IN = struct.Struct("=I4xQQQ24x12xI4xII4x")
_OPEN_IN = struct.Struct("=II")
_OPEN_OUT = struct.Struct("=QI4x")
_STATFS_OUT = struct.Struct("=QQQQQIII28x")
_FSYNC_IN = struct.Struct("=QI4x")
_FALLOCATE_IN = struct.Struct("=QQQI4x")
_LSEEK_IN = struct.Struct("=QQI4x")
_LSEEK_OUT = struct.Struct("=Q")
_COPY_IN = struct.Struct("=QQQQQQQ")
_INTERRUPT_IN = struct.Struct("=Q")
_FORGET_IN = struct.Struct("=Q")
_BATCH_FORGET_IN = struct.Struct("=I4x")
_FORGET_ONE = struct.Struct("=QQ")
_INVAL_INODE_OUT = struct.Struct("=Qqq")

_NOTIFY_INVAL_INODE = 2


class Opcode(IntEnum):
    """Calls that are served here; the kernel learns from ENOSYS not to send the others again."""

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
    COPY_FILE_RANGE = 47


class InitFlag(IntFlag):
    """What both sides can do; bits from 32 on travel in ``flags2``."""

    ASYNC_READ = 1 << 0
    ATOMIC_O_TRUNC = 1 << 3
    BIG_WRITES = 1 << 5
    AUTO_INVAL_DATA = 1 << 12
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    INIT_EXT = 1 << 30
    DIRECT_IO_ALLOW_MMAP = 1 << 36


class OpenFlag(IntFlag):
    """FOPEN_*: what the kernel may do with an open file."""

    DIRECT_IO = 1 << 0
    NOFLUSH = 1 << 5
    PARALLEL_DIRECT_WRITES = 1 << 6


class SetattrFlag(IntFlag):
    """FATTR_*: which members of a SETATTR count."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    LOCKOWNER = 1 << 9
    CTIME = 1 << 10
    KILL_SUIDGID = 1 << 11


class ProtocolError(Exception):
    """A message that makes no sense. ``unique`` is the call that can be answered with EINVAL, 0 if none can."""

    def __init__(self, text: str, unique: int = 0) -> None:
        super().__init__(text)
        self.unique = unique


# -- calls ----------------------------------------------------------------------------------------------------


@attrs.frozen
class Header:
    """Who calls: ``unique`` names the call in its reply and in an INTERRUPT."""

    opcode: int
    unique: int
    nodeid: int = ROOT_ID
    uid: int = 0
    gid: int = 0
    pid: int = 0


@attrs.frozen
class Call:
    """A call without a structure of interest (GETATTR, STATFS, RELEASE, FLUSH, DESTROY), or one not known here."""

    header: Header


@attrs.frozen
class Init(Call):
    """The first call. ``flags`` are 64 bits."""

    major: int
    minor: int
    max_readahead: int = 0
    flags: int = 0


@attrs.frozen
class Setattr(Call):
    """``valid`` (``SetattrFlag``) says which of the others count. Size in bytes."""

    valid: int
    size: int
    mode: int
    uid: int
    gid: int


@attrs.frozen
class Open(Call):
    """``flags`` are those of open(2)."""

    flags: int


@attrs.frozen
class Transfer(Call):
    """READ or WRITE of ``size`` bytes. ``flags`` are the open file's, with O_DSYNC for a write that must be."""

    offset: int
    size: int
    flags: int


@attrs.frozen
class Fsync(Call):
    """fsync, or fdatasync."""

    datasync: bool


@attrs.frozen
class Fallocate(Call):
    """``mode`` as in fallocate(2)."""

    offset: int
    length: int
    mode: int


@attrs.frozen
class Lseek(Call):
    """SEEK_DATA or SEEK_HOLE."""

    offset: int
    whence: int


@attrs.frozen
class CopyFileRange(Call):
    """Copy inside the file system."""

    offset_in: int
    nodeid_out: int
    offset_out: int
    length: int
    flags: int


@attrs.frozen
class Interrupt(Call):
    """The caller of ``target`` got a signal."""

    target: int


@attrs.frozen
class Forget(Call):
    """FORGET and BATCH_FORGET: (nodeid, lookups) that are no longer remembered. No reply."""

    nodes: tuple[tuple[int, int], ...]


def decode(message: bytes | bytearray | memoryview) -> Call:
    """The call in a whole message. Raises ProtocolError."""
    size = len(message)
    if size < IN_HEADER.size:
        raise ProtocolError(f"{size} bytes are no message")
    length, opcode, unique, nodeid, uid, gid, pid, extensions, _ = IN_HEADER.unpack_from(message)
    if length != size:
        raise ProtocolError(f"a message of {size} bytes says it has {length}", unique)
    # Extensions (8-byte units) lie at the end; a file has no use for any.
    end = size - 8 * extensions
    if end < IN_HEADER.size:
        raise ProtocolError("extensions longer than the message", unique)
    header = Header(opcode, unique, nodeid, uid, gid, pid)
    read = _DECODERS.get(opcode)
    if read is None:
        return Call(header)
    layout, make = read
    if end - IN_HEADER.size < layout.size:
        raise ProtocolError(f"opcode {opcode}: {size} bytes are too few", unique)
    return make(header, layout.unpack_from(message, IN_HEADER.size), memoryview(message)[:end])


_Make = Callable[[Header, tuple[Any, ...], memoryview], Call]


def _init(header: Header, fields: tuple[Any, ...], message: memoryview) -> Call:
    major, minor, readahead, flags = fields
    if flags & InitFlag.INIT_EXT and len(message) >= IN_HEADER.size + _INIT_IN_EXT.size:
        flags |= _INIT_IN_EXT.unpack_from(message, IN_HEADER.size)[4] << 32
    return Init(header, major, minor, readahead, flags)


def _transfer(header: Header, fields: tuple[Any, ...], message: memoryview) -> Call:
    _fh, offset, size, _rw_flags, _owner, flags, _padding = fields
    if header.opcode == Opcode.WRITE and len(message) - TRANSFER.size != size:
        raise ProtocolError(f"a WRITE of {size} bytes carries {len(message) - TRANSFER.size}", header.unique)
    return Transfer(header, offset, size, flags)


def _forget(header: Header, fields: tuple[Any, ...], _message: memoryview) -> Call:
    return Forget(header, ((header.nodeid, fields[0]),))


def _batch_forget(header: Header, fields: tuple[Any, ...], message: memoryview) -> Call:
    body = message[IN_HEADER.size + _BATCH_FORGET_IN.size :]
    if fields[0] * _FORGET_ONE.size > len(body):
        raise ProtocolError(f"{fields[0]} nodes to forget in {len(body)} bytes")
    return Forget(header, tuple(_FORGET_ONE.iter_unpack(body[: fields[0] * _FORGET_ONE.size])))


_RW_IN = struct.Struct("=QQIIQII")
_DECODERS: dict[int, tuple[struct.Struct, _Make]] = {
    Opcode.INIT: (_INIT_IN, _init),
    Opcode.READ: (_RW_IN, _transfer),
    Opcode.WRITE: (_RW_IN, _transfer),
    Opcode.FORGET: (_FORGET_IN, _forget),
    Opcode.BATCH_FORGET: (_BATCH_FORGET_IN, _batch_forget),
    Opcode.SETATTR: (_SETATTR_IN, lambda h, f, _: Setattr(h, f[0], f[2], f[4], f[5], f[6])),
    Opcode.OPEN: (_OPEN_IN, lambda h, f, _: Open(h, f[0])),
    Opcode.FSYNC: (_FSYNC_IN, lambda h, f, _: Fsync(h, bool(f[1] & 1))),
    Opcode.FALLOCATE: (_FALLOCATE_IN, lambda h, f, _: Fallocate(h, f[1], f[2], f[3])),
    Opcode.LSEEK: (_LSEEK_IN, lambda h, f, _: Lseek(h, f[1], f[2])),
    Opcode.COPY_FILE_RANGE: (_COPY_IN, lambda h, f, _: CopyFileRange(h, f[1], f[2], f[4], f[5], f[6])),
    Opcode.INTERRUPT: (_INTERRUPT_IN, lambda h, f, _: Interrupt(h, f[0])),
}


# -- negotiation ----------------------------------------------------------------------------------------------


@attrs.frozen
class Wishes:
    """What the server would like. ``max_transfer`` is the largest READ or WRITE in bytes, whole pages."""

    flags: int
    max_transfer: int
    max_background: int
    congestion_threshold: int


@attrs.frozen
class Negotiated:
    """What was agreed on."""

    minor: int
    flags: int
    max_readahead: int
    max_transfer: int
    max_background: int
    congestion_threshold: int


def negotiate(init: Init, wishes: Wishes) -> Negotiated | None:
    """Agree on what both sides know; None when the kernel is to try again with version 7.

    Raises ProtocolError for a kernel older than 7.23 (Linux 3.15).
    """
    if init.major > KERNEL_VERSION:
        return None
    if init.major < KERNEL_VERSION or init.minor < OLDEST_MINOR:
        raise ProtocolError(f"FUSE version {init.major}.{init.minor} is too old", init.header.unique)
    flags = init.flags & wishes.flags
    if not flags & InitFlag.INIT_EXT:
        flags &= (1 << 32) - 1
    max_transfer = wishes.max_transfer
    if not flags & InitFlag.MAX_PAGES:
        max_transfer = min(max_transfer, DEFAULT_PAGES * PAGE)
    if not flags & InitFlag.BIG_WRITES:
        max_transfer = PAGE
    return Negotiated(
        min(init.minor, KERNEL_MINOR),
        flags,
        init.max_readahead,
        max_transfer,
        wishes.max_background,
        wishes.congestion_threshold,
    )


def init_reply(unique: int, agreed: Negotiated | None) -> bytes:
    """The answer to INIT; None asks for version 7 again."""
    if agreed is None:
        body = _INIT_OUT.pack(KERNEL_VERSION, KERNEL_MINOR, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    else:
        body = _INIT_OUT.pack(
            KERNEL_VERSION,
            agreed.minor,
            agreed.max_readahead,
            agreed.flags & 0xFFFFFFFF,
            agreed.max_background,
            agreed.congestion_threshold,
            agreed.max_transfer,
            1,
            agreed.max_transfer // PAGE,
            0,
            agreed.flags >> 32,
        )
    return _reply(unique, body)


# -- replies --------------------------------------------------------------------------------------------------


@attrs.frozen
class Attributes:
    """What stat(2) shows. Size in bytes; ``blocks`` are 512 bytes each; ``time`` is seconds, nanoseconds."""

    size: int
    blocks: int
    mode: int
    uid: int
    gid: int
    block_size: int
    time: tuple[int, int] = (0, 0)
    inode: int = ROOT_ID


@attrs.frozen
class FileSystem:
    """What statvfs(3) shows. ``blocks``, ``free`` and ``available`` count ``block_size`` bytes each."""

    block_size: int
    blocks: int
    free: int
    available: int
    files: int = 1
    name_length: int = 255


def _reply(unique: int, body: bytes = b"") -> bytes:
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body


def ok_reply(unique: int) -> bytes:
    """Done, and nothing to say about it."""
    return OUT_HEADER.pack(OUT_HEADER.size, 0, unique)


def error_reply(unique: int, number: int) -> bytes:
    """Failed with a positive errno."""
    return OUT_HEADER.pack(OUT_HEADER.size, -number, unique)


def attr_reply(unique: int, attributes: Attributes, valid: int) -> bytes:
    """The answer to GETATTR and SETATTR; the kernel believes it for ``valid`` seconds."""
    seconds, nanoseconds = attributes.time
    return _reply(
        unique,
        _ATTR_OUT.pack(
            valid,
            0,
            attributes.inode,
            attributes.size,
            attributes.blocks,
            *(seconds, seconds, seconds),
            *(nanoseconds, nanoseconds, nanoseconds),
            attributes.mode,
            1,
            attributes.uid,
            attributes.gid,
            0,
            attributes.block_size,
            0,
        ),
    )


def open_reply(unique: int, flags: int) -> bytes:
    """The answer to OPEN; ``flags`` are ``OpenFlag``."""
    return _reply(unique, _OPEN_OUT.pack(0, flags))


def write_reply(unique: int, count: int) -> bytes:
    """The answer to WRITE and COPY_FILE_RANGE: bytes written."""
    return OUT_WRITE.pack(OUT_WRITE.size, 0, unique, count, 0)


def lseek_reply(unique: int, offset: int) -> bytes:
    """The answer to LSEEK."""
    return _reply(unique, _LSEEK_OUT.pack(offset))


def statfs_reply(unique: int, system: FileSystem) -> bytes:
    """The answer to STATFS."""
    return _reply(
        unique,
        _STATFS_OUT.pack(
            *(system.blocks, system.free, system.available),
            *(system.files, 0),
            *(system.block_size, system.name_length, system.block_size),
        ),
    )


def notify_inval_inode(inode: int = ROOT_ID, offset: int = 0, length: int = 0) -> bytes:
    """Tell the kernel to forget the file's attributes, and its cached pages in the range (length 0: to the end).

    A negative offset leaves the pages alone.
    """
    body = _INVAL_INODE_OUT.pack(inode, offset, length)
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), _NOTIFY_INVAL_INODE, 0) + body
