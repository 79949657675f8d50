"""The older option syntax (``--chardev``): a flat list of ``key=value``, checked against a table of known options.

Beside ``key=value`` it knows the implied first key, ``,,`` for a comma, and deprecated short forms: ``key`` for
``key=on`` and ``nokey`` for ``key=off``. The first ``id`` names the group, and is checked before anything else; the
options are then checked from left to right. Of several values of a key the last counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from enum import Enum

import attrs

from qsd.errors import QmpError
from qsd.wire.literals import parse_bool, parse_integer, parse_size

_VALUE = re.compile(r"(?:[^,]|,,)*+", re.DOTALL)
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_HELP = ("help", "?")
_ID_HINT = "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."
_SIZE_HINT = (
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively."
)


class OptionKind(Enum):
    """What an option's value is; the value is how help shows it."""

    STRING = "str"
    BOOL = "bool (on/off)"
    NUMBER = "num"
    SIZE = "size"


@attrs.frozen
class OptionTable:
    """The options a command line option knows. ``short_forms`` are those whose short form means another's value,
    as ``delay`` means ``nodelay=off``."""

    options: Mapping[str, OptionKind]
    implied: str | None = None
    short_forms: Mapping[str, tuple[str, str]] = attrs.field(factory=dict)

    def help(self) -> str:
        """The lines that help shows, in alphabetical order."""
        return "".join(f"  {name}=<{self.options[name].value}>\n" for name in sorted(self.options))


@attrs.frozen
class QemuOpts:
    """Checked options: the getters cannot fail. With ``wants_help`` what came after the question is unread."""

    id: str | None
    values: Mapping[str, str]
    wants_help: bool = False

    def text(self, name: str) -> str | None:
        return self.values.get(name)

    def flag(self, name: str) -> bool | None:
        return parse_bool(self.values[name]) if name in self.values else None

    def number(self, name: str) -> int | None:
        """An unsigned 64 bit number; negative ones come as their two's complement, as the reference takes them."""
        number = parse_integer(self.values[name]) if name in self.values else None
        return None if number is None else number % (1 << 64)

    def size(self, name: str) -> int | None:
        """A number of bytes below 2^64."""
        return parse_size(self.values[name]) if name in self.values else None


def parse(text: str, table: OptionTable, warn: Callable[[str], None]) -> QemuOpts:
    """Parse an option's argument. ``warn`` gets the text of every deprecation warning, before any error is raised
    that comes after it. Raises QmpError, with a hint where the reference gives one."""
    found: list[tuple[str | None, str, str]] = []  # the short form if it was one, then what it says
    for key, given in _split(text, table.implied):
        found.append((None, key, given) if given is not None else (key, *_spelled_out(table, key)))
    identifier = next((value for _, name, value in found if name == "id"), None)
    if identifier is not None and not _IDENTIFIER.fullmatch(identifier):
        raise QmpError("Parameter 'id' expects an identifier", hint=_ID_HINT)
    values: dict[str, str] = {}
    for word, name, value in found:
        if word is not None:
            if word in _HELP:
                return QemuOpts(identifier, values, wants_help=True)
            warn(f"short-form boolean option '{word}' deprecated\nPlease use {name}={value} instead")
        if name == "id":
            continue
        if name not in table.options:
            raise QmpError(f"Invalid parameter '{name}'")
        check_value(table.options[name], name, value)
        values[name] = value
    return QemuOpts(identifier, values)


def check_value(kind: OptionKind, name: str, value: str) -> None:
    """Raise QmpError when an option cannot have that value."""
    _CHECKS[kind](name, value)


def _split(text: str, implied: str | None) -> Iterator[tuple[str, str | None]]:
    """Yield keys with their values, None for short forms. The implied first key is put in."""
    at = 0
    while at < len(text):
        ends = (text.find("=", at), text.find(",", at))
        end = min((end for end in ends if end >= 0), default=len(text))
        if end < len(text) and text[end] == "=":
            key, start = text[at:end], end + 1
        elif at == 0 and implied is not None:
            key, start = implied, 0
        else:
            yield text[at:end], None
            at = end + 1
            continue
        match = _VALUE.match(text, start)
        stop = match.end() if match else start
        yield key, text[start:stop].replace(",,", ",")
        at = stop + 1


def _spelled_out(table: OptionTable, word: str) -> tuple[str, str]:
    """What a short form stands for."""
    if word in table.short_forms:
        return table.short_forms[word]
    if word.startswith("no") and word not in table.options:
        return word[2:], "off"
    return word, "on"


def _check_bool(name: str, value: str) -> None:
    if parse_bool(value) is None:
        raise QmpError(f"Parameter '{name}' expects 'on' or 'off'")


def _check_number(name: str, value: str) -> None:
    number = parse_integer(value)
    if number is None:
        raise QmpError(f"Parameter '{name}' expects a number")
    if not -(1 << 64) < number < 1 << 64:
        raise QmpError(f"Value '{value}' is too large for parameter '{name}'")


def _check_size(name: str, value: str) -> None:
    size = parse_size(value)
    is_negative = value.lstrip(" \t\n\v\f\r").startswith("-") and re.search("-[0-9]+$", value) is not None
    if is_negative or (size is not None and size >= 1 << 64):
        raise QmpError(f"Value '{value}' is out of range for parameter '{name}'")
    if size is None:
        raise QmpError(f"Parameter '{name}' expects a non-negative number below 2^64", hint=_SIZE_HINT)


_CHECKS: dict[OptionKind, Callable[[str, str], None]] = {
    OptionKind.STRING: lambda _name, _value: None,
    OptionKind.BOOL: _check_bool,
    OptionKind.NUMBER: _check_number,
    OptionKind.SIZE: _check_size,
}
