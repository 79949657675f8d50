"""The FUSE codec: golden bytes, messages cut anywhere, with junk behind, and whatever a kernel might say."""

from __future__ import annotations

import struct

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsd.wire import fuse
from qsd.wire.fuse import Call, Header, InitFlag, Opcode


def message(opcode: int, body: bytes, unique: int = 7, extensions: int = 0) -> bytes:
    size = 40 + len(body)
    return struct.pack("=IIQQIIIHH", size, opcode, unique, 1, 11, 22, 33, extensions, 0) + body


def header(opcode: int) -> Header:
    return Header(opcode, 7, 1, 11, 22, 33)


def rw(size: int) -> bytes:
    return struct.pack("=QQIIQII", 9, 4096, size, 2, 5, 0o2, 0)


# Opcode: a body as <linux/fuse.h> lays it out, and what it says.
CALLS: dict[int, tuple[bytes, Call]] = {
    Opcode.GETATTR: (struct.pack("=IIQ", 0, 0, 0), Call(header(Opcode.GETATTR))),
    Opcode.STATFS: (b"", Call(header(Opcode.STATFS))),
    Opcode.RELEASE: (struct.pack("=QIIQ", 9, 0, 0, 0), Call(header(Opcode.RELEASE))),
    Opcode.FLUSH: (struct.pack("=QIIQ", 9, 0, 0, 0), Call(header(Opcode.FLUSH))),
    Opcode.DESTROY: (b"", Call(header(Opcode.DESTROY))),
    Opcode.INIT: (
        struct.pack("=IIIII44x", 7, 45, 131072, 0x73FFFFFB, 0x5FD),
        fuse.Init(header(Opcode.INIT), 7, 45, 131072, 0x5FD73FFFFFB),
    ),
    Opcode.SETATTR: (
        struct.pack("=IIQQQQQQIIIIIIII", 1 << 3, 0, 9, 8192, 5, 6, 7, 8, 1, 2, 3, 0o640, 0, 44, 55, 0),
        fuse.Setattr(header(Opcode.SETATTR), 1 << 3, 8192, 0o640, 44, 55),
    ),
    Opcode.OPEN: (struct.pack("=II", 0o102, 0), fuse.Open(header(Opcode.OPEN), 0o102)),
    Opcode.READ: (rw(512), fuse.Transfer(header(Opcode.READ), 4096, 512, 0o2)),
    Opcode.WRITE: (rw(5) + b"hello", fuse.Transfer(header(Opcode.WRITE), 4096, 5, 0o2)),
    Opcode.FSYNC: (struct.pack("=QII", 9, 1, 0), fuse.Fsync(header(Opcode.FSYNC), datasync=True)),
    Opcode.FALLOCATE: (
        struct.pack("=QQQII", 9, 512, 1024, 3, 0),
        fuse.Fallocate(header(Opcode.FALLOCATE), 512, 1024, 3),
    ),
    Opcode.LSEEK: (struct.pack("=QQII", 9, 8192, 4, 0), fuse.Lseek(header(Opcode.LSEEK), 8192, 4)),
    Opcode.COPY_FILE_RANGE: (
        struct.pack("=QQQQQQQ", 9, 100, 1, 10, 200, 300, 0),
        fuse.CopyFileRange(header(Opcode.COPY_FILE_RANGE), 100, 1, 200, 300, 0),
    ),
    Opcode.INTERRUPT: (struct.pack("=Q", 99), fuse.Interrupt(header(Opcode.INTERRUPT), 99)),
    Opcode.FORGET: (struct.pack("=Q", 3), fuse.Forget(header(Opcode.FORGET), ((1, 3),))),
    Opcode.BATCH_FORGET: (
        struct.pack("=IIQQQQ", 2, 0, 5, 6, 7, 8),
        fuse.Forget(header(Opcode.BATCH_FORGET), ((5, 6), (7, 8))),
    ),
}
# Bytes of a body without which the call says nothing; the rest may be missing or longer in another version.
NEEDED = {opcode: len(body) for opcode, (body, call) in CALLS.items() if type(call) is not Call} | {Opcode.INIT: 16}


def test_every_opcode_is_tried() -> None:
    assert set(CALLS) == set(Opcode)


@pytest.mark.parametrize("opcode", CALLS)
def test_calls_are_read(opcode: Opcode) -> None:
    body, call = CALLS[opcode]
    for kind in (bytes, bytearray, memoryview):
        assert fuse.decode(kind(message(opcode, body))) == call


@pytest.mark.parametrize("opcode", NEEDED)
def test_calls_cut_short_are_refused_with_their_number(opcode: Opcode) -> None:
    body, _ = CALLS[opcode]
    for length in range(NEEDED[opcode]):
        with pytest.raises(fuse.ProtocolError) as caught:
            fuse.decode(message(opcode, body[:length]))
        assert caught.value.unique in (7, 0)


@pytest.mark.parametrize("opcode", set(CALLS) - {Opcode.WRITE})
def test_what_a_later_version_appends_is_passed_over(opcode: Opcode) -> None:
    body, call = CALLS[opcode]
    assert fuse.decode(message(opcode, body + b"later")) == call
    assert fuse.decode(message(opcode, body + bytes(8), extensions=1)) == call


def test_a_write_must_carry_what_it_says() -> None:
    for data in (b"hell", b"hello!", b""):
        with pytest.raises(fuse.ProtocolError):
            fuse.decode(message(Opcode.WRITE, rw(5) + data))


def test_forgetting_more_than_there_is_room_for_is_refused() -> None:
    with pytest.raises(fuse.ProtocolError):
        fuse.decode(message(Opcode.BATCH_FORGET, struct.pack("=IIQQ", 0xFFFFFFFF, 0, 1, 1)))


def test_the_header_must_tell_the_length() -> None:
    whole = message(Opcode.GETATTR, bytes(16))
    for wrong in (whole[:-1], whole + b"x", whole[:39], b""):
        with pytest.raises(fuse.ProtocolError):
            fuse.decode(wrong)
    with pytest.raises(fuse.ProtocolError):
        fuse.decode(message(Opcode.GETATTR, bytes(16), extensions=3))


@given(st.integers(0, 2**32 - 1) | st.sampled_from(list(Opcode)), st.binary(max_size=200), st.integers(0, 40))
def test_any_message_is_read_or_refused(opcode: int, body: bytes, extensions: int) -> None:
    try:
        call = fuse.decode(message(opcode, body, extensions=extensions))
    except fuse.ProtocolError:
        return
    assert call.header == Header(opcode, 7, 1, 11, 22, 33)


@given(st.binary(max_size=120))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        fuse.decode(data)
    except fuse.ProtocolError:
        return
    assert len(data) >= 40


# -- negotiation ----------------------------------------------------------------------------------------------

WISHES = fuse.Wishes(
    int(
        InitFlag.ASYNC_DIO
        | InitFlag.BIG_WRITES
        | InitFlag.MAX_PAGES
        | InitFlag.INIT_EXT
        | InitFlag.DIRECT_IO_ALLOW_MMAP
    ),
    1 << 20,
    100,
    75,
)


def offer(minor: int, flags: int, major: int = 7) -> fuse.Init:
    return fuse.Init(header(Opcode.INIT), major, minor, 4096, flags)


def test_a_new_kernel_gets_all_that_is_wished_for() -> None:
    agreed = fuse.negotiate(offer(45, 0xFFFFFFFFFFFFFFFF), WISHES)
    assert agreed == fuse.Negotiated(45, WISHES.flags, 4096, 1 << 20, 100, 75)
    packed = fuse.init_reply(7, agreed)
    assert len(packed) == 16 + 64
    assert struct.unpack_from("=IiQ", packed) == (80, 0, 7)
    low = WISHES.flags & 0xFFFFFFFF
    assert struct.unpack_from("=IIIIHHIIHHI", packed, 16) == (7, 45, 4096, low, 100, 75, 1 << 20, 1, 256, 0, 1 << 4)


def test_a_newer_minor_version_is_answered_with_ours() -> None:
    agreed = fuse.negotiate(offer(99, 0xFFFFFFFF), WISHES)
    assert agreed is not None
    assert agreed.minor == fuse.KERNEL_MINOR


def test_without_extended_flags_the_high_ones_are_not_meant() -> None:
    agreed = fuse.negotiate(offer(38, 0xFFFFFFFFFFFFFFFF & ~InitFlag.INIT_EXT), WISHES)
    assert agreed is not None
    assert agreed.flags < 1 << 32


@pytest.mark.parametrize(
    ("flags", "limit"),
    [(InitFlag.BIG_WRITES | InitFlag.MAX_PAGES, 1 << 20), (InitFlag.BIG_WRITES, 128 << 10), (0, 4096)],
)
def test_transfers_are_as_large_as_the_kernel_can(flags: int, limit: int) -> None:
    agreed = fuse.negotiate(offer(31, int(flags)), WISHES)
    assert agreed is not None
    assert agreed.max_transfer == limit


@pytest.mark.parametrize("version", [(7, 22), (6, 99), (0, 0)])
def test_old_kernels_are_refused(version: tuple[int, int]) -> None:
    with pytest.raises(fuse.ProtocolError):
        fuse.negotiate(offer(version[1], 0, version[0]), WISHES)


def test_a_later_major_version_is_asked_to_come_down() -> None:
    assert fuse.negotiate(offer(0, 0, 8), WISHES) is None
    assert struct.unpack_from("=II", fuse.init_reply(7, None), 16)[0] == 7


@given(st.integers(0, 9), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_nothing_is_agreed_that_was_not_offered(major: int, minor: int, flags: int) -> None:
    try:
        agreed = fuse.negotiate(offer(minor, flags, major), WISHES)
    except fuse.ProtocolError:
        return
    if agreed is not None:
        assert agreed.flags & ~(flags & WISHES.flags) == 0
        assert len(fuse.init_reply(1, agreed)) == 80


# -- replies --------------------------------------------------------------------------------------------------


def test_replies() -> None:
    assert fuse.ok_reply(5) == struct.pack("=IiQ", 16, 0, 5)
    assert fuse.error_reply(5, 38) == struct.pack("=IiQ", 16, -38, 5)
    assert fuse.write_reply(5, 9) == struct.pack("=IiQII", 24, 0, 5, 9, 0)
    assert fuse.open_reply(5, 3) == struct.pack("=IiQQII", 32, 0, 5, 0, 3, 0)
    assert fuse.lseek_reply(5, 1 << 40) == struct.pack("=IiQQ", 24, 0, 5, 1 << 40)
    assert fuse.notify_inval_inode(offset=-1) == struct.pack("=IiQQqq", 40, 2, 0, 1, -1, 0)


def test_attributes() -> None:
    shown = fuse.Attributes(size=10, blocks=2, mode=0o100600, uid=1, gid=2, block_size=512, time=(3, 4))
    packed = fuse.attr_reply(5, shown, 1)
    assert len(packed) == 16 + 16 + 88
    assert struct.unpack_from("=QII", packed, 16) == (1, 0, 0)
    assert struct.unpack_from("=QQQQQQ", packed, 32) == (1, 10, 2, 3, 3, 3)
    assert struct.unpack_from("=IIIIIIIIII", packed, 80) == (4, 4, 4, 0o100600, 1, 1, 2, 0, 512, 0)
    assert fuse.attr_reply(5, attrs.evolve(shown, size=11), 1) != packed


def test_file_system() -> None:
    packed = fuse.statfs_reply(5, fuse.FileSystem(4096, 100, 60, 50))
    assert struct.unpack_from("=QQQQQIII", packed, 16) == (100, 60, 50, 1, 0, 4096, 255, 4096)
    assert len(packed) == 16 + 80
