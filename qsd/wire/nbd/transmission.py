"""The transmission phase: layouts of requests and replies, the errors of the wire, block status descriptors.

Numbers in network byte order. ``Struct`` objects are public because the server's hot loop uses them directly.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from typing import NamedTuple

from qsd.messages import BlockState, Extent
from qsd.wire import modified_utf8
from qsd.wire.nbd import constants as c

REQUEST = struct.Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
# The same for requests that lie one behind the other: magic, flags and type are one number.
RUN = struct.Struct(">QQQI")
EXTENDED_RUN = struct.Struct(">QQQQ")
SIMPLE_REPLY = struct.Struct(">IIQ")  # magic, error, cookie
STRUCTURED_CHUNK = struct.Struct(">IHHQI")  # magic, flags, type, cookie, length
EXTENDED_CHUNK = struct.Struct(">IHHQQQ")  # magic, flags, type, cookie, offset, length
# A chunk header and OFFSET_DATA's offset. In the answer to a read the first bytes are always these.
STRUCTURED_READ = struct.Struct(">8sQIQ")
STRUCTURED_READ_START = struct.pack(">IHH", c.STRUCTURED_REPLY_MAGIC, c.REPLY_FLAG_DONE, c.REPLY_TYPE_OFFSET_DATA)
EXTENDED_DATA = struct.Struct(">IHHQQQQ")
ERROR = struct.Struct(">IH")  # error, length of the text
STATUS_32 = struct.Struct(">II")  # length, flags
STATUS_64 = struct.Struct(">QQ")
PAYLOAD_EFFECT = struct.Struct(">Q")
CONTEXT_ID = struct.Struct(">I")


class RequestHeader(NamedTuple):
    """A decoded request, whichever its header."""

    magic: int
    flags: int
    kind: int
    cookie: int
    offset: int
    length: int


# Errors that have a number of their own on the wire; everything else is EINVAL.
_WIRE_ERRORS: dict[int, int] = {
    0: 0,
    errno.EPERM: 1,
    errno.EIO: 5,
    errno.ENOMEM: 12,
    errno.EINVAL: 22,
    errno.ENOSPC: 28,
    errno.EFBIG: 28,
    errno.EDQUOT: 28,
    errno.EOVERFLOW: 75,
    errno.ENOTSUP: 95,
    errno.ESHUTDOWN: 108,
}


def wire_error(number: int) -> int:
    """The protocol's number for a positive errno."""
    return _WIRE_ERRORS.get(number, 22)


# What each command may carry besides FUA, which the reference accepts on all of them.
_ALLOWED_FLAGS: dict[int, int] = {
    c.CMD_READ: c.CMD_FLAG_DF,
    c.CMD_WRITE: 0,
    c.CMD_FLUSH: 0,
    c.CMD_TRIM: 0,
    c.CMD_CACHE: 0,
    c.CMD_WRITE_ZEROES: c.CMD_FLAG_NO_HOLE | c.CMD_FLAG_FAST_ZERO,
    c.CMD_BLOCK_STATUS: c.CMD_FLAG_REQ_ONE,
}
_WRITING = frozenset({c.CMD_WRITE, c.CMD_TRIM, c.CMD_WRITE_ZEROES})
_BOUNDED = frozenset({c.CMD_READ, c.CMD_WRITE, c.CMD_CACHE})


def payload_length(header: RequestHeader, *, extended: bool) -> int:
    """Bytes that follow the header on the wire.

    A WRITE has its payload whether or not it says so with PAYLOAD_LEN, which extended headers ask for: the
    reference's own client leaves the flag out of writes with FUA, and its server takes them.
    """
    if header.kind == c.CMD_WRITE or (extended and header.flags & c.CMD_FLAG_PAYLOAD_LEN):
        return header.length
    return 0


def refusal(header: RequestHeader, *, size: int, read_only: bool, structured: bool, extended: bool) -> str | None:
    """Why the request is answered with EINVAL, in the reference's words; None when it is to be served.

    ``size`` is the export's length in bytes. A payload behind a refused request still has to be skipped.
    """
    kind, flags, offset, length = header.kind, header.flags, header.offset, header.length
    wanted_magic = c.EXTENDED_REQUEST_MAGIC if extended else c.REQUEST_MAGIC
    if header.magic != wanted_magic:
        return f"invalid magic (got 0x{header.magic:x}, expected 0x{wanted_magic:x})"
    if kind not in _ALLOWED_FLAGS:
        return f"invalid request type ({kind}) received"
    if kind in _BOUNDED and length > c.MAX_PAYLOAD:
        return f"len ({length}) is larger than max len ({c.MAX_PAYLOAD})"
    if read_only and kind in _WRITING:
        return "Export is read-only"
    if offset > size or length > size - offset:
        return f"operation past EOF; From: {offset}, Len: {length}, Size: {size}"
    allowed = _ALLOWED_FLAGS[kind] | c.CMD_FLAG_FUA
    if not structured:
        allowed &= ~c.CMD_FLAG_DF
    if extended and kind in (c.CMD_WRITE, c.CMD_BLOCK_STATUS):
        allowed |= c.CMD_FLAG_PAYLOAD_LEN
    if flags & ~allowed:
        return f"unsupported flags for command {c.COMMAND_NAMES[kind]} (got 0x{flags:x})"
    if kind == c.CMD_BLOCK_STATUS and not length and not flags & c.CMD_FLAG_PAYLOAD_LEN:
        return "need non-zero length"
    return None


def chunk(header: RequestHeader, kind: int, payload: bytes, *, extended: bool, done: bool = True) -> bytes:
    """A reply chunk, structured or extended."""
    flags = c.REPLY_FLAG_DONE if done else 0
    if extended:
        head = EXTENDED_CHUNK.pack(c.EXTENDED_REPLY_MAGIC, flags, kind, header.cookie, header.offset, len(payload))
    else:
        head = STRUCTURED_CHUNK.pack(c.STRUCTURED_REPLY_MAGIC, flags, kind, header.cookie, len(payload))
    return head + payload


def error_chunk(header: RequestHeader, number: int, text: str, *, extended: bool) -> bytes:
    """An ERROR chunk with its text, at most 4096 bytes of it; ``number`` is a positive errno."""
    message = modified_utf8.encode(text)[: c.MAX_STRING]
    payload = ERROR.pack(wire_error(number), len(message)) + message
    return chunk(header, c.REPLY_TYPE_ERROR, payload, extended=extended)


def simple_reply(cookie: int, number: int) -> bytes:
    """A simple reply without data; ``number`` is a positive errno, or 0."""
    return SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, wire_error(number), cookie)


def base_flags(extent: Extent) -> int:
    """base:allocation: hole when no layer has allocated it or it holds no data, zero when it reads as zeroes."""
    flags = 0
    if not extent.state & BlockState.DATA:
        flags |= c.STATE_HOLE
    if extent.state & BlockState.ZERO:
        flags |= c.STATE_ZERO
    return flags


def depth_flags(extent: Extent) -> int:
    """qemu:allocation-depth: 0 nobody, 1 this layer, n the n-th below."""
    return extent.depth


def descriptors(extents: Sequence[tuple[int, int]], *, extended: bool, limit: int) -> bytes:
    """Wire descriptors of (length, flags) runs: neighbours with equal flags joined, at most ``limit`` of them.

    A 32-bit length cannot say more than 4 GiB - 1: a longer run is cut, and the answer ends there.
    """
    joined: list[tuple[int, int]] = []
    for length, flags in extents:
        if joined and joined[-1][1] == flags:
            joined[-1] = (joined[-1][0] + length, flags)
        else:
            joined.append((length, flags))
    layout = STATUS_64 if extended else STATUS_32
    parts = []
    for length, flags in joined[:limit]:
        if not extended and length > 0xFFFFFFFF:
            parts.append(layout.pack(0xFFFF0000, flags))
            break
        parts.append(layout.pack(length, flags))
    return b"".join(parts)


def status_chunk(header: RequestHeader, context: int, body: bytes, *, extended: bool, done: bool) -> bytes:
    """A BLOCK_STATUS chunk for one context from packed descriptors."""
    if extended:
        payload = struct.pack(">II", context, len(body) // STATUS_64.size) + body
        return chunk(header, c.REPLY_TYPE_BLOCK_STATUS_EXT, payload, extended=True, done=done)
    payload = CONTEXT_ID.pack(context) + body
    return chunk(header, c.REPLY_TYPE_BLOCK_STATUS, payload, extended=False, done=done)
