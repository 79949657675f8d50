"""The tokens of QMP's JSON dialect, from bytes that arrive in any pieces.

Rules, all the reference's:

- Strings may be quoted with ``"`` or ``'``; the bytes 0x00-0x1f, 0xfe and 0xff may not stand in them.
- A word is a run of ``a-z``. A number ends at the first byte that cannot belong to it, a word likewise; so neither
  is known before the byte after it has arrived.
- What fits nothing is *stray*: the bytes consumed so far, with the bad one. After a stray the lexer skips what
  follows up to a bracket, comma, colon, line end, or one of 0x00, 0xfe, 0xff (strays of their own; clients send
  0xff to synchronise).
- Positions count lines by LF and columns by bytes, from 1. A token that starts at the very byte that ended a
  number, a word or the skipping counts one column more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from typing import Final, NamedTuple

MAX_TOKEN_SIZE: Final = 64 << 20
_SHORT = 4096  # a pending number or word up to here is looked at anew whenever bytes arrive


class Kind(Enum):
    PUNCTUATION = "punctuation"
    STRING = "string"
    NUMBER = "number"
    WORD = "word"
    STRAY = "stray"
    TOO_LONG = "too long"


class Token(NamedTuple):
    """``text`` is the token as it came, quotes included; ``column`` and ``line`` are where it starts."""

    kind: Kind
    text: bytes
    line: int
    column: int


_EXPONENT = rb"[eE][+-]?+[0-9]*+"
_QUICK = re.compile(
    rb"([ \t\r\n]++)"
    rb"|([{}\[\]:,])"
    rb'|("(?:[^"\\\x00-\x1f\xfe\xff]++)?+")'
    rb"|(-?+(?:0|[1-9][0-9]*+)(?=[,\]} \t\r\n]))"
)
_WHITE, _PUNCTUATION, _STRING, _NUMBER = 1, 2, 3, 4
# The longest run of bytes that can still become a number, and what is left to ask: does it end in a digit?
_NUMBER_RUN = re.compile(
    rb"-?+(?:(?:0|[1-9][0-9]*+)(?:\.(?:[0-9]++(?:" + _EXPONENT + rb")?+)?+|" + _EXPONENT + rb")?+)?+"
)
_WORD_RUN = re.compile(rb"[a-z]++")
_STRING_RUN = {
    0x22: re.compile(rb'[^"\\\x00-\x1f\xfe\xff]*+(?:\\[^\x00-\x1f\xfe\xff][^"\\\x00-\x1f\xfe\xff]*+)*+'),
    0x27: re.compile(rb"[^'\\\x00-\x1f\xfe\xff]*+(?:\\[^\x00-\x1f\xfe\xff][^'\\\x00-\x1f\xfe\xff]*+)*+"),
}
_SKIPPED = re.compile(rb"[^{}\[\]:,\r\n\x00\xfe\xff]*+")
_ENDS_NUMBER = re.compile(rb"[^0-9eE.+-]")
_ENDS_WORD = re.compile(rb"[^a-z]")
_DIGITS = b"0123456789"
_BACKSLASH = 0x5C
_LF = 0x0A


def _run(pattern: re.Pattern[bytes], buffer: bytearray, start: int) -> int:
    """Where the run of ``pattern`` from ``start`` ends. Keeps no match: that would keep the buffer from growing."""
    match = pattern.match(buffer, start)
    return match.end() if match else start


class Lexer:
    """Feed bytes with ``feed``, take what is complete from ``tokens``; ``finish`` gives what the end completes."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0  # where the next token starts in the buffer
        self._scanned = 0  # how far an unfinished token has been looked at
        self._line = 1
        self._line_start = 0  # of the current line, in buffer offsets; gets negative as the buffer is cut
        self._ended_by_lookahead = False
        self._skipping = False
        self._dropping: int | None = None  # the quote that ends a string too long to keep

    @property
    def is_idle(self) -> bool:
        """Whether the next byte starts a fresh token."""
        return self._at == len(self._buffer) and not (self._skipping or self._ended_by_lookahead or self._dropping)

    @property
    def position(self) -> tuple[int, int]:
        """Line and column of what comes next."""
        return self._line, self._at - self._line_start + 1 + self._ended_by_lookahead

    def skip(self, data: bytes) -> None:
        """Count ``data``, which somebody else has read while the lexer was idle."""
        newlines = data.count(b"\n")
        if newlines:
            self._line += newlines
            self._line_start = self._at - (len(data) - data.rindex(b"\n") - 1)
        else:
            self._line_start -= len(data)

    def feed(self, data: bytes) -> None:
        if self._at:
            del self._buffer[: self._at]
            self._line_start -= self._at
            self._scanned -= self._at
            self._at = 0
        self._buffer += data

    def tokens(self) -> Iterator[Token]:
        """Yield the tokens that are complete."""
        while (token := self._next()) is not None:
            yield token

    def finish(self) -> Iterator[Token]:
        """Yield the tokens of what is left, knowing that nothing follows."""
        yield from self.tokens()
        rest = self._buffer
        if self._at == len(rest) or self._dropping:
            return
        first = rest[self._at]
        if first in _STRING_RUN:
            kind = Kind.STRAY
        elif _WORD_RUN.match(rest, self._at):
            kind = Kind.WORD
        else:
            kind = Kind.NUMBER if rest[-1] in _DIGITS else Kind.STRAY
        yield self._take(kind, len(rest))
        self._ended_by_lookahead = kind is not Kind.STRAY

    def _next(self) -> Token | None:
        buffer = self._buffer
        size = len(buffer)
        while True:
            if self._dropping is not None and not self._drop():
                return None
            if self._skipping:
                self._at = _run(_SKIPPED, buffer, self._at)
                if self._at == size:
                    return None
                self._skipping = False
                self._ended_by_lookahead = True
            if self._at == size:
                return None
            match = _QUICK.match(buffer, self._at) if self._scanned <= self._at else None
            if match is None:
                return self._unusual()
            end, group = match.end(), match.lastindex
            del match  # it holds the buffer, which must be free to grow
            if group == _WHITE:
                self._white(end)
            elif group == _PUNCTUATION:
                return self._take(Kind.PUNCTUATION, end)
            elif group == _STRING:
                return self._take_sized(Kind.STRING, end)
            else:
                return self._take_sized(Kind.NUMBER, end)

    def _unusual(self) -> Token | None:
        """Read what the quick expression does not know, or what has not arrived as a whole."""
        buffer, start = self._buffer, self._at
        first = buffer[start]
        if first in _STRING_RUN:
            return self._string(first)
        if 0x61 <= first <= 0x7A:
            return self._word()
        if first == 0x2D or first in _DIGITS:
            return self._number()
        return self._stray(start + 1)

    def _string(self, quote: int) -> Token | None:
        buffer, size = self._buffer, len(self._buffer)
        at = _run(_STRING_RUN[quote], buffer, max(self._scanned, self._at + 1))
        if at < size and buffer[at] == quote:
            return self._take_sized(Kind.STRING, at + 1)
        if at < size and buffer[at] == _BACKSLASH:
            if at + 1 < size:
                return self._stray(at + 2)
        elif at < size:
            return self._stray(at + 1)
        return self._wait(at)

    def _word(self) -> Token | None:
        if self._is_dull(_ENDS_WORD):
            return self._wait(len(self._buffer))
        end = _run(_WORD_RUN, self._buffer, self._at)
        if end == len(self._buffer):
            return self._wait(end)
        return self._take_sized(Kind.WORD, end)

    def _number(self) -> Token | None:
        buffer, start = self._buffer, self._at
        if self._is_dull(_ENDS_NUMBER):
            return self._wait(len(buffer))
        end = _run(_NUMBER_RUN, buffer, start)
        if end == len(buffer):
            return self._wait(end)
        is_zero = end - start <= 2 and buffer[end - 1] == 0x30 and buffer[start] in b"-0"
        if buffer[end - 1] not in _DIGITS or (is_zero and buffer[end] in _DIGITS):
            return self._stray(end + 1)
        return self._take_sized(Kind.NUMBER, end)

    def _is_dull(self, ends: re.Pattern[bytes]) -> bool:
        """Whether a long unfinished token goes on through all that has come since it was last looked at.

        Looking at megabytes of digits again for every byte that arrives would be the sender's gain.
        """
        looked = self._scanned - self._at
        return looked > _SHORT and ends.search(self._buffer, self._scanned) is None

    def _wait(self, scanned: int) -> Token | None:
        self._scanned = scanned
        if len(self._buffer) - self._at <= MAX_TOKEN_SIZE:
            return None
        first = self._buffer[self._at]
        line, column = self.position
        self._at = self._scanned
        if first in _STRING_RUN:
            self._dropping = first
        else:
            self._skipping = True
        return Token(Kind.TOO_LONG, b"", line, column)

    def _drop(self) -> bool:
        """Go on inside a string that is too long; say whether its end has come."""
        assert self._dropping is not None
        buffer, size = self._buffer, len(self._buffer)
        at = _run(_STRING_RUN[self._dropping], buffer, self._at)
        if at == size or (buffer[at] == _BACKSLASH and at + 1 == size):
            self._at = self._scanned = at
            return False
        if buffer[at] == self._dropping:
            self._at = at + 1
        else:
            self._at, self._skipping = at, True
        self._dropping = None
        return True

    def _take_sized(self, kind: Kind, end: int) -> Token:
        if end - self._at > MAX_TOKEN_SIZE:
            kind = Kind.TOO_LONG
        token = self._take(kind, end)
        # The byte at ``end`` was needed to know that the token is over; blanks take the mark off again.
        self._ended_by_lookahead = kind is Kind.NUMBER or kind is Kind.WORD
        return token

    def _take(self, kind: Kind, end: int) -> Token:
        start = self._at
        token = Token(
            kind,
            bytes(self._buffer[start:end]),
            self._line,
            start - self._line_start + 1 + self._ended_by_lookahead,
        )
        self._at = end
        self._ended_by_lookahead = False
        return token

    def _stray(self, end: int) -> Token:
        token = self._take(Kind.STRAY, end)
        self._skipping = True
        if self._buffer[end - 1] == _LF:
            self._line += 1
            self._line_start = end
        return token

    def _white(self, end: int) -> None:
        newlines = self._buffer.count(b"\n", self._at, end)
        if newlines:
            self._line += newlines
            self._line_start = self._buffer.rindex(b"\n", self._at, end) + 1
        self._at = end
        self._ended_by_lookahead = False
