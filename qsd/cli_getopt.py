"""The C library's long option rules, as a pure function over an argument list.

Long names may be cut to a unique prefix, take their argument after ``=`` or as the next word; one-letter options
may stand together (``-hV``); words that are no options are given in order, those after ``--`` are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum

import attrs


class Option(Enum):
    """The daemon's options; the value is the long name."""

    BLOCKDEV = "blockdev"
    CHARDEV = "chardev"
    DAEMONIZE = "daemonize"
    EXPORT = "export"
    HELP = "help"
    MONITOR = "monitor"
    NBD_SERVER = "nbd-server"
    OBJECT = "object"
    PIDFILE = "pidfile"
    TRACE = "trace"
    VERSION = "version"


_BARE = {Option.DAEMONIZE, Option.HELP, Option.VERSION}
_LETTERS = {"h": Option.HELP, "T": Option.TRACE, "V": Option.VERSION}


class UsageError(Exception):
    """The argument list breaks the rules; the text is the C library's."""


@attrs.frozen
class Given:
    """One option (None: a stray word) with its argument, and ``where``: how messages call it, as it was typed."""

    option: Option | None
    argument: str
    where: str


def options(words: Sequence[str]) -> Iterator[Given]:
    """Yield what ``words`` (without the program's name) say, in order. Raises UsageError when it gets there."""
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if word == "--":
            return
        if word.startswith("--"):
            option, argument = _long(word[2:])
            if argument is None and option not in _BARE:
                if at == len(words):
                    raise UsageError(f"option '--{option.value}' requires an argument")
                argument = words[at]
                at += 1
                yield Given(option, argument, f"{word} {argument}")
            else:
                yield Given(option, argument or "", word)
        elif word.startswith("-") and len(word) > 1:
            letters = word[1:]
            while letters:
                letter, letters = letters[0], letters[1:]
                if letter not in _LETTERS:
                    raise UsageError(f"invalid option -- '{letter}'")
                option = _LETTERS[letter]
                if option in _BARE:
                    yield Given(option, "", word)
                    continue
                if letters:
                    yield Given(option, letters, word)
                elif at == len(words):
                    raise UsageError(f"option requires an argument -- '{letter}'")
                else:
                    yield Given(option, words[at], f"{word} {words[at]}")
                    at += 1
                break
        else:
            yield Given(None, word, word)


def _long(text: str) -> tuple[Option, str | None]:
    name, equals, rest = text.partition("=")
    argument = rest if equals else None
    matches = [option for option in Option if option.value.startswith(name)]
    exact = [option for option in matches if option.value == name]
    if not matches:
        raise UsageError(f"unrecognized option '--{name}'")
    if len(matches) > 1 and not exact:
        listed = " ".join(f"'--{option.value}'" for option in matches)
        raise UsageError(f"option '--{text}' is ambiguous; possibilities: {listed}")
    option = (exact or matches)[0]
    if argument is not None and option in _BARE:
        raise UsageError(f"option '--{option.value}' doesn't allow an argument")
    return option, argument
