"""What is wrong with an image's name, in the words the reference has for options that come from names.

The contract checks options as it does those of a user; the reference checks them node by node, as text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from qsd.errors import QmpError

CHILDREN: Final = ("file", "backing", "data-file", "header")
_PROTOCOLS: Final = ("file", "host_device", "null-co", "null-aio")
_NO_FILE: Final = 'A block device must be specified for "{}"'


def in_names_words(error: QmpError, tree: dict[str, Any]) -> QmpError:
    """The error that ``tree``, the options of a name, met, as it is told."""
    for pattern, words in _WORDS:
        match = pattern.fullmatch(error.desc)
        if match is not None:
            driver, option = _place(tree, match[1])
            return QmpError(words(driver, option, match))
    return error


def _place(tree: dict[str, Any], path: str) -> tuple[str, str]:
    """The driver of the node that an option belongs to, and what the option is called there."""
    parts = path.split(".")
    while len(parts) > 1 and parts[0] in CHILDREN:
        tree = tree.get(parts.pop(0)) or {}
    return str(tree.get("driver", "")), ".".join(parts)


def _unknown(driver: str, option: str, _match: re.Match[str]) -> str:
    if driver in _PROTOCOLS:
        return f"Block protocol '{driver}' doesn't support the option '{option}'"
    return f"Block format '{driver}' does not support the option '{option}'"


def _missing(driver: str, option: str, match: re.Match[str]) -> str:
    if option == "filename":
        return f"The '{driver}' block driver requires a file name"
    if option == "driver":
        option = match[1].split(".")[-2]
    return _NO_FILE.format(option) if option in CHILDREN else match[0]


def _no_child(driver: str, option: str, match: re.Match[str]) -> str:
    return _NO_FILE.format(option) if option in CHILDREN else _missing(driver, option, match)


def _value(_driver: str, option: str, match: re.Match[str]) -> str:
    value = match[2]
    if option == "driver":
        return f"Unknown driver '{value}'"
    if option == "discard":
        return "Invalid discard option"
    if option in ("overlap-check", "template"):
        return (
            f"Unsupported value '{value}' for qcow2 option 'overlap-check'. Allowed are any of the following: "
            "none, constant, cached, all"
        )
    return f"invalid parameter value: {value}"


def _number(_driver: str, option: str, match: re.Match[str]) -> str:
    return f"Parameter '{option}' expects {match[2]}"


_WORDS: Final[tuple[tuple[re.Pattern[str], Callable[[str, str, re.Match[str]], str]], ...]] = (
    (re.compile("Parameter '(.+)' is unexpected"), _unknown),
    (re.compile("Parameter '(.+)' is missing"), _missing),
    (re.compile("Parameter '(.+)' does not accept value '(.*)'", re.DOTALL), _value),
    (re.compile("Parameter '(.+)' expects (.+)"), _number),
    (re.compile("Invalid parameter type for '(.+)', expected: (?:BlockdevRef|string)"), _no_child),
)
