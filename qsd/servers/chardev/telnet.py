"""Telnet (RFC 854) as far as a server of byte streams needs it: one greeting, and commands filtered out."""

from __future__ import annotations

import socket
from collections.abc import Callable

from qsd.servers.chardev.logfile import LogFile
from qsd.servers.chardev.stream import SocketStream

_IAC = 255
_WITH_OPTION = range(251, 255)  # WILL, WONT, DO, DONT
_SUBNEGOTIATION = 250
_SUBNEGOTIATION_END = 240

# WILL echo, WILL suppress go-ahead, WILL binary, DO binary: what the reference sends.
GREETING = bytes((_IAC, 251, 1, _IAC, 251, 3, _IAC, 251, 0, _IAC, 253, 0))
# TN3270 (RFC 1576): end of record, binary, terminal type, both ways, and the question for the latter. What the
# client answers reaches the user of the chardev, as with the reference.
GREETING_3270 = bytes.fromhex("fffd19 fffb19 fffd00 fffb00 fffd18 fffa1801fff0")


class Filter:
    """Takes telnet commands out of what a client sends; keeps its place between calls."""

    def __init__(self) -> None:
        self._state: Callable[[int, bytearray], None] = self._data

    def feed(self, data: bytes) -> bytes:
        """The plain bytes in ``data``."""
        if self._state == self._data and _IAC not in data:
            return data
        out = bytearray()
        for byte in data:
            self._state(byte, out)
        return bytes(out)

    def _data(self, byte: int, out: bytearray) -> None:
        if byte == _IAC:
            self._state = self._command
        else:
            out.append(byte)

    def _command(self, byte: int, out: bytearray) -> None:
        self._state = self._data
        if byte == _IAC:
            out.append(byte)
        elif byte in _WITH_OPTION:
            self._state = self._option
        elif byte == _SUBNEGOTIATION:
            self._state = self._inside

    def _option(self, _byte: int, _out: bytearray) -> None:
        self._state = self._data

    def _inside(self, byte: int, _out: bytearray) -> None:
        if byte == _IAC:
            self._state = self._inside_command

    def _inside_command(self, byte: int, _out: bytearray) -> None:
        self._state = self._data if byte == _SUBNEGOTIATION_END else self._inside


class TelnetStream(SocketStream):
    """A telnet client. What is sent to it must not contain byte 255 (QMP is ASCII)."""

    def __init__(self, sock: socket.socket, log: LogFile | None) -> None:
        super().__init__(sock, log)
        self._filter = Filter()
        sock.send(GREETING)  # a new connection's buffer takes it

    def _receive(self) -> bytes:
        data = super()._receive()
        if not data:
            return data
        plain = self._filter.feed(data)
        if not plain:
            raise BlockingIOError
        return plain
