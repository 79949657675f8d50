"""The server's side of a WebSocket (RFC 6455), sans-IO: the upgrade request, then frames both ways.

Only what a byte stream needs: binary messages, of which nobody sees the boundaries, and control frames. Nothing is
kept of a frame but its header, so no length a client names costs memory (CVE-2015-1779).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from enum import IntEnum

import attrs

# Bytes an upgrade request may have; the reference's limit.
MAX_REQUEST = 4096
_MAX_CONTROL = 125  # RFC 6455, 5.5
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_REQUEST_LINE = re.compile(rb"GET [^ ]+ HTTP/1\.1")
_HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*")


class Code(IntEnum):
    """Why a connection is closed (RFC 6455, 7.4.1)."""

    NORMAL = 1000
    PROTOCOL_ERROR = 1002
    UNSUPPORTED = 1003


class Refused(Exception):
    """No WebSocket comes of this connection; ``response`` is what the client is told."""

    def __init__(self, status: str) -> None:
        super().__init__(status)
        self.response = (f"HTTP/1.1 {status}\r\nConnection: close\r\nSec-WebSocket-Version: 13\r\n\r\n").encode()


class Upgrade:
    """Reads the request of a client that is about to speak WebSocket."""

    def __init__(self) -> None:
        self._data = bytearray()

    def receive(self, data: bytes) -> tuple[bytes, bytes] | None:
        """Take bytes; None while the request is not complete, then the response and what came behind the request.

        Raises Refused.
        """
        self._data += data
        end = self._data.find(b"\r\n\r\n")
        if end < 0 or end + 4 > MAX_REQUEST:
            if len(self._data) >= MAX_REQUEST:
                raise Refused("403 Request Entity Too Large")
            return None
        return _response(bytes(self._data[:end])), bytes(self._data[end + 4 :])


def _response(request: bytes) -> bytes:
    first, *lines = request.split(b"\r\n")
    headers: dict[bytes, bytes] = {}
    for line in lines:
        match = _HEADER_LINE.fullmatch(line)
        if match is None:
            raise Refused("400 Bad Request")
        name = match[1].lower()
        headers[name] = headers[name] + b"," + match[2] if name in headers else match[2]
    key = headers.get(b"sec-websocket-key", b"")
    if not (
        _REQUEST_LINE.fullmatch(first)
        and b"host" in headers
        and b"websocket" in _words(headers.get(b"upgrade", b""))
        and b"upgrade" in _words(headers.get(b"connection", b""))
        and headers.get(b"sec-websocket-version") == b"13"
        and _is_key(key)
    ):
        raise Refused("400 Bad Request")
    accept = base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())
    chosen = b""
    if b"binary" in _words(headers.get(b"sec-websocket-protocol", b"")):
        chosen = b"Sec-WebSocket-Protocol: binary\r\n"
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept + b"\r\n" + chosen + b"\r\n"
    )


def _words(value: bytes) -> list[bytes]:
    return [word.strip().lower() for word in value.split(b",")]


def _is_key(value: bytes) -> bool:
    try:
        return len(base64.b64decode(value, validate=True)) == 16
    except binascii.Error:
        return False


class _Op(IntEnum):
    CONTINUATION = 0
    TEXT = 1
    BINARY = 2
    CLOSE = 8
    PING = 9
    PONG = 10


# What the 7 bits of a length say: how many bytes of the real one follow (5.2).
_LENGTH_BYTES = {126: 2, 127: 8}


@attrs.define(eq=False)
class _Frame:
    """A frame that is being read: what its header said, and how much of its payload is still to come."""

    op: int
    is_final: bool
    left: int
    mask: bytes
    control: bytearray


class Decoder:
    """What a client sends, in any pieces, to plain bytes. ``replies`` collects what it has to be told; once
    ``is_over`` nothing it says matters any more."""

    def __init__(self) -> None:
        self._header = bytearray()
        self._frame: _Frame | None = None
        self._in_message = False
        self.replies = bytearray()
        self.is_over = False

    def feed(self, data: bytes) -> bytes:
        """The payload of the binary messages in ``data``."""
        out = bytearray()
        at = 0
        while at < len(data) and not self.is_over:
            frame = self._frame
            if frame is None:
                missing = self._header_size() - len(self._header)
                self._header += data[at : at + missing]
                at += missing
                if len(self._header) == self._header_size():
                    self._begin()
                continue
            piece = _unmasked(data[at : at + frame.left], frame.mask)
            at += len(piece)
            frame.left -= len(piece)
            turn = len(piece) % 4
            frame.mask = frame.mask[turn:] + frame.mask[:turn]
            (out if frame.op < _Op.CLOSE else frame.control).extend(piece)
            if not frame.left:
                self._end(frame)
        return bytes(out)

    def _header_size(self) -> int:
        """As far as the first two bytes, once they are there, tell."""
        if len(self._header) < 2:
            return 2
        second = self._header[1]
        return 2 + _LENGTH_BYTES.get(second & 0x7F, 0) + (4 if second & 0x80 else 0)

    def _begin(self) -> None:
        header = self._header
        short = header[1] & 0x7F
        extra = _LENGTH_BYTES.get(short, 0)
        op, is_final = header[0] & 0x0F, bool(header[0] & 0x80)
        length = int.from_bytes(header[2 : 2 + extra], "big") if extra else short
        problem = self._problem(op, is_final=is_final, length=length)
        if problem is not None:
            self._close(*problem)
            return
        frame = _Frame(op, is_final, length, bytes(header[-4:]), bytearray())
        self._header = bytearray()
        self._frame = frame
        if not frame.left:
            self._end(frame)

    def _problem(self, op: int, *, is_final: bool, length: int) -> tuple[Code, bytes] | None:
        if self._header[0] & 0x70:
            return Code.PROTOCOL_ERROR, b"no extension was negotiated"
        if not self._header[1] & 0x80:
            return Code.PROTOCOL_ERROR, b"client frames must be masked"
        if op not in (_Op.CONTINUATION, _Op.BINARY, _Op.CLOSE, _Op.PING, _Op.PONG):
            return Code.UNSUPPORTED, b"only binary, close, ping, and pong frames are supported"
        if op >= _Op.CLOSE:
            if not is_final or length > _MAX_CONTROL:
                return Code.PROTOCOL_ERROR, b"control frames are short and whole"
        elif (op == _Op.CONTINUATION) != self._in_message:
            return Code.PROTOCOL_ERROR, b"a message continues exactly where one was begun"
        if length >> 63:
            return Code.PROTOCOL_ERROR, b"a length has 63 bits"
        return None

    def _end(self, frame: _Frame) -> None:
        self._frame = None
        if frame.op == _Op.CLOSE:
            self._close(Code.NORMAL, b"peer requested close")
        elif frame.op == _Op.PING:
            # Who does not read our answers gets the last one only (5.5.3 allows it).
            self.replies[:] = header(_Op.PONG, len(frame.control)) + frame.control
        elif frame.op != _Op.PONG:
            self._in_message = not frame.is_final

    def _close(self, code: Code, reason: bytes) -> None:
        self.is_over = True
        body = code.to_bytes(2, "big") + reason
        self.replies += header(_Op.CLOSE, len(body)) + body


def header(op: int, length: int) -> bytes:
    """The header of an unmasked, final frame."""
    first = bytes([0x80 | op])
    if length < 126:
        return first + bytes([length])
    if length < 1 << 16:
        return first + b"\x7e" + length.to_bytes(2, "big")
    return first + b"\x7f" + length.to_bytes(8, "big")


def binary_header(length: int) -> bytes:
    """The header in front of ``length`` bytes for the client."""
    return header(_Op.BINARY, length)


def _unmasked(data: bytes, mask: bytes) -> bytes:
    size = len(data)
    pattern = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "little") ^ int.from_bytes(pattern, "little")).to_bytes(size, "little")
