"""The beginning and the end of nodes: opened from the leaves up, closed from the top down.

Opening and closing wait for I/O, so both run outside the graph's lock; what has to fit the rest of the graph
(names, edges, permissions) happens under it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import attrs
import outcome
import trio

from qsd.actors.bitmap_keeping import load as load_bitmaps
from qsd.actors.change import Change
from qsd.actors.change_steps import Firmness
from qsd.actors.edges import Edge, NodeInfo, NodeState, Truncate, info_of
from qsd.actors.node import Node
from qsd.actors.node_options import check_mode, resolve_mode
from qsd.actors.supervisor import Floor, Supervisor
from qsd.actors.topology import Topology
from qsd.block.graph import cycle_text
from qsd.drivers.base import Aio, Child, ChildRole, Driver, Mode
from qsd.errors import QmpError, errno_text
from qsd.host.shield import shield
from qsd.qapi.core import NULL

if TYPE_CHECKING:
    from qsd.qapi.schema.block import BlockdevOptions

T = TypeVar("T")

# Finds the class of a driver by the name users give; raises QmpError.
FindDriver = Callable[[str], Awaitable[type[Driver]]]

# How many images may name one another, as libvirt limits it; a bound for chains that lead back to themselves.
MAX_CHAIN = 200
UNKNOWN_REFERENCE = "Cannot find device='{}' nor node-name='{}'"


class _OpenChild(Protocol):
    """``Host.open_child``."""

    async def __call__(self, name: str, role: ChildRole, options: Any, /, *, is_probed: bool = False) -> Child: ...


async def _nothing_to_open(name: str, /, *_args: Any, **_more: Any) -> Child:
    raise AssertionError(f"child {name} is opened outside of Driver.open")


@attrs.define(eq=False)
class NodeHost:
    """What the daemon lends one node's driver (the ``Host`` protocol)."""

    aio: Aio
    warn: Callable[[str], None]
    secret: Callable[[str], bytes]
    emit: Callable[[str, dict[str, Any]], None]
    open_child: _OpenChild = _nothing_to_open
    node: Node | None = None

    def spawn(self, function: Callable[..., Any], *args: Any, name: str) -> None:
        """Start a task in the node actor's own nursery."""
        assert self.node is not None
        self.node.spawn(function, *args, name=name)


class _Circle(Exception):
    """A node is to stand on ``node``, which is being opened and was to stand on that node."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.name)
        self.node = node


@attrs.frozen
class _Place:
    """What a node is opened for.

    ``above`` are the nodes that are being opened and wait for it, ``depth`` counts how many images named the next
    until this one was named.
    """

    above: tuple[Node, ...] = ()
    depth: int = 0

    def find(self, name: str) -> Node | None:
        """The node of that name that waits for this one."""
        return next((node for node in self.above if node.name == name), None)

    def below(self, node: Node, *, is_named: bool) -> _Place:
        """Where a child of ``node`` is; ``is_named`` by the image, not by the user. Raises QmpError."""
        depth = self.depth + is_named
        if depth > MAX_CHAIN:
            raise QmpError("The chain of images is too long")
        return _Place((*self.above, node), depth)


@attrs.frozen
class _Found:
    """A child for a node to be opened: ``is_inline`` when it was made for this."""

    name: str
    role: ChildRole
    node: Node
    is_inline: bool


class Opener:
    """Makes nodes and does away with them."""

    def __init__(
        self,
        topology: Topology,
        supervisor: Supervisor,
        find_driver: FindDriver,
        aio: Aio,
        warn: Callable[[str], None],
        secret: Callable[[str], bytes],
        emit: Callable[[str, dict[str, Any]], None],
        truncate: Truncate,
    ) -> None:
        self._topology = topology
        self._supervisor = supervisor
        self._find_driver = find_driver
        self._aio = aio
        self._warn = warn
        self._secret = secret
        self._emit = emit
        self._truncate = truncate

    # -- opening ----------------------------------------------------------------------------------------------

    async def open(
        self,
        options: BlockdevOptions,
        inherited: Mode | None = None,
        role: ChildRole = ChildRole.DATA,
        place: _Place = _Place(),
        *,
        is_probed: bool = False,
    ) -> Node:
        """Open a node with its inline children. It has one pin of the caller's.

        ``is_probed`` is for the driver, see there.

        Raises QmpError and leaves nothing: no node, no descriptor, no lock, no name.
        """
        driver_class = await self._find_driver(options.driver.value)
        mode = resolve_mode(options, inherited, role)
        # As in the reference only what the driver itself asks for is inactive along with the node.
        early = attrs.evolve(mode, active=inherited is None or inherited.active)
        async with contextlib.AsyncExitStack() as stack:
            children: list[_Found] = []
            for name, child_role in driver_class.child_specs:
                if name in driver_class.late_children:
                    continue
                found = await self._child(getattr(options, _attribute(name)), early, name, child_role, place)
                if found is not None:
                    children.append(found)
                    stack.push_async_callback(self.unpin, found.node)
            check_mode(mode)
            return await self._open(driver_class, options, mode, children, place, is_probed)

    async def _child(
        self, value: Any, mode: Mode, name: str, role: ChildRole, place: _Place, is_probed: bool = False
    ) -> _Found | None:
        if value is None or value is NULL:
            return None
        try:
            if isinstance(value, str):
                waiting = place.find(value)
                if waiting is not None:
                    raise _Circle(waiting)
                node = self._topology.find(value, UNKNOWN_REFERENCE)
                info_of(node).pins += 1
                return _Found(name, role, node, is_inline=False)
            node = await self.open(value, mode, role, place, is_probed=is_probed)
            return _Found(name, role, node, is_inline=True)
        except QmpError as error:
            raise error.prefixed("Could not open backing file: " if role is ChildRole.COW else "") from None

    async def _open(
        self,
        driver_class: type[Driver],
        options: BlockdevOptions,
        mode: Mode,
        children: list[_Found],
        place: _Place,
        is_probed: bool,
    ) -> Node:
        topology = self._topology
        name = topology.take_name(options.node_name)
        try:
            host = NodeHost(self._aio, self._warn, self._secret, self._emit)
            driver = driver_class(name, options, mode, host)
            driver.is_probed = is_probed
            node = Node(name, driver)
            host.node = node
            info = node.info = NodeInfo(
                topology.next_key(), options, is_auto_named=options.node_name is None, pins=1
            )
            await self._supervisor.start(node, Floor.NODES)
        except BaseException:
            topology.release_name(name)
            raise
        topology.living[info.key] = node
        try:
            await self._attach(node, children)
            host.open_child = partial(self._open_child, node, children, place)
            try:
                await driver.open()
            finally:
                host.open_child = _nothing_to_open
            node.is_open = True
            node.refresh()
            await load_bitmaps(node)
            await self._join(node)
        except BaseException as error:
            await shielded(self._give_up, node)
            if isinstance(error, OSError):
                raise QmpError(f"Could not open '{name}': {errno_text(error.errno or 0)}") from error
            raise
        for child in children:
            if child.is_inline:
                info_of(child.node).inline_parent = node
        return node

    async def _open_child(
        self,
        node: Node,
        children: list[_Found],
        place: _Place,
        name: str,
        role: ChildRole,
        value: Any,
        *,
        is_probed: bool = False,
    ) -> Child:
        inner = place.below(node, is_named=value is not getattr(node.driver.options, _attribute(name)))
        try:
            found = await _in_own_task(self._child, value, node.mode, name, role, inner, is_probed)
        except _Circle as circle:
            if circle.node is not node:
                raise
            # A node that is still being opened cannot be read: the circle is not made to find out that it is one.
            child = value if isinstance(value, str) else self._topology.free_name(value.node_name)
            raise QmpError(cycle_text(child, name, node.name)) from None
        assert found is not None
        try:
            await self._attach(node, [found])
            children.append(found)
        finally:
            await self.unpin(found.node)
        return node.driver.children[name]

    async def _attach(self, node: Node, children: list[_Found]) -> None:
        if not children:
            return
        topology = self._topology
        async with topology.lock:
            change = Change(topology, [node, *(child.node for child in children)], is_near=True)
            for child in children:
                change.attach(Edge(node, child.name, child.node, child.role, self._truncate))
            await change.run()

    async def _join(self, node: Node) -> None:
        topology = self._topology
        async with topology.lock:
            # What a driver wants of its children may depend on what it found when it opened.
            await Change(topology, [node], is_near=True).run()
            info = info_of(node)
            if info.state is NodeState.OPENING:
                info.state = NodeState.OPEN
            node.refresh()
            topology.nodes[node.name] = node

    async def _give_up(self, node: Node) -> None:
        # A driver that failed to open has let go of everything itself; one that opened is closed by its node.
        info_of(node).state = NodeState.CLOSING
        await self.close_unwanted(await self._end(node))

    async def unpin(self, node: Node) -> None:
        """Give up one pin; the node closes when it was all that kept it. Does not raise."""
        info_of(node).pins -= 1
        if self._topology.is_orphan(node):
            await shielded(self.close_unwanted, [node])

    # -- closing ----------------------------------------------------------------------------------------------

    async def close_unwanted(self, nodes: Iterable[Node]) -> None:
        """Close those of ``nodes`` that nobody uses, and then what nobody uses any more because of that.

        Does not raise.
        """
        waiting = list(nodes)
        while waiting:
            async with self._topology.lock:
                gone = self._topology.orphans(waiting)
                for node in gone:
                    self._withdraw(node)
            waiting = [child for node in gone for child in await self._end(node)]

    def _withdraw(self, node: Node) -> None:
        # From now on nobody finds the node; its name stays taken until it is closed.
        self._topology.nodes.pop(node.name, None)
        info_of(node).state = NodeState.CLOSING

    async def _end(self, node: Node) -> list[Node]:
        """Close a withdrawn node; what lost its last user with it."""
        topology = self._topology
        # The node waits for what is in flight, flushes and closes its driver; however long it takes, because giving
        # up would leave descriptors and locks behind. At shutdown the floor's deadline bounds it.
        await self._supervisor.stop(node, math.inf)
        info = info_of(node)
        left: list[Node] = []
        async with topology.lock:
            children = list(info.children.values())
            if children:
                touched = [node, *(edge.node for edge in children)]
                change = Change(topology, touched, Firmness.MUST_SUCCEED, is_near=True)
                for edge in children:
                    change.detach(edge)
                await change.run()
                left = change.left_alone
            del topology.living[info.key]
            topology.release_name(node.name)
        return left


async def _in_own_task(function: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Await with a stack of its own: every image of a long chain is opened from within the one above."""
    result: outcome.Maybe[T] | None = None

    async def run() -> None:
        nonlocal result
        try:
            result = outcome.Value(await function(*args))
        except Exception as error:  # noqa: BLE001  # it is what the caller gets
            result = outcome.Error(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, name="open child")
    assert result is not None
    return result.unwrap()


def _attribute(name: str) -> str:
    return name.replace("-", "_")


async def shielded(function: Callable[..., Any], *args: Any) -> None:
    """Undo something although this task has been cancelled."""
    with shield():
        await function(*args)
