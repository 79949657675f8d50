"""The block graph as a value: nodes and edges, and what follows from them.

A snapshot may be a part of the graph: an edge whose parent is not in it is held by somebody outside (an export, a
node that does not change) and counts as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

import attrs

from qsd.block.permissions import Perm
from qsd.errors import QmpError

T = TypeVar("T", bound=Hashable)


def reach(start: Iterable[T], onward: Callable[[T], Iterable[T]]) -> set[T]:
    """``start`` and everything that is met going ``onward`` from there; each is gone on from once."""
    found: set[T] = set()
    waiting = list(start)
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.add(each)
            waiting.extend(onward(each))
    return found


UNNAMED = "an unnamed block device"


def cycle_text(child: str, name: str, parent: str) -> str:
    """The error of an edge called ``name`` that would close a cycle."""
    return f"Making '{child}' a {name} child of '{parent}' would create a cycle"


@attrs.frozen
class NodeFacts:
    """A node. ``changing``: the planned change gives it a new mode. ``ragged``: its length is no multiple of its
    request alignment. ``force_share``: nodes that use it share everything, whatever they need.
    """

    name: str
    read_only: bool = False
    active: bool = True
    changing: bool = False
    ragged: bool = False
    force_share: bool = False


@attrs.frozen
class EdgeFacts:
    """An edge from ``parent`` (None: ``parent_text`` is no node) to ``child``, with what it uses and shares."""

    key: int
    parent: int | None
    child: int
    name: str
    parent_text: str = UNNAMED
    perm: Perm = Perm.NONE
    shared: Perm = Perm.ALL


@attrs.frozen
class Snapshot:
    """Nodes by key, and edges in the order in which they were attached."""

    nodes: Mapping[int, NodeFacts]
    edges: tuple[EdgeFacts, ...] = ()

    def edges_to(self, node: int) -> tuple[EdgeFacts, ...]:
        """Who uses ``node``, newest first (the order in which conflicts are looked for)."""
        return tuple(edge for edge in reversed(self.edges) if edge.child == node)

    def with_edge(self, edge: EdgeFacts) -> Snapshot:
        """Attach ``edge`` as the newest. Raises QmpError when it would close a cycle or join what must not be."""
        if edge.parent is not None:
            self._check(edge, edge.parent)
        return attrs.evolve(self, edges=(*self.edges, edge))

    def without_edges(self, keys: Iterable[int]) -> Snapshot:
        """Detach edges."""
        gone = frozenset(keys)
        return attrs.evolve(self, edges=tuple(edge for edge in self.edges if edge.key not in gone))

    def with_node(self, key: int, facts: NodeFacts) -> Snapshot:
        """Add or change a node."""
        return attrs.evolve(self, nodes={**self.nodes, key: facts})

    def joined(self, other: Snapshot) -> Snapshot:
        """This part of a graph and another, of nodes that are not in this one."""
        edges = {edge.key: edge for edge in (*self.edges, *other.edges)}
        return Snapshot({**self.nodes, **other.nodes}, tuple(edges[key] for key in sorted(edges)))

    def _check(self, edge: EdgeFacts, parent_key: int) -> None:
        parent, child = self.nodes[parent_key], self.nodes[edge.child]
        if parent_key in self.below({edge.child}):
            raise QmpError(cycle_text(child.name, edge.name, parent.name))
        if parent.active and not child.active:
            raise QmpError(f"Inactive '{child.name}' can't be a {edge.name} child of active '{parent.name}'")

    def below(self, nodes: Iterable[int]) -> set[int]:
        """``nodes`` and everything they stand on."""
        children: dict[int, list[int]] = {}
        for edge in self.edges:
            if edge.parent is not None:
                children.setdefault(edge.parent, []).append(edge.child)
        return reach(nodes, lambda node: children.get(node, ()))

    def order_towards(self, after: Snapshot) -> list[int]:
        """The order to drain in while this graph becomes ``after``: a parent also comes before its new children.

        It reads what a new child holds, which a held child does not answer. A new edge that contradicts an old one
        does not count: what is in flight goes by the old ones.
        """
        both = self
        known = {(edge.parent, edge.child) for edge in self.edges}
        for edge in after.edges:
            if edge.parent is None or (edge.parent, edge.child) in known or edge.child not in self.nodes:
                continue
            if edge.parent not in both.below({edge.child}):
                both = attrs.evolve(both, edges=(*both.edges, edge))
        return both.order()

    def order(self) -> list[int]:
        """The nodes, every parent before its children: the order to drain in.

        A parent waits for its children, so holding a child first would keep the parent from ever getting idle.
        """
        waiting_for = dict.fromkeys(self.nodes, 0)
        children: dict[int, list[int]] = {}
        for edge in self.edges:
            if edge.parent in waiting_for and edge.child in waiting_for:
                waiting_for[edge.child] += 1
                children.setdefault(edge.parent, []).append(edge.child)
        ready = [node for node, count in waiting_for.items() if not count]
        order: list[int] = []
        for node in ready:
            order.append(node)
            for child in children.get(node, ()):
                waiting_for[child] -= 1
                if not waiting_for[child]:
                    ready.append(child)
        assert len(order) == len(waiting_for), "the graph has a cycle"
        return order
