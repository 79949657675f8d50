"""Permissions of the block graph: what a parent uses on a child, and what it lets others use."""

from __future__ import annotations

from enum import IntFlag


class Perm(IntFlag):
    """The four permissions; the bit number is also the lock byte's offset (100+n used, 200+n unshared)."""

    NONE = 0
    CONSISTENT_READ = 1
    WRITE = 2
    WRITE_UNCHANGED = 4
    RESIZE = 8
    ALL = 15


# Names as they stand in error texts and in x-debug-query-block-graph, in bit order.
PERM_NAMES: tuple[tuple[Perm, str], ...] = (
    (Perm.CONSISTENT_READ, "consistent read"),
    (Perm.WRITE, "write"),
    (Perm.WRITE_UNCHANGED, "write unchanged"),
    (Perm.RESIZE, "resize"),
)


def perm_text(perm: Perm) -> str:
    """``write, resize``: the permissions of the set, as conflict texts name them."""
    return ", ".join(name for bit, name in PERM_NAMES if perm & bit)
