"""LUKS1 headers: the codec, and what hostile ones are told, in the reference's words and order."""

from __future__ import annotations

import contextlib
import itertools
import struct
from collections.abc import Callable

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsd.drivers.luks.algorithms import BY_NAME, CipherSpec, parse_cipher
from qsd.drivers.luks.header import LENGTH, SLOTS, Header, KeySlot, new_slots, parse_header, serialise_header
from qsd.errors import QmpError


def header(key_bytes: int = 64, mode: str = "xts-plain64") -> Header:
    """As qemu-img lays it out for aes-256-xts."""
    slots = new_slots(key_bytes)
    return Header(
        cipher_name="aes",
        cipher_mode=mode,
        hash_name="sha256",
        payload_offset=4040 * 512,
        key_bytes=key_bytes,
        digest=bytes(range(20)),
        digest_salt=bytes(range(32)),
        digest_iterations=1234,
        uuid=b"c72b007d-ceb3-4cad-94fb-4156d8c3ec77",
        slots=(attrs.evolve(slots[0], is_active=True, iterations=5678, salt=b"s" * 32), *slots[1:]),
    )


BASE = serialise_header(header())


def put(offset: int, data: bytes) -> Callable[[bytearray], None]:
    def edit(raw: bytearray) -> None:
        raw[offset : offset + len(data)] = data

    return edit


def number(offset: int, value: int) -> Callable[[bytearray], None]:
    return put(offset, struct.pack(">I", value))


def name(offset: int, text: bytes) -> Callable[[bytearray], None]:
    return put(offset, text.ljust(32, b"\0"))


def cipher(text: bytes) -> Callable[[bytearray], None]:
    return name(8, text)


def mode(text: bytes) -> Callable[[bytearray], None]:
    return name(40, text)


def slot(index: int, member: str, value: int) -> Callable[[bytearray], None]:
    places = {"state": 0, "iterations": 4, "offset": 40, "stripes": 44}
    return number(208 + 48 * index + places[member], value)


def refusal(*edits: Callable[[bytearray], None], is_detached: bool = False) -> str | None:
    raw = bytearray(BASE)
    for edit in edits:
        edit(raw)
    try:
        parse_cipher(parse_header(bytes(raw), is_detached=is_detached))
    except QmpError as error:
        return error.desc
    return None


def test_header_is_the_specification() -> None:
    assert len(BASE) == LENGTH
    assert BASE[:8] == b"LUKS\xba\xbe\0\1"
    assert BASE[8:40] == b"aes".ljust(32, b"\0")
    assert BASE[40:72] == b"xts-plain64".ljust(32, b"\0")
    assert BASE[72:104] == b"sha256".ljust(32, b"\0")
    assert struct.unpack(">II", BASE[104:112]) == (4040, 64)
    assert BASE[112:132] == bytes(range(20))
    assert BASE[132:164] == bytes(range(32))
    assert struct.unpack(">I", BASE[164:168]) == (1234,)
    assert BASE[168:208] == b"c72b007d-ceb3-4cad-94fb-4156d8c3ec77".ljust(40, b"\0")
    assert struct.unpack(">II32sII", BASE[208:256]) == (0x00AC71F3, 5678, b"s" * 32, 8, 4000)
    assert struct.unpack(">II32sII", BASE[256:304]) == (0x0000DEAD, 0, bytes(32), 512, 4000)
    assert [slot.offset // 512 for slot in header().slots] == [8 + 504 * index for index in range(SLOTS)]


@pytest.mark.parametrize(("key_bytes", "payload"), [(16, 1032), (24, 1544), (32, 2056), (48, 3016), (64, 4040)])
def test_layout_is_the_references(key_bytes: int, payload: int) -> None:
    made = attrs.evolve(header(key_bytes), payload_offset=0)
    assert made.area_bytes == payload * 512
    assert parse_header(serialise_header(attrs.evolve(made, payload_offset=payload * 512)))


def test_parsing_undoes_serialising() -> None:
    assert parse_header(BASE) == header()
    changed = header().with_slot(3, KeySlot(header().slots[3].offset, True, 7, b"x" * 32))
    assert parse_header(serialise_header(changed)) == changed
    assert changed.active_slots == (0, 3)


def test_what_follows_the_header_is_not_looked_at() -> None:
    assert parse_header(BASE + b"junk") == header()


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (put(0, b"X"), "Volume is not in LUKS format"),
        (put(0, bytes(592)), "Volume is not in LUKS format"),
        (put(6, b"\0\2"), "LUKS version 2 is not supported"),
        (put(6, b"\0\0"), "LUKS version 0 is not supported"),
        (put(8, b"a" * 32), "LUKS header cipher name is not NUL terminated"),
        (put(40, b"a" * 32), "LUKS header cipher mode is not NUL terminated"),
        (put(72, b"a" * 32), "LUKS header hash spec is not NUL terminated"),
        (cipher(b""), "Algorithm '' with key size 32 bytes not supported"),
        (cipher(b"\xff\xfe"), "Algorithm '��' with key size 32 bytes not supported"),
        (cipher(b"des3_ede"), "Algorithm 'des3_ede' with key size 32 bytes not supported"),
        (cipher(b"serpent"), "Algorithm 'serpent-256' not supported"),
        (cipher(b"twofish"), "Algorithm 'twofish-256' not supported"),
        (mode(b""), "Unexpected cipher mode string format ''"),
        (mode(b"xts"), "Unexpected cipher mode string format 'xts'"),
        (mode(b"xts-"), "IV generator '' not supported"),
        (mode(b"-plain64"), "Cipher mode '' not supported"),
        (mode(b"xts-plain"), None),
        (mode(b"xts-plain64:sha256"), None),
        (mode(b"xts-foo"), "IV generator 'foo' not supported"),
        (mode(b"foo-bar:baz"), "Hash algorithm 'baz' not supported"),
        (mode(b"xts-essiv"), "Missing IV generator hash specification"),
        (mode(b"xts-essiv:"), "Hash algorithm '' not supported"),
        (mode(b"xts-essiv:sha256:x"), "Hash algorithm 'sha256:x' not supported"),
        (mode(b"xts-essiv:sha1"), "No AES cipher with key size 20 available"),
        (mode(b"ecb-plain64"), "Algorithm 'aes' with key size 64 bytes not supported"),
        (name(72, b"foo"), "Hash algorithm 'foo' not supported"),
        (number(104, 0), "LUKS payload is overlapping with the header"),
        (number(104, 7), "LUKS payload is overlapping with the header"),
        (number(104, 8), "Keyslot 0 is overlapping with the encrypted payload"),
        (number(104, 4039), "Keyslot 7 is overlapping with the encrypted payload"),
        (number(104, 0xFFFFFFFF), None),
        (number(108, 0), "Algorithm 'aes' with key size 0 bytes not supported"),
        (number(108, 48), None),
        (number(108, 63), "Algorithm 'aes' with key size 31 bytes not supported"),
        (number(108, 33), "XTS cipher key length should be a multiple of 2"),
        (number(108, 65), "Keyslots 0 and 1 are overlapping in the header"),
        (number(108, 0xFFFFFFFF), "Keyslot 0 is overlapping with the encrypted payload"),
        (number(164, 0), "LUKS key iteration count is zero"),
        (slot(0, "state", 0), "Keyslot 0 state (active/disable) is corrupted"),
        (slot(7, "state", 0xFFFFFFFF), "Keyslot 7 state (active/disable) is corrupted"),
        (slot(0, "iterations", 0), "Keyslot 0 iteration count is zero"),
        (slot(1, "iterations", 5), None),
        (slot(0, "offset", 0), "Keyslot 0 is overlapping with the LUKS header"),
        (slot(0, "offset", 7), "Keyslot 0 is overlapping with the LUKS header"),
        (slot(0, "offset", 9), "Keyslots 0 and 1 are overlapping in the header"),
        (slot(1, "offset", 1000), "Keyslots 1 and 2 are overlapping in the header"),
        (slot(1, "offset", 0xFFFFFFFF), "Keyslot 1 is overlapping with the encrypted payload"),
        (slot(0, "stripes", 3999), "Keyslot 0 is corrupted (stripes 3999 != 4000)"),
        (slot(5, "stripes", 0xFFFFFFFF), "Keyslot 5 is corrupted (stripes -1 != 4000)"),
        (put(168, b"a" * 40), None),
    ],
)
def test_hostile_field_gets_the_references_words(edit: Callable[[bytearray], None], text: str | None) -> None:
    assert refusal(edit) == text


def test_detached_header_needs_no_payload() -> None:
    assert refusal(number(104, 0), is_detached=True) is None
    # In the other file the data may begin anywhere (cryptsetup's --align-payload).
    assert refusal(number(104, 7), is_detached=True) is None
    assert refusal(number(104, 64), is_detached=True) is None


# In the order in which the reference finds them.
FAULTS = [
    (put(0, b"X"), "Volume is not in LUKS format"),
    (put(6, b"\0\2"), "LUKS version 2 is not supported"),
    (put(72, b"a" * 32), "LUKS header hash spec is not NUL terminated"),
    (number(104, 0), "LUKS payload is overlapping with the header"),
    (number(164, 0), "LUKS key iteration count is zero"),
    (slot(0, "stripes", 5), "Keyslot 0 is corrupted (stripes 5 != 4000)"),
    (slot(0, "state", 1), "Keyslot 0 state (active/disable) is corrupted"),
    (slot(0, "offset", 1), "Keyslot 0 is overlapping with the LUKS header"),
    (slot(1, "offset", 9), "Keyslots 0 and 1 are overlapping in the header"),
    (slot(7, "stripes", 5), "Keyslot 7 is corrupted (stripes 5 != 4000)"),
    (mode(b"foo-bar:baz"), "Hash algorithm 'baz' not supported"),
    (cipher(b"foo"), "Algorithm 'foo' with key size 32 bytes not supported"),
    (name(72, b"foo"), "Hash algorithm 'foo' not supported"),
]


@pytest.mark.parametrize("first", range(len(FAULTS)))
def test_first_of_several_faults_is_reported(first: int) -> None:
    for later in range(first + 1, len(FAULTS)):
        if FAULTS[later][1].endswith("'foo' not supported") and "not NUL terminated" in FAULTS[first][1]:
            continue  # the same bytes
        assert refusal(FAULTS[later][0], FAULTS[first][0]) == FAULTS[first][1]


@settings(deadline=None)
@given(data=st.binary(min_size=LENGTH, max_size=LENGTH))
def test_any_bytes_are_a_header_or_refused(data: bytes) -> None:
    for raw in (data, b"LUKS\xba\xbe\0\1" + data[8:]):
        with contextlib.suppress(QmpError):
            parse_cipher(parse_header(raw))


# Where the header has numbers.
NUMBERS = [104, 108, 164, *(208 + 48 * index + place for index in (0, 3) for place in (0, 4, 40, 44))]


@settings(deadline=None)
@given(
    edits=st.lists(
        st.tuples(
            st.sampled_from(NUMBERS),
            st.one_of(st.integers(0, 0xFFFFFFFF), st.sampled_from([0, 8, 512, 0xDEAD, 0xAC71F3, 4000, 1 << 31])),
        ),
        max_size=4,
    )
)
def test_what_is_accepted_fits_together(edits: list[tuple[int, int]]) -> None:
    raw = bytearray(BASE)
    for place, value in edits:
        number(place, value)(raw)
    try:
        found = parse_header(bytes(raw))
        parse_cipher(found)
    except QmpError:
        return
    assert found.key_bytes in (32, 48, 64)
    assert found.material_bytes <= 500 * 512
    ends = sorted((slot.offset, slot.offset + found.material_bytes) for slot in found.slots)
    assert ends[0][0] >= 4096
    assert ends[-1][1] <= found.payload_offset
    assert all(end <= start for (_low, end), (start, _high) in itertools.pairwise(ends))


def test_names_of_what_is_made_are_read_back() -> None:
    for algorithm in ("aes-128", "aes-192", "aes-256", "cast5-128", "sm4"):
        for how in ("cbc", "xts", "ecb", "ctr"):
            if how == "xts" and algorithm == "cast5-128":
                continue
            spec = CipherSpec(BY_NAME[algorithm], how, "plain64")
            made = attrs.evolve(
                header(spec.key_bytes, spec.mode_text),
                cipher_name=spec.algorithm.family,
                slots=new_slots(spec.key_bytes),
            )
            assert parse_cipher(parse_header(serialise_header(made))) == spec
