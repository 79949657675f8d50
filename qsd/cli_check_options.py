"""The words of ``qsd check``: those of ``qemu-img check``, what is wrong with them in the reference's words."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, Final

import attrs

from qsd.cli_getopt import Grammar, UsageError, options
from qsd.drivers.qcow2.examining import Repairs
from qsd.errors import QmpError

_HELP: Final = """\
Usage: {prog} [-f FMT | --image-opts] [-T CACHE] [-r leaks|all] [--output human|json] [-U] [-q]
       {pad} [--progress] [--object OBJECT]... IMAGE

Check a qcow2 image, and repair it. The image must not be open for writing elsewhere.

  -f, --format FMT           the image's format (default: what its first bytes say)
  --image-opts               IMAGE is a list: [driver=qcow2,]file.filename=FILE[,encrypt.key-secret=ID]
  -T, --cache CACHE          none and directsync leave nothing of the image in the page cache, unsafe does not
                             wait for the disk; writeback (default), writethrough
  -r, --repair leaks|all     give leaked clusters back; all: also counts, flags, the refcount structure,
                             and tables of snapshots and bitmaps
  --output human|json        what the answer looks like
  -U, --force-share          look at an image others write to; what is shown may be wrong
  -q, --quiet                say nothing but what is wrong, on stderr
  --progress                 show on stderr how far it is
  --object TYPE,id=ID[,PROPERTY=VALUE]...
                             make an object: a secret that opens an encrypted image. Without it the image is
                             checked all the same

Exit code: 0 clean, 1 not checked, 2 corrupt, 3 leaks only, 63 the format cannot be checked.
"""
CACHES: Final = ("none", "off", "writeback", "writethrough", "directsync", "unsafe")


class Option(Enum):
    """The options; the value is the long name. Listed where one is ambiguous, in the reference's order."""

    HELP = "help"
    FORMAT = "format"
    IMAGE_OPTS = "image-opts"
    CACHE = "cache"
    REPAIR = "repair"
    FORCE_SHARE = "force-share"
    OUTPUT = "output"
    QUIET = "quiet"
    OBJECT = "object"
    PROGRESS = "progress"


_GRAMMAR: Final = Grammar(
    Option,
    frozenset({Option.HELP, Option.IMAGE_OPTS, Option.FORCE_SHARE, Option.QUIET, Option.PROGRESS}),
    {
        "h": Option.HELP,
        "f": Option.FORMAT,
        "T": Option.CACHE,
        "r": Option.REPAIR,
        "U": Option.FORCE_SHARE,
        "q": Option.QUIET,
    },
    takes_rest=True,
)


@attrs.frozen(kw_only=True)
class Options:
    """What a check was asked for. ``objects`` are arguments of ``--object`` that nobody has parsed."""

    image: str = ""
    image_opts: bool = False
    format: str | None = None
    repairs: Repairs = Repairs.NONE
    cache: str = "writeback"
    objects: tuple[str, ...] = ()
    output: str = "human"
    quiet: bool = False
    force_share: bool = False
    progress: bool = False
    wants_help: bool = False


def parse(words: Sequence[str]) -> Options:
    """What the words say. Raises UsageError; what the cache is called is asked later, as the reference does."""
    found = Options()
    images: list[str] = []
    for given in options(words, _GRAMMAR):
        argument = given.argument
        match given.option:
            case Option.HELP:
                return Options(wants_help=True)
            case Option.OUTPUT:
                _expect("--output", argument, ("human", "json"))
                found = attrs.evolve(found, output=argument)
            case Option.REPAIR:
                _expect("--repair (-r)", argument, ("leaks", "all"))
                found = attrs.evolve(found, repairs=Repairs(argument))
            case Option.FORMAT:
                found = attrs.evolve(found, format=argument)
            case Option.CACHE:
                found = attrs.evolve(found, cache=argument)
            case Option.OBJECT:
                found = attrs.evolve(found, objects=(*found.objects, argument))
            case None:
                images.append(argument)
            case _:
                switch: dict[str, Any] = {given.option.value.replace("-", "_"): True}
                found = attrs.evolve(found, **switch)
    if len(images) != 1:
        raise UsageError("Expecting one image file name")
    return attrs.evolve(found, image=images[0])


def _expect(option: str, argument: str, allowed: tuple[str, str]) -> None:
    if argument not in allowed:
        raise UsageError(f"{option} expects '{allowed[0]}' or '{allowed[1]}', not '{argument}'")


def check_together(found: Options) -> None:
    """Raise QmpError where options do not go together, or the cache has no such name."""
    if found.image_opts and found.format is not None:
        raise QmpError("--image-opts and --format are mutually exclusive")
    if found.cache not in CACHES:
        raise QmpError(f"Invalid source cache option: {found.cache}")


def help_text(prog: str) -> str:
    """The text of ``--help``."""
    return _HELP.format(prog=prog, pad=" " * len(prog))
