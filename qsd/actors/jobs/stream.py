"""block-stream: data of a backing chain is copied into the node at its top, which then needs less of the chain."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import attrs

from qsd.actors.edges import MAIN_NODE, Edge, check_not_in_job, info_of
from qsd.actors.jobs.block_job import BlockJob, BlockJobOptions
from qsd.actors.jobs.filter_node import FilterKind, open_filter, put_in, take_out
from qsd.actors.jobs.pace import SMALLEST
from qsd.actors.opening import shielded
from qsd.actors.read_only import set_read_only
from qsd.block.permissions import Perm
from qsd.drivers.base import ChildRole
from qsd.drivers.calls import call
from qsd.errors import QmpError
from qsd.messages import BlockState, Op
from qsd.qapi.schema.block_jobs import BlockdevOnError, IoOperationType
from qsd.qapi.schema.jobs import JobType

if TYPE_CHECKING:
    from qsd.actors.change import Change
    from qsd.actors.graph import Graph
    from qsd.actors.node import Node
    from qsd.messages import Extent

# How many extents are asked for at a time.
EXTENTS = 64


@attrs.frozen
class StreamTask:
    """What is to be streamed: into ``top``, from the nodes ``between`` it and ``base`` (None: the whole chain).

    ``backing_file`` is what the image is to name as its backing file, where that is not the base's own name, and
    ``base_kind`` the format named with it.
    """

    top: Node
    between: tuple[Node, ...]
    base: Node | None
    backing_file: str | None
    base_kind: str
    on_error: BlockdevOnError


class StreamJob(BlockJob):
    """See the module."""

    type: ClassVar[JobType] = JobType.STREAM
    # Bytes looked at in one step.
    largest_step: ClassVar[int] = 1 << 20

    def __init__(self, options: BlockJobOptions, graph: Graph, task: StreamTask) -> None:
        super().__init__(options, graph)
        self._task = task
        self._is_unpinned = False
        # The top is as it was before again if the job does not start.
        self._was_read_only = False
        # What lies before is done; where a step failed, the extent that it failed in ends there.
        self._offset = 0
        self._failed_end = 0

    # -- the graph ----------------------------------------------------------------------------------------------

    @property
    def touched(self) -> Sequence[Node]:
        """The chain down to the base, and whoever uses its top."""
        task = self._task
        nodes = [*self.graph.tools.topology.above([task.top]), task.top, *task.between]
        if self.filter is not None:
            nodes.append(self.filter)
        return nodes if task.base is None else [*nodes, task.base]

    @property
    def concerned(self) -> Sequence[Node]:
        """The top."""
        return [self._task.top]

    async def stage(self) -> None:
        """Open the filter; make the top writable, which it stays, as in the reference."""
        tools, top = self.graph.tools, self._task.top
        async with tools.topology.lock:
            self._check_chain()
            self._was_read_only = top.mode.read_only
            await set_read_only(tools.topology, top, read_only=False)
            info_of(top).pins += 1
        try:
            self.filter = await open_filter(tools, FilterKind.STREAM, top, self.options.filter_name)
        except BaseException:
            await shielded(self._restore)
            raise
        finally:
            await tools.opener.unpin(top)

    def joined_graph(self) -> None:
        """As for any job; and the top stays writable."""
        super().joined_graph()
        self._was_read_only = False

    async def _restore(self) -> None:
        topology, top = self.graph.tools.topology, self._task.top
        async with topology.lock:
            if self._was_read_only and topology.nodes.get(top.name) is top:
                # Somebody may have begun to write there meanwhile.
                with contextlib.suppress(QmpError):
                    await set_read_only(topology, top, read_only=True)

    def _check_chain(self) -> None:
        """Somebody else may have had a turn since the nodes were found. Raises QmpError."""
        task = self._task
        wanted = [task.top, *task.between, *([] if task.base is None else [task.base])]
        chain = backing_chain(task.top)
        is_open = self.graph.tools.topology.nodes.get(task.top.name) is task.top
        if not is_open or chain[: len(wanted)] != wanted or (task.base is None and chain != wanted):
            raise QmpError(f"The backing chain of '{task.top.name}' has changed")

    async def unstage(self) -> None:
        """Give up the caller's pin on the filter; a job that did not start leaves nothing."""
        if self.filter is not None and not self._is_unpinned:
            self._is_unpinned = True
            await self.graph.tools.opener.unpin(self.filter)
            await self._restore()

    def describe_start(self, change: Change) -> None:
        """The filter goes above the top; nobody resizes it or changes the nodes below."""
        task = self._task
        assert self.filter is not None
        self._check_chain()
        check_not_in_job(task.top)
        put_in(change, task.top, self.filter)
        read, unchanged = Perm.CONSISTENT_READ, Perm.WRITE_UNCHANGED
        # The job reads through its filter, which writes what it reads; that is how nobody may resize the top.
        self.use(change, self.filter, "root", read, Perm.ALL & ~Perm.RESIZE, is_user=True)
        self.use(change, self.filter, MAIN_NODE, Perm.NONE, Perm.ALL)
        for node in task.between:
            self.use(change, node, "intermediate node", Perm.NONE, read | unchanged)
        self.use(change, task.top, "active node", Perm.NONE, Perm.ALL & ~Perm.RESIZE)
        links = (_backing(node) for node in (task.top, *task.between))
        self.frozen.extend(link for link in links if link is not None)

    def describe_end(self, change: Change, *, is_success: bool) -> None:
        """The filter goes; after a success the base is next below the top."""
        task = self._task
        assert self.filter is not None
        take_out(change, task.top, self.filter)
        link = _backing(task.top)
        if not is_success or link is None or link.node is task.base:
            return
        if task.base is None:
            change.detach(link)
        else:
            change.swap(link, task.base)

    async def prepare_end(self, *, is_success: bool) -> None:
        """Name the base in the image. Opened without the backing file it names, it goes on naming it."""
        task, driver = self._task, self._task.top.driver
        if not is_success or _backing(task.top) is None:
            return
        # What was copied is there before the image does without the nodes it came from.
        await call(driver, Op.FLUSH, 0, 0)
        if task.base is None:
            await driver.change_backing_file("", "")
        else:
            await driver.change_backing_file(task.backing_file or task.base.driver.filename(), task.base_kind)

    # -- the work -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Go through the disk and copy what the nodes in between hold."""
        async with self._task.top.writes_tracked():
            await self._go_through()

    async def _go_through(self) -> None:
        task = self._task
        length = task.top.length if task.between else 0
        failure: OSError | None = None
        self.show_progress(0, length)
        while self._offset < length:
            await self.step_allowed()
            try:
                await self._step(min(self._offset + self.pace.step(self.largest_step), length))
            except OSError as error:
                self.show_progress(self._offset, length)
                await self.failed(IoOperationType.READ, error, task.on_error)
                if task.on_error is not BlockdevOnError.IGNORE:
                    continue
                failure, self._offset = failure or error, self._failed_end
            self.show_progress(self._offset, length)
        if failure is not None:
            raise failure

    async def _step(self, end: int) -> None:
        """Copy what is to be copied up to ``end``. Nobody else writes there meanwhile."""
        top = self._task.top
        async with top.working(), top.serialiser.exclusive(self._offset, end):
            while self._offset < end:
                self._failed_end = end
                for extent in await self._extents(self._offset, end - self._offset):
                    if 1 < extent.depth <= 1 + len(self._task.between):
                        await self._take(extent)
                    else:
                        self._offset += extent.length

    async def _take(self, extent: Extent) -> None:
        """Copy an extent, or as much of it as comes before an error."""
        self._failed_end = self._offset + extent.length
        try:
            await self._copy(self._offset, extent)
        except OSError:
            if extent.length <= SMALLEST:
                raise
            for done in range(0, extent.length, SMALLEST):
                await self._take(attrs.evolve(extent, length=min(SMALLEST, extent.length - done)))
        else:
            self.pace.spend(extent.length)
            self._offset += extent.length

    async def _extents(self, offset: int, length: int) -> list[Extent]:
        request = await call(self._task.top.driver, Op.BLOCK_STATUS, offset, length, extents=EXTENTS)
        found: list[Extent] = request.result
        if not found:
            raise OSError(errno.EIO, "no block status")
        return found

    async def _copy(self, offset: int, extent: Extent) -> None:
        driver, length = self._task.top.driver, extent.length
        if extent.state & BlockState.ZERO:
            await call(driver, Op.WRITE_ZEROES, offset, length)
            return
        data = memoryview(bytearray(length))
        await call(driver, Op.READ, offset, length, data)
        await call(driver, Op.WRITE, offset, length, data)


def backing_chain(top: Node) -> list[Node]:
    """``top`` and the backing files below it."""
    chain = [top]
    while (edge := _backing(chain[-1])) is not None:
        chain.append(edge.node)
    return chain


def _backing(node: Node) -> Edge | None:
    return next((edge for edge in info_of(node).children.values() if edge.role is ChildRole.COW), None)
