"""Conversations with an NBD server, step by step: what is sent, and what came back, decoded far enough to compare.

A step is a tuple. ``flags`` N: the client's flags (left out, 3 are sent). ``opt`` NUMBER PAYLOAD: an option, and
its replies up to the last. ``name`` NAME: NBD_OPT_EXPORT_NAME. ``req`` KIND OFFSET LENGTH [FLAGS] [PAYLOAD]: a
request, and its reply up to the last chunk. ``raw`` BYTES: sent as they are; everything until the end comes back.
Payloads are bytes in hexadecimal. A server that hangs up ends the conversation. A chunk that tells of a hole counts
as one of so many zeroes: whether a server looks for holes is its own affair.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compare import FILES, place

SECONDS = 10.0
ACK, SERVER, INFO, META = 1, 2, 3, 4
STRUCTURED, EXTENDED, GO = 8, 11, 7

Step = tuple[Any, ...]


@contextmanager
def server(program: Sequence[str], arguments: Sequence[str]) -> Iterator[Callable[[Sequence[Step]], list[Any]]]:
    """A daemon that listens on ``n``; a function that plays one conversation, with the image as it was."""
    with place() as where:
        process = subprocess.Popen(
            [*program, *arguments], cwd=where, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            yield lambda steps: _play(process, where, steps)
        finally:
            process.terminate()
            assert process.wait(SECONDS) == 0


def _play(process: subprocess.Popen[bytes], where: Path, steps: Sequence[Step]) -> list[Any]:
    (where / "img").write_bytes(FILES["img"])
    end = time.monotonic() + SECONDS
    while True:
        try:
            talk = Talk(where / "n")
        except OSError:
            assert process.poll() is None, "the daemon has ended"
            assert time.monotonic() < end, "the daemon does not listen"
            time.sleep(0.005)
        else:
            return talk.play(steps)


class _Ended(Exception):
    """The server has hung up."""


class Talk:
    """One connection."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SECONDS)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._is_structured = self._is_extended = self._is_greeted = False
        self._cookie = 0
        self._no_zeroes = True

    def play(self, steps: Sequence[Step]) -> list[Any]:
        """What came back, one item a step; ``ended`` when the server hung up."""
        answers: list[Any] = []
        with self._socket:
            try:
                self._read(18)
                for step in steps:
                    if step[0] not in ("flags", "raw") and not self._is_greeted:
                        self._flags(3)
                    answers.append([])
                    answers[-1] = getattr(self, f"_{step[0]}")(*step[1:])
            except _Ended:
                answers[-1] = [*self._partial, "ended"]
            except TimeoutError:
                raise AssertionError(f"no answer to {steps[len(answers) - 1]}") from None
        return answers

    _partial: tuple[Any, ...] = ()

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            try:
                part = self._socket.recv(count - len(data))
            except ConnectionError:
                part = b""
            if not part:
                raise _Ended
            data += part
        return data

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except ConnectionError:
            raise _Ended from None

    # -- negotiation ------------------------------------------------------------------------------------------

    def _flags(self, flags: int) -> str:
        self._is_greeted = True
        self._no_zeroes = bool(flags & 2)
        self._send(struct.pack(">I", flags))
        return "sent"

    def _opt(self, number: int, payload: str = "") -> list[Any]:
        data = bytes.fromhex(payload)
        self._send(b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data)
        replies: list[Any] = []
        self._partial = ()
        while True:
            magic, option, kind, length = struct.unpack(">QIII", self._read(20))
            assert magic == 0x3E889045565A9
            assert option == number
            body = self._read(length)
            replies.append([kind & 0xFFFF if kind < 1 << 31 else -(kind & 0xFFFF), _shown(body)])
            self._partial = tuple(replies)
            if kind not in (SERVER, INFO, META):
                break
        if kind == ACK:
            self._is_structured |= number in (STRUCTURED, EXTENDED)
            self._is_extended |= number == EXTENDED
        self._partial = ()
        return replies

    def _name(self, name: str) -> list[Any]:
        data = name.encode()
        self._send(b"IHAVEOPT" + struct.pack(">II", 1, len(data)) + data)
        size, flags = struct.unpack(">QH", self._read(10))
        zeroes = b"" if self._no_zeroes else self._read(124)
        return [size, flags, len(zeroes), any(zeroes)]

    def _raw(self, data: str) -> list[Any]:
        if data:
            self._send(bytes.fromhex(data))
        self._socket.shutdown(socket.SHUT_WR)
        received = b""
        while True:
            try:
                part = self._socket.recv(1 << 16)
            except ConnectionError:
                part = b""
            if not part:
                return [_shown(received), "ended"]
            received += part

    # -- transmission -----------------------------------------------------------------------------------------

    def _req(self, kind: int, offset: int, length: int, flags: int = 0, payload: str = "") -> list[Any]:
        self._cookie += 1
        if self._is_extended:
            head = struct.pack(">IHHQQQ", 0x21E41C71, flags, kind, self._cookie, offset, length)
        else:
            head = struct.pack(">IHHQQI", 0x25609513, flags, kind, self._cookie, offset, length)
        self._send(head + bytes.fromhex(payload))
        self._partial = ()
        chunks: list[Any] = []
        while True:
            (magic,) = struct.unpack(">I", self._read(4))
            if magic == 0x67446698:
                error, cookie = struct.unpack(">IQ", self._read(12))
                data = self._read(length) if kind == 0 and not error else b""
                chunk, is_done = ["simple", error, _shown(data)], True
            elif magic == 0x668E33EF:
                bits, type_, cookie, size = struct.unpack(">HHQI", self._read(16))
                data = self._read(size)
                chunk, is_done = ["chunk", type_, _shown(data)], bool(bits & 1)
            else:
                assert magic == 0x6E8A278C, hex(magic)
                bits, type_, cookie, at, size = struct.unpack(">HHQQQ", self._read(28))
                data = self._read(size)
                chunk, is_done = ["extended", type_, at, _shown(data)], bool(bits & 1)
            assert cookie == self._cookie
            if chunk[1] == 2 and chunk[0] != "simple":
                chunk[1:] = 1, *chunk[2:-1], _shown(data[:8] + bytes(int.from_bytes(data[8:], "big")))
            chunks.append(chunk)
            self._partial = tuple(chunks)
            if is_done:
                self._partial = ()
                return chunks


def _shown(data: bytes) -> str:
    """Bytes in hexadecimal, long rows of one byte shortened, and text as text."""
    if len(data) > 3 and all(32 <= byte < 127 for byte in data):
        text = data.decode()
        return text if text != text[0] * len(text) else f"{text[0]!r} * {len(text)}"
    parts = []
    while data:
        rest = data.lstrip(data[:1])
        count = len(data) - len(rest)
        if count > 8:
            parts.append(f"[{data[:1].hex()} * {count}]")
        else:
            parts.append(data[:count].hex())
        data = rest
    return "".join(parts)
