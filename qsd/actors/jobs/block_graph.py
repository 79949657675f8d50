"""How a block job joins the graph and leaves it again: as an action, alone or as part of a transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import attrs

from qsd.actors.change_steps import Firmness
from qsd.actors.graph_actions import GraphAction
from qsd.actors.jobs.job import CANCELED
from qsd.errors import QmpError
from qsd.qapi.schema.jobs import JobStatus

if TYPE_CHECKING:
    from qsd.actors.change import Change
    from qsd.actors.edges import Edge
    from qsd.actors.jobs.block_job import BlockJob
    from qsd.actors.jobs.group import JobGroup
    from qsd.actors.jobs.table import Jobs
    from qsd.actors.node import Node


@attrs.define(eq=False, kw_only=True)
class StartJob(GraphAction):
    """Start a block job: it is created beforehand, and begins to work when everything else is done.

    ``is_alone``: no other action can be the reason why it does not start.
    """

    jobs: Jobs
    job: BlockJob
    group: JobGroup | None = None
    is_alone: bool = True
    # It touches no more than its own nodes, wherever in the graph they are.
    is_near: ClassVar[bool] = False
    _was_committed: bool = attrs.field(default=False, init=False)

    @property
    def concerned(self) -> list[Node]:
        """The job's nodes."""
        return list(self.job.concerned)

    @property
    def touched(self) -> list[Node]:
        """The job's nodes."""
        return list(self.job.touched)

    async def stage(self, earlier: Sequence[GraphAction]) -> None:
        """Create the job."""
        job = self.job
        await job.stage()
        try:
            await self.jobs.create(job, self.group)
        except BaseException:
            await job.unstage()
            raise
        try:
            job.set_speed(job.options.speed)
        except QmpError:
            self.jobs.discard(job)
            await job.unstage()
            raise

    def describe(self, change: Change) -> None:
        """Put the job's filter in place, and let it use its nodes."""
        if self.job.status is not JobStatus.CREATED:
            # A user has seen it in the list, and cancelled it.
            raise QmpError(CANCELED)
        self.job.is_starting = True
        self.job.edges.clear()
        self.job.frozen.clear()
        self.job.describe_start(change)

    def commit(self) -> None:
        """Let it work."""
        self._was_committed = True
        self.job.joined_graph()
        self.job.start()

    async def unstage(self) -> None:
        """Forget the job if it does not work."""
        job = self.job
        job.is_starting = False
        if not self._was_committed and not job.concluded.is_set():
            if self.is_alone:
                self.jobs.discard(job)
            else:
                job.cancel(force=True)
                await job.concluded.wait()
        await job.unstage()


@attrs.define(eq=False, kw_only=True)
class EndJob(GraphAction):
    """Take a block job out of the graph."""

    job: BlockJob
    is_success: bool
    is_near: ClassVar[bool] = False

    @property
    def firmness(self) -> Firmness:
        """Giving up cannot be refused."""
        return Firmness.MAY_FAIL if self.is_success else Firmness.MUST_SUCCEED

    @property
    def concerned(self) -> list[Node]:
        """The job's nodes."""
        return list(self.job.concerned)

    @property
    def touched(self) -> list[Node]:
        """The job's nodes."""
        return list(self.job.touched)

    @property
    def thawed(self) -> list[Edge]:
        """The job's own links."""
        return self.job.frozen

    def describe(self, change: Change) -> None:
        """The job's filter goes, and what the job worked for happens."""
        for edge in self.job.edges:
            change.detach(edge)
        self.job.describe_end(change, is_success=self.is_success)

    async def prepare(self) -> None:
        """What goes with it in images."""
        await self.job.prepare_end(is_success=self.is_success)

    def abort(self) -> None:
        """Undo that."""
        self.job.abort_end()

    def commit(self) -> None:
        """It is out."""
        self.job.left_graph()
