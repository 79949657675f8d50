"""A minimal blocking NBD client: one request at a time, simple replies."""

from __future__ import annotations

import contextlib
import socket
import struct
from pathlib import Path
from types import TracebackType

READ, WRITE, DISC, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 2, 3, 4, 6


class NbdError(Exception):
    """The server answered with an error."""


class NbdReader:
    """A connection to one export."""

    def __init__(self, path: Path, export: str) -> None:
        with contextlib.ExitStack() as stack:
            self.socket = stack.enter_context(socket.socket(socket.AF_UNIX))
            self.socket.settimeout(30)
            self.socket.connect(str(path))
            self._stream = stack.enter_context(self.socket.makefile("rb"))
            assert self._take(18)[:16] == b"NBDMAGICIHAVEOPT"
            name = export.encode()
            self.socket.sendall(struct.pack(">I", 3) + struct.pack(">8sII", b"IHAVEOPT", 1, len(name)) + name)
            self.size, self.flags = struct.unpack(">QH", self._take(10))
            stack.pop_all()  # from here on it is ``__exit__`` that closes

    def __enter__(self) -> NbdReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, DISC, 0, 0, 0))
        if kind is None:
            # Until the server has taken leave as well, the export is in use.
            assert self._stream.read() == b"", "answers to nothing"
        self._stream.close()
        self.socket.close()

    def _take(self, count: int) -> bytes:
        data = self._stream.read(count)
        assert len(data) == count, "the server closed the connection"
        return data

    def request(self, kind: int, offset: int, length: int, payload: bytes = b"", flags: int = 0) -> bytes:
        """Send one request and wait for its answer; raises NbdError."""
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, flags, kind, 1, offset, length) + payload)
        magic, error, cookie = struct.unpack(">IIQ", self._take(16))
        assert (magic, cookie) == (0x67446698, 1)
        if error:
            raise NbdError(error)
        return self._take(length) if kind == READ else b""

    def read(self, offset: int, length: int) -> bytes:
        """Bytes."""
        return self.request(READ, offset, length)

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        """Write."""
        self.request(WRITE, offset, len(data), data, flags=1 if fua else 0)

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        """Zero a range."""
        self.request(WRITE_ZEROES, offset, length, flags=0 if may_unmap else 2)

    def trim(self, offset: int, length: int) -> None:
        """Discard a range."""
        self.request(TRIM, offset, length)

    def flush(self) -> None:
        """Flush."""
        self.request(FLUSH, 0, 0)
