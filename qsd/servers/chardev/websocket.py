"""A WebSocket client of a socket chardev: the upgrade, then a stream of bytes in binary frames."""

from __future__ import annotations

import contextlib
import socket

import trio

from qsd.servers.chardev.logfile import LogFile
from qsd.servers.chardev.stream import RECEIVE_SIZE, SocketStream
from qsd.wire.websocket import Decoder, Refused, Upgrade, binary_header

# Seconds a client may take for its request, as it keeps the place of the next one meanwhile.
_UPGRADE_S = 10.0
_MAX_FRAME = 64 << 10


async def upgrade(sock: socket.socket) -> bytes | None:
    """Read the client's request and answer it; what came behind it, or None when no WebSocket came of it."""
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
    request = Upgrade()
    with trio.move_on_after(_UPGRADE_S), contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while data := await stream.receive_some(RECEIVE_SIZE):
            try:
                done = request.receive(bytes(data))
            except Refused as refused:
                await stream.send_all(refused.response)
                return None
            if done is not None:
                response, rest = done
                await stream.send_all(response)
                return rest
    return None


class WebsocketStream(SocketStream):
    """A client past its upgrade; ``rest`` is what it has sent already."""

    def __init__(self, sock: socket.socket, log: LogFile | None, rest: bytes) -> None:
        super().__init__(sock, log)
        self._decoder = Decoder()
        self._rest = rest
        # What goes out before the next byte of payload: a header, or an answer to a control frame.
        self._control = bytearray()
        self._left = 0  # payload still owed to the frame whose header went out

    def _receive(self) -> bytes:
        if self._decoder.is_over:
            return b""
        data, self._rest = self._rest, b""
        data = data or super()._receive()
        if not data:
            return data
        plain = self._decoder.feed(data)
        if self._decoder.replies and not self._left:
            self._put_replies()
            self._send_control()
        if not plain and not self._decoder.is_over:
            raise BlockingIOError
        return plain

    def _send(self, data: bytes | memoryview) -> int:
        """Bytes count as sent when they are; who calls comes again with the rest, which ends the frame."""
        if not self._left and not self._control:
            self._put_replies()
        if not self._left:
            self._left = min(len(data), _MAX_FRAME)
            self._control += binary_header(self._left)
        if not self._send_control():
            raise BlockingIOError
        sent = super()._send(data[: self._left])
        self._left -= sent
        return sent

    def _put_replies(self) -> None:
        self._control += self._decoder.replies
        self._decoder.replies.clear()

    def _send_control(self) -> bool:
        """Send what stands before the payload; True when all of it is out."""
        with contextlib.suppress(BlockingIOError):
            while self._control:
                del self._control[: super()._send(bytes(self._control))]
        return not self._control
