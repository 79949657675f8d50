"""JSON text as the reference writes it: ASCII only, ``", "`` and ``": "``, doubles with 17 significant digits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from json.encoder import encode_basestring_ascii
from typing import Any, Final

from qsd.wire.modified_utf8 import NUL

_UNPRINTABLE = re.compile(NUL + r'|[\x00-\x1f"\\\x7f-\U0010ffff]')
_SHORT = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_LARGEST = 1.7976931348623157e308
_INDENT = "    "
_DONE = object()
# Texts put together in one piece: less than a millisecond's work.
_PIECE: Final = 256


def dumps(value: Any, pretty: bool = False) -> str:
    """``pieces`` in one."""
    return "".join(pieces(value, pretty))


def pieces(value: Any, pretty: bool = False) -> Iterator[str]:
    """Write JSON values (as Python has them); ``pretty``: every member on its own line, four blanks a level.

    In pieces, between which others may run: an answer may be many megabytes long.

    Never fails for what ``Parser`` returns: nesting costs no stack, and a double that is not finite, which JSON
    cannot express, is written as the nearest that is (NaN as 0). Lone surrogates, as in file names that are not
    UTF-8, are written as U+FFFD: no client could read them.
    """
    parts: list[str] = []
    write = parts.append
    stack: list[tuple[Iterator[Any], str, bool]] = []
    opened = _begin(value, write, stack)
    while stack:
        if len(parts) >= _PIECE:
            yield "".join(parts)
            parts.clear()
        iterator, closing, is_object = stack[-1]
        item: Any = next(iterator, _DONE)
        if item is _DONE:
            stack.pop()
            if pretty:
                write("\n" + _INDENT * len(stack))
            write(closing)
            opened = False
            continue
        if not opened:
            write("," if pretty else ", ")
        if pretty:
            write("\n" + _INDENT * len(stack))
        if is_object:
            write(_member(item[0]))
            item = item[1]
        if not pretty and type(item) is dict and item:
            # Most objects of a long answer hold nothing but scalars.
            try:
                write(f"{{{', '.join([_member(key) + _SCALARS[type(held)](held) for key, held in item.items()])}}}")
                opened = False
                continue
            except KeyError:
                pass
        opened = _begin(item, write, stack)
    yield "".join(parts)


def _begin(value: Any, write: Any, stack: list[tuple[Iterator[Any], str, bool]]) -> bool:
    """Write a scalar, or open a container and put it on the stack; say whether one was opened."""
    if isinstance(value, str):
        write(_quote(value))
    elif value is None:
        write("null")
    elif value is True or value is False:
        write("true" if value else "false")
    elif isinstance(value, int):
        write(str(value))
    elif isinstance(value, float):
        write(_double(value))
    elif isinstance(value, dict):
        write("{")
        stack.append((iter(value.items()), "}", True))
        return True
    else:
        write("[")
        stack.append((iter(value), "]", False))
        return True
    return False


def _member(name: str) -> str:
    # Only names of the contract are that short and come again; a client's may be megabytes.
    return _known_member(name) if len(name) < 40 else _quote(name) + ": "


@lru_cache(maxsize=1024)
def _known_member(name: str) -> str:
    return _quote(name) + ": "


def _double(value: float) -> str:
    if value != value:
        value = 0.0
    return f"{max(-_LARGEST, min(_LARGEST, value)):.17g}"


def _quote(text: str) -> str:
    # What else there is, the standard library escapes in another way.
    if text.isascii() and text.isprintable():
        return encode_basestring_ascii(text)
    return f'"{_UNPRINTABLE.sub(_escape, text)}"'


def _escape(match: re.Match[str]) -> str:
    character = match.group()
    if character == NUL:
        return "\\u0000"
    short = _SHORT.get(character)
    if short is not None:
        return short
    code = ord(character)
    if 0xD800 <= code < 0xE000:
        return "\\uFFFD"
    if code < 0x10000:
        return f"\\u{code:04X}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04X}\\u{0xDC00 + (code & 0x3FF):04X}"


_SCALARS: Final[dict[type[Any], Callable[[Any], str]]] = {
    str: _quote,
    int: str,
    bool: {True: "true", False: "false"}.__getitem__,
    type(None): lambda _none: "null",
}
