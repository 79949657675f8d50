"""All jobs by id: an actor that starts them, sees them to their end, and closes them with the daemon."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from qsd.actors.core import Actor
from qsd.actors.events import EventBus
from qsd.actors.jobs.group import JobGroup
from qsd.actors.jobs.job import Job, Tell
from qsd.actors.jobs.states import WORKING, Verb
from qsd.actors.supervisor import Floor, Supervisor
from qsd.block.names import is_well_formed
from qsd.errors import ActorStopped, QmpError
from qsd.qapi.schema.jobs import JobInfo, JobStatus


def _not_found() -> QmpError:
    return QmpError("Job not found")


class Jobs(Actor):
    """The table. Runs on the floor JOBS, as its jobs do; what is to be done at their end runs in its nursery."""

    kind = "jobs"

    def __init__(self, supervisor: Supervisor, events: EventBus) -> None:
        super().__init__("jobs")
        self._supervisor = supervisor
        self._events = events
        self._jobs: dict[str, Job] = {}

    # -- life -----------------------------------------------------------------------------------------------------

    def check_id(self, name: str) -> None:
        """Raise QmpError when no job can be made with this id."""
        if not is_well_formed(name):
            raise QmpError(f"Invalid job ID '{name}'")
        if name in self._jobs:
            raise QmpError(f"Job ID '{name}' already in use")

    async def create(self, job: Job, group: JobGroup | None = None) -> None:
        """Make ``job`` known without starting it. Raises QmpError."""
        self.check_id(job.id)
        group = group or JobGroup(self)
        job.bind(group, self._events.emit)
        self._jobs[job.id] = job
        try:
            await self._supervisor.start(job, Floor.JOBS, parent=self)
        except BaseException:
            del self._jobs[job.id]
            raise
        group.add(job)
        job.change_status(JobStatus.CREATED)

    async def start(self, job: Job) -> None:
        """Make ``job`` known and let it work. Raises QmpError."""
        await self.create(job)
        job.start()

    def discard(self, job: Job) -> None:
        """Forget a job that was created and cannot be started after all."""
        job.group.jobs.remove(job)
        job.concluded.set()
        job.change_status(JobStatus.NULL)
        self.forget(job)

    def forget(self, job: Job) -> None:
        """The job is gone; its id is free."""
        del self._jobs[job.id]
        self._supervisor.stop_soon(job)

    def run_later(self, function: Callable[..., Awaitable[None]], *args: object, name: str) -> None:
        """Run in a task of the table's own."""
        self.spawn(function, *args, name=name)

    async def started(self) -> None:
        """Say what the crash of a job means."""
        self._supervisor.failures[Job.kind] = self._crashed

    def _crashed(self, job: Actor, error: BaseException) -> None:
        """A job without its actor is given up with its group, for the reason it crashed."""
        assert isinstance(job, Job)
        job.has_run.set()
        if job.status in WORKING:
            job.fail(error)
            job.group.has_run(job)

    async def stopping(self) -> None:
        """Cancel all jobs; when all have ended, forget them, the newest first."""
        jobs = self.jobs()
        for job in jobs:
            if not job.concluded.is_set():
                job.cancel(force=True)
        for job in jobs:
            await job.concluded.wait()
        for job in self.jobs():
            job.group.dismiss(job)

    # -- use ------------------------------------------------------------------------------------------------------

    def jobs(self) -> list[Job]:
        """All jobs, newest first."""
        return [job for job in reversed(self._jobs.values()) if job.status is not JobStatus.UNDEFINED]

    def find(self, name: str) -> Job | None:
        """The job with that id."""
        return self._jobs.get(name)

    def query(self) -> list[JobInfo]:
        """``query-jobs``."""
        return [job.info() for job in self.jobs()]

    async def tell(self, name: str, verb: Verb, value: Any = None) -> None:
        """Tell a job a verb. Raises QmpError."""
        job = self._jobs.get(name)
        if job is None:
            raise _not_found()
        try:
            end = await job.ref.ask(Tell(verb, value))
        except ActorStopped:
            # One that crashed is concluded, and still to be dismissed.
            if self._jobs.get(name) is not job:
                raise _not_found() from None
            end = job.obey(verb, value)
        if end is not None:
            await end.wait()

    def statistics(self) -> dict[str, Any]:
        """The actor's facts and how many jobs there are."""
        return super().statistics() | {"jobs": len(self._jobs)}
