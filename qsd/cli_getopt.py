"""The C library's long option rules, as a pure function over an argument list.

Long names may be cut to a unique prefix, take their argument after ``=`` or as the next word; one-letter options
may stand together (``-hV``); words that are no options are given in order. Which options there are is a grammar.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any, Final

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


@attrs.frozen
class Grammar:
    """The options of a program, long names as values: ``bare`` take no argument, ``letters`` are short names.

    ``takes_rest``: words after ``--`` are given, too; else they are left out.
    """

    options: type[Enum]
    bare: frozenset[Enum]
    letters: dict[str, Enum]
    takes_rest: bool = False


DAEMON: Final = Grammar(
    Option,
    frozenset({Option.DAEMONIZE, Option.HELP, Option.VERSION}),
    {"h": Option.HELP, "T": Option.TRACE, "V": Option.VERSION},
)


class UsageError(Exception):
    """The argument list breaks the rules; the text is the C library's."""


@attrs.frozen
class Given:
    """One option (None: a stray word) with its argument, and ``where``: how messages call it, as it was typed."""

    option: Any
    argument: str
    where: str


def options(words: Sequence[str], grammar: Grammar = DAEMON) -> Iterator[Given]:
    """Yield what ``words`` (without the program's name) say, in order. Raises UsageError when it gets there."""
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if word == "--":
            if grammar.takes_rest:
                yield from (Given(None, rest, rest) for rest in words[at:])
            return
        if word.startswith("--"):
            option, argument = _long(word[2:], grammar)
            if argument is None and option not in grammar.bare:
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
                if letter not in grammar.letters:
                    raise UsageError(f"invalid option -- '{letter}'")
                option = grammar.letters[letter]
                if option in grammar.bare:
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


def _long(text: str, grammar: Grammar) -> tuple[Enum, str | None]:
    name, equals, rest = text.partition("=")
    argument = rest if equals else None
    matches = [option for option in grammar.options if option.value.startswith(name)]
    exact = [option for option in matches if option.value == name]
    if not matches:
        raise UsageError(f"unrecognized option '--{text}'")
    if len(matches) > 1 and not exact:
        listed = " ".join(f"'--{option.value}'" for option in matches)
        raise UsageError(f"option '--{text}' is ambiguous; possibilities: {listed}")
    option = (exact or matches)[0]
    if argument is not None and option in grammar.bare:
        raise UsageError(f"option '--{option.value}' doesn't allow an argument")
    return option, argument
