"""Making an open node read-only or writable, with the children whose options stand inside its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from qsd.actors.change import Change
from qsd.actors.edges import info_of
from qsd.actors.topology import NewMode, Topology
from qsd.drivers.base import ChildRole

if TYPE_CHECKING:
    from qsd.actors.node import Node


async def set_read_only(topology: Topology, node: Node, *, read_only: bool) -> None:
    """Do it under the topology's lock. Raises QmpError and leaves everything as it was."""
    if node.mode.read_only == read_only:
        return
    modes: dict[Node, NewMode] = {}
    _gather(modes, node, read_only=read_only)
    options = attrs.evolve(info_of(node).options, read_only=read_only)
    modes[node] = attrs.evolve(modes[node], options=options)
    change = Change(topology, modes, is_near=True)
    for each, new in modes.items():
        change.reopen(each, new)
    await change.run()


def _gather(modes: dict[Node, NewMode], node: Node, *, read_only: bool) -> None:
    info = info_of(node)
    modes[node] = NewMode(info.options, attrs.evolve(node.mode, read_only=read_only))
    for edge in info.children.values():
        child = info_of(edge.node)
        inherits = child.inline_parent is node and edge.role is not ChildRole.COW
        if inherits and child.options.read_only is None:
            _gather(modes, edge.node, read_only=read_only)
