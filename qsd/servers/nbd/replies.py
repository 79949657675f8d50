"""What one client's negotiation decided, as the layouts and verdicts its transmission uses."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from qsd.block.dirty import NamedBitmap
from qsd.errors import errno_text
from qsd.messages import Extent, Flag, Op, Request
from qsd.wire.nbd import constants as c
from qsd.wire.nbd import transmission as wire
from qsd.wire.nbd.handshake import ALLOCATION_DEPTH, BASE_ALLOCATION, Negotiated
from qsd.wire.nbd.transmission import RequestHeader


@attrs.frozen
class Verdict:
    """A refused request: what it is answered, and whether the connection ends with it."""

    errno: int
    text: str
    drop: bool


_OPS: dict[int, Op] = {
    c.CMD_READ: Op.READ,
    c.CMD_WRITE: Op.WRITE,
    c.CMD_FLUSH: Op.FLUSH,
    c.CMD_TRIM: Op.DISCARD,
    c.CMD_CACHE: Op.CACHE,
    c.CMD_WRITE_ZEROES: Op.WRITE_ZEROES,
    c.CMD_BLOCK_STATUS: Op.BLOCK_STATUS,
}
_WRITES = frozenset({Op.WRITE, Op.WRITE_ZEROES})
_FLAGS_OF: dict[str, Callable[[Extent], int]] = {
    BASE_ALLOCATION: wire.base_flags,
    ALLOCATION_DEPTH: wire.depth_flags,
}


_BAD_PAYLOAD = "CMD_BLOCK_STATUS payload not valid"
# Extents in one answer, over all contexts it is about.
MAX_EXTENTS_TOGETHER = 4 * c.MAX_EXTENTS


class Encoder:
    """Layouts of one connection. ``size`` is the export's in bytes; ``bitmaps`` go by their context's number."""

    def __init__(
        self, negotiated: Negotiated, *, writethrough: bool, bitmaps: Mapping[int, NamedBitmap] | None = None
    ) -> None:
        export = negotiated.export
        self.size = export.size
        self.writable = not export.read_only
        self.base_flags = Flag.FUA.value if writethrough else 0
        self.structured = negotiated.structured
        self.extended = negotiated.extended
        self._contexts = dict(negotiated.contexts)
        self._bitmaps = bitmaps or {}
        layout = wire.EXTENDED_REQUEST if self.extended else wire.REQUEST
        self.request_size = layout.size
        self.unpack_request: Callable[[Any, int], tuple[int, ...]] = layout.unpack_from
        # The same with magic, flags and kind as one number, and that number of a plain read.
        self.run_layout = wire.EXTENDED_RUN if self.extended else wire.RUN
        self.request_magic = c.EXTENDED_REQUEST_MAGIC if self.extended else c.REQUEST_MAGIC
        self.plain_read = self.request_magic << 32 | c.CMD_READ
        self.plain_write_flags = c.CMD_FLAG_PAYLOAD_LEN if self.extended else 0
        # Memory, start, ``read_start``, cookie, length with the offset before the data, offset.
        self.pack_read: Callable[[Any, int, bytes, int, int, int], None]
        self.read_start = wire.STRUCTURED_READ_START
        self.pack_done: Callable[[Any, int, int, int], None]
        self.pack_empty: Callable[[Any, int, int, int], None]
        if self.extended:
            self.read_head, self.done_size = wire.EXTENDED_DATA.size, wire.EXTENDED_CHUNK.size
            self.pack_read, self.pack_done = _extended_read, _extended_done
            self.empty_size, self.pack_empty = self.done_size, self.pack_done
        elif self.structured:
            self.read_head, self.done_size = wire.STRUCTURED_READ.size, wire.SIMPLE_REPLY.size
            # Without a call of Python: most answers are this.
            self.pack_read, self.pack_done = wire.STRUCTURED_READ.pack_into, _simple_done
            # A read is answered with chunks, also one of nothing.
            self.empty_size, self.pack_empty = wire.STRUCTURED_CHUNK.size, _structured_done
        else:
            self.read_head = self.done_size = wire.SIMPLE_REPLY.size
            self.pack_read, self.pack_done = _simple_read, _simple_done
            self.empty_size, self.pack_empty = self.done_size, self.pack_done

    # -- requests ---------------------------------------------------------------------------------------------

    def decode(self, memory: Any, position: int) -> RequestHeader:
        """The request at ``position``."""
        return RequestHeader(*self.unpack_request(memory, position))

    def payload_length(self, header: RequestHeader) -> int:
        """Bytes that follow the header."""
        return wire.payload_length(header, extended=self.extended)

    def check(self, header: RequestHeader) -> Verdict | None:
        """What a request that is not served is answered; None when it is to be served."""
        if header.kind == c.CMD_DISC and header.magic == self.request_magic:
            return None
        text = wire.refusal(
            header,
            size=self.size,
            read_only=not self.writable,
            structured=self.structured,
            extended=self.extended,
        )
        if text is None:
            return None
        # What follows a wrong magic or an over-long payload cannot be trusted to be a request again.
        drop = header.magic != self.request_magic or self.payload_length(header) > c.MAX_PAYLOAD
        return Verdict(errno.EINVAL, text, drop)

    def translate(self, header: RequestHeader) -> tuple[Op, int]:
        """The request's operation and flags for the block layer."""
        op = _OPS[header.kind]
        flags = self.base_flags if op in _WRITES else 0
        if header.flags & c.CMD_FLAG_FUA and op in _WRITES:
            flags |= Flag.FUA.value
        if op is Op.WRITE_ZEROES:
            if not header.flags & c.CMD_FLAG_NO_HOLE:
                flags |= Flag.MAY_UNMAP.value
            if header.flags & c.CMD_FLAG_FAST_ZERO:
                flags |= Flag.NO_FALLBACK.value
        return op, flags

    def contexts(self, header: RequestHeader, body: memoryview) -> tuple[RequestHeader, tuple[int, ...], str]:
        """The header with its effective length, the contexts BLOCK_STATUS asks for, or why it is refused."""
        if not self._contexts:
            return header, (), "CMD_BLOCK_STATUS not negotiated"
        if not header.flags & c.CMD_FLAG_PAYLOAD_LEN:
            return header, tuple(self._contexts), ""
        size = wire.PAYLOAD_EFFECT.size
        count, odd = divmod(len(body) - size, wire.CONTEXT_ID.size)
        if odd or not 0 < count <= len(self._contexts):
            return header, (), _BAD_PAYLOAD
        (length,) = wire.PAYLOAD_EFFECT.unpack_from(body)
        asked = tuple(sorted({number for (number,) in wire.CONTEXT_ID.iter_unpack(body[size:])}))
        if len(asked) != count or not self._contexts.keys() >= set(asked):
            return header, (), _BAD_PAYLOAD
        header = header._replace(length=length)
        if not length:
            return header, (), "need non-zero length"
        if length > self.size - header.offset:
            text = f"operation past EOF; From: {header.offset}, Len: {length}, Size: {self.size}"
            return header, (), text
        return header, asked, ""

    def needs_node(self, contexts: tuple[int, ...]) -> bool:
        """Whether the node has to be asked: bitmaps alone are answered without it."""
        return any(number not in self._bitmaps for number in contexts)

    def extents_wanted(self, header: RequestHeader) -> int:
        """How many extents the client can take."""
        return 1 if header.flags & c.CMD_FLAG_REQ_ONE else c.MAX_EXTENTS

    # -- replies ----------------------------------------------------------------------------------------------

    def error(self, header: RequestHeader, number: int, text: str | None) -> bytes:
        """The answer to a request that failed with a positive errno."""
        if not self.structured:
            return wire.simple_reply(header.cookie, number)
        # Of any command, not only of those that must be answered with chunks: here is room for the text.
        return wire.error_chunk(header, number, text or errno_text(number), extended=self.extended)

    def answer(self, header: RequestHeader, request: Request, contexts: tuple[int, ...]) -> bytes:
        """The reply to an ended request that was not laid out beforehand: an error, or block status."""
        if request.error:
            return self.error(header, request.error, None)
        return self.block_status(header, request.result, contexts)

    def block_status(self, header: RequestHeader, extents: Sequence[Extent], contexts: tuple[int, ...]) -> bytes:
        """One chunk per context in id order, the last with DONE."""
        limit = min(self.extents_wanted(header), max(1, MAX_EXTENTS_TOGETHER // len(contexts)))
        parts = []
        for position, number in enumerate(contexts):
            bitmap = self._bitmaps.get(number)
            if bitmap is not None:
                runs: list[tuple[int, int]] = list(bitmap.bits.extents(header.offset, header.length, limit))
            else:
                flags_of = _FLAGS_OF[self._contexts[number]]
                runs = [(extent.length, flags_of(extent)) for extent in extents]
            body = wire.descriptors(runs, extended=self.extended, limit=limit)
            done = position == len(contexts) - 1
            parts.append(wire.status_chunk(header, number, body, extended=self.extended, done=done))
        return b"".join(parts)


_pack_extended = wire.EXTENDED_DATA.pack_into
_pack_structured_chunk = wire.STRUCTURED_CHUNK.pack_into
_pack_chunk = wire.EXTENDED_CHUNK.pack_into
_pack_simple = wire.SIMPLE_REPLY.pack_into


def _extended_read(memory: Any, start: int, _start: bytes, cookie: int, length: int, offset: int) -> None:
    _pack_extended(memory, start, 0x6E8A278C, 1, 1, cookie, offset, length, offset)


def _simple_read(memory: Any, start: int, _start: bytes, cookie: int, _length: int, _offset: int) -> None:
    _pack_simple(memory, start, 0x67446698, 0, cookie)


def _extended_done(memory: Any, start: int, cookie: int, offset: int) -> None:
    _pack_chunk(memory, start, 0x6E8A278C, 1, 0, cookie, offset, 0)


def _structured_done(memory: Any, start: int, cookie: int, _offset: int) -> None:
    _pack_structured_chunk(memory, start, 0x668E33EF, 1, 0, cookie, 0)


def _simple_done(memory: Any, start: int, cookie: int, _offset: int) -> None:
    _pack_simple(memory, start, 0x67446698, 0, cookie)
