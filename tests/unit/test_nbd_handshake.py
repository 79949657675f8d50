"""The NBD handshake as bytes: each option, lies about lengths, and any split of what arrives."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsd.wire.nbd import constants as c
from qsd.wire.nbd.handshake import MAX_BUFFERED, MAX_OUTPUT, ExportInfo, ServerHandshake

DISK = ExportInfo("disk", 1 << 20, description="a disk", read_only=False)
GREETING = b"NBDMAGICIHAVEOPT\x00\x03"
CLIENT_FLAGS = struct.pack(">I", 3)


class Directory:
    """One export, or none."""

    def __init__(self, *exports: ExportInfo) -> None:
        self._exports = exports

    def lookup(self, name: str) -> ExportInfo | None:
        return next((export for export in self._exports if export.name == name), None)

    def list(self) -> tuple[ExportInfo, ...]:
        return self._exports


def option(number: int, payload: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(payload)) + payload


def name(text: str) -> bytes:
    return struct.pack(">I", len(text)) + text.encode()


def replies(data: bytes) -> list[tuple[int, int, bytes]]:
    found = []
    while data:
        magic, opt, kind, length = struct.unpack_from(">QIII", data)
        assert magic == c.REPLY_MAGIC
        found.append((opt, kind, data[20 : 20 + length]))
        data = data[20 + length :]
    return found


def talk(sent: bytes, *, step: int | None = None) -> tuple[ServerHandshake, bytes]:
    handshake = ServerHandshake(Directory(DISK))
    assert handshake.take_output() == GREETING
    data = CLIENT_FLAGS + sent
    for start in range(0, len(data), step or len(data)):
        handshake.receive(data[start : start + (step or len(data))])
    return handshake, handshake.take_output()


GO = option(c.OPT_GO, name("disk") + struct.pack(">HH", 1, c.INFO_BLOCK_SIZE))
CONVERSATION = (
    option(c.OPT_LIST)
    + option(c.OPT_STRUCTURED_REPLY)
    + option(c.OPT_SET_META_CONTEXT, name("disk") + struct.pack(">I", 1) + name("base:allocation"))
    + GO
)


@pytest.mark.parametrize("step", [None, 1, 3, 17])
def test_conversation_in_any_pieces(step: int | None) -> None:
    handshake, output = talk(CONVERSATION, step=step)
    answers = replies(output)
    assert [(opt, kind) for opt, kind, _ in answers] == [
        (c.OPT_LIST, c.REP_SERVER),
        (c.OPT_LIST, c.REP_ACK),
        (c.OPT_STRUCTURED_REPLY, c.REP_ACK),
        (c.OPT_SET_META_CONTEXT, c.REP_META_CONTEXT),
        (c.OPT_SET_META_CONTEXT, c.REP_ACK),
        (c.OPT_GO, c.REP_INFO),
        (c.OPT_GO, c.REP_INFO),
        (c.OPT_GO, c.REP_INFO),
        (c.OPT_GO, c.REP_ACK),
    ]
    assert answers[0][2] == name("disk") + b"a disk"
    assert answers[5][2] == struct.pack(">H", c.INFO_DESCRIPTION) + b"a disk"
    assert answers[6][2] == struct.pack(">HIII", c.INFO_BLOCK_SIZE, 1, 4096, 32 << 20)
    assert answers[7][2] == struct.pack(">HQH", c.INFO_EXPORT, 1 << 20, 0xDED)
    assert handshake.result is not None
    assert handshake.result.contexts == ((0, "base:allocation"),)


def test_bytes_behind_go_are_handed_on() -> None:
    handshake, _ = talk(GO + b"request bytes")
    assert handshake.result is not None
    assert handshake.result.leftover == b"request bytes"


def test_export_name_answers_size_and_flags_only() -> None:
    handshake, output = talk(option(c.OPT_EXPORT_NAME, b"disk"))
    assert output == struct.pack(">QH", 1 << 20, 0xD6D)
    assert handshake.result is not None


def test_extended_headers_change_the_flags_once_a_context_is_chosen() -> None:
    handshake, output = talk(
        option(c.OPT_EXTENDED_HEADERS)
        + option(c.OPT_SET_META_CONTEXT, name("disk") + struct.pack(">I", 1) + name("base:allocation"))
        + option(c.OPT_GO, name("disk") + b"\0\0")
    )
    export = next(data for _, kind, data in replies(output) if kind == c.REP_INFO and data[:2] == b"\0\0")
    assert export == struct.pack(">HQH", c.INFO_EXPORT, 1 << 20, 0x1DED)
    assert handshake.result is not None
    assert handshake.result.extended


REFUSED = [
    (option(99), c.REP_ERR_UNSUP, b"Unsupported option 99 (<unknown>)"),
    (option(c.OPT_STARTTLS), c.REP_ERR_POLICY, b"TLS not configured"),
    (option(c.OPT_LIST, b"x"), c.REP_ERR_INVALID, b"option 'list' has unexpected length"),
    (option(c.OPT_GO, name("nope") + b"\0\0"), c.REP_ERR_UNKNOWN, b"export 'nope' not present"),
    (option(c.OPT_GO, b"\0\0"), c.REP_ERR_INVALID, b"Inconsistent lengths in option go"),
    (option(c.OPT_GO, struct.pack(">I", 5000) + b"x" * 5002), c.REP_ERR_INVALID, b"Invalid name length: 5000"),
    (
        option(c.OPT_STRUCTURED_REPLY) * 2,
        c.REP_ERR_INVALID,
        b"structured reply already negotiated",
    ),
]


@pytest.mark.parametrize(("sent", "kind", "text"), REFUSED)
def test_option_refused(sent: bytes, kind: int, text: bytes) -> None:
    handshake, output = talk(sent)
    assert replies(output)[-1][1:] == (kind, text)
    # The negotiation goes on.
    handshake.receive(GO)
    assert handshake.result is not None


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (option(c.OPT_EXPORT_NAME, b"nope"), "export not found"),
        (b"GARBAGE!" + bytes(8), "Bad magic received"),
        (b"IHAVEOPT" + struct.pack(">II", c.OPT_LIST, 0xFFFFFFFF), "len (4294967295) is larger than max len"),
    ],
)
def test_negotiation_fails(sent: bytes, why: str) -> None:
    handshake, _ = talk(sent)
    assert handshake.failure is not None
    assert handshake.failure.startswith(why)


def test_unknown_client_flags_end_it() -> None:
    handshake = ServerHandshake(Directory(DISK))
    handshake.receive(struct.pack(">I", 7))
    assert handshake.failure == "Unknown client flags 0x7 received"


def test_answers_do_not_pile_up() -> None:
    """A thousand short options ask for a thousand long lists at once."""
    handshake = ServerHandshake(
        Directory(*(ExportInfo(str(i) * 1000, 1, description="d" * 4096) for i in range(9)))
    )
    handshake.receive(CLIENT_FLAGS + option(c.OPT_LIST) * 1000)
    total = most = 0
    while True:
        output = handshake.take_output()
        total += output.count(struct.pack(">QII", c.REPLY_MAGIC, c.OPT_LIST, c.REP_ACK))
        most = max(most, len(output))
        if not handshake.has_more:
            break
        handshake.receive(b"")
    assert total == 1000
    assert most < MAX_OUTPUT + 9 * 6000


def test_long_payload_is_skipped_not_kept() -> None:
    handshake, _ = talk(b"IHAVEOPT" + struct.pack(">II", 99, 20 << 20))
    for _ in range(20):
        handshake.receive(bytes(1 << 20))
        assert len(handshake._input) <= MAX_BUFFERED
    handshake.receive(GO)
    assert handshake.result is not None


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 14), st.binary(max_size=80)), max_size=12), st.integers(1, 40))
def test_any_options_are_survived(options: list[tuple[int, bytes]], step: int) -> None:
    sent = b"".join(option(number, payload) for number, payload in options)
    handshake, output = talk(sent, step=step)
    assert len(handshake._input) <= MAX_BUFFERED
    assert len(output) < 4096 * (len(options) + 2)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_survived(data: bytes) -> None:
    handshake = ServerHandshake(Directory(DISK))
    handshake.receive(data)
    assert len(handshake._input) <= MAX_BUFFERED


@pytest.mark.parametrize(
    ("data", "while_sending", "told"),
    [
        (b"", False, None),
        (CLIENT_FLAGS[:2], False, None),
        (CLIENT_FLAGS, False, "Failed to read opts magic: why"),
        (CLIENT_FLAGS + b"IHAVE", False, "Failed to read opts magic: why"),
        (CLIENT_FLAGS + option(c.OPT_GO, b"x" * 9)[:-1], False, "Failed to read: why"),
        (CLIENT_FLAGS + option(c.OPT_GO, b"x" * (1 << 16))[:100], False, "Failed to read: why"),
        (CLIENT_FLAGS + option(c.OPT_LIST), True, "Unable to write to socket: why"),
        (CLIENT_FLAGS + option(c.OPT_LIST) + option(c.OPT_ABORT), True, None),
    ],
)
def test_a_client_that_goes_away(data: bytes, while_sending: bool, told: str | None) -> None:
    handshake = ServerHandshake(Directory(DISK))
    handshake.take_output()
    handshake.receive(data)
    assert handshake.complaint_of_loss("why", while_sending=while_sending) == told
