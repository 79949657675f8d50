"""Edges of the live graph: how a parent's driver, an export or a job reaches a node."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from enum import Enum
from itertools import count
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs

from qsd.block.graph import UNNAMED
from qsd.block.permissions import Perm
from qsd.block.plan import Rights
from qsd.drivers.base import ChildRole, Limits
from qsd.drivers.calls import SlowPath
from qsd.drivers.spot import Spot, end_epoch
from qsd.errors import QmpError

if TYPE_CHECKING:
    from qsd.actors.node import Node
    from qsd.messages import Request

_keys = count(1)


class NodeState(Enum):
    """Where a node is in its life. Only open and broken nodes have a name that others can use."""

    OPENING = "opening"
    OPEN = "open"
    BROKEN = "broken"
    CLOSING = "closing"


@attrs.define(eq=False)
class NodeInfo:
    """What the graph knows about a node (``node.info``).

    ``options`` are those it was opened or last reopened with. ``pins`` counts operations that rely on the node
    living on; ``rights`` is what its users add up to, as committed; ``inline_parent`` is the node whose options
    held this one's. ``height`` counts the levels of nodes from this one down, itself included.
    """

    key: int
    options: Any
    is_auto_named: bool
    inline_parent: Node | None = None
    is_monitor_owned: bool = False
    state: NodeState = NodeState.OPENING
    pins: int = 0
    rights: Rights = attrs.field(factory=Rights)
    height: int = 1
    parents: list[Edge] = attrs.field(factory=list)
    children: dict[str, Edge] = attrs.field(factory=dict)

    @property
    def job(self) -> JobUse | None:
        """The job that has the node for itself."""
        for edge in self.parents:
            if isinstance(edge, RootEdge) and edge.options.job is not None:
                return edge.options.job
        return None

    @property
    def has_root_parents(self) -> bool:
        """True when an export or the like uses the node itself, or it is a job's own filter."""
        roots = (edge for edge in self.parents if isinstance(edge, RootEdge))
        return any(edge.options.job is None or edge.name == MAIN_NODE for edge in roots)


def info_of(node: Node) -> NodeInfo:
    """The graph's record of ``node``."""
    info = node.info
    assert isinstance(info, NodeInfo)
    return info


def owners_of(node: Node) -> Iterator[Node]:
    """The node whose options held those of ``node``, the one whose options held that one's, and so on."""
    owner = info_of(node).inline_parent
    while owner is not None:
        yield owner
        owner = info_of(owner).inline_parent


def disown(owner: Node, node: Node) -> None:
    """``node`` is a child of ``owner`` in one place less: nothing ties them any more when that was the last."""
    info = info_of(node)
    if info.inline_parent is owner and not any(edge.parent is owner for edge in info.parents):
        info.inline_parent = None


# What a job calls the node it has put into the graph.
MAIN_NODE: Final = "main node"


def check_not_in_job(node: Node) -> None:
    """Raise QmpError when a job has ``node`` for itself."""
    job = info_of(node).job
    if job is not None:
        raise QmpError(f"Node '{node.name}' is busy: block device is in use by block job: {job.kind}")


def check_not_backing(node: Node, users: Iterable[Edge]) -> None:
    """Raise QmpError when ``node`` is the backing file of one of its ``users``, newest first."""
    for edge in users:
        if edge.role is ChildRole.COW:
            assert edge.parent is not None
            raise QmpError(f"Node '{node.name}' is busy: node is used as backing hd of '{edge.parent.name}'")


class Truncate(Protocol):
    """Resizes a node and tells everybody above it. Raises QmpError."""

    async def __call__(self, node: Node, size: int, *, exact: bool = True) -> None: ...


class Edge(SlowPath):
    """A child of a node, as the node's driver sees it (the ``Child`` protocol). ``parent`` is None at the root.

    ``submit`` is the child node's own, bound anew when the child is swapped: keep the edge, not its ``submit``.
    """

    __slots__ = ("_truncate", "freezes", "key", "name", "node", "parent", "perm", "role", "shared", "submit")

    submit: Callable[[list[Request]], None]

    def __init__(self, parent: Node | None, name: str, node: Node, role: ChildRole, truncate: Truncate) -> None:
        self.key = next(_keys)
        self.parent = parent
        self.name = name
        self.role = role
        self.perm = Perm.NONE
        self.shared = Perm.ALL
        self._truncate = truncate
        # Jobs that rely on the edge leading where it does.
        self.freezes = 0
        self.bind(node)

    def bind(self, node: Node) -> None:
        """Lead to ``node`` from now on."""
        self.node = node
        self.submit = node.submit
        end_epoch()

    def spot(self) -> Spot | None:
        """The node's way of reading on the spot."""
        return self.node.spot()

    def served(self, count: int, size: int) -> None:
        """So many reads of ``size`` bytes together have been served on the spot."""
        stats = self.node.stats
        stats.rd_operations += count
        stats.rd_bytes += size

    @property
    def parent_text(self) -> str:
        """How error texts name the user of the child."""
        assert self.parent is not None
        return f"node '{self.parent.name}'"

    @property
    def node_name(self) -> str:
        """The child node's name."""
        return self.node.name

    @property
    def length(self) -> int:
        """Bytes of the child node."""
        return self.node.length

    @property
    def limits(self) -> Limits:
        """The child node's limits."""
        return self.node.limits

    async def truncate(self, size: int, *, exact: bool = True) -> None:
        """Resize the child node; raises QmpError. The user needs the resize permission."""
        assert self.perm & Perm.RESIZE, f"{self!r} may not resize"
        await self._truncate(self.node, size, exact=exact)

    def grow(self, size: int) -> bool:
        """Let the child be at least ``size`` bytes long; False when that takes waiting. Raises OSError."""
        assert self.perm & Perm.RESIZE, f"{self!r} may not resize"
        node = self.node
        has_grown = node.driver.grow(size)
        node.refresh()
        length_changed(node, self)
        return has_grown

    async def quiesce(self) -> None:
        """Return when everything that was submitted to the child before has ended, wherever below it is."""
        await _quiesce(self.node)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.parent_text} --{self.name}--> {self.node.name}>"


async def _quiesce(node: Node) -> None:
    # A parent first: when it has nothing left of its own, all of it has reached the children.
    await node.quiesce()
    for edge in list(info_of(node).children.values()):
        await _quiesce(edge.node)


def length_changed(node: Node, ignored: Edge | None = None) -> None:
    """Let everybody above ``node`` look again at how long their child is; ``ignored`` knows."""
    for edge in list(info_of(node).parents):
        if edge is ignored:
            continue
        if isinstance(edge, RootEdge):
            if edge.options.on_resize is not None:
                edge.options.on_resize()
            continue
        parent = edge.parent
        assert parent is not None
        before = parent.length, attrs.astuple(parent.driver.limits)
        parent.driver.refresh_length()
        parent.refresh()
        if (parent.length, attrs.astuple(parent.driver.limits)) != before:
            length_changed(parent)


@attrs.frozen
class JobUse:
    """The job that uses a node, and what kind of job that is. A node in use by a job is not for other jobs."""

    id: str
    kind: str


@attrs.frozen
class RootOptions:
    """How an export or a job (``job``) uses a node.

    ``allow_inactive``: take the node as it is, and let it be inactivated while in use; without it an inactive node
    is activated, and a writing user keeps it active. ``needs_active``: do not activate it either, but refuse what
    an inactive node does not allow: another process may own the image. ``on_resize`` is called (between awaits)
    after the length or the limits have changed, ``on_swap`` after the edge leads to another node. ``amends``: while
    the edge is there, the node's driver asks its children for what amending the image takes.
    """

    perm: Perm
    shared: Perm = Perm.ALL
    text: str = UNNAMED
    allow_inactive: bool = False
    needs_active: bool = False
    on_resize: Callable[[], None] | None = None
    on_swap: Callable[[], None] | None = None
    name: str = "root"
    job: JobUse | None = None
    amends: bool = False


class RootEdge(Edge):
    """The way from an export or a job to its node. Made by ``Graph.attach``; ends with ``detach``.

    While the node is inactive the edge uses nothing and shares everything; ``wanted`` comes back with activation.
    """

    __slots__ = ("_ask", "_holds", "_kept", "amended", "is_attached", "options", "wanted")

    def __init__(
        self,
        node: Node,
        options: RootOptions,
        truncate: Truncate,
        ask: Callable[[Detach | SetRights], Awaitable[Any]],
    ) -> None:
        self._holds = 0
        self._kept: list[Request] = []
        super().__init__(None, options.name, node, ChildRole.FILTERED, truncate)
        self.options = options
        self.wanted = Rights(options.perm, options.shared)
        self.is_attached = False
        # What is amended stays the same node, wherever the edge leads.
        self.amended = node if options.amends else None
        self._ask = ask

    @property
    def parent_text(self) -> str:
        """How error texts name the user."""
        return self.options.text

    def bind(self, node: Node) -> None:
        """Lead to ``node`` from now on, requests kept back included."""
        super().bind(node)
        if self._holds:
            self.submit = self._kept.extend

    def hold(self) -> None:
        """Keep back what is submitted from now on: it goes to the node the edge then leads to. Nests."""
        self._holds += 1
        self.submit = self._kept.extend
        end_epoch()

    def spot(self) -> Spot | None:
        """The node's way of reading on the spot; none while requests are kept back."""
        return None if self._holds else super().spot()

    def release(self) -> None:
        """End one ``hold``; the last one lets go of what was kept back."""
        self._holds -= 1
        if not self._holds:
            self.submit = self.node.submit
            end_epoch()
            if self._kept:
                kept, self._kept = self._kept, []
                self.submit(kept)

    async def detach(self) -> None:
        """Let go of the node, which closes when nobody else wants it. Idempotent. No request may be in flight."""
        await self._ask(Detach(self))

    async def set_permissions(self, perm: Perm, shared: Perm) -> None:
        """Use and share something else from now on. Raises QmpError and leaves everything as it was."""
        await self._ask(SetRights(self, Rights(perm, shared)))


@attrs.frozen(eq=False)
class Detach:
    """Ask the graph to take a root edge away."""

    edge: RootEdge


@attrs.frozen(eq=False)
class SetRights:
    """Ask the graph to change what a root edge uses and shares."""

    edge: RootEdge
    rights: Rights
