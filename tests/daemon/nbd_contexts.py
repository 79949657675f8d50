"""A blocking NBD client for metadata contexts: selecting them, and block status replies as values."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

ABORT, STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT, GO, EXTENDED_HEADERS = 2, 8, 9, 10, 7, 11
REQ_ONE, PAYLOAD_LEN = 8, 32
REPLY_ACK, REPLY_META_CONTEXT = 1, 4
# Replies of an option that more will follow.
PARTIAL = (2, 3, 4)
DISCONNECT, BLOCK_STATUS = 2, 7
CHUNK_STATUS, CHUNK_STATUS_EXT = 5, 6
DONE = 1


class ContextClient:
    """A connection that has negotiated structured replies or extended headers. ``select`` comes before ``go``."""

    def __init__(self, path: Path, export: str, *, extended: bool = False) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        self.socket.connect(str(path))
        self._stream = self.socket.makefile("rb")
        self._name = export.encode()
        self._extended = extended
        self._gone = False
        self._take(18)
        self.socket.sendall(struct.pack(">I", 3))
        assert self._option(EXTENDED_HEADERS if extended else STRUCTURED_REPLY, b"") == [(REPLY_ACK, b"")]

    def __enter__(self) -> ContextClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._say_goodbye()
        self._stream.close()
        self.socket.close()

    def _say_goodbye(self) -> None:
        if not self._gone:
            assert self._option(ABORT, b"") == [(REPLY_ACK, b"")]
        else:
            self.socket.sendall(self._head(DISCONNECT, 0, 0, 0))

    def _take(self, count: int) -> bytes:
        data = self._stream.read(count)
        assert len(data) == count, "the server closed the connection"
        return data

    def _option(self, option: int, payload: bytes) -> list[tuple[int, bytes]]:
        self.socket.sendall(struct.pack(">8sII", b"IHAVEOPT", option, len(payload)) + payload)
        replies = []
        while True:
            _magic, _option, kind, length = struct.unpack(">QIII", self._take(20))
            replies.append((kind, self._take(length)))
            if kind not in PARTIAL:
                return replies

    def _contexts(self, option: int, queries: Sequence[str]) -> list[list[Any]]:
        payload = struct.pack(">I", len(self._name)) + self._name + struct.pack(">I", len(queries))
        for query in queries:
            payload += struct.pack(">I", len(query.encode())) + query.encode()
        *found, last = self._option(option, payload)
        assert last == (REPLY_ACK, b"")
        return [[struct.unpack_from(">I", data)[0], data[4:].decode()] for _kind, data in found]

    def listed(self, *queries: str) -> list[list[Any]]:
        """Number and name of the contexts that LIST gives."""
        return self._contexts(LIST_META_CONTEXT, queries)

    def select(self, *queries: str) -> list[list[Any]]:
        """Number and name of the contexts that are selected now."""
        return self._contexts(SET_META_CONTEXT, queries)

    def go(self) -> None:
        """End the negotiation."""
        replies = self._option(GO, struct.pack(">I", len(self._name)) + self._name + b"\0\0")
        assert replies[-1][0] == REPLY_ACK
        self._gone = True

    def _head(self, kind: int, flags: int, offset: int, length: int) -> bytes:
        if self._extended:
            return struct.pack(">IHHQQQ", 0x21E41C71, flags, kind, 1, offset, length)
        return struct.pack(">IHHQQI", 0x25609513, flags, kind, 1, offset, length)

    def status(self, offset: int, length: int, flags: int = 0, contexts: Sequence[int] | None = None) -> list[Any]:
        """One ``[number, [[length, flags]...]]`` for each context, or ``[error, text]``.

        ``contexts`` are numbers sent with the request (extended headers only).
        """
        payload = b""
        if contexts is not None:
            payload = struct.pack(f">Q{len(contexts)}I", length, *contexts)
            flags, length = flags | PAYLOAD_LEN, len(payload)
        self.socket.sendall(self._head(BLOCK_STATUS, flags, offset, length) + payload)
        found: list[Any] = []
        while True:
            flags, kind, data = self._chunk()
            if kind == CHUNK_STATUS:
                runs = [list(run) for run in struct.iter_unpack(">II", data[4:])]
                found.append([struct.unpack_from(">I", data)[0], runs])
            elif kind == CHUNK_STATUS_EXT:
                number, count = struct.unpack_from(">II", data)
                runs = [list(run) for run in struct.iter_unpack(">QQ", data[8:])]
                assert len(runs) == count
                found.append([number, runs])
            else:
                found += [struct.unpack_from(">I", data)[0], data[6:].decode()]
            if flags & DONE:
                return found

    def _chunk(self) -> tuple[int, int, bytes]:
        if self._extended:
            magic, flags, kind, _cookie, _offset, length = struct.unpack(">IHHQQQ", self._take(32))
            assert magic == 0x6E8A278C
        else:
            magic, flags, kind, _cookie, length = struct.unpack(">IHHQI", self._take(20))
            assert magic == 0x668E33EF
        return flags, kind, self._take(length)
