"""Drivers for tests of the graph: a disk in memory with permission locks, a pass-through, and a format.

``World`` is what the disks stand in: their contents, who has which one open, who uses what, and what is to fail.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import Enum
from typing import Any, ClassVar

import attrs
import trio
from fake_bitmap_store import FakeBitmapStore, Stored

from qsd.actors.edges import info_of
from qsd.actors.graph import Graph
from qsd.actors.supervisor import Floor, Supervisor
from qsd.block.permissions import Perm, perm_text
from qsd.block.plan import Rights, plan_permissions
from qsd.drivers.base import ChildRole, Driver, Mode
from qsd.drivers.snapshots import InternalSnapshot
from qsd.errors import QmpError
from qsd.messages import Op, Request
from qsd.qapi.schema.block import BlockdevOptions


class Kind(str, Enum):
    DISK = "disk"
    RAW = "raw"
    FORMAT = "format"


@attrs.frozen(kw_only=True, slots=False)
class DiskOptions(BlockdevOptions):
    driver: Any = Kind.DISK
    filename: str = "a"


@attrs.frozen(kw_only=True, slots=False)
class RawOptions(BlockdevOptions):
    driver: Any = Kind.RAW
    file: Any = None
    offset: int | None = None
    size: int | None = None


@attrs.frozen(kw_only=True, slots=False)
class FormatOptions(BlockdevOptions):
    driver: Any = Kind.FORMAT
    file: Any = None
    backing: Any = None


NO_SECRETS: dict[str, bytes] = {}


@attrs.define
class World:
    """``fail`` holds (what, node name); ``gates`` lets an operation of that kind wait."""

    contents: dict[str, bytearray] = attrs.field(factory=dict)
    locks: dict[tuple[str, int], tuple[Perm, Perm]] = attrs.field(factory=dict)
    open: set[str] = attrs.field(factory=set)
    # Node name of a format -> what its image says its backing file is.
    named_backing: dict[str, BlockdevOptions] = attrs.field(factory=dict)
    # Node name of a format -> its internal snapshots, and the backing file its image names.
    snapshots: dict[str, list[InternalSnapshot]] = attrs.field(factory=dict)
    backing_names: dict[str, tuple[str, str]] = attrs.field(factory=dict)
    # Node name of a format -> the bitmaps its image holds; formats not named here cannot keep any.
    bitmaps: dict[str, dict[str, Stored]] = attrs.field(factory=dict)
    fail: set[tuple[str, str]] = attrs.field(factory=set)
    gates: dict[tuple[str, str], trio.Event] = attrs.field(factory=dict)
    arrived: dict[tuple[str, str], trio.Event] = attrs.field(factory=dict)
    log: list[str] = attrs.field(factory=list)

    async def pass_point(self, what: str, name: str) -> None:
        self.log.append(f"{what} {name}")
        await trio.lowlevel.checkpoint()
        if (what, name) in self.arrived:
            self.arrived[what, name].set()
        if (what, name) in self.gates:
            await self.gates[what, name].wait()
        if (what, name) in self.fail:
            raise QmpError(f"{what} of {name} fails")

    def gate(self, what: str, name: str) -> tuple[trio.Event, trio.Event]:
        """(set when it was reached, set it to let it go on)."""
        reached, go = trio.Event(), trio.Event()
        self.arrived[what, name], self.gates[what, name] = reached, go
        return reached, go


class _Fake(Driver):
    world: ClassVar[World]
    can_truncate = True

    async def open(self) -> None:
        await self.world.pass_point("open", self.node_name)
        self.world.open.add(self.node_name)
        self.refresh_length()

    async def close(self) -> None:
        await self.world.pass_point("close", self.node_name)
        self.world.open.remove(self.node_name)

    async def prepare_permissions(self, perm: Perm, shared: Perm) -> None:
        await self.world.pass_point("permissions", self.node_name)

    async def prepare_reopen(self, options: Any, mode: Mode) -> None:
        await self.world.pass_point("reopen", self.node_name)


class Disk(_Fake):
    """Locks like ``file``: what is used and what is not shared, seen by every other open of the same file."""

    name = "disk"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._old: tuple[Perm, Perm] | None = None
        self.held: list[Request] = []
        self.holding = False

    def refresh_length(self) -> None:
        self.length = len(self.data)

    @property
    def data(self) -> bytearray:
        return self.world.contents.setdefault(self.options.filename, bytearray(4096))

    @property
    def _key(self) -> tuple[str, int]:
        return self.options.filename, id(self)

    async def close(self) -> None:
        await super().close()
        self.world.locks.pop(self._key, None)

    async def prepare_permissions(self, perm: Perm, shared: Perm) -> None:
        await super().prepare_permissions(perm, shared)
        for (filename, owner), (theirs, they_share) in self.world.locks.items():
            if filename == self.options.filename and owner != id(self):
                if perm & ~they_share:
                    raise QmpError(f'Failed to get "{perm_text(perm & ~they_share)}" lock')
                if theirs & ~shared:
                    raise QmpError(f'Failed to get shared "{perm_text(theirs & ~shared)}" lock')
        self._old = self.world.locks.get(self._key, (Perm.NONE, Perm.ALL))
        # Until the commit both the old and the new rights are held.
        self.world.locks[self._key] = (perm | self._old[0], shared & self._old[1])
        self._new = (perm, shared)

    def commit_permissions(self) -> None:
        assert self._old is not None
        self._old = None
        self.world.locks[self._key] = self._new

    def abort_permissions(self) -> None:
        assert self._old is not None
        self.world.locks[self._key] = self._old
        self._old = None

    async def prepare_reopen(self, options: Any, mode: Mode) -> None:
        await super().prepare_reopen(options, mode)
        if options.filename != self.options.filename:
            raise QmpError("Cannot change the option 'filename'")

    def submit(self, batch: list[Request]) -> None:
        for request in batch:
            self.started()
            if self.holding:
                self.held.append(request)
            else:
                self._serve(request)

    def let_go(self) -> None:
        self.holding = False
        held, self.held = self.held, []
        for request in held:
            self._serve(request)

    def _serve(self, request: Request) -> None:
        end = request.offset + request.length
        if request.op == Op.READ:
            assert request.buffer is not None
            request.buffer[:] = self.data[request.offset : end]
        elif request.op == Op.WRITE:
            assert request.buffer is not None
            assert self.world.locks[self._key][0] & Perm.WRITE, "a write without the permission"
            self.data[request.offset : end] = request.buffer
        self.finished()
        request.complete(0)

    async def truncate(self, size: int, *, exact: bool = True) -> None:
        await self.world.pass_point("truncate", self.node_name)
        data = self.data
        self.world.contents[self.options.filename] = bytearray(data[:size]).ljust(size, b"\0")
        self.refresh_length()


class Raw(_Fake):
    """A window onto its child; with a size it does not share resize."""

    name = "raw"
    is_format = True
    child_specs = (("file", ChildRole.DATA),)

    def refresh_length(self) -> None:
        whole = self.children["file"].length - (self.options.offset or 0)
        self.length = whole if self.options.size is None else self.options.size

    async def prepare_reopen(self, options: Any, mode: Mode) -> None:
        await super().prepare_reopen(options, mode)
        if (options.offset or 0) > self.children["file"].length:
            raise QmpError("Offset cannot be greater than size of the containing file")

    def commit_reopen(self, options: Any, mode: Mode) -> None:
        super().commit_reopen(options, mode)
        self.refresh_length()

    def child_permissions(self, name: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        return perm, shared & ~Perm.RESIZE if self.options.size is not None else shared

    def submit(self, batch: list[Request]) -> None:
        for request in batch:
            request.offset += self.options.offset or 0
        self.children["file"].submit(batch)

    async def truncate(self, size: int, *, exact: bool = True) -> None:
        if self.options.size is not None:
            raise QmpError("Cannot resize fixed-size raw disks")
        await self.world.pass_point("truncate", self.node_name)
        await self.children["file"].truncate(size + (self.options.offset or 0))
        self.refresh_length()


class Format(_Fake):
    """Needs its file for itself, idle or not, and its backing file unchanged; writes to its file when it closes."""

    name = "format"
    is_format = True
    child_specs = (("backing", ChildRole.COW), ("file", ChildRole.DATA))
    can_truncate = False

    async def open(self) -> None:
        named = self.world.named_backing.get(self.node_name)
        if named is not None and self.options.backing is None:
            child = await self.host.open_child("backing", ChildRole.COW, named)
            assert self.children["backing"] is child
        await super().open()
        image = self.world.bitmaps.get(self.node_name)
        if image is not None:
            self.bitmap_store = FakeBitmapStore(image, self)

    def refresh_length(self) -> None:
        self.length = self.children["file"].length

    def child_permissions(self, name: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        stable = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
        if not self.mode.active:
            return Perm.NONE, Perm.ALL
        if name == "backing" or self.mode.read_only:
            return Perm.CONSISTENT_READ, stable
        return Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE, stable

    def submit(self, batch: list[Request]) -> None:
        self.children["file"].submit(batch)

    async def close(self) -> None:
        if not self.mode.read_only and self.mode.active:
            await self.children["file"].write(0, b"closed clean")
        await super().close()

    def can_snapshot(self) -> bool:
        return True

    def snapshots(self) -> list[InternalSnapshot]:
        return self.world.snapshots.setdefault(self.node_name, [])

    async def create_snapshot(self, name: str, now_ns: int) -> str:
        await self._write_metadata("create")
        made = InternalSnapshot(str(len(self.snapshots()) + 1), name, now_ns, now_ns)
        self.snapshots().append(made)
        return made.id

    async def delete_snapshot(self, snapshot_id: str) -> None:
        await self.world.pass_point("delete", self.node_name)
        await self.children["file"].write(512, bytes(8))
        (gone,) = [snapshot for snapshot in self.snapshots() if snapshot.id == snapshot_id]
        self.snapshots().remove(gone)

    async def change_backing_file(self, name: str, kind: str) -> None:
        await self._write_metadata("rename")
        self.world.backing_names[self.node_name] = name, kind

    async def _write_metadata(self, what: str) -> None:
        await self.children["file"].write(512, b"metadata")
        try:
            await self.world.pass_point(what, self.node_name)
        except QmpError:
            raise OSError(errno.ENOSPC, "no space") from None


class NoAio:
    """The graph passes it on and no fake uses it."""

    name = "none"


@asynccontextmanager
async def running_graph(world: World | None = None) -> AsyncIterator[tuple[Graph, World]]:
    """A graph with the fakes on a supervisor; at the end everything must have been closed."""
    world = world or World()
    kinds = {kind.name: type(kind.__name__, (kind,), {"world": world}) for kind in (Disk, Raw, Format)}

    async def find(name: str) -> type[Driver]:
        return kinds[name]

    async with Supervisor() as supervisor:
        aio: Any = NoAio()  # never used
        graph = Graph(supervisor, find, aio, warn=print, secret=NO_SECRETS.__getitem__, emit=print)
        await supervisor.start(graph, Floor.GRAPH)
        yield graph, world
    assert supervisor.fatal is None
    assert not world.open, "a driver was left open"
    assert not world.locks, "a lock was left behind"


def check_plan(graph: Graph) -> None:
    """What nodes and edges have is what planning the whole graph anew gives them."""
    living = graph.topology.living
    nodes = list(living.values())
    edges = {edge.key: edge for node in nodes for edge in info_of(node).parents}

    def rule(key: int, name: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        return living[key].driver.child_permissions(name, perm, shared)

    plan = plan_permissions(graph.topology.snapshot(nodes), rule)
    assert {key: Rights(edge.perm, edge.shared) for key, edge in edges.items()} == plan.edges
    assert {info_of(node).key: info_of(node).rights for node in nodes} == plan.nodes
    for info in map(info_of, nodes):
        assert info.height == 1 + max((info_of(edge.node).height for edge in info.children.values()), default=0)


def state_of(graph: Graph, world: World) -> Any:
    """Everything a failed operation must leave as it was."""
    topology = graph.topology
    nodes = {
        node.name: (
            key,
            node.mode,
            node.active,
            node.writable,
            node.length,
            node.info.state,
            node.info.options,
            node.info.rights,
            node.info.pins,
            node.info.is_monitor_owned,
            node.is_held,
            [(b.name, b.bits.digest(), b.is_recording, b.is_busy, b.is_persistent) for b in node.bitmaps],
            [(edge.key, edge.perm, edge.shared) for edge in node.info.parents],
            {name: (edge.key, edge.node.name) for name, edge in node.driver.children.items()},
            {name: edge.key for name, edge in node.info.children.items()},
        )
        for key, node in topology.living.items()
    }
    roots = [(edge.key, edge.node.name, edge.wanted) for edge in topology.roots]
    return (
        nodes,
        list(topology.nodes),
        roots,
        set(topology._taken),
        {key: lock for key, lock in world.locks.items() if lock != (Perm.NONE, Perm.ALL)},
        set(world.open),
        [actor.name for actor in graph._supervisor.actors(Floor.NODES)],
    )
