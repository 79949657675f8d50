"""How many nodes may stand on one another.

A request passes from node to node by calls, and so do answers, lengths and drained scopes: what is too deep for the
stack would fail half-way through. The reference takes more, if one waits: a minute and a half for a thousand raw
nodes, and four times that for each doubling.
"""

from __future__ import annotations

from collections.abc import Collection
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


def new_heights(new: Collection[tuple[Edge, Node]], gone: Collection[Edge]) -> dict[Node, int]:
    """The ``NodeInfo.height`` of all nodes that may get another with edges to these nodes, and without others.

    ``new`` may hold edges that lead elsewhere now. Raises QmpError when nodes would stand too deep. Only what
    stands on these edges is looked at.
    """
    children: dict[Node, list[Node]] = {}
    users: dict[Node, list[Node]] = {}
    ignored = {edge.key for edge in (*gone, *(edge for edge, _child in new))}
    for edge, child in new:
        if edge.parent is not None:
            children.setdefault(edge.parent, []).append(child)
            users.setdefault(child, []).append(edge.parent)

    def parents(node: Node) -> list[Node]:
        live = (edge.parent for edge in info_of(node).parents if edge.key not in ignored)
        return [parent for parent in (*live, *users.get(node, ())) if parent is not None]

    changed = (edge.parent for edge in (*gone, *(edge for edge, _child in new)))
    above = reach((parent for parent in changed if parent is not None), parents)
    below: dict[Node, list[Node]] = {}
    waiting_for: dict[Node, int] = {}
    for node in above:
        live = (edge.node for edge in info_of(node).children.values() if edge.key not in ignored)
        below[node] = [*live, *children.get(node, ())]
        waiting_for[node] = sum(child in above for child in below[node])
    heights: dict[Node, int] = {}
    ready = [node for node in above if not waiting_for[node]]
    for node in ready:
        each = (heights[child] if child in above else info_of(child).height for child in below[node])
        heights[node] = 1 + max(each, default=0)
        if heights[node] > MAX_DEPTH:
            raise QmpError(f"Block nodes cannot be stacked more than {MAX_DEPTH} deep")
        for parent in parents(node):
            waiting_for[parent] -= 1
            if not waiting_for[parent]:
                ready.append(parent)
    return heights
