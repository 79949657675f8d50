"""blockdev-set-active: handing images over to another owner and taking them back.

An inactive node holds no locks and refuses writes. It may stand above an active one, never below one.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from qsd.actors.change import Change
from qsd.actors.edges import RootEdge, info_of
from qsd.actors.topology import Topology
from qsd.block.permissions import Perm
from qsd.block.plan import WRITING
from qsd.errors import QmpError, errno_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from qsd.actors.node import Node


async def set_active(topology: Topology, name: str | None, *, active: bool) -> None:
    """Switch the node ``name`` and what is below it, or all nodes. Call under the topology's lock.

    Raises QmpError and leaves all as they were (the reference leaves those switched that came first).
    """
    if name is None:
        tops = list(topology.nodes.values())
    else:
        tops = [topology.find(name, "Failed to find node with node-name='{}'")]
    if active:
        await _activate(topology, tops)
        return
    what = "all nodes" if name is None else "node"
    if name is not None and any(parent.active for parent in _node_parents(tops[0])):
        raise QmpError("Node has active parent node")
    try:
        await _inactivate(topology, tops)
    except QmpError as error:
        raise error.prefixed(f"Failed to inactivate {what}: ") from None


async def _activate(topology: Topology, tops: Iterable[Node]) -> None:
    nodes = [node for node in topology.below(tops) if not node.active]
    if nodes:
        change = Change(topology, nodes)
        for node in nodes:
            change.activate(node, active=True)
        await change.run()


async def _inactivate(topology: Topology, tops: list[Node]) -> None:
    nodes = going_inactive(topology, tops)
    if nodes:
        change = Change(topology, nodes)
        for node in nodes:
            change.activate(node, active=False)
        await change.run()


def going_inactive(topology: Topology, tops: Sequence[Node]) -> list[Node]:
    """What is inactivated with ``tops``, parents first. Raises QmpError where somebody would go on writing."""
    nodes: list[Node] = []
    # Parents come first, so every parent's fate is known before its child's: a child that an active node still
    # needs stays active.
    for node in topology.below(tops):
        parents = _node_parents(node)
        if node.active and (node in tops or all(p in nodes or not p.active for p in parents)):
            nodes.append(node)
    for node in nodes:
        if any(_keeps_active(edge) for edge in info_of(node).parents if isinstance(edge, RootEdge)):
            raise QmpError(errno_text(errno.EPERM))
    return nodes


def _keeps_active(edge: RootEdge) -> bool:
    if edge.options.job is not None or edge.options.amends:
        # It would go on writing (the reference's does) to what is somebody else's.
        return True
    return bool(edge.wanted.perm & (WRITING | Perm.RESIZE)) and not edge.options.allow_inactive


def _node_parents(node: Node) -> list[Node]:
    return [edge.parent for edge in info_of(node).parents if edge.parent is not None]
