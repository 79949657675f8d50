"""How the options every node takes become a ``Mode``, and what an inline child inherits."""

from __future__ import annotations

from typing import Any

from qsd.block.mode import DetectZeroes, Mode
from qsd.errors import QmpError


def resolve_mode(options: Any, parent: Mode | None, *, is_protocol: bool) -> Mode:
    """The node's mode from its options; ``parent`` is the mode of the node it stands inline under, or None.

    Raises QmpError for combinations the reference refuses.
    """
    cache = options.cache
    discard = _text(options.discard)
    detect = DetectZeroes(_text(options.detect_zeroes) or "off")
    inherited = parent or Mode()
    # An inline protocol child passes discards on unless told otherwise: its parent decides.
    default_discard = parent is not None and is_protocol
    mode = Mode(
        read_only=_given(options.read_only, inherited.read_only),
        auto_read_only=_given(options.auto_read_only, inherited.auto_read_only),
        force_share=_given(options.force_share, inherited.force_share),
        discard_unmap=default_discard if discard is None else discard == "unmap",
        detect_zeroes=detect,
        cache_direct=_given(cache.direct if cache is not None else None, inherited.cache_direct),
        cache_no_flush=_given(cache.no_flush if cache is not None else None, inherited.cache_no_flush),
        active=_given(options.active, inherited.active),
    )
    if mode.force_share and not mode.read_only:
        raise QmpError("force-share=on can only be used with read-only images")
    if detect is DetectZeroes.UNMAP and not mode.discard_unmap:
        raise QmpError("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")
    return mode


def _given(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _text(value: Any) -> str | None:
    return None if value is None else str(value.value)
