"""blockdev-reopen: several nodes change their options, all or none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qsd.actors.edges import Edge, info
from qsd.actors.permit import PermissionUpdate, below
from qsd.block.mode import Mode
from qsd.block.modes import resolve_mode
from qsd.errors import QmpError

if TYPE_CHECKING:
    from qsd.actors.graph import Graph
    from qsd.actors.node import Node


class ReopenTransaction:
    """Prepare every node, then the permissions under the new modes; commit all, or abort in reverse."""

    def __init__(self, graph: Graph, wanted: dict[Node, Any]) -> None:
        self._graph = graph
        self._wanted = dict(wanted)
        self._modes: dict[Node, Mode] = {}
        self._swaps: list[tuple[Edge, Node]] = []
        self._prepared: list[Node] = []

    async def run(self) -> None:
        """Do it. Raises QmpError; then everything is as before. Call inside a drained scope."""
        for node, options in list(self._wanted.items()):
            self._plan(node, options, None)
        touched = [*self._modes, *(target for _, target in self._swaps), *(edge.node for edge, _ in self._swaps)]
        update: PermissionUpdate | None = None
        try:
            for node, options in self._wanted.items():
                self._prepared.append(node)
                await node.driver.prepare_reopen(options, self._modes[node])
            self._swap()
            update = PermissionUpdate(touched, self._modes)
            await update.prepare()
        except BaseException:
            self._swap_back()
            for node in reversed(self._prepared):
                node.driver.abort_reopen()
            raise
        for node, options in self._wanted.items():
            node.driver.commit_reopen(options, self._modes[node])
            info(node).options = options
        update.commit()
        for node in reversed(below(touched)):
            node.driver.refresh_length()
            node.refresh()

    def _plan(self, node: Node, options: Any, parent_mode: Mode | None) -> None:
        if options.driver.value != node.driver.name:
            raise QmpError("Cannot change the option 'driver'")
        mode = resolve_mode(options, parent_mode, is_protocol=not node.driver.child_specs)
        if mode.force_share != node.mode.force_share:
            raise QmpError("Cannot change the option 'force-share'")
        if mode.active != node.active and options.active is not None:
            raise QmpError("Cannot change the option 'active'")
        self._modes[node] = mode
        self._wanted[node] = options
        for name, child in node.driver.children.items():
            assert isinstance(child, Edge)
            given = getattr(options, name, None)
            if isinstance(given, str):
                target = self._graph.lookup_child(given)
                if target is not child.node:
                    if node in below([target]):
                        raise QmpError(
                            f"Making '{target.name}' a {name} child of '{node.name}' would create a cycle"
                        )
                    self._swaps.append((child, target))
            elif given is not None:
                if given.node_name not in (None, child.node.name) or not child.is_owner:
                    raise QmpError(f"Cannot change the option '{name}'")
                self._plan(child.node, given, mode)

    def _swap(self) -> None:
        for position, (edge, target) in enumerate(self._swaps):
            old = edge.node
            info(old).parents.remove(edge)
            info(target).parents.append(edge)
            edge.point_to(target)
            self._swaps[position] = (edge, old)

    def _swap_back(self) -> None:
        for edge, old in reversed(self._swaps):
            if edge in info(edge.node).parents and edge.node is not old and edge not in info(old).parents:
                info(edge.node).parents.remove(edge)
                info(old).parents.append(edge)
                edge.point_to(old)
