"""Permissions of the parents of one node put together, and the words when they do not go together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from qsd.block.permissions import Perm, perm_text
from qsd.errors import QmpError


class ParentEdge(Protocol):
    """An edge seen from the child: who uses it, as what, and with which permissions."""

    @property
    def parent_description(self) -> str:
        """``node 'x'`` or ``an unnamed block device``."""

    @property
    def name(self) -> str:
        """The edge's name."""

    perm: Perm
    shared: Perm


def cumulative(edges: Iterable[ParentEdge]) -> tuple[Perm, Perm]:
    """What all parents use together, and what all of them share."""
    perm, shared = Perm.NONE, Perm.ALL
    for edge in edges:
        perm |= edge.perm
        shared &= edge.shared
    return perm, shared


def check(node_name: str, edges: Sequence[ParentEdge]) -> None:
    """Raise QmpError for the first pair of parents that conflict."""
    for one in edges:
        for other in edges:
            if one is other:
                continue
            clash = one.perm & ~other.shared
            if clash:
                edge = f"(uses node '{node_name}' as"
                raise QmpError(
                    f"Permission conflict on node '{node_name}': permissions '{perm_text(clash)}' are both "
                    f"required by {one.parent_description} {edge} '{one.name}' child) and unshared by "
                    f"{other.parent_description} {edge} '{other.name}' child)."
                )
