"""What a WebSocket client sends, for tests of the server's side."""

from __future__ import annotations

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def frame(op: int, data: bytes = b"", *, final: bool = True, mask: bytes | None = b"\1\2\3\4") -> bytes:
    """A frame; only a broken client leaves out the mask."""
    bit = 0 if mask is None else 0x80
    size = len(data)
    if size < 126:
        length = bytes([bit | size])
    elif size < 1 << 16:
        length = bytes([bit | 126]) + size.to_bytes(2, "big")
    else:
        length = bytes([bit | 127]) + size.to_bytes(8, "big")
    head = bytes([(0x80 if final else 0) | op]) + length
    if mask is None:
        return head + data
    return head + mask + bytes(byte ^ mask[index % 4] for index, byte in enumerate(data))
