"""From the options a user gives a node to the mode it is opened in: defaults, inheritance, consistency."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from qsd.drivers.base import ChildRole, DetectZeroes, Mode
from qsd.errors import QmpError
from qsd.qapi.schema.block import BlockdevDiscardOptions

if TYPE_CHECKING:
    from qsd.qapi.schema.block import BlockdevOptions


def resolve_mode(options: BlockdevOptions, inherited: Mode | None = None, role: ChildRole = ChildRole.DATA) -> Mode:
    """The mode ``options`` ask for.

    ``inherited`` is the parent's mode for a child whose options stand inside the parent's, None for others: such a
    child takes over cache, read-only, auto-read-only and force-share where it says nothing itself, and passes
    discards on unless told otherwise (the node above decides). Below an inactive node all are inactive, whatever
    they say. The rest is never inherited. A backing file is read-only where it says nothing.
    """
    base = inherited or Mode()
    if role is ChildRole.COW and inherited is not None:
        base = attrs.evolve(base, read_only=True, auto_read_only=False)
    cache = options.cache
    discard = options.discard
    if discard is None:
        unmap = inherited is not None and role is not ChildRole.COW
    else:
        unmap = discard is BlockdevDiscardOptions.UNMAP
    return Mode(
        read_only=_or(options.read_only, base.read_only),
        auto_read_only=_or(options.auto_read_only, base.auto_read_only),
        force_share=_or(options.force_share, base.force_share),
        discard_unmap=unmap,
        detect_zeroes=DetectZeroes(options.detect_zeroes.value if options.detect_zeroes else "off"),
        cache_direct=_or(cache.direct if cache else None, base.cache_direct),
        cache_no_flush=_or(cache.no_flush if cache else None, base.cache_no_flush),
        active=_or(options.active, True) and base.active,
    )


def check_mode(mode: Mode) -> None:
    """Raise QmpError when the options contradict each other."""
    if mode.force_share and not mode.read_only:
        raise QmpError("force-share=on can only be used with read-only images")
    check_detect_zeroes(mode)


def check_detect_zeroes(mode: Mode) -> None:
    """Raise QmpError when zeroes are to be unmapped by a node that does not pass discards on."""
    if mode.detect_zeroes is DetectZeroes.UNMAP and not mode.discard_unmap:
        raise QmpError("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")


def _or(given: bool | None, default: bool) -> bool:
    return default if given is None else given
