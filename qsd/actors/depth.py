"""How many nodes may stand on one another.

A request passes from node to node by calls, and so do answers, lengths and drained scopes: what is too deep for the
stack would fail half-way through. The reference takes more, if one waits: a minute and a half for a thousand raw
nodes, and four times that for each doubling.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Final

from qsd.actors.edges import Edge, info_of
from qsd.block.graph import reach
from qsd.errors import QmpError

if TYPE_CHECKING:
    from qsd.actors.node import Node

# libvirt's chains have 200 images at most, with a file below each.
MAX_DEPTH: Final = 500
# Python frames of the daemon's process: up to ten are under way for one node, and twice as many where a request
# ends at once.
RECURSION_LIMIT: Final = 1000 + 20 * MAX_DEPTH


def check_depth(new: Collection[tuple[Edge, Node]], gone: Collection[int] = ()) -> None:
    """Raise QmpError when nodes stand too deep with these edges to these nodes, and without those by their keys.

    ``new`` may hold edges that lead elsewhere now.
    """
    more: dict[Node, list[Node]] = {}
    users: dict[Node, list[Node]] = {}
    ignored = {*gone, *(edge.key for edge, _child in new)}
    for edge, child in new:
        if edge.parent is not None:
            more.setdefault(edge.parent, []).append(child)
            users.setdefault(child, []).append(edge.parent)

    def parents(node: Node) -> list[Node]:
        live = (edge.parent for edge in info_of(node).parents if edge.key not in ignored)
        return [parent for parent in (*live, *users.get(node, ())) if parent is not None]

    def children(node: Node) -> Iterable[Node]:
        live = (edge.node for edge in info_of(node).children.values() if edge.key not in ignored)
        return (*live, *more.get(node, ()))

    level = {node for node in reach(more, parents) if not parents(node)}
    for _level in range(MAX_DEPTH):
        level = {child for node in level for child in children(node)}
        if not level:
            return
    raise QmpError(f"Block nodes cannot be stacked more than {MAX_DEPTH} deep")
