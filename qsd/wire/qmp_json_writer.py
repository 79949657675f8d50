"""JSON text as the reference writes it: ASCII only, ``", "`` and ``": "``, doubles with 17 significant digits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_UNPRINTABLE = re.compile(r'[\x00-\x1f"\\\x7f-\U0010ffff]')
_SHORT = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_LARGEST = 1.7976931348623157e308
_INDENT = "    "
_DONE = object()


def dumps(value: Any, pretty: bool = False) -> str:
    """Write JSON values (as Python has them); ``pretty``: every member on its own line, four blanks a level.

    Never fails for what ``Parser`` returns: nesting costs no stack, and a double that is not finite, which JSON
    cannot express, is written as the nearest that is (NaN as 0). Lone surrogates, as in file names that are not
    UTF-8, are written as U+FFFD: no client could read them.
    """
    parts: list[str] = []
    write = parts.append
    stack: list[tuple[Iterator[Any], str, bool]] = []
    opened = _begin(value, write, stack)
    while stack:
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
            write(_quote(item[0]) + ": ")
            item = item[1]
        opened = _begin(item, write, stack)
    return "".join(parts)


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


def _double(value: float) -> str:
    if value != value:
        value = 0.0
    return f"{max(-_LARGEST, min(_LARGEST, value)):.17g}"


def _quote(text: str) -> str:
    return f'"{_UNPRINTABLE.sub(_escape, text)}"'


def _escape(match: re.Match[str]) -> str:
    character = match.group()
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
