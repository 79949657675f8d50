"""The block graph: one owner of which nodes there are and how they hang together.

Changes are messages, served one after the other. Each is prepared whole (names, opening, permissions) before
anything is kept; a change that fails leaves the graph, its permissions and the files' locks as they were.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import attrs

from qsd.actors import permit
from qsd.actors.core import Actor, receives
from qsd.actors.edges import Edge, NodeInfo, info
from qsd.actors.node import Node
from qsd.actors.supervisor import Floor, Supervisor
from qsd.block.modes import resolve_mode
from qsd.block.names import NameGenerator, check_node_name
from qsd.block.permissions import Perm
from qsd.drivers.base import Aio, Driver, Mode
from qsd.errors import QmpError


@attrs.frozen
class AddNode:
    """Open a node of the user's from visited BlockdevOptions."""

    options: Any


@attrs.frozen
class DeleteNode:
    """Close a node of the user's."""

    name: str


@attrs.frozen
class Reopen:
    """Change the options of several nodes, all or none."""

    options: tuple[Any, ...]


@attrs.frozen
class Attach:
    """Let somebody outside the graph use a node."""

    name: str
    perm: Perm
    shared: Perm


@attrs.frozen(eq=False)
class Detach:
    """End an attachment."""

    edge: Edge


@attrs.frozen
class Resize:
    """Give a node another length in bytes."""

    name: str
    size: int


@attrs.frozen
class SetActive:
    """Activate or inactivate one node, or all."""

    name: str | None
    active: bool


@asynccontextmanager
async def drained(nodes: Iterable[Node]) -> AsyncIterator[None]:
    """Nothing is in flight in the nodes or below them inside the scope; parents first, resumed whatever happens."""
    held: list[Node] = []
    try:
        for node in permit.below(nodes):
            held.append(node)
            await node.hold()
        yield
    finally:
        for node in reversed(held):
            node.release()


class _NodeHost:
    """What a driver gets from the daemon (``drivers.base.Host``)."""

    def __init__(self, aio: Aio, warn: Callable[[str], None]) -> None:
        self.aio = aio
        self.warn = warn
        self.node: Node | None = None

    def spawn(self, function: Callable[..., Any], *args: Any, name: str) -> None:
        assert self.node is not None
        self.node.spawn(function, *args, name=name)


class Graph(Actor):
    """See the module. ``drivers`` maps driver names to classes."""

    kind = "graph"

    def __init__(
        self,
        supervisor: Supervisor,
        drivers: dict[str, type[Driver]],
        aio: Aio,
        warn: Callable[[str], None],
        on_write_threshold: Callable[[Node, int, int], None],
    ) -> None:
        super().__init__("graph")
        self._supervisor = supervisor
        self._drivers = drivers
        self._aio = aio
        self._warn = warn
        self._on_write_threshold = on_write_threshold
        self._names = NameGenerator(lambda: random.randrange(100))
        self._nodes: dict[str, Node] = {}
        self._count = 0

    # -- reading ----------------------------------------------------------------------------------------------

    def nodes(self) -> list[Node]:
        """All nodes, newest first."""
        return sorted(self._nodes.values(), key=lambda node: -info(node).number)

    def find(self, name: str | None) -> Node | None:
        """The node of that name."""
        return self._nodes.get(name) if name is not None else None

    def lookup(self, name: str, *, device: str = "") -> Node:
        """The node of that name; raises QmpError in the words of commands that take either name."""
        node = self._nodes.get(name)
        if node is None:
            raise QmpError(f"Cannot find device='{device}' nor node-name='{name}'")
        return node

    def statistics(self) -> dict[str, Any]:
        """The actor's facts, and how many nodes there are."""
        return super().statistics() | {"nodes": len(self._nodes)}

    # -- life -------------------------------------------------------------------------------------------------

    async def stopping(self) -> None:
        """Close all nodes, parents before their children."""
        for node in permit.below(self.nodes()):
            await self._close(node)

    async def _close(self, node: Node) -> None:
        self._nodes.pop(node.name, None)
        await self._supervisor.stop(node)

    # -- adding -----------------------------------------------------------------------------------------------

    @receives(AddNode)
    async def _add(self, message: AddNode) -> None:
        options = message.options
        if options.node_name is None:
            raise QmpError("'node-name' must be specified for the root node")
        opened: list[Node] = []
        try:
            node = await self._open(options, None, opened)
            await permit.update([node])
        except BaseException:
            for node in reversed(opened):
                self._unlink(node)
                await self._close(node)
            raise
        info(node).is_monitor_owned = True

    async def _open(self, options: Any, parent_mode: Mode | None, opened: list[Node]) -> Node:
        """Open a node and the children given inline; those that were opened are appended to ``opened``."""
        kind = self._drivers[options.driver.value]
        name = self._new_name(options.node_name)
        mode = resolve_mode(options, parent_mode, is_protocol=not kind.child_specs)
        children: list[tuple[str, Node, bool]] = []
        for child_name, _role in kind.child_specs:
            given = getattr(options, child_name, None)
            if isinstance(given, str):
                children.append((child_name, self.lookup_child(given), False))
            elif given is not None:
                children.append((child_name, await self._open(given, mode, opened), True))
        host = _NodeHost(self._aio, self._warn)
        driver = kind(name, options, mode, host)
        node = host.node = Node(name, driver)
        node.info = NodeInfo(options, [], is_monitor_owned=False, number=self._count)
        node.on_write_threshold = self._on_write_threshold
        self._count += 1
        await self._supervisor.start(node, Floor.NODES)
        self._nodes[name] = node
        opened.append(node)
        for child_name, child, is_owner in children:
            self._link(node, child_name, child, is_owner=is_owner)
        await driver.open()
        node.is_open = True
        node.refresh()
        return node

    def lookup_child(self, name: str) -> Node:
        """A node given by reference; raises QmpError."""
        node = self._nodes.get(name)
        if node is None:
            raise QmpError(f"Cannot find device='{name}' nor node-name='{name}'")
        return node

    def _new_name(self, name: str | None) -> str:
        if name is None:
            while True:
                made = self._names.next()
                if made not in self._nodes:
                    return made
        check_node_name(name)
        if name in self._nodes:
            raise QmpError(f"Duplicate nodes with node-name='{name}'")
        return name

    def _link(self, parent: Node, name: str, child: Node, *, is_owner: bool) -> Edge:
        edge = Edge(parent, name, child)
        edge.is_owner = is_owner
        edge.perm, edge.shared = parent.driver.child_permissions(name, Perm.NONE, Perm.ALL)
        info(child).parents.append(edge)
        parent.driver.children[name] = edge
        return edge

    def _unlink(self, node: Node) -> list[Node]:
        """Take the node's child edges away; the children that nobody else has."""
        orphans: list[Node] = []
        for child in node.driver.children.values():
            assert isinstance(child, Edge)
            parents = info(child.node).parents
            parents.remove(child)
            if not parents and not info(child.node).is_monitor_owned:
                orphans.append(child.node)
        return orphans

    # -- deleting ---------------------------------------------------------------------------------------------

    @receives(DeleteNode)
    async def _delete(self, message: DeleteNode) -> None:
        node = self._nodes.get(message.name)
        if node is None:
            raise QmpError(f"Failed to find node with node-name='{message.name}'")
        parents = info(node).parents
        if any(edge.parent is None for edge in parents):
            raise QmpError(f"Node {node.name} is in use")
        if not info(node).is_monitor_owned:
            raise QmpError(f"Node {node.name} is not owned by the monitor")
        if parents:
            raise QmpError(f"Block device {node.name} is in use")
        await self._drop(node)

    async def _drop(self, node: Node) -> None:
        await self._close(node)
        children = [edge.node for edge in node.driver.children.values() if isinstance(edge, Edge)]
        orphans = self._unlink(node)
        await permit.update([child for child in children if child not in orphans])
        for orphan in orphans:
            await self._drop(orphan)

    # -- attaching --------------------------------------------------------------------------------------------

    @receives(Attach)
    async def _attach(self, message: Attach) -> Edge:
        node = self.lookup(message.name)
        edge = Edge(None, "root", node, message.perm, message.shared)
        info(node).parents.append(edge)
        try:
            await permit.update([node])
        except BaseException:
            info(node).parents.remove(edge)
            raise
        return edge

    @receives(Detach)
    async def _detach(self, message: Detach) -> None:
        node = message.edge.node
        info(node).parents.remove(message.edge)
        if node.name in self._nodes:
            await permit.update([node])

    # -- resizing ---------------------------------------------------------------------------------------------

    @receives(Resize)
    async def _resize(self, message: Resize) -> None:
        node = self.lookup(message.name)
        if message.size < 0:
            raise QmpError("Parameter 'size' expects a >0 size")
        edge = Edge(None, "root", node, Perm.RESIZE, Perm.ALL)
        parents = info(node).parents
        parents.append(edge)
        try:
            await permit.update([node])
            if not node.driver.can_truncate:
                raise QmpError("Image format driver does not support resize")
            async with drained([node]):
                await node.driver.truncate(message.size)
                self._spread_length(node)
        finally:
            parents.remove(edge)
            await permit.update([node])

    def _spread_length(self, node: Node) -> None:
        """Let everything above (and the child that was resized with it) see the new length."""
        for low in reversed(permit.below([node])):
            low.refresh()
        for edge in info(node).parents:
            if edge.parent is not None:
                edge.parent.driver.refresh_length()
                edge.parent.refresh()
                self._spread_length(edge.parent)
            elif edge.on_resize is not None:
                edge.on_resize()

    # -- activity ---------------------------------------------------------------------------------------------

    @receives(SetActive)
    async def _set_active(self, message: SetActive) -> None:
        if message.name is None:
            tops = [node for node in self.nodes() if not any(edge.parent for edge in info(node).parents)]
        else:
            tops = [self.lookup_active(message.name)]
        for node in tops:
            await self._switch(node, active=message.active)

    def lookup_active(self, name: str) -> Node:
        """The node blockdev-set-active names; raises QmpError."""
        node = self._nodes.get(name)
        if node is None:
            raise QmpError(f"Failed to find node with node-name='{name}'")
        return node

    async def _switch(self, top: Node, *, active: bool) -> None:
        nodes = [node for node in permit.below([top]) if node.active != active]
        if not nodes:
            return
        if not active:
            for edge in info(top).parents:
                if edge.parent is not None and edge.parent.active:
                    raise QmpError("Node has active parent node")
                if edge.parent is None and edge.perm & Perm.WRITE:
                    raise QmpError("Failed to inactivate node: Operation not permitted")
        async with drained([top]):
            for node in nodes:
                node.set_active(active=active)
            try:
                await permit.update([top])
            except BaseException:
                for node in nodes:
                    node.set_active(active=not active)
                raise

    # -- reopening --------------------------------------------------------------------------------------------

    @receives(Reopen)
    async def _reopen(self, message: Reopen) -> None:
        from qsd.actors.reopen import ReopenTransaction

        wanted: dict[Node, Any] = {}
        for options in message.options:
            if options.node_name is None:
                raise QmpError("node-name not specified")
            node = self._nodes.get(options.node_name)
            if node is None:
                raise QmpError(f"Failed to find node with node-name='{options.node_name}'")
            wanted[node] = options
        if wanted:
            async with drained(wanted):
                await ReopenTransaction(self, wanted).run()
