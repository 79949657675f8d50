"""Carrying permissions through the graph: prepare every node that is touched, then commit or abort all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from qsd.actors.edges import Edge, info
from qsd.block import conflicts
from qsd.block.mode import Mode
from qsd.block.permissions import Perm
from qsd.errors import QmpError

if TYPE_CHECKING:
    from qsd.actors.node import Node

_WRITING = Perm.WRITE | Perm.WRITE_UNCHANGED | Perm.RESIZE


def below(nodes: Iterable[Node]) -> list[Node]:
    """The nodes and all their descendants, every parent before its children."""
    order: list[Node] = []
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        if node in seen:
            return
        seen.add(node)
        for child in node.driver.children.values():
            assert isinstance(child, Edge)
            visit(child.node)
        order.append(node)

    for node in nodes:
        visit(node)
    order.reverse()
    return order


class PermissionUpdate:
    """New permissions for ``nodes`` and everything below them. ``modes`` are modes about to be taken (reopen)."""

    def __init__(self, nodes: Iterable[Node], modes: Mapping[Node, Mode] | None = None) -> None:
        self._order = below(nodes)
        self._modes = modes or {}
        self._prepared: list[Node] = []
        self._edges: list[tuple[Edge, Perm, Perm]] = []
        self._sums: dict[Node, tuple[Perm, Perm]] = {}

    async def prepare(self) -> None:
        """Check and get ready. Raises QmpError; then everything is as before."""
        try:
            for node in self._order:
                await self._prepare_node(node)
        except BaseException:
            self.abort()
            raise

    async def _prepare_node(self, node: Node) -> None:
        parents = info(node).parents
        conflicts.check(node.name, parents)
        perm, shared = conflicts.cumulative(parents)
        mode = self._modes.get(node, node.mode)
        if perm & _WRITING and mode.read_only:
            if node in self._modes:
                raise QmpError(f"Read-only block node '{node.name}' cannot support read-write users")
            raise QmpError("Block node is read-only")
        self._sums[node] = (perm, shared)
        self._prepared.append(node)
        # An inactive node leaves the image to somebody else: it uses nothing and locks nothing.
        await node.driver.prepare_permissions(*((perm, shared) if node.active else (Perm.NONE, Perm.ALL)))
        for name, child in node.driver.children.items():
            assert isinstance(child, Edge)
            self._edges.append((child, child.perm, child.shared))
            child.perm, child.shared = node.driver.child_permissions(name, perm, shared)
            if not node.active:
                child.perm, child.shared = Perm.NONE, Perm.ALL

    def abort(self) -> None:
        """Undo what was prepared, in reverse."""
        for edge, perm, shared in reversed(self._edges):
            edge.perm, edge.shared = perm, shared
        for node in reversed(self._prepared):
            node.driver.abort_permissions()
        self._edges.clear()
        self._prepared.clear()

    def commit(self) -> None:
        """Keep it."""
        for node in self._prepared:
            node.driver.commit_permissions()
            record = info(node)
            record.perm, record.shared = self._sums[node]
            node.set_writable(writable=bool(record.perm & (Perm.WRITE | Perm.WRITE_UNCHANGED)))


async def update(nodes: Iterable[Node]) -> None:
    """Prepare and commit in one step. Raises QmpError; then everything is as before."""
    change = PermissionUpdate(nodes)
    await change.prepare()
    change.commit()
