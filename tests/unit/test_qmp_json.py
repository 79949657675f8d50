"""QMP's JSON: what the reference answers to good, bad and hostile bytes, in whatever pieces they arrive."""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qsd.errors import QmpError
from qsd.qapi.rows import Rows
from qsd.wire import qmp_json_lexer
from qsd.wire.modified_utf8 import NUL
from qsd.wire.qmp_json import MAX_DEPTH, MAX_TOKENS, JsonError, Parser, dumps, parse_one, pieces

_REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "qmp_json_reference.json").read_text())["rows"]


def _feed(data: bytes, size: int) -> list[Any]:
    parser = Parser()
    return [item for at in range(0, len(data), size) for item in parser.feed(data[at : at + size])]


def _outcomes(results: list[Any]) -> list[Any]:
    """As the answers are recorded: a text for an error, the id of a value, None for a value without one."""
    found: list[Any] = []
    for item in results:
        if isinstance(item, JsonError):
            found.append(item.desc.replace(NUL, "\0"))
        else:
            # Through the writer: in between a NUL has a form of its own.
            found.append(json.loads(dumps(item)) if isinstance(item, dict) and set(item) == {"id"} else None)
    return found


@pytest.mark.parametrize("size", [1 << 20, 1, 3])
def test_feed_answers_what_the_reference_answers(size: int) -> None:
    assert len(_REFERENCE) > 300
    for text, expected in _REFERENCE:
        data = text.encode("latin-1")
        assert _outcomes(_feed(data, size)) == expected, data


def test_feed_returns_an_object_at_its_closing_brace() -> None:
    parser = Parser()
    assert parser.feed(b'{"execute": "quit"') == []
    assert parser.feed(b"}") == [{"execute": "quit"}]


def test_feed_returns_several_messages_of_one_packet_in_order() -> None:
    assert Parser().feed(b'{"a": 1}\r\n{"b": [2]}@{"c": null}') == [
        {"a": 1},
        {"b": [2]},
        JsonError("2:11: JSON parse error, stray '@'"),
        {"c": None},
    ]


def test_feed_withholds_a_number_until_it_is_over() -> None:
    parser = Parser()
    assert parser.feed(b"12") == []
    assert parser.feed(b"3\n") == [123]


def test_lines_count_on_over_messages() -> None:
    parser = Parser()
    parser.feed(b'{"a": 1}\n')
    parser.feed('{"a": "é\\u00e9"}\r\n\r\n'.encode())
    assert parser.feed('{"é": @'.encode()) == [JsonError("4:8: JSON parse error, stray '@'")]


def test_feed_accepts_what_json_allows_for_zero() -> None:
    """The reference refuses an exponent right after a zero."""
    assert _feed(b"[0e5, 0E+1, -0e-2]", 100) == _feed(b"[0e5, 0E+1, -0e-2]", 1) == [[0.0, 0.0, -0.0]]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18446744073709551615", 18446744073709551615),
        ("18446744073709551616", 18446744073709551616.0),
        ("-9223372036854775808", -9223372036854775808),
        ("-9223372036854775809", -9223372036854775808.0),
        ("-0", 0),
        ("1e3", 1000.0),
        ("1.0", 1.0),
        ("1e400", sys.float_info.max),
        ("-1e400", -sys.float_info.max),
        ("9" * 5000, sys.float_info.max),
    ],
)
def test_numbers_keep_64_bits_and_become_doubles_beyond(text: str, value: float) -> None:
    for size in (1 << 20, 7):
        (result,) = _feed(b'{"n": ' + text.encode() + b"}", size)
        assert result["n"] == value
        assert type(result["n"]) is type(value)


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_depth_limit_is_1024_open_brackets(opening: str, closing: str) -> None:
    def nested(depth: int) -> bytes:
        return (opening * depth + "1" + closing * depth + "{}").encode()

    for size in (1 << 20, 5):
        value, after = _feed(nested(MAX_DEPTH), size)
        assert isinstance(value, (dict, list))
        assert after == {}
        assert _feed(nested(MAX_DEPTH + 1), size) == [JsonError("JSON nesting depth limit exceeded"), {}]


def test_depth_limit_swallows_until_balanced_or_overdrawn() -> None:
    too_deep = JsonError("JSON nesting depth limit exceeded")
    assert Parser().feed(b"[" * 1030 + b"]" * 1029 + b"{}") == [too_deep]
    assert Parser().feed(b"[" * 1030 + b"@{}") == [too_deep, {}]
    assert Parser().feed(b"[" * 1030 + b"} }{}") == [
        too_deep,
        JsonError("1:1033: JSON parse error, expecting value"),
        {},
    ]


def test_token_count_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_TOKENS == 2 * 1024 * 1024
    monkeypatch.setattr("qsd.wire.qmp_json.MAX_TOKENS", 10)
    monkeypatch.setattr("qsd.wire.qmp_json._QUICK_LIMIT", 0)
    assert Parser().feed(b"[1,2,3,4,5]") == [JsonError("JSON token count limit exceeded")]
    assert Parser().feed(b"[1,2,3,4 ]{}[1,2,3,4,5]{}") == [
        [1, 2, 3, 4],
        {},
        JsonError("JSON token count limit exceeded"),
        {},
    ]


def test_token_size_limit_counts_all_tokens_of_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    assert qmp_json_lexer.MAX_TOKEN_SIZE == 64 * 1024 * 1024
    monkeypatch.setattr("qsd.wire.qmp_json.MAX_TOKEN_SIZE", 20)
    monkeypatch.setattr("qsd.wire.qmp_json._QUICK_LIMIT", 0)
    assert Parser().feed(b'["12345678","12345678","1"]{}') == [JsonError("JSON token size limit exceeded"), {}]
    assert Parser().feed(b'["12345678"]["12345678"]{}') == [["12345678"], ["12345678"], {}]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("body", [b'"%s"', b"'%s\\'%s'"])
def test_token_size_limit_bounds_what_is_kept(monkeypatch: pytest.MonkeyPatch, size: int, body: bytes) -> None:
    monkeypatch.setattr("qsd.wire.qmp_json_lexer.MAX_TOKEN_SIZE", 50)
    monkeypatch.setattr("qsd.wire.qmp_json._QUICK_LIMIT", 0)
    long = body.replace(b"%s", b"x" * 300)
    assert _feed(b"[" + long + b"]{}", size) == [JsonError("JSON token size limit exceeded"), {}]


def test_token_size_limit_holds_for_words_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsd.wire.qmp_json_lexer.MAX_TOKEN_SIZE", 50)
    monkeypatch.setattr("qsd.wire.qmp_json._QUICK_LIMIT", 0)
    for token in (b"a" * 300, b"1" * 300):
        for size in (1, 1000):
            assert _feed(b"[" + token + b"]{}", size) == [JsonError("JSON token size limit exceeded"), {}]


def test_messages_quote_a_bounded_part_of_the_input() -> None:
    (error,) = Parser().feed(b"x" * 100_000 + b" ")
    assert len(error.desc) < 5000


def test_control_byte_ff_synchronises_after_anything() -> None:
    for start in (b'{"a": [', b'"abc', b"12", b"tru", b"@", b'{"a" 1 [', b"[" * 2000):
        parser = Parser()
        parser.feed(start)
        parser.feed(b"\xff")
        assert parser.feed(b'{"execute": "x"}') == [{"execute": "x"}], start


@pytest.mark.parametrize(
    ("text", "desc"),
    [
        ("{", "1:2: JSON parse error, premature end of input"),
        ('{"driver":"null-co","a":1', "1:27: JSON parse error, premature end of input"),
        ('{"a":1\n\n ', "3:2: JSON parse error, premature end of input"),
        ('{"a": tru', "1:7: JSON parse error, invalid keyword 'tru'"),
        ('{"a":"b', "1:6: JSON parse error, stray '\"b'"),
        ('{"a":1.', "1:6: JSON parse error, stray '1.'"),
        ("{}@", "Expecting at most one JSON value"),
        ("{} {}", "Expecting at most one JSON value"),
        ("", "Expecting a JSON value"),
        ('{"a":@}', "1:6: JSON parse error, stray '@'"),
        ('{"a":' * 1025, "JSON nesting depth limit exceeded"),
    ],
)
def test_parse_one_refuses(text: str, desc: str) -> None:
    with pytest.raises(QmpError) as caught:
        parse_one(text)
    assert caught.value.desc == desc


def test_parse_one_takes_one_value_with_blanks_around_it() -> None:
    assert parse_one("{'a': 1} \n") == {"a": 1}
    assert parse_one("17") == 17


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (
            {"a": [], "b": {}, "c": [1, "x", None, True, False]},
            '{"a": [], "b": {}, "c": [1, "x", null, true, false]}',
        ),
        (0.1, "0.10000000000000001"),
        (3.14, "3.1400000000000001"),
        (1000.0, "1000"),
        (-0.0, "-0"),
        (1e16, "10000000000000000"),
        (1e17, "1e+17"),
        (1.5e300, "1.5000000000000001e+300"),
        (0.0001, "0.0001"),
        (1e-5, "1.0000000000000001e-05"),
        (5e-324, "4.9406564584124654e-324"),
        (18446744073709551615, "18446744073709551615"),
        (math.inf, "1.7976931348623157e+308"),
        (math.nan, "0"),
        (
            "\x1f\x7f\x80é\ud7ff\ue000 😀 <>&/\b\f\n\r\t\\'\"",
            '"\\u001F\\u007F\\u0080\\u00E9\\uD7FF\\uE000 \\uD83D\\uDE00 <>&/\\b\\f\\n\\r\\t\\\\\'\\""',
        ),
    ],
)
def test_dumps_writes_what_the_reference_writes(value: Any, text: str) -> None:
    assert dumps(value) == text


def test_dumps_pretty_indents_by_four_and_gives_empty_containers_two_lines() -> None:
    value = {"return": {}, "list": [1, {"a": []}]}
    assert dumps(value, pretty=True) == (
        '{\n    "return": {\n    },\n    "list": [\n        1,\n        {\n            "a": [\n            ]\n'
        "        }\n    ]\n}"
    )


def test_dumps_takes_any_depth_the_parser_takes() -> None:
    (value,) = Parser().feed(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    assert dumps(value) == "[" * MAX_DEPTH + "]" * MAX_DEPTH


@pytest.mark.parametrize("pretty", [False, True])
def test_pieces_of_a_long_answer_are_short_and_together_what_dumps_writes(pretty: bool) -> None:
    rows = [{"name": f"row {number}", "flags": ["a"], "count": number, "busy": False} for number in range(5000)]
    answer = {"return": [{"rows": Rows(range(5000), rows.__getitem__), "none": Rows((), dict)}]}
    whole = {"return": [{"rows": rows, "none": []}]}
    found = list(pieces(answer, pretty))
    assert "".join(found) == dumps(whole, pretty)
    assert json.loads("".join(found)) == whole
    assert len(found) > 50
    assert max(map(len, found)) < 16 << 10


_NONCHARACTERS = {chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF)} | {
    chr(code) for code in range(0xFDD0, 0xFDF0)
}
_characters = st.characters(exclude_categories=("Cs",)).filter(lambda c: c not in _NONCHARACTERS)
_texts = st.text(_characters, max_size=20).map(lambda text: text.replace("\0", NUL))
_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False).filter(lambda number: number != int(number))
    | _texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_texts, inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(value=_values, pretty=st.booleans(), raw=st.booleans(), size=st.integers(1, 60))
def test_round_trip_through_dumps_and_feed(value: Any, pretty: bool, raw: bool, size: int) -> None:
    text = dumps([value], pretty)
    assert text.isascii()
    # Clients may as well send UTF-8 as it is.
    data = json.dumps([value], ensure_ascii=False).encode("utf-8", "surrogateescape") if raw else text.encode()
    assert _feed(data, size) == [[value]]
    assert _feed(b'{"v":' + data + b"}", 1 << 20) == [{"v": [value]}]


_HOSTILE = [
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b'"',
    b"'",
    b"\\",
    b"\\u",
    b"\\ud83d",
    b"\\ude00",
    b"\\uffff",
    b"a",
    b"true",
    b"0",
    b"1",
    b"-",
    b".",
    b"e",
    b"E+",
    b"@",
    b"\n",
    b"\r",
    b" ",
    b"\x00",
    b"\x7f",
    b"\xc0\x80",
    b"\xc3",
    b"\xa9",
    b"\xed\xa0\x80",
    b"\xfe",
    b"\xff",
    b'{"a":1}',
    b'{"a":1,"a":2}',
    b'{"id":"\\u00e9"}',
    b'{"k":',
    "é".encode(),
]


@settings(max_examples=400, deadline=None)
@given(
    data=st.lists(st.sampled_from(_HOSTILE), max_size=25).map(b"".join) | st.binary(max_size=40),
    cuts=st.lists(st.integers(0, 100), max_size=6),
)
@example(data=b'{"a":1}{"a":1}', cuts=[])
@example(data=b"1\n-\n", cuts=[1])
def test_any_input_gives_the_same_results_in_any_pieces(data: bytes, cuts: list[int]) -> None:
    whole = Parser()
    expected = whole.feed(data) + whole.finish()
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    parser = Parser()
    found: list[Any] = []
    for start, end in pairwise(edges):
        found += parser.feed(data[start:end])
    assert found + parser.finish() == expected
    assert _feed(data, 1) == _feed(data, 1 << 20)
    # The reference's reset works after anything.
    assert Parser().feed(data + b"\xff" + b'{"execute":1}')[-1] == {"execute": 1}
    for item in expected:
        assert isinstance(item, (JsonError, dict, list, str, int, float, type(None)))
