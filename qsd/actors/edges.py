"""Edges of the block graph: how a parent reaches a child node, and what it uses and shares there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs

from qsd.block.permissions import Perm
from qsd.drivers.base import Limits
from qsd.drivers.calls import call
from qsd.messages import Op, Request

if TYPE_CHECKING:
    from qsd.actors.node import Node


class Edge:
    """A child edge (``drivers.base.Child``), or a root edge when ``parent`` is None (an export, a job).

    ``submit`` is bound straight to the child node's, and bound again when the child is swapped.
    """

    def __init__(
        self, parent: Node | None, name: str, node: Node, perm: Perm = Perm.NONE, shared: Perm = Perm.ALL
    ) -> None:
        self.parent = parent
        self._name = name
        self.perm = perm
        self.shared = shared
        self.node = node
        self.submit: Callable[[list[Request]], None] = node.submit
        # True when the child was given inline: it belongs to the parent and goes with it.
        self.is_owner = False
        self.on_resize: Callable[[], None] | None = None

    def point_to(self, node: Node) -> None:
        """Lead to another node from now on."""
        self.node = node
        self.submit = node.submit

    @property
    def name(self) -> str:
        """The edge's name: file, backing, root."""
        return self._name

    @property
    def parent_description(self) -> str:
        """Who uses the node, as conflict texts say it."""
        return "an unnamed block device" if self.parent is None else f"node '{self.parent.name}'"

    @property
    def length(self) -> int:
        """Bytes of the child node."""
        return self.node.length

    @property
    def limits(self) -> Limits:
        """The child node's limits."""
        return self.node.limits

    @property
    def node_name(self) -> str:
        """The child node's name."""
        return self.node.name

    async def read(self, offset: int, length: int) -> bytes:
        """Read; raises OSError."""
        buffer = bytearray(length)
        await call(self, Op.READ, offset, length, memoryview(buffer))
        return bytes(buffer)

    async def write(self, offset: int, data: bytes) -> None:
        """Write; raises OSError."""
        await call(self, Op.WRITE, offset, len(data), memoryview(data))

    async def flush(self) -> None:
        """Flush; raises OSError."""
        await call(self, Op.FLUSH, 0, 0)

    async def truncate(self, size: int, *, exact: bool = True) -> None:
        """Resize the child; raises QmpError. The child's other parents are told by the graph."""
        await self.node.driver.truncate(size, exact=exact)
        self.node.refresh()


@attrs.define(eq=False)
class NodeInfo:
    """What the graph knows about a node beside the node itself."""

    options: object
    parents: list[Edge]
    is_monitor_owned: bool
    number: int
    # Permissions in force: the sums over the parents.
    perm: Perm = Perm.NONE
    shared: Perm = Perm.ALL
    opened_for: object = None


def info(node: Node) -> NodeInfo:
    """The graph's record about ``node``."""
    assert isinstance(node.info, NodeInfo)
    return node.info
