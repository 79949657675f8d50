"""A block job: a job that copies data between nodes at a speed, has a way with I/O errors, and tells more.

A kind of block job says in ``describe_start`` and ``describe_end`` how the graph looks while it works and after it;
``block_graph`` carries that out. Its ``run`` calls ``step_allowed`` before every step and ``failed`` when one has
failed.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import trio

from qsd.actors.edges import JobUse, RootEdge, RootOptions
from qsd.actors.jobs.block_graph import EndJob
from qsd.actors.jobs.job import Job, JobOptions
from qsd.actors.jobs.pace import Pace
from qsd.block.permissions import Perm
from qsd.errors import QmpError
from qsd.qapi.schema.block_info import BlockDeviceIoStatus
from qsd.qapi.schema.block_jobs import BlockdevOnError, BlockErrorAction, BlockJobInfo, IoOperationType
from qsd.qapi.schema.jobs import JobStatus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qsd.actors.change import Change
    from qsd.actors.edges import Edge
    from qsd.actors.graph import Graph
    from qsd.actors.node import Node

_ACTIONS = {
    BlockdevOnError.REPORT: BlockErrorAction.REPORT,
    BlockdevOnError.IGNORE: BlockErrorAction.IGNORE,
    BlockdevOnError.STOP: BlockErrorAction.STOP,
}
# Seconds before a step is tried again after an error that is to be ignored (the reference does not wait).
_IGNORE_PAUSE = 0.1


@attrs.frozen
class BlockJobOptions(JobOptions):
    """``speed`` in bytes per second, 0 without limit; ``filter_name`` is for the filter the job puts in."""

    speed: int = 0
    filter_name: str | None = None


class BlockJob(Job):
    """See the module."""

    options: BlockJobOptions
    filter_driver: ClassVar[str]

    def __init__(self, options: BlockJobOptions, graph: Graph) -> None:
        super().__init__(options)
        self.graph = graph
        self.pace = Pace()
        self.io_status = BlockDeviceIoStatus.OK
        self.filter: Node | None = None
        self.edges: list[RootEdge] = []
        self.frozen: list[Edge] = []
        self.is_in_graph = False
        self._was_started = False
        self._was_ready = False
        self._is_waiting = False

    # -- the graph ----------------------------------------------------------------------------------------------

    @property
    def touched(self) -> Sequence[Node]:
        """The nodes the job is about."""
        raise NotImplementedError

    @property
    def concerned(self) -> Sequence[Node]:
        """Those to be drained when it begins and ends."""
        raise NotImplementedError

    async def stage(self) -> None:
        """Open what is needed beforehand. Raises QmpError and leaves nothing."""

    async def unstage(self) -> None:
        """Give up what ``stage`` opened, as far as nobody uses it."""

    def describe_start(self, change: Change) -> None:
        """Describe the graph while the job works. Raises QmpError."""
        raise NotImplementedError

    def describe_end(self, change: Change, *, is_success: bool) -> None:
        """Describe the graph after the job. Raises QmpError."""
        raise NotImplementedError

    async def prepare_end(self, *, is_success: bool) -> None:
        """Change the images as the end asks for, with the nodes drained. Raises QmpError or OSError."""

    def abort_end(self) -> None:
        """The end that was prepared does not come."""

    def use(
        self, change: Change, node: Node, name: str, perm: Perm, shared: Perm, *, is_user: bool = False
    ) -> RootEdge:
        """Describe an edge of the job's own; ``is_user``: one like that of any other user."""
        job = None if is_user else JobUse(self.id, self.type.value)
        options = RootOptions(perm, shared, name=name, job=job)
        edge = self.graph.tools.make_root(node, options)
        change.attach(edge)
        self.edges.append(edge)
        return edge

    def joined_graph(self) -> None:
        """The graph is as ``describe_start`` says."""
        self.is_in_graph = True
        for edge in self.frozen:
            edge.freezes += 1

    def left_graph(self) -> None:
        """The graph is as ``describe_end`` says."""
        self.is_in_graph = False
        for edge in self.frozen:
            edge.freezes -= 1
        self.frozen.clear()
        self.edges.clear()

    async def prepare(self) -> None:
        """Leave the graph as it is meant to be."""
        await self._leave(is_success=True)

    async def abort(self) -> None:
        """Leave the graph as it was before, if the job ever joined it."""
        if self.is_in_graph:
            await self._leave(is_success=False)

    async def _leave(self, *, is_success: bool) -> None:
        await self.graph.transact([EndJob(job=self, is_success=is_success)])

    # -- working ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin the work."""
        self._was_started = True
        super().start()

    async def step_allowed(self) -> None:
        """Return when the next step may be done: not paused, and not too fast."""
        while True:
            await self.pause_point()
            if self.pace.is_due:
                return
            self._is_waiting = True
            try:
                await self.pace.wait()
            finally:
                self._is_waiting = False

    def hold_back(self) -> None:
        """See ``Job``; a job that waits for its time pauses at once."""
        super().hold_back()
        self.pace.interrupt()

    async def failed(self, operation: IoOperationType, error: OSError, policy: BlockdevOnError) -> None:
        """Do what the policy says about an I/O error: raise it, or return when the step is to be tried again."""
        number = error.errno or errno.EIO
        action = _ACTIONS.get(policy)
        if action is None:
            action = BlockErrorAction.STOP if number == errno.ENOSPC else BlockErrorAction.REPORT
        self._emit(
            "BLOCK_JOB_ERROR",
            {"device": self.id, "operation": operation.value, "action": action.value},
        )
        if action is BlockErrorAction.REPORT:
            raise error
        if action is BlockErrorAction.STOP:
            is_full = number == errno.ENOSPC
            self.io_status = BlockDeviceIoStatus.NOSPACE if is_full else BlockDeviceIoStatus.FAILED
            self.pause_for_user()
        else:
            await trio.sleep(_IGNORE_PAUSE)

    def set_speed(self, speed: int) -> None:
        """See ``Job``."""
        if speed < 0:
            raise QmpError("Parameter 'speed' expects a non-negative value")
        self.pace.speed = speed

    def resumed(self) -> None:
        """The user has seen to the error."""
        self.io_status = BlockDeviceIoStatus.OK

    # -- what is told -------------------------------------------------------------------------------------------

    def on_status(self, status: JobStatus) -> None:
        """READY and PENDING have events of their own."""
        if status is JobStatus.READY and not self._was_ready:
            self._was_ready = True
            self._emit("BLOCK_JOB_READY", self._figures())
        elif status is JobStatus.PENDING and not self.options.auto_finalize:
            self._emit("BLOCK_JOB_PENDING", {"type": self.type.value, "id": self.id})

    def on_concluding(self) -> None:
        """Tell how it ended, if it ever began."""
        if not self._was_started:
            return
        if self.is_cancelled:
            self._emit("BLOCK_JOB_CANCELLED", self._figures())
        else:
            error = {} if self.error is None else {"error": self.error}
            self._emit("BLOCK_JOB_COMPLETED", self._figures() | error)

    def _figures(self) -> dict[str, Any]:
        return {
            "type": self.type.value,
            "device": self.id,
            "len": self.total,
            "offset": self.progress,
            "speed": self.pace.speed,
        }

    def block_info(self) -> BlockJobInfo:
        """What ``query-block-jobs`` tells."""
        return BlockJobInfo(**self._block_facts())

    def _block_facts(self) -> dict[str, Any]:
        is_working = self.status in (JobStatus.RUNNING, JobStatus.READY) and not self._is_waiting
        return {
            "type": self.type,
            "device": self.id,
            "len": self.total,
            "offset": self.progress,
            "busy": is_working,
            "paused": self.is_to_pause,
            "speed": self.pace.speed,
            "io_status": self.io_status,
            "ready": self.status in (JobStatus.READY, JobStatus.STANDBY),
            "status": self.status,
            "auto_finalize": self.options.auto_finalize,
            "auto_dismiss": self.options.auto_dismiss,
            "error": self.error,
        }
