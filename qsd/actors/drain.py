"""Drained scopes: nodes that have nothing in flight and start nothing, until the scope is left.

What comes in meanwhile over a root edge is kept back on the edge, so that it goes where the edge then leads to;
what comes from other nodes is kept back by the node.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from qsd.actors.edges import RootEdge, info_of

if TYPE_CHECKING:
    from qsd.actors.node import Node
    from qsd.actors.topology import Topology


class Drained:
    """One node's scope."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._edges: list[RootEdge] = []

    async def begin(self) -> None:
        """Return when nothing is in flight; what raises from here (cancelled) has left the scope again."""
        self._edges = [edge for edge in info_of(self._node).parents if isinstance(edge, RootEdge)]
        for edge in self._edges:
            edge.hold()
        try:
            await self._node.hold()
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Go on, wherever the edges lead to now."""
        self._node.release()
        for edge in self._edges:
            edge.release()


@asynccontextmanager
async def drained(topology: Topology, nodes: Iterable[Node]) -> AsyncIterator[None]:
    """Keep ``nodes``, and all that stand on them, drained inside the scope.

    Nodes are drained from the top down, as what a parent has in flight needs its children. One that stands below
    another of ``nodes`` is left alone: that one's driver may have to read and write it inside the scope, and
    nothing else comes through it.
    """
    wanted = set(nodes)
    tops = topology.above([node for node in wanted if len(wanted & topology.above([node])) == 1])
    scopes: list[Drained] = []
    try:
        for key in topology.snapshot(tops, is_near=True).order():
            scope = Drained(topology.living[key])
            await scope.begin()
            scopes.append(scope)
        yield
    finally:
        for scope in reversed(scopes):
            scope.end()


@asynccontextmanager
async def drained_alone(node: Node) -> AsyncIterator[None]:
    """Keep ``node`` drained inside a scope that no other meets: who holds it and who resizes it take turns.

    Raises OSError when the node breaks down.
    """
    scope = Drained(node)
    while True:
        await node.wait_released()
        await scope.begin()
        if node.is_held_once:
            break
        # Another scope began while this one waited for requests to end: it is that one's turn.
        scope.end()
    try:
        with node.counted():
            yield
    finally:
        scope.end()
