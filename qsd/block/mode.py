"""How a node is opened: the options every node takes, resolved."""

from __future__ import annotations

from enum import Enum

import attrs


class DetectZeroes(str, Enum):
    """The node option detect-zeroes."""

    OFF = "off"
    ON = "on"
    UNMAP = "unmap"


@attrs.frozen
class Mode:
    """The options every node takes, inheritance applied."""

    read_only: bool = False
    auto_read_only: bool = False
    force_share: bool = False
    discard_unmap: bool = False
    detect_zeroes: DetectZeroes = DetectZeroes.OFF
    cache_direct: bool = False
    cache_no_flush: bool = False
    active: bool = True
