"""The graph actor: the one owner of which block nodes there are and how they hang together.

Every operation is a message. The mailbox loop only starts it, as a task of the actor's own: opening and closing may
take long and go on side by side, while what changes the graph takes turns under one lock (``Topology.lock``). An
operation that fails leaves the graph, its permissions and the files' locks as they were; one whose asker has gone
away is finished all the same.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import outcome
import trio
from trio_util import RepeatedEvent

from qsd.actors.activation import set_active
from qsd.actors.change import Change
from qsd.actors.change_steps import Firmness
from qsd.actors.core import Actor, Promise, receives
from qsd.actors.drain import drained_alone
from qsd.actors.edges import (
    Detach,
    NodeInfo,
    NodeState,
    RootEdge,
    RootOptions,
    SetRights,
    check_not_backing,
    check_not_in_job,
    info_of,
    length_changed,
)
from qsd.actors.graph_actions import GraphAction, GraphTools, transact
from qsd.actors.images import change_backing_file, delete_snapshot
from qsd.actors.node import Node
from qsd.actors.opening import UNKNOWN_REFERENCE, FindDriver, Opener, shielded
from qsd.actors.reopening import UNKNOWN_NODE, reopen
from qsd.actors.supervisor import Supervisor
from qsd.actors.topology import Topology
from qsd.actors.transaction import CommitFailed
from qsd.block.dirty import Bar
from qsd.block.permissions import Perm, perm_text
from qsd.block.plan import NOT_WHEN_INACTIVE
from qsd.drivers.base import Aio
from qsd.errors import ActorStopped, QmpError, errno_text

if TYPE_CHECKING:
    from qsd.drivers.snapshots import InternalSnapshot
    from qsd.qapi.schema.block import BlockdevOptions

# The longest a node can be, in bytes, as in the reference.
MAX_LENGTH = (1 << 63) - (1 << 30)
UNKNOWN_DEVICE = "Cannot find device='' nor node-name='{}'"


@attrs.frozen(eq=False)
class _Work:
    """An operation to be started."""

    function: Callable[..., Awaitable[Any]]
    args: tuple[Any, ...]


@attrs.define(eq=False)
class _Claim:
    """Who attaches may go away before the edge is there; then nobody would ever detach it."""

    is_abandoned: bool = False
    edge: RootEdge | None = None


class Graph(Actor):
    """See the module. Runs on the floor GRAPH; its nodes run on the floor NODES and are closed by it.

    ``find_driver`` returns the class for a driver's name or raises QmpError; ``warn`` prints one line on stderr;
    ``secret`` gives the value of a secret object or raises QmpError; ``emit`` tells everybody about an event.
    """

    kind = "graph"

    def __init__(
        self,
        supervisor: Supervisor,
        find_driver: FindDriver,
        aio: Aio,
        warn: Callable[[str], None],
        secret: Callable[[str], bytes],
        emit: Callable[[str, dict[str, Any]], None],
    ) -> None:
        super().__init__("graph")
        self.topology = Topology()
        self._supervisor = supervisor
        self._opener = Opener(self.topology, supervisor, find_driver, aio, warn, secret, emit, self._truncate)
        self.tools = GraphTools(self.topology, self._opener, self._truncate, self._make_root)
        self._scopes: set[trio.CancelScope] = set()
        self._work_ended = RepeatedEvent()

    # -- looking: between awaits ------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[Node]:
        """The open nodes, oldest first: what an image names comes after the node of that image."""
        return sorted(self.topology.nodes.values(), key=lambda node: info_of(node).key)

    @property
    def roots(self) -> list[RootEdge]:
        """What uses nodes from outside the graph, oldest first."""
        return list(self.topology.roots)

    def find(self, name: str, error: str = UNKNOWN_DEVICE) -> Node:
        """The open node ``name``; raises QmpError with ``error``, in which ``{}`` stands for the name."""
        return self.topology.find(name, error)

    def statistics(self) -> dict[str, Any]:
        """The actor's facts and the graph's."""
        return super().statistics() | {"nodes": len(self.topology.nodes), "working": len(self._scopes)}

    # -- operations -------------------------------------------------------------------------------------------

    async def add(self, options: BlockdevOptions) -> None:
        """Open a node, which belongs to the user from then on. Raises QmpError and leaves nothing."""
        await self._do(self._add, options)

    async def delete(self, name: str) -> None:
        """Close a node of the user's. Raises QmpError when it is used."""
        await self._do(self._delete, name)

    async def reopen(self, options: tuple[BlockdevOptions, ...]) -> None:
        """Give nodes new options, all or none. Raises QmpError."""
        await self._do(self._reopen, options)

    async def resize(self, name: str | None, size: int, device: str | None = None) -> None:
        """Give a node another length in bytes. Raises QmpError."""
        await self._do(self._resize, name, size, device)

    async def set_active(self, name: str | None, *, active: bool) -> None:
        """Activate or inactivate one node with what is below it, or all (None). Raises QmpError."""
        await self._do(self._set_active, name, active)

    async def transact(self, actions: Sequence[GraphAction]) -> None:
        """Carry out all of ``actions`` or none. Raises QmpError."""
        await self._do(transact, self.tools, actions)

    async def delete_snapshot(self, device: str, snapshot_id: str | None, name: str | None) -> InternalSnapshot:
        """Delete an internal snapshot; what it was. Raises QmpError."""
        deleted: InternalSnapshot = await self._do(delete_snapshot, self.topology, device, snapshot_id, name)
        return deleted

    async def change_backing_file(self, device: str, image: str, backing_file: str) -> None:
        """Name another backing file in the image of a node in the chain of ``device``. Raises QmpError."""
        await self._do(change_backing_file, self.topology, device, image, backing_file)

    async def attach(self, name: str, options: RootOptions) -> RootEdge:
        """Use the node ``name`` from outside the graph. Raises QmpError (unknown node, permissions)."""
        return await self._claim(self._attach, name, options)

    async def attach_ref(self, ref: str | BlockdevOptions, options: RootOptions) -> RootEdge:
        """Use the node ``ref`` names, or one to be opened from options, which closes with its last user.

        Raises QmpError.
        """
        return await self._claim(self._attach_ref, ref, options)

    async def _claim(
        self, function: Callable[..., Awaitable[RootEdge]], what: Any, options: RootOptions
    ) -> RootEdge:
        claim = _Claim()
        try:
            edge = await self._do(function, what, options, claim)
        except trio.Cancelled:
            claim.is_abandoned = True
            if claim.edge is not None:
                with contextlib.suppress(ActorStopped):
                    self.ref.tell(_Work(self._detach, (claim.edge,)))
            raise
        assert isinstance(edge, RootEdge)
        return edge

    async def move(self, edge: RootEdge, name: str) -> None:
        """Let a root edge lead to another node (a pivot). Raises QmpError and leaves it where it was."""
        await self._do(self._move, edge, name)

    # -- the mailbox ------------------------------------------------------------------------------------------

    async def _do(self, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        promise: Promise = await self.ref.ask(_Work(function, args))
        return await promise.wait()

    @receives(_Work)
    async def _begin(self, work: _Work) -> Promise:
        promise = Promise()
        self.spawn(self._carry_out, work, promise, name=work.function.__name__.lstrip("_"))
        return promise

    async def _carry_out(self, work: _Work, promise: Promise) -> None:
        scope = trio.CancelScope()
        self._scopes.add(scope)
        try:
            with scope:
                await self._answer(work, promise)
        finally:
            self._scopes.discard(scope)
            self._work_ended.set()

    async def _answer(self, work: _Work, promise: Promise) -> None:
        # As in the mailbox loop: every exception becomes the reply. A commit that failed has left a graph nobody
        # can vouch for, and is the actor's crash.
        try:
            result = await work.function(*work.args)
        except CommitFailed as error:
            promise.set(outcome.Error(error))
            raise
        except Exception as error:  # noqa: BLE001  # it is the reply
            promise.set(outcome.Error(error))
        except BaseException:
            promise.set(outcome.Error(ActorStopped(f"{self.name} stopped before it could answer")))
            raise
        else:
            promise.set(outcome.Value(result))

    async def started(self) -> None:
        """Say what the crash of a node means."""
        self._supervisor.failures[Node.kind] = self._node_crashed

    async def stopping(self) -> None:
        """Give up what is going on, then close all nodes, every parent before its children."""
        for scope in list(self._scopes):
            scope.cancel()
        while self._scopes:
            await self._work_ended.wait()
        for node in self.topology.below(self.topology.living.values()):
            await self._supervisor.stop(node, math.inf)
        self.topology.nodes.clear()

    def _node_crashed(self, actor: Actor, _error: BaseException) -> None:
        """A node without its actor answers EIO; it stays in the graph until it is deleted."""
        assert isinstance(actor, Node)
        actor.break_down()
        if isinstance(actor.info, NodeInfo) and actor.info.state is not NodeState.CLOSING:
            actor.info.state = NodeState.BROKEN

    # -- nodes ------------------------------------------------------------------------------------------------

    async def _add(self, options: BlockdevOptions) -> None:
        if options.node_name is None:
            raise QmpError("'node-name' must be specified for the root node")
        info = info_of(await self._opener.open(options))
        info.is_monitor_owned = True
        info.pins -= 1

    async def _delete(self, name: str) -> None:
        async with self.topology.lock:
            node = self.topology.find(name, UNKNOWN_NODE)
            info = info_of(node)
            _check_deletable(node, info)
            info.is_monitor_owned = False
        await shielded(self._opener.close_unwanted, [node])

    async def _reopen(self, options: tuple[BlockdevOptions, ...]) -> None:
        # The reference asserts on an empty list; there is nothing to do.
        if not options:
            return
        async with self.topology.lock:
            left = await reopen(self.topology, options, self._truncate)
        await shielded(self._opener.close_unwanted, left)

    async def _set_active(self, name: str | None, active: bool) -> None:
        async with self.topology.lock:
            await set_active(self.topology, name, active=active)

    # -- root edges -------------------------------------------------------------------------------------------

    async def _attach(self, name: str, options: RootOptions, claim: _Claim) -> RootEdge:
        async with self.topology.lock:
            edge = await self._attach_node(self.topology.find(name, UNKNOWN_DEVICE), options)
        return await self._hand_over(edge, claim)

    async def _attach_ref(self, ref: str | BlockdevOptions, options: RootOptions, claim: _Claim) -> RootEdge:
        topology = self.topology
        if isinstance(ref, str):
            node = topology.find(ref, UNKNOWN_REFERENCE)
            info_of(node).pins += 1
        else:
            node = await self._opener.open(ref)
        try:
            async with topology.lock:
                edge = await self._attach_node(node, options)
        finally:
            await shielded(self._opener.unpin, node)
        return await self._hand_over(edge, claim)

    async def _attach_node(self, node: Node, options: RootOptions) -> RootEdge:
        topology = self.topology
        change = Change(topology, [node])
        refused = options.perm & NOT_WHEN_INACTIVE
        if options.needs_active and not node.active and refused:
            raise QmpError(f"Permission '{perm_text(refused)}' unavailable on inactive node")
        if not options.allow_inactive and not options.needs_active:
            for below in topology.below([node]):
                if not below.active:
                    change.activate(below, active=True)
        edge = self._make_root(node, options)
        change.attach(edge)
        node.driver.amending += options.amends
        try:
            await change.run()
        except BaseException:
            node.driver.amending -= options.amends
            raise
        return edge

    def _make_root(self, node: Node, options: RootOptions) -> RootEdge:
        return RootEdge(node, options, self._truncate, self._ask_for_edge)

    async def _hand_over(self, edge: RootEdge, claim: _Claim) -> RootEdge:
        if claim.is_abandoned:
            await shielded(self._detach, edge)
        claim.edge = edge
        return edge

    async def _ask_for_edge(self, message: Detach | SetRights) -> None:
        if isinstance(message, Detach):
            await self._do(self._detach, message.edge)
        else:
            await self._do(self._set_rights, message)

    async def _detach(self, edge: RootEdge) -> None:
        async with self.topology.lock:
            if not edge.is_attached:
                return
            touched = [edge.node]
            if edge.amended is not None:
                edge.amended.driver.amending -= 1
                if info_of(edge.amended).key in self.topology.living:
                    touched.append(edge.amended)
            change = Change(self.topology, touched, Firmness.MUST_SUCCEED)
            change.detach(edge)
            await change.run()
            left = change.left_alone
        await shielded(self._opener.close_unwanted, left)

    async def _set_rights(self, message: SetRights) -> None:
        async with self.topology.lock:
            _check_attached(message.edge)
            change = Change(self.topology, [message.edge.node])
            change.want(message.edge, message.rights)
            await change.run()

    async def _move(self, edge: RootEdge, name: str) -> None:
        async with self.topology.lock:
            _check_attached(edge)
            target = self.topology.find(name, UNKNOWN_DEVICE)
            change = Change(self.topology, [edge.node, target])
            change.swap(edge, target)
            await change.run()
            left = change.left_alone
        await shielded(self._opener.close_unwanted, left)

    # -- length -----------------------------------------------------------------------------------------------

    async def _resize(self, name: str | None, size: int, device: str | None) -> None:
        topology = self.topology
        # There are no devices, only nodes.
        node = topology.find(name or "", f"Cannot find device='{device or ''}' nor node-name='{{}}'")
        if size < 0:
            raise QmpError("Parameter 'size' expects a >0 size")
        check_not_in_job(node)
        check_not_backing(node, reversed(info_of(node).parents))
        edge = await self._attach(node.name, RootOptions(Perm.RESIZE, needs_active=True), _Claim())
        try:
            if not node.mode.read_only:
                node.bitmaps.check_resizable(size)
            # Not exactly: a device may be longer.
            await self._truncate(node, size, exact=False)
        finally:
            await shielded(self._detach, edge)

    async def _truncate(self, node: Node, size: int, *, exact: bool = True) -> None:
        if size > MAX_LENGTH:
            raise QmpError(f"offset({size}) exceeds maximum({MAX_LENGTH})")
        # The node alone: a request that comes from above may be what grows it.
        try:
            async with drained_alone(node):
                _check_resizable(node)
                await node.driver.truncate(size, exact=exact)
                node.refresh()
        except OSError as error:
            raise QmpError(errno_text(error.errno or 0)) from None
        length_changed(node)


def _check_attached(edge: RootEdge) -> None:
    if not edge.is_attached:
        raise QmpError("The node is not in use any more")


def _check_resizable(node: Node) -> None:
    if node.mode.read_only:
        raise QmpError("Image is read-only")
    if not node.driver.can_truncate:
        raise QmpError("Image format driver does not support resize")
    for bitmap in node.bitmaps.persistent:
        bitmap.check(Bar.ANY)


def _check_deletable(node: Node, info: NodeInfo) -> None:
    if info.has_root_parents:
        raise QmpError(f"Node {node.name} is in use")
    check_not_in_job(node)
    check_not_backing(node, reversed(info.parents))
    for bitmap in node.bitmaps:
        # An export of another node shows it. The reference asserts.
        bitmap.check(Bar.BUSY)
    if not info.is_monitor_owned:
        raise QmpError(f"Node {node.name} is not owned by the monitor")
    if info.parents or info.pins:
        raise QmpError(f"Block device {node.name} is in use")
