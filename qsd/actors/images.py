"""What the graph does to images themselves: deleting internal snapshots, naming another backing file."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from qsd.actors.drain import drained
from qsd.actors.edges import RootEdge, info_of
from qsd.actors.opening import UNKNOWN_REFERENCE as UNKNOWN
from qsd.actors.read_only import set_read_only
from qsd.errors import QmpError, errno_text

if TYPE_CHECKING:
    from qsd.actors.change import Change
    from qsd.actors.node import Node
    from qsd.actors.topology import Topology
    from qsd.drivers.snapshots import InternalSnapshot


def find_root(topology: Topology, name: str, change: Change | None = None) -> Node:
    """The node ``name``, which no other node and no job may use (as ``change`` describes it). Raises QmpError."""
    node = topology.find(name, UNKNOWN)
    parents = info_of(node).parents if change is None else change.edges_to(node)
    if any(edge.parent is not None or (isinstance(edge, RootEdge) and edge.options.job) for edge in parents):
        raise QmpError("Need a root block node")
    return node


async def delete_snapshot(
    topology: Topology, device: str, snapshot_id: str | None, name: str | None
) -> InternalSnapshot:
    """blockdev-snapshot-delete-internal-sync. Raises QmpError."""
    async with topology.lock:
        node = find_root(topology, device)
        snapshot = _find_snapshot(node, snapshot_id, name)
        if not node.active:
            # The image has another owner. The reference asserts.
            raise QmpError(errno_text(errno.EPERM))
        async with drained(topology, [node]):
            await node.driver.delete_snapshot(snapshot.id)
        return snapshot


def _find_snapshot(node: Node, snapshot_id: str | None, name: str | None) -> InternalSnapshot:
    if snapshot_id is None and name is None:
        raise QmpError("Name or id must be provided")
    node.driver.require_snapshots()
    found = node.driver.find_snapshot(snapshot_id, name)
    if found is not None:
        return found
    shown_id, shown_name = ("null" if text is None else text for text in (snapshot_id, name))
    raise QmpError(f"Snapshot with id '{shown_id}' and name '{shown_name}' does not exist on device '{node.name}'")


async def change_backing_file(topology: Topology, device: str, image: str, backing_file: str) -> None:
    """change-backing-file: only the name in the image changes, not the graph. Raises QmpError.

    The format named with it is the backing node's (the reference names the image's own).
    """
    async with topology.lock:
        top = find_root(topology, device)
        node = topology.find(image, "Cannot find device='' nor node-name='{}'")
        backing = info_of(node).children.get("backing")
        if backing is None:
            raise QmpError("not allowing backing file change on an image without a backing file")
        if node not in _chain(top):
            raise QmpError(f"'{top.name}' and image file are not in the same chain")
        if not node.active:
            # The reference asserts.
            raise QmpError(f"Could not change backing file to '{backing_file}': {errno_text(errno.EPERM)}")
        was_read_only = node.mode.read_only
        await set_read_only(topology, node, read_only=False)
        try:
            await node.driver.change_backing_file(backing_file, backing.node.driver.name)
        except OSError as error:
            text = errno_text(error.errno or 0)
            raise QmpError(f"Could not change backing file to '{backing_file}': {text}") from None
        finally:
            await set_read_only(topology, node, read_only=was_read_only)


def _chain(top: Node) -> list[Node]:
    chain = [top]
    while (edge := info_of(chain[-1]).children.get("backing")) is not None:
        chain.append(edge.node)
    return chain
