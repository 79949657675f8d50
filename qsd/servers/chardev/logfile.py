"""The log of a character device: what was sent to its peer, with the time before each line if asked for."""

from __future__ import annotations

import os
from datetime import UTC, datetime

from qsd.errors import QmpError, errno_text


class LogFile:
    """``logfile``, ``logappend`` and ``logtimestamp`` of a chardev. Raises QmpError when it cannot be made."""

    def __init__(self, path: str, *, append: bool, timestamps: bool) -> None:
        # Non-blocking: a FIFO that nobody reads, or not fast enough, must hold up nobody.
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_APPEND if append else os.O_TRUNC)
        try:
            self._fd = os.open(path, flags, 0o666)
        except OSError as error:
            raise QmpError(f"Could not create '{path}': {errno_text(error.errno or 0)}") from None
        self._timestamps = timestamps
        self._at_line_start = True

    def write(self, data: bytes) -> None:
        """Record bytes that were sent. A log that cannot be written loses them: the peer comes first."""
        if self._timestamps:
            data = self._stamped(data)
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            return

    def _stamped(self, data: bytes) -> bytes:
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ ").encode()
        parts = data.split(b"\n")
        lines = [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])
        out = bytearray()
        for line in lines:
            if self._at_line_start:
                out += stamp
            out += line
            self._at_line_start = line.endswith(b"\n")
        return bytes(out)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
