"""Snapshots: an overlay that takes a node's place, and snapshots inside an image; as actions of a transaction.

The node under a new overlay is made read-only as far as that goes; who used it uses the overlay from then on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import attrs

from qsd.actors.activation import going_inactive
from qsd.actors.change import Change
from qsd.actors.edges import Edge, check_not_backing, check_not_in_job, info_of
from qsd.actors.graph_actions import GraphAction, GraphTools, rehearse
from qsd.actors.images import find_root
from qsd.actors.opening import UNKNOWN_REFERENCE as UNKNOWN
from qsd.actors.read_only import set_read_only
from qsd.drivers.base import ChildRole
from qsd.drivers.calls import call
from qsd.errors import FAILURES, QmpError, errno_text
from qsd.messages import Op

if TYPE_CHECKING:
    from qsd.actors.node import Node

log = logging.getLogger("qsd.graph")


@attrs.define(eq=False, kw_only=True)
class _OverlayAction(GraphAction):
    """Put an overlay above a node. ``node`` and ``overlay`` are found when it is described."""

    tools: GraphTools
    _node: Node | None = attrs.field(default=None, init=False)
    _was_committed: bool = attrs.field(default=False, init=False)

    def find_node(self) -> Node:
        """The node that is to get an overlay. Raises QmpError."""
        raise NotImplementedError

    def find_overlay(self) -> Node | None:
        """The overlay, unless it is still to be made. Raises QmpError."""
        raise NotImplementedError

    @property
    def concerned(self) -> list[Node]:
        """The node: nothing may be written to it any more."""
        return [self.find_node()]

    @property
    def touched(self) -> list[Node]:
        """The node with all above it, and the overlay with what it stands on."""
        overlay = self.find_overlay()
        topology = self.tools.topology
        above = topology.above([self.find_node()])
        return [*above] if overlay is None else [*above, *topology.below([overlay])]

    def describe(self, change: Change) -> None:
        """Check both nodes; attach the overlay and let everybody who uses the node use it."""
        node = self._node = self.find_node()
        check_not_in_job(node)
        users = change.edges_to(node)
        check_not_backing(node, users)
        overlay = self.find_overlay()
        if overlay is None:
            return
        # A node above it that asks nothing of it, a filter without users say, is no user.
        idle = [edge for edge in info_of(overlay).parents if edge.parent is not None and not edge.perm]
        if any(edge not in idle for edge in change.edges_to(overlay)):
            raise QmpError("The overlay is already in use")
        if not overlay.driver.can_have_backing():
            raise QmpError("The overlay does not support backing images")
        if "backing" in change.children_of(overlay):
            raise QmpError("The overlay already has a backing image")
        if not change.is_active(node):
            # The image is somebody else's, and nothing active can stand on it: the overlay waits with it.
            for each in going_inactive(self.tools.topology, [overlay]):
                change.activate(each, active=False)
        change.attach(Edge(overlay, "backing", node, ChildRole.COW, self.tools.truncate))
        for edge in users:
            change.swap(edge, overlay)

    async def prepare(self) -> None:
        """What was written to the node reaches the disk."""
        node = self._node
        assert node is not None
        if node.mode.read_only or not node.active:
            return
        try:
            await call(node.driver, Op.FLUSH, 0, 0)
        except OSError:
            raise QmpError("An IO error has occurred") from None

    def commit(self) -> None:
        """The node is the overlay's backing file."""
        self._was_committed = True

    async def clean(self) -> None:
        """Nobody is to write to a backing file; where that cannot be had, nobody may all the same."""
        if not self._was_committed:
            return
        assert self._node is not None
        try:
            await set_read_only(self.tools.topology, self._node, read_only=True)
        except FAILURES as error:
            log.info("%s stays writable: %s", self._node.name, error)


@attrs.define(eq=False, kw_only=True)
class SnapshotAction(_OverlayAction):
    """blockdev-snapshot: the overlay is a node that exists."""

    node_name: str
    overlay_name: str

    def find_node(self) -> Node:
        """By name."""
        return self.tools.topology.find(self.node_name, UNKNOWN)

    def find_overlay(self) -> Node | None:
        """By name."""
        return self.tools.topology.find(self.overlay_name, UNKNOWN)

    @property
    def touched(self) -> list[Node]:
        """The same; a node that does not exist is for ``describe`` to complain about."""
        topology, nodes = self.tools.topology, self.tools.topology.nodes
        found = [nodes[name] for name in (self.node_name, self.overlay_name) if name in nodes]
        overlay = [nodes[name] for name in (self.overlay_name,) if name in nodes]
        return [*topology.above(found), *topology.below(overlay)]

    async def stage(self, earlier: Sequence[GraphAction]) -> None:
        """Complain early, before other actions make files."""
        await rehearse(self.tools.topology, [*earlier, self])


# Makes the overlay's image, which names its backing file so, and opens it, with one pin of the caller's. Raises
# QmpError.
MakeOverlay = Callable[["Node", str], Awaitable["Node"]]


def _coming_name(node: Node, earlier: Sequence[GraphAction]) -> str:
    """What a node is called when ``earlier`` overlays are in their places: it may be one of them.

    Called what it is now, without a backing file, it would be opened without what lies below it.
    """
    placed: list[Node] = []
    try:
        for action in earlier:
            overlay = action.find_overlay() if isinstance(action, _OverlayAction) else None
            if isinstance(action, _OverlayAction) and overlay is not None:
                below = action.find_node()
                overlay.driver.children["backing"] = Edge(
                    overlay, "backing", below, ChildRole.COW, action.tools.truncate
                )
                placed.append(overlay)
        return node.driver.filename()
    finally:
        for overlay in placed:
            del overlay.driver.children["backing"]


@attrs.define(eq=False, kw_only=True)
class SnapshotSyncAction(_OverlayAction):
    """blockdev-snapshot-sync: the overlay is opened for this, and lives as long as somebody uses it."""

    device: str | None
    node_name: str | None
    overlay_name: str | None
    make: MakeOverlay
    _overlay: Node | None = attrs.field(default=None, init=False)

    def find_node(self) -> Node:
        """By name; there are no devices."""
        error = f"Cannot find device='{self.device or ''}' nor node-name='{{}}'"
        return self.tools.topology.find(self.node_name or "", error)

    def find_overlay(self) -> Node | None:
        """What was opened."""
        return self._overlay

    async def stage(self, earlier: Sequence[GraphAction]) -> None:
        """Make the image, open it, and see whether it can be put in place."""
        topology = self.tools.topology
        node = self.find_node()
        await rehearse(topology, [*earlier, self])
        if self.overlay_name is None:
            raise QmpError("New overlay node-name missing")
        if self.overlay_name in topology.nodes:
            raise QmpError("New overlay node-name already in use")
        self._overlay = await self.make(node, _coming_name(node, earlier))
        try:
            await rehearse(topology, [*earlier, self])
        except BaseException:
            await self.unstage()
            raise

    async def unstage(self) -> None:
        """Give up the overlay, which closes when nobody uses it."""
        overlay, self._overlay = self._overlay, None
        if overlay is not None:
            await self.tools.opener.unpin(overlay)


@attrs.define(eq=False, kw_only=True)
class InternalSnapshotAction(GraphAction):
    """blockdev-snapshot-internal-sync."""

    tools: GraphTools
    device: str
    name: str
    _node: Node | None = attrs.field(default=None, init=False)
    _made: str | None = attrs.field(default=None, init=False)

    @property
    def concerned(self) -> list[Node]:
        """The node: all snapshots of a transaction are of one moment."""
        return [self.tools.topology.find(self.device, UNKNOWN)]

    @property
    def touched(self) -> list[Node]:
        """The node, to see who uses it; an unknown one is for ``describe`` to complain about."""
        found = self.tools.topology.nodes.get(self.device)
        return [] if found is None else [found]

    async def stage(self, earlier: Sequence[GraphAction]) -> None:
        """Complain early, before other actions make files."""
        await rehearse(self.tools.topology, [*earlier, self])

    def describe(self, change: Change) -> None:
        """Check the node and the name."""
        node = self._node = find_root(self.tools.topology, self.device, change)
        if node.mode.read_only:
            raise QmpError(f"Device '{self.device}' is read only")
        # An inactive image may have another owner by now.
        if not node.driver.can_snapshot() or not node.active:
            kind = node.driver.name
            raise QmpError(
                f"Block format '{kind}' used by device '{self.device}' does not support internal snapshots"
            )
        if not self.name:
            raise QmpError("Name is empty")
        node.driver.require_snapshots()
        if node.driver.find_snapshot(None, self.name) is not None:
            raise QmpError(f"Snapshot with name '{self.name}' already exists on device '{self.device}'")

    async def prepare(self) -> None:
        """Make the snapshot."""
        assert self._node is not None
        try:
            self._made = await self._node.driver.create_snapshot(self.name, time.time_ns())
        except OSError as error:
            text = errno_text(error.errno or 0)
            raise QmpError(f"Failed to create snapshot '{self.name}' on device '{self.device}': {text}") from None

    def commit(self) -> None:
        """Keep it."""
        self._made = None

    async def clean(self) -> None:
        """Delete it, unless it is to be kept."""
        if self._made is None:
            return
        assert self._node is not None
        try:
            await self._node.driver.delete_snapshot(self._made)
        except FAILURES as error:
            log.warning("snapshot '%s' on '%s' stays: %s", self.name, self.device, error)


class AbortAction(GraphAction):
    """abort: makes every transaction fail that holds it."""

    async def stage(self, earlier: Sequence[GraphAction]) -> None:
        """Fail, before later actions make files."""
        raise QmpError("Transaction aborted using Abort action")
