"""WebSocket, the server's side: the example of the RFC, every piece size, and what hostile clients send."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websocket_client import UPGRADE, frame

from qsd.wire.websocket import MAX_REQUEST, Decoder, Refused, Upgrade, binary_header

# RFC 6455, 1.3
ACCEPT = b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"


# -- the upgrade ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_upgrade_in_pieces_of_any_size(size: int) -> None:
    upgrade = Upgrade()
    data = UPGRADE + b"behind"
    got = None
    for at in range(0, len(data), size):
        got = upgrade.receive(data[at : at + size])
        if got is not None:
            break
    assert got is not None
    response, rest = got
    assert response.startswith(b"HTTP/1.1 101 ")
    assert ACCEPT in response
    assert response.endswith(b"\r\n\r\n")
    assert b"Protocol" not in response.replace(b"Switching Protocols", b"")
    assert b"behind".startswith(rest)


def test_subprotocol_is_named_when_the_client_offers_it() -> None:
    offer = b"\r\nSec-WebSocket-Protocol: chat, binary\r\n\r\n"
    got = Upgrade().receive(UPGRADE.replace(b"\r\n\r\n", offer))
    assert got is not None
    assert b"\r\nSec-WebSocket-Protocol: binary\r\n" in got[0]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"GET", b"POST"),
        (b"GET / ", b"GET  / "),
        (b"HTTP/1.1", b"HTTP/1.0"),
        (b"Host: x\r\n", b""),
        (b"websocket", b"h2c"),
        (b"keep-alive, Upgrade", b"close"),
        (b"Version: 13", b"Version: 8"),
        (b"Sec-WebSocket-Version: 13\r\n", b""),
        (b"dGhlIHNhbXBsZSBub25jZQ==", b"dGhl"),
        (b"dGhlIHNhbXBsZSBub25jZQ==", b"*" * 24),
        (b"Host: x", b"no colon"),
        (b"Host: x", b": x"),
        (b"Host: x", b"Ho st: x"),
    ],
)
def test_request_that_is_none_is_refused(old: bytes, new: bytes) -> None:
    with pytest.raises(Refused) as caught:
        Upgrade().receive(UPGRADE.replace(old, new, 1))
    assert caught.value.response.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert caught.value.response.endswith(b"\r\n\r\n")


def test_request_without_end_is_refused_at_the_limit() -> None:
    upgrade = Upgrade()
    for _ in range(MAX_REQUEST // 64 - 1):
        assert upgrade.receive(b"x" * 64) is None
    with pytest.raises(Refused, match="Too Large"):
        upgrade.receive(b"x" * 64)
    with pytest.raises(Refused, match="Too Large"):
        Upgrade().receive(UPGRADE[:-2] + b"X: " + b"x" * MAX_REQUEST + b"\r\n\r\n")


@given(st.binary(max_size=300))
def test_any_request_is_answered_refused_or_waited_for(data: bytes) -> None:
    try:
        got = Upgrade().receive(data + b"\r\n\r\n")
    except Refused:
        return
    assert got is not None


# -- frames -----------------------------------------------------------------------------------------------------


def fed(data: bytes, size: int) -> tuple[bytes, Decoder]:
    decoder = Decoder()
    pieces = [decoder.feed(data[at : at + size]) for at in range(0, len(data), size)]
    return b"".join(pieces), decoder


@given(
    st.lists(st.tuples(st.binary(max_size=300), st.binary(min_size=4, max_size=4), st.booleans())),
    st.integers(1, 100),
)
def test_payload_comes_out_however_it_is_framed_and_split(
    parts: list[tuple[bytes, bytes, bool]], size: int
) -> None:
    data = b""
    inside = False
    for payload, mask, final in parts:
        data += frame(0 if inside else 2, payload, final=final, mask=mask) + frame(10, b"pong")
        inside = not final
    plain, decoder = fed(data, size)
    assert plain == b"".join(payload for payload, _, _ in parts)
    assert not decoder.replies
    assert not decoder.is_over


@pytest.mark.parametrize("length", [0, 125, 126, 65535, 65536])
def test_every_form_of_length(length: int) -> None:
    assert fed(frame(2, b"x" * length), 9999)[0] == b"x" * length
    # Ours carries no mask; apart from that it is the same frame.
    assert frame(2, b"x" * length, mask=None) == binary_header(length) + b"x" * length


@pytest.mark.parametrize("size", [1, 3, 100])
def test_ping_is_answered_and_the_last_one_counts(size: int) -> None:
    _, decoder = fed(frame(9, b"one") + frame(9, b"two"), size)
    assert bytes(decoder.replies) == b"\x8a\x03two"


def test_close_is_answered_and_ends_it() -> None:
    plain, decoder = fed(frame(2, b"a") + frame(8, b"\x03\xe8bye") + frame(2, b"lost"), 5)
    assert plain == b"a"
    assert decoder.is_over
    assert bytes(decoder.replies) == b"\x88\x16\x03\xe8peer requested close"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(2, b"x", mask=None), 1002),
        (frame(9, b"", mask=None), 1002),
        (frame(1, b"text"), 1003),
        (frame(3, b"x"), 1003),
        (frame(11, b"x"), 1003),
        (b"\xc2" + frame(2, b"x")[1:], 1002),
        (frame(9, b"x" * 126), 1002),
        (frame(8, b"x", final=False), 1002),
        (frame(0, b"x"), 1002),
        (frame(2, b"x", final=False) + frame(2, b"y"), 1002),
        (b"\x82\xff" + b"\xff" * 8 + b"mask", 1002),
    ],
)
def test_broken_rule_closes_the_connection(data: bytes, code: int) -> None:
    for size in (1, 1000):
        _, decoder = fed(data + frame(2, b"more"), size)
        assert decoder.is_over
        assert bytes(decoder.replies[2:4]) == code.to_bytes(2, "big")


def test_giant_frame_costs_nothing_but_what_has_come() -> None:
    plain, decoder = fed(b"\x82\xff\x7f" + b"\xff" * 7 + b"\0\0\0\0" + b"hello", 4)
    assert plain == b"hello"
    assert not decoder.is_over


@given(st.binary(max_size=200), st.integers(1, 50))
def test_any_bytes_do_no_harm_and_pieces_do_not_matter(data: bytes, size: int) -> None:
    one, all_at_once = fed(data, size), fed(data, 1000)
    assert one[0] == all_at_once[0]
    assert one[1].is_over == all_at_once[1].is_over
    assert one[1].replies == all_at_once[1].replies
    assert len(one[1].replies) <= 400
