"""Modified UTF-8: what the reference gives for these bytes, and what comes back unchanged."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsd.wire.modified_utf8 import NUL, decode, decode_leniently, encode

# What ringbuf-read of the reference (11.1) gives for these bytes.
RECORDED = [
    ("f88080808041", "\ufffdA"),
    ("fc808080808041", "\ufffdA"),
    ("fe41", "\ufffdA"),
    ("ff41", "\ufffdA"),
    ("f490808041", "\ufffdA"),
    ("c041", "\ufffdA"),
    ("c18041", "\ufffdA"),
    ("c08041", f"{NUL}A"),
    ("c080c080", NUL + NUL),
    ("e09f8041", "\ufffdA"),
    ("eda08041", "\ufffdA"),
    ("eda0bdedb88041", "\ufffd\ufffdA"),
    ("bfbf41", "\ufffd\ufffdA"),
    ("80", "\ufffd"),
    ("f09f98", "\ufffd"),
    ("f09f9841", "\ufffdA"),
    ("f09f9880", "\U0001f600"),
    ("e28241", "\ufffdA"),
    ("f0808041", "\ufffdA"),
    ("efbfbe41", "\ufffdA"),
    ("efb79041", "\ufffdA"),
    ("f09fbfbe41", "\ufffdA"),
    ("c3a9", "é"),
    ("f8888080", "\ufffd"),
]


@pytest.mark.parametrize(("data", "text"), RECORDED)
def test_lenient_text_is_the_reference_s(data: str, text: str) -> None:
    assert decode_leniently(bytes.fromhex(data)) == text


@given(st.binary(max_size=64))
def test_lenient_decoding_never_raises_and_agrees_with_the_strict_one(data: bytes) -> None:
    text = decode_leniently(data)
    try:
        strict = decode(data)
    except ValueError:
        assert "\ufffd" in text
    else:
        assert text == strict


@given(st.text(st.characters(exclude_categories=["Cs", "Cn"])).map(lambda text: text.replace("\0", NUL)))
def test_texts_come_back(text: str) -> None:
    data = encode(text)
    assert b"\0" not in data
    assert decode(data) == decode_leniently(data) == text
