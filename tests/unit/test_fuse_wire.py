"""The FUSE codec: golden bytes, bodies cut anywhere, whatever a kernel might say."""

from __future__ import annotations

import struct

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsd.wire import fuse
from qsd.wire.fuse import Opcode


def request(opcode: int, body: bytes, unique: int = 7) -> bytes:
    return struct.pack("=IIQQIIIHH", 40 + len(body), opcode, unique, 1, 0, 0, 99, 0, 0) + body


BODIES = {
    Opcode.INIT: struct.pack("=IIII", 7, 45, 131072, 0xFFFFFFFF) + bytes(48),
    Opcode.SETATTR: struct.pack(
        "=IIQQQQQQIIIIIIII", fuse.SET_SIZE, 0, 0, 4096, *(0,) * 4, *(0,) * 3, 0o600, 0, 5, 6, 0
    ),
    Opcode.FALLOCATE: struct.pack("=QQQII", 0, 512, 1024, 3, 0),
    Opcode.LSEEK: struct.pack("=QQII", 0, 8192, 4, 0),
}
VALUES = {
    Opcode.INIT: fuse.Init(7, 45, 131072, 0xFFFFFFFF),
    Opcode.SETATTR: fuse.SetAttr(valid=fuse.SET_SIZE, size=4096, mode=0o600, uid=5, gid=6),
    Opcode.FALLOCATE: fuse.Fallocate(512, 1024, 3),
    Opcode.LSEEK: fuse.Lseek(8192, 4),
}


def parse(message: bytes) -> fuse.Body:
    return fuse.parse_body(fuse.parse_header(message), message)


@pytest.mark.parametrize("opcode", BODIES)
def test_bodies_are_read(opcode: Opcode) -> None:
    message = request(opcode, BODIES[opcode])
    assert fuse.parse_header(message)[:3] == (len(message), opcode, 7)
    assert parse(message) == VALUES[opcode]
    assert parse(request(opcode, BODIES[opcode] + b"junk")) == VALUES[opcode]


@pytest.mark.parametrize("opcode", BODIES)
def test_bodies_that_are_too_short_are_refused(opcode: Opcode) -> None:
    needed = 16 if opcode is Opcode.INIT else len(BODIES[opcode])
    for length in range(needed):
        with pytest.raises(fuse.ProtocolError):
            parse(request(opcode, BODIES[opcode][:length]))


def test_header_must_tell_the_length() -> None:
    message = request(Opcode.GETATTR, bytes(16))
    for wrong in (message[:-1], message + b"x", message[:39], b""):
        with pytest.raises(fuse.ProtocolError):
            fuse.parse_header(wrong)


@given(st.integers(0, 2**32 - 1), st.binary(max_size=200))
def test_any_message_is_read_or_refused(opcode: int, body: bytes) -> None:
    try:
        assert parse(request(opcode, body)) is not None
    except fuse.ProtocolError:
        assert opcode in BODIES


@given(st.binary(max_size=100))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        fuse.parse_header(data)
    except fuse.ProtocolError:
        return
    assert len(data) >= 40


def test_negotiation_takes_what_both_know() -> None:
    offer = fuse.Init(7, 45, 1 << 30, fuse.ASYNC_READ | fuse.MAX_PAGES | 1 << 16 | 1 << 31)
    major, minor, readahead, flags, _background, _congestion, max_write, _gran, pages = struct.unpack_from(
        "=IIIIHHIIH", fuse.negotiate(offer)
    )
    assert len(fuse.negotiate(offer)) == 64
    assert (major, minor, readahead, max_write, pages) == (7, 38, 1 << 20, 1 << 20, 256)
    assert flags == fuse.ASYNC_READ | fuse.MAX_PAGES


@pytest.mark.parametrize("version", [(6, 99), (7, 23), (0, 0)])
def test_old_kernels_are_refused(version: tuple[int, int]) -> None:
    with pytest.raises(fuse.ProtocolError):
        fuse.negotiate(fuse.Init(*version, 0, 0))


def test_later_kernels_are_told_our_version() -> None:
    assert struct.unpack_from("=II", fuse.negotiate(fuse.Init(8, 0, 0, 0))) == (7, 38)


def test_answers() -> None:
    assert fuse.answer(5, b"abcd") == struct.pack("=IiQ", 20, 0, 5) + b"abcd"
    assert fuse.refuse(5, 38) == struct.pack("=IiQ", 16, -38, 5)
    assert fuse.pack_written(9) == struct.pack("=II", 9, 0)
    assert fuse.forget_attributes() == struct.pack("=IiQQqq", 40, 2, 0, 1, -1, 0)


def test_attributes() -> None:
    shown = fuse.Attributes(size=10, allocated=513, mode=0o100600, uid=1, gid=2, block_size=512, time=3_000_000_004)
    packed = fuse.pack_attributes(shown, 1)
    assert len(packed) == 16 + 88
    assert struct.unpack_from("=QII", packed) == (1, 0, 0)
    assert struct.unpack_from("=QQQQQQ", packed, 16) == (1, 10, 2, 3, 3, 3)
    assert struct.unpack_from("=IIIIIIIIII", packed, 64) == (4, 4, 4, 0o100600, 1, 1, 2, 0, 512, 0)
    assert fuse.pack_attributes(attrs.evolve(shown, size=11), 1) != packed


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))
def test_free_space_is_what_is_not_allocated(size: int, allocated: int) -> None:
    blocks, free, available = struct.unpack_from("=QQQ", fuse.pack_statfs(size, allocated))
    assert free == available <= blocks
    assert blocks * 4096 >= size
