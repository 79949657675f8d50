"""The live graph: its nodes by name, its edges, and snapshots of it to plan changes on.

Owned by the graph actor. Whoever changes it holds ``lock``; whoever only looks does so between awaits.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from itertools import count
from typing import TYPE_CHECKING, Any

import attrs
import trio

from qsd.actors.edges import Edge, NodeState, RootEdge, info_of
from qsd.block.graph import EdgeFacts, NodeFacts, Snapshot, reach
from qsd.block.names import NameGenerator, check_node_name
from qsd.block.permissions import Perm
from qsd.block.plan import Rights
from qsd.errors import QmpError

if TYPE_CHECKING:
    from qsd.actors.node import Node
    from qsd.drivers.base import Driver, Mode


@attrs.frozen
class NewMode:
    """What a node is to be reopened with."""

    options: Any
    mode: Mode


class Topology:
    """See the module. ``nodes`` holds the open nodes, oldest first; ``roots`` the root edges, oldest first."""

    def __init__(self) -> None:
        self.lock = trio.Lock()
        self.nodes: dict[str, Node] = {}
        self.roots: list[RootEdge] = []
        self.living: dict[int, Node] = {}
        self._names = NameGenerator(lambda: random.randrange(100))
        self._taken: set[str] = set()
        self._keys = count(1)

    # -- names ------------------------------------------------------------------------------------------------

    def take_name(self, wanted: str | None) -> str:
        """Reserve ``wanted``, or a name that is made up. Raises QmpError; ``release_name`` gives it back."""
        if wanted is None:
            name = self._names.next()
        else:
            check_node_name(wanted)
            name = wanted
        if name in self._taken:
            raise QmpError(f"Duplicate nodes with node-name='{name}'")
        self._taken.add(name)
        return name

    def free_name(self, wanted: str | None) -> str:
        """What a node would be called that is not made after all: ``wanted``, or a name that is made up."""
        return self._names.next() if wanted is None else wanted

    def release_name(self, name: str) -> None:
        """The name is free again."""
        self._taken.discard(name)

    def next_key(self) -> int:
        """A number no other node has or will have."""
        return next(self._keys)

    # -- looking ----------------------------------------------------------------------------------------------

    def find(self, name: str, error: str) -> Node:
        """The open node ``name``; raises QmpError with ``error``, in which ``{}`` stands for the name."""
        found = self.nodes.get(name)
        if found is None:
            raise QmpError(error.replace("{}", name))
        return found

    def below(self, nodes: Iterable[Node]) -> list[Node]:
        """``nodes`` and everything they stand on, parents before children."""
        snapshot = self.snapshot(nodes)
        return [self.living[key] for key in snapshot.order()]

    def above(self, nodes: Iterable[Node]) -> set[Node]:
        """``nodes`` and everything that stands on them."""
        return reach(nodes, lambda node: [edge.parent for edge in info_of(node).parents if edge.parent is not None])

    def snapshot(self, touched: Iterable[Node], *, is_near: bool = False) -> Snapshot:
        """The part of the graph that a change of ``touched`` can reach: them and what is below, and who uses it.

        ``is_near`` leaves out what is below them.
        """
        nodes: dict[int, NodeFacts] = {}
        edges: dict[int, EdgeFacts] = {}
        waiting = list(touched)
        while waiting:
            node = waiting.pop()
            info = info_of(node)
            if info.key in nodes:
                continue
            nodes[info.key] = facts_of(node)
            for edge in info.parents:
                edges[edge.key] = edge_facts(edge)
            if not is_near:
                waiting.extend(edge.node for edge in info.children.values())
        return Snapshot(nodes, tuple(edges[key] for key in sorted(edges)))

    def orphans(self, nodes: Iterable[Node]) -> list[Node]:
        """Those of ``nodes`` nobody wants any more."""
        return [node for node in nodes if self.is_orphan(node)]

    @staticmethod
    def is_orphan(node: Node) -> bool:
        """True for a node that lives on without a reason."""
        info = info_of(node)
        return not (
            info.is_monitor_owned
            or info.parents
            or info.pins
            or info.state in (NodeState.OPENING, NodeState.CLOSING)
        )

    @contextlib.contextmanager
    def pinned(self, nodes: Iterable[Node]) -> Iterator[None]:
        """Keep ``nodes`` from being deleted."""
        held = list(nodes)
        for node in held:
            info_of(node).pins += 1
        try:
            yield
        finally:
            for node in held:
                info_of(node).pins -= 1


def facts_of(node: Node) -> NodeFacts:
    """A node as a snapshot shows it."""
    ragged = bool(node.length % node.limits.request_alignment)
    mode = node.mode
    return NodeFacts(node.name, mode.read_only, node.active, ragged=ragged, force_share=mode.force_share)


def edge_facts(edge: Edge) -> EdgeFacts:
    """An edge as a snapshot shows it."""
    parent = info_of(edge.parent).key if edge.parent is not None else None
    return EdgeFacts(edge.key, parent, info_of(edge.node).key, edge.name, edge.parent_text, edge.perm, edge.shared)


@contextlib.contextmanager
def pretending(driver: Driver, new: NewMode | None) -> Iterator[None]:
    """Let ``driver`` be asked what it would want in its new mode. Nothing else runs meanwhile: no awaits inside."""
    if new is None:
        yield
        return
    before = driver.options, driver.mode
    driver.options, driver.mode = new.options, new.mode
    try:
        yield
    finally:
        driver.options, driver.mode = before


def rights_of(edge: RootEdge, *, active: bool) -> Rights:
    """What a root edge uses and shares on an active or inactive node."""
    return edge.wanted if active else Rights(Perm.NONE, Perm.ALL)
