"""Jobs that end together: either the work of all of them counts, or of none.

A job outside of a transaction is a group of its own. Jobs that have run wait for the others; when the last has run,
all become pending and, where nobody wants to finalize by hand, are finalized. When one fails or is cancelled, the
others are cancelled. The newest job comes first at every step, as in the reference.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import Enum
from typing import TYPE_CHECKING, Protocol

import trio

from qsd.qapi.schema.jobs import JobStatus

if TYPE_CHECKING:
    from qsd.actors.jobs.job import Job


class Keeper(Protocol):
    """The table of jobs, as far as a group needs it."""

    def run_later(self, function: Callable[..., Awaitable[None]], *args: object, name: str) -> None:
        """Run in a task that outlives the jobs."""

    def forget(self, job: Job) -> None:
        """The job is gone."""


class _Course(Enum):
    """How far a group has come."""

    OPEN = "jobs are created, work, wait for each other or for the user"
    PREPARING = "all have worked; what can still fail is done, and is not undone because a user changes his mind"
    COMMITTING = "the work counts: nothing stops it any more"
    ABORTING = "nothing of it counts"


class JobGroup:
    """See the module."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self.jobs: list[Job] = []
        self._course = _Course.OPEN
        self.ended = trio.Event()

    def add(self, job: Job) -> None:
        """Let ``job`` end together with the others."""
        self.jobs.insert(0, job)

    # -- what jobs and users tell ---------------------------------------------------------------------------------

    def has_run(self, job: Job) -> None:
        """``job`` has done its work, or failed."""
        if job.error is not None:
            job.change_status(JobStatus.ABORTING)
            self.give_up()
        elif self._course is _Course.OPEN:
            job.change_status(JobStatus.WAITING)
            if all(each.status is JobStatus.WAITING for each in self.jobs):
                self._converge()

    def _converge(self) -> None:
        for job in self.jobs:
            job.change_status(JobStatus.PENDING)
        if all(job.options.auto_finalize for job in self.jobs):
            self.finalize()

    def finalize(self) -> trio.Event:
        """Make the work of all count; set when that is done."""
        if self._course is _Course.OPEN:
            self._course = _Course.PREPARING
            self._keeper.run_later(self._finalize, name="end of jobs")
        return self.ended

    def cancel(self, job: Job) -> trio.Event:
        """Cancel a job that does not work, if it is not too late; set when all are concluded."""
        if self._course is _Course.OPEN:
            job.cancelled()
            self.give_up()
        return self.ended

    def give_up(self) -> None:
        """A job will not make it, so none will."""
        if self._course is _Course.OPEN:
            self._course = _Course.ABORTING
            self._keeper.run_later(self._abort, name="end of jobs")

    # -- the end --------------------------------------------------------------------------------------------------

    async def _finalize(self) -> None:
        for job in self.jobs:
            if not await job.attempt(job.prepare):
                self._course = _Course.ABORTING
                await self._abort()
                return
        self._course = _Course.COMMITTING
        for job in list(self.jobs):
            await self._conclude(job)
        self.ended.set()

    async def _abort(self) -> None:
        for job in self.jobs:
            if not job.has_run.is_set():
                job.cancel(force=True)
        for job in list(self.jobs):
            await job.has_run.wait()
            if job.error is None:
                job.cancelled()
            await self._conclude(job)
        self.ended.set()

    async def _conclude(self, job: Job) -> None:
        if job.error is None:
            await job.attempt(job.commit)
        else:
            if job.status is not JobStatus.ABORTING:
                job.change_status(JobStatus.ABORTING)
            await job.attempt(job.abort)
        await job.attempt(job.clean)
        job.on_concluding()
        job.change_status(JobStatus.CONCLUDED)
        job.concluded.set()
        if job.options.auto_dismiss:
            self.dismiss(job)

    def dismiss(self, job: Job) -> None:
        """Forget a concluded job."""
        job.change_status(JobStatus.NULL)
        self._keeper.forget(job)
