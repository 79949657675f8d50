"""A drained scope: nodes that have nothing in flight and start nothing, until it is left."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qsd.actors.node import Node
    from qsd.actors.topology import Topology


@asynccontextmanager
async def drained(topology: Topology, nodes: Iterable[Node]) -> AsyncIterator[None]:
    """Hold ``nodes`` inside the scope.

    Parents are held before their children, as what a parent has in flight needs them. Nobody may wait for I/O of
    these nodes inside the scope, nor for I/O of a node that needs one of them.
    """
    wanted = set(nodes)
    held: list[Node] = []
    try:
        for node in topology.below(wanted):
            if node in wanted:
                held.append(node)
                await node.hold()
        yield
    finally:
        for node in reversed(held):
            node.release()
