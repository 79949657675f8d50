"""A copy-on-write format in memory, and a house with a graph, jobs and what monitors hear, for block jobs."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import Enum
from types import SimpleNamespace
from typing import Any, ClassVar

import attrs
import pytest
import trio
import trio.testing
from graph_fakes import NO_SECRETS, NoAio

import qsd.commands.block
import qsd.commands.block_jobs
import qsd.commands.jobs
import qsd.commands.snapshots  # noqa: F401  # each fills the table of commands
from qsd.actors.events import Emitted, EventBus
from qsd.actors.graph import Graph
from qsd.actors.jobs.table import Jobs
from qsd.actors.supervisor import Floor, Supervisor
from qsd.block.permissions import Perm
from qsd.commands.context import Context
from qsd.commands.dispatch import execute
from qsd.drivers.base import ChildRole, Driver
from qsd.drivers.registry import JOB_FILTERS
from qsd.errors import QmpError
from qsd.messages import BlockState, Extent, Op, Request
from qsd.qapi.schema.block import BlockdevOptions

BLOCK = 512


class CowKind(str, Enum):
    COW = "cow"


@attrs.frozen(kw_only=True, slots=False)
class CowOptions(BlockdevOptions):
    driver: Any = CowKind.COW
    image: str = ""
    backing: Any = None


@attrs.define(eq=False)
class Image:
    """What is on disk: the blocks that are allocated (None: zeroes), and the names in the header."""

    length: int
    blocks: dict[int, bytes | None] = attrs.field(factory=dict)
    backing: tuple[str, str] = ("", "")
    flushed: int = 0


@attrs.define
class Shelf:
    """All images; requests of (operation, image) that fail, with the errno; or that wait until ``let_go``."""

    images: dict[str, Image] = attrs.field(factory=dict)
    failing: dict[tuple[Op, str], int] = attrs.field(factory=dict)
    held: dict[tuple[Op, str], list[Any]] = attrs.field(factory=dict)

    def let_go(self, op: Op, image: str) -> None:
        for go_on in self.held.pop((op, image)):
            go_on()


class CowDriver(Driver):
    """Blocks of 512 bytes, from the image or from the backing file."""

    name = "cow"
    is_format = True
    child_specs = (("backing", ChildRole.COW),)
    can_truncate = True
    shelf: ClassVar[Shelf]

    @property
    def image(self) -> Image:
        return self.shelf.images[self.options.image]

    async def open(self) -> None:
        self.length = self.image.length

    def filename(self) -> str:
        return str(self.options.image)

    def child_permissions(self, name: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        stable = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
        return perm & Perm.CONSISTENT_READ, Perm.ALL if shared & Perm.WRITE else stable

    async def truncate(self, size: int, *, exact: bool = True) -> None:
        self.image.length = self.length = size

    async def change_backing_file(self, name: str, kind: str) -> None:
        if len(name) > 100:
            raise OSError(errno.EINVAL, "too long")
        self.image.backing = name, kind

    def submit(self, batch: list[Request]) -> None:
        for request in batch:
            self.started()
            key = Op(request.op), self.options.image
            if key in self.shelf.held:
                self.shelf.held[key].append(lambda request=request: self._serve(request))
            else:
                self._serve(request)

    def _serve(self, request: Request) -> None:
        error = self.shelf.failing.get((Op(request.op), self.options.image), 0)
        if error:
            self.finished()
            request.complete(error)
            return
        op = request.op
        first, last = request.offset // BLOCK, (request.offset + request.length) // BLOCK
        assert op == Op.FLUSH or not (request.offset | request.length) % BLOCK
        if op == Op.READ:
            assert request.buffer is not None
            for number in range(first, last):
                start = (number - first) * BLOCK
                request.buffer[start : start + BLOCK] = self.read_block(number)
        elif op == Op.WRITE:
            assert request.buffer is not None
            assert not self.mode.read_only
            for number in range(first, last):
                start = (number - first) * BLOCK
                self.image.blocks[number] = bytes(request.buffer[start : start + BLOCK])
        elif op == Op.WRITE_ZEROES:
            assert not self.mode.read_only
            self.image.blocks.update(dict.fromkeys(range(first, last)))
        elif op == Op.BLOCK_STATUS:
            request.result = [self.state(number) for number in range(first, last)][: request.extents_wanted]
        elif op == Op.FLUSH:
            self.image.flushed = len(self.image.blocks)
        self.finished()
        request.complete(0)

    @property
    def _backing(self) -> CowDriver | None:
        child: Any = self.children.get("backing")
        return None if child is None else child.node.driver

    def read_block(self, number: int) -> bytes:
        if number in self.image.blocks:
            return self.image.blocks[number] or bytes(BLOCK)
        below = self._backing
        if below is None or (number + 1) * BLOCK > below.length:
            return bytes(BLOCK)
        return below.read_block(number)

    def state(self, number: int) -> Extent:
        if number in self.image.blocks:
            kind = BlockState.ZERO if self.image.blocks[number] is None else BlockState.DATA
            return Extent(BLOCK, kind | BlockState.ALLOCATED, 1)
        below = self._backing
        if below is None:
            return Extent(BLOCK, BlockState.ZERO, 0)
        if (number + 1) * BLOCK > below.length:
            return Extent(BLOCK, BlockState.ZERO, 2)
        found = below.state(number)
        return Extent(BLOCK, found.state & ~BlockState.ALLOCATED, found.depth + 1 if found.depth else 0)


@attrs.define(eq=False)
class House:
    """A graph of such images, jobs, and what was heard of them."""

    graph: Graph
    jobs: Jobs
    shelf: Shelf
    heard: list[tuple[str, dict[str, Any]]] = attrs.field(factory=list)

    def hear(self, event: Emitted) -> None:
        self.heard.append((event.name, dict(event.message["data"])))

    @property
    def told(self) -> list[str]:
        """The statuses and the names of other events, in order."""
        return [data["status"] if name == "JOB_STATUS_CHANGE" else name for name, data in self.heard]

    def of(self, name: str) -> list[dict[str, Any]]:
        """What events of that name said."""
        return [data for each, data in self.heard if each == name]

    def image(self, name: str, blocks: dict[int, int | None] | None = None, *, length: int = 64) -> None:
        """Make an image of ``length`` blocks; ``blocks`` maps numbers to a byte that fills the block."""
        filled = {at: None if byte is None else bytes([byte]) * BLOCK for at, byte in (blocks or {}).items()}
        self.shelf.images[name] = Image(length * BLOCK, filled)

    async def node(self, name: str, backing: Any = None, **more: Any) -> None:
        """Open the image of that name as the node of that name."""
        make: Any = CowOptions
        await self.graph.add(make(node_name=name, image=name, backing=backing, **more))

    async def contents(self, name: str) -> list[int]:
        """What a reader of the node sees: the first byte of every block, all of which must be alike."""
        driver: Any = self.graph.find(name).driver
        blocks = [driver.read_block(number) for number in range(driver.length // BLOCK)]
        assert all(block == block[:1] * BLOCK for block in blocks)
        return [block[0] for block in blocks]

    async def execute(self, name: str, **arguments: Any) -> Any:
        """Run a command."""
        services: Any = SimpleNamespace(graph=self.graph, jobs=self.jobs)
        return await execute(Context(services), name, {key.replace("_", "-"): arguments[key] for key in arguments})

    async def refusal(self, name: str, **arguments: Any) -> str:
        """Run a command that must fail; why it does."""
        with pytest.raises(QmpError) as caught:
            await self.execute(name, **arguments)
        return caught.value.desc

    def allocated(self, name: str) -> set[int]:
        """The blocks an image holds itself."""
        return set(self.shelf.images[name].blocks)


@asynccontextmanager
async def running_house(*drivers: type[Driver]) -> AsyncIterator[House]:
    """A house, with other drivers as well; at the end everything must have been closed."""
    shelf = Shelf()
    cow = type("CowDriver", (CowDriver,), {"shelf": shelf})
    bus = EventBus()

    known: dict[str, type[Driver]] = {cow.name: cow, **JOB_FILTERS, **{each.name: each for each in drivers}}

    async def find(name: str) -> type[Driver]:
        return known[name]

    async with Supervisor() as supervisor:
        aio: Any = NoAio()  # never used
        graph = Graph(supervisor, find, aio, warn=print, secret=NO_SECRETS.__getitem__, emit=bus.emit)
        await supervisor.start(graph, Floor.GRAPH)
        jobs = Jobs(supervisor, bus)
        await supervisor.start(jobs, Floor.JOBS)
        house = House(graph, jobs, shelf)
        bus.subscribe(house.hear)
        yield house
    assert supervisor.fatal is None
    assert not shelf.held, "requests were left waiting"


async def settle() -> None:
    """Let everything happen that can happen by itself."""
    await trio.testing.wait_all_tasks_blocked()
