"""QMP's JSON, sans-IO: bytes in any pieces to values and parse errors, in order; values to the reference's text.

Two kinds of recovery, as the reference has them. A *stray* (``qmp_json_lexer``) forgets everything read so far:
what follows is a new message. An error of grammar is reported once; then tokens are swallowed silently until as
many brackets were closed as opened, braces and square ones counted apart.

Limits per message: 1024 open brackets, 2 Mi tokens, 64 MiB of tokens. Ordinary objects cost the C decoder's time;
what has to go through the tokens costs up to 3 us a byte, so feed what a connection sends in moderate pieces.

Differences on purpose: ``0e5`` is a number (it is JSON; the reference refuses it), a number too large for a double
is the largest double (the reference would echo the word ``inf``), and messages quote no more than 4 KiB of input.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from enum import Enum
from typing import Any, Final

import attrs

from qsd.errors import QmpError
from qsd.wire import modified_utf8
from qsd.wire.qmp_json_lexer import MAX_TOKEN_SIZE, Kind, Lexer, Token
from qsd.wire.qmp_json_writer import dumps, pieces

__all__ = ["MAX_DEPTH", "MAX_TOKENS", "MAX_TOKEN_SIZE", "JsonError", "Parser", "dumps", "parse_one", "pieces"]

MAX_DEPTH: Final = 1024
MAX_TOKENS: Final = 2 << 20
_QUICK_LIMIT = 1 << 20  # below MAX_TOKENS, so that no limit but the depth can be met on the quick path
_QUOTED_LIMIT = 4096

_LARGEST = 1.7976931348623157e308
_INTEGER = re.compile(r"-?[0-9]+")
_PIECE = re.compile(rb"[^\\]+|\\u(?:[0-9a-fA-F]{4})?|\\.", re.DOTALL)
_ESCAPES = {b"\\" + key: value for key, value in zip((b'"', b"'", b"\\", b"/"), "\"'\\/", strict=True)} | {
    b"\\b": "\b",
    b"\\f": "\f",
    b"\\n": "\n",
    b"\\r": "\r",
    b"\\t": "\t",
}
_WORDS: dict[bytes, Any] = {b"true": True, b"false": False, b"null": None}


@attrs.frozen
class JsonError:
    """What came was not JSON; ``desc`` is the reference's text."""

    desc: str


class _Refused(Exception):
    """Inside this module: the token at hand ends the message with an error (the text after the position)."""


class _TooComplex(Exception):
    """Inside this module: the quick path does not judge this value."""


def _number(text: str) -> int | float:
    """Keep what fits 64 bits as an int, everything else as a double."""
    if _INTEGER.fullmatch(text) and len(text) <= 20:
        value = int(text)
        if -(1 << 63) <= value < 1 << 64:
            return value
    return max(-_LARGEST, min(_LARGEST, float(text)))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _TooComplex
    return found


def _no_constant(_text: str) -> Any:
    raise _TooComplex


_quick_decode: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_number, parse_float=_number
).raw_decode
_DOUBTFUL = re.compile(
    modified_utf8.NONCHARACTER.pattern + r"|\\u(?:0000|[dD][89a-fA-F]|[fF][dD][dDeE]|[fF]{3}[eEfF])"
)
_BLANKS = re.compile(r"[ \t\r\n]*")


class _Expect(Enum):
    """What the grammar allows next."""

    VALUE = "a value"
    FIRST_ELEMENT = "a value or ]"
    ARRAY_NEXT = ", or ]"
    FIRST_KEY = "a key or }"
    KEY = "a key"
    COLON = ":"
    OBJECT_NEXT = ", or }"


_REFUSAL = {
    _Expect.VALUE: "expecting value",
    _Expect.FIRST_ELEMENT: "expecting value",
    _Expect.ARRAY_NEXT: "expected ',' or ']'",
    _Expect.FIRST_KEY: "expecting key",
    _Expect.KEY: "expecting key",
    _Expect.COLON: "expecting ':'",
    _Expect.OBJECT_NEXT: "expected ',' or '}'",
}
_OPENING = {b"{": (1, 0), b"[": (0, 1), b"}": (-1, 0), b"]": (0, -1)}


class Parser:
    """Turns what a connection receives into values and ``JsonError``s. One per connection: positions count on."""

    def __init__(self) -> None:
        self._lexer = Lexer()
        self._results: list[Any] = []
        self._forget()

    def feed(self, data: bytes) -> list[Any]:
        """Take received bytes; return what they complete: values (JSON's, as Python has them) and ``JsonError``s.

        An object is returned as soon as its closing brace is here. Memory is bounded by the limits of the dialect;
        where there is less, what has been read of a message is forgotten, and that is an error as well.
        """
        try:
            if self._is_idle and len(data) <= _QUICK_LIMIT:
                data = self._feed_quick(data)
            if data:
                self._lexer.feed(data)
                for token in self._lexer.tokens():
                    self._take(token)
        except MemoryError:
            self._lexer = Lexer()
            self._forget()
            self._results.append(JsonError("JSON parse error, out of memory"))
        return self._give()

    def finish(self) -> list[Any]:
        """Return what the end of the input completes: a number or word, or the error that something is missing."""
        for token in self._lexer.finish():
            self._take(token)
        if self._stack and not self._is_swallowing:
            line, column = self._lexer.position
            self._results.append(JsonError(f"{line}:{column}: JSON parse error, premature end of input"))
        self._forget()
        return self._give()

    @property
    def _is_idle(self) -> bool:
        return not self._stack and not self._is_swallowing and self._lexer.is_idle

    def _give(self) -> list[Any]:
        results, self._results = self._results, []
        return results

    def _forget(self) -> None:
        self._stack: list[Any] = []
        self._keys: list[str] = []
        self._expect = _Expect.VALUE
        self._braces = self._brackets = self._tokens = self._size = 0
        self._is_swallowing = False

    def _feed_quick(self, data: bytes) -> bytes:
        """Let the C decoder read whole objects while nothing is unusual about them; return the bytes left over.

        Whatever it does not take, or judges by other rules (NULs, surrogates, noncharacters, duplicate keys), is
        left to the tokens.
        """
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            return data
        if _DOUBTFUL.search(text):
            return data
        done, used, size = 0, 0, len(text)
        while done < size:
            blanks = _BLANKS.match(text, done)
            start = blanks.end() if blanks else done
            if start < size and text[start] != "{":
                break
            if start < size:
                try:
                    value, end = _quick_decode(text, start)
                except (ValueError, _TooComplex, RecursionError):
                    break
                if text.count("{", start, end) + text.count("[", start, end) > MAX_DEPTH:
                    break
                self._results.append(value)
                start = end
            taken = text[done:start].encode()
            self._lexer.skip(taken)
            used += len(taken)
            done = start
        return data[used:]

    def _take(self, token: Token) -> None:
        if token.kind is Kind.STRAY:
            was_swallowing = self._is_swallowing
            self._forget()
            if not was_swallowing:
                self._fail(token, f"stray '{_printable(token.text)}'")
            return
        brace, bracket = _OPENING.get(token.text, (0, 0)) if token.kind is Kind.PUNCTUATION else (0, 0)
        self._braces += brace
        self._brackets += bracket
        if not self._is_swallowing:
            try:
                self._parse(token)
            except _Refused as refused:
                self._fail(token, refused.args[0])
                self._refuse()
        if self._is_swallowing and (
            self._braces < 0 or self._brackets < 0 or (self._braces == 0 and self._brackets == 0)
        ):
            self._forget()

    def _refuse(self) -> None:
        braces, brackets = self._braces, self._brackets
        self._forget()
        self._braces, self._brackets, self._is_swallowing = braces, brackets, True

    def _fail(self, token: Token, text: str) -> None:
        if text.startswith("JSON "):  # a limit: has no position
            self._results.append(JsonError(text))
        else:
            self._results.append(JsonError(f"{token.line}:{token.column}: JSON parse error, {text}"))

    def _parse(self, token: Token) -> None:
        self._tokens += 1
        self._size += len(token.text)
        if token.kind is Kind.TOO_LONG or self._size > MAX_TOKEN_SIZE:
            raise _Refused("JSON token size limit exceeded")
        if self._tokens > MAX_TOKENS:
            raise _Refused("JSON token count limit exceeded")
        if self._braces + self._brackets > MAX_DEPTH:
            raise _Refused("JSON nesting depth limit exceeded")
        _STEPS[self._expect](self, token)

    def _on_value(self, token: Token) -> None:
        if token.kind is Kind.PUNCTUATION:
            if token.text == b"{":
                self._stack.append({})
                self._expect = _Expect.FIRST_KEY
            elif token.text == b"[":
                self._stack.append([])
                self._expect = _Expect.FIRST_ELEMENT
            else:
                raise _Refused(_REFUSAL[self._expect])
        elif token.kind is Kind.STRING:
            self._complete(_string(token.text))
        elif token.kind is Kind.NUMBER:
            self._complete(_number(token.text.decode("ascii")))
        elif token.text in _WORDS:
            self._complete(_WORDS[token.text])
        else:
            raise _Refused(f"invalid keyword '{_printable(token.text)}'")

    def _on_first_element(self, token: Token) -> None:
        if token.text == b"]":
            self._complete(self._stack.pop())
        else:
            self._on_value(token)

    def _on_array_next(self, token: Token) -> None:
        if token.text == b"]":
            self._complete(self._stack.pop())
        elif token.text == b",":
            self._expect = _Expect.VALUE
        else:
            raise _Refused(_REFUSAL[_Expect.ARRAY_NEXT])

    def _on_first_key(self, token: Token) -> None:
        if token.text == b"}":
            self._complete(self._stack.pop())
        else:
            self._on_key(token)

    def _on_key(self, token: Token) -> None:
        if token.kind is not Kind.STRING:
            raise _Refused(_REFUSAL[_Expect.KEY])
        self._keys.append(_string(token.text))
        self._expect = _Expect.COLON

    def _on_colon(self, token: Token) -> None:
        if token.text != b":":
            raise _Refused(_REFUSAL[_Expect.COLON])
        self._expect = _Expect.VALUE

    def _on_object_next(self, token: Token) -> None:
        if token.text == b"}":
            self._complete(self._stack.pop())
        elif token.text == b",":
            self._expect = _Expect.KEY
        else:
            raise _Refused(_REFUSAL[_Expect.OBJECT_NEXT])

    def _complete(self, value: Any) -> None:
        """Put a complete value where it belongs. A duplicate key is noticed only here, as in the reference."""
        if not self._stack:
            self._results.append(value)
            self._forget()
            return
        holder = self._stack[-1]
        if isinstance(holder, list):
            holder.append(value)
            self._expect = _Expect.ARRAY_NEXT
            return
        key = self._keys.pop()
        if key in holder:
            raise _Refused("duplicate key")
        holder[key] = value
        self._expect = _Expect.OBJECT_NEXT


_STEPS: dict[_Expect, Callable[[Parser, Token], None]] = {
    _Expect.VALUE: Parser._on_value,
    _Expect.FIRST_ELEMENT: Parser._on_first_element,
    _Expect.ARRAY_NEXT: Parser._on_array_next,
    _Expect.FIRST_KEY: Parser._on_first_key,
    _Expect.KEY: Parser._on_key,
    _Expect.COLON: Parser._on_colon,
    _Expect.OBJECT_NEXT: Parser._on_object_next,
}


def parse_one(text: str) -> Any:
    """Parse a command line argument, which must be one JSON value. Raises QmpError."""
    parser = Parser()
    results = parser.feed(text.encode("utf-8", "surrogateescape")) + parser.finish()
    if not results:
        raise QmpError("Expecting a JSON value")
    if isinstance(results[0], JsonError):
        raise QmpError(results[0].desc)
    if len(results) > 1:
        raise QmpError("Expecting at most one JSON value")
    return results[0]


def _printable(data: bytes) -> str:
    """Input as messages quote it: up to the first NUL, each broken sequence one U+FFFD."""
    return modified_utf8.decode_leniently(data[:_QUOTED_LIMIT].split(b"\0")[0])


def _text(data: bytes) -> str:
    try:
        return modified_utf8.decode(data)
    except ValueError:
        raise _Refused("invalid UTF-8 sequence in string") from None


def _string(token: bytes) -> str:
    """The text of a string token (with its quotes). Raises _Refused for the first thing wrong with it."""
    if b"\\" not in token:
        return _text(token[1:-1])
    found: list[str] = []
    at, end = 1, len(token) - 1
    while at < end:
        match = _PIECE.match(token, at, end)
        assert match is not None, "the lexer ends no string in a backslash"
        piece = match.group()
        at = match.end()
        if piece[0] != 0x5C:
            found.append(_text(piece))
        elif piece[1] != 0x75:
            if piece not in _ESCAPES:
                raise _Refused("invalid escape sequence in string")
            found.append(_ESCAPES[piece])
        else:
            character, at = _code_point(token, match.start())
            found.append(character)
    return "".join(found)


_HEX = re.compile(rb"\\u([0-9a-fA-F]{4})")


def _code_point(token: bytes, at: int) -> tuple[str, int]:
    """Read ``\\uXXXX``, or two of them that form a surrogate pair; return the character and where it ends."""
    first = _HEX.match(token, at)
    if first is None:
        raise _Refused(f"{_printable(token[at : at + 6])} is not a valid Unicode character")
    code, end = int(first[1], 16), at + 6
    if 0xD800 <= code < 0xDC00:
        second = _HEX.match(token, end)
        low = int(second[1], 16) if second else 0
        if 0xDC00 <= low < 0xE000:
            code, end = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00), end + 6
    character = chr(code)
    if 0xD800 <= code < 0xE000 or modified_utf8.NONCHARACTER.match(character):
        raise _Refused(f"{token[at:end].decode('ascii')} is not a valid Unicode character")
    return character if code else modified_utf8.NUL, end
