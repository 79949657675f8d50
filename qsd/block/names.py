"""Node names: which are allowed, and the ones made up for nodes that were given none."""

from __future__ import annotations

import re
from collections.abc import Callable

from qsd.errors import QmpError

MAX_NAME = 31
_WELL_FORMED = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*")


def is_well_formed(name: str) -> bool:
    """QEMU's rule for identifiers: a letter, then letters, digits, ``-``, ``.`` and ``_``."""
    return _WELL_FORMED.fullmatch(name) is not None


def check_node_name(name: str) -> None:
    """Raise QmpError when ``name`` cannot be a user's node name."""
    if not is_well_formed(name):
        raise QmpError(f"Invalid node-name: '{name}'")
    if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME:
        raise QmpError("Node name too long")


class NameGenerator:
    """Makes ``#block`` + counter + two random digits, as the reference does. ``digits`` returns 0..99."""

    def __init__(self, digits: Callable[[], int]) -> None:
        self._digits = digits
        self._counter = 0

    def next(self) -> str:
        """A name no user can choose, and that was not made up before."""
        name = f"#block{self._counter}{self._digits():02d}"
        self._counter += 1
        return name
