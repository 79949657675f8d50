"""A job: an actor that does one long piece of work in a task of its own and is steered by verbs.

A kind of job is a subclass. It writes ``run``, which calls ``pause_point`` often and raises QmpError or OSError
when the work fails, and where there is something to be done at the end:

    run -> (all jobs of the transaction have run) -> prepare -> commit -> clean      the work counts
    run fails, prepare fails, cancelled           ->            abort -> clean      nothing remains of it

Those four run in a task of the table's (``Jobs``), so that they outlive a job that crashes. Every change of status
is checked against ``states.FOLLOWERS``, told as an event and shown at once by ``query-jobs``.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import attrs
import trio
from trio_util import AsyncValue

from qsd.actors.core import Actor, receives
from qsd.actors.jobs.states import FOLLOWERS, Verb, check_verb
from qsd.errors import QmpError, errno_text
from qsd.qapi.schema.jobs import JobInfo, JobStatus, JobType

if TYPE_CHECKING:
    from qsd.actors.jobs.group import JobGroup

log = logging.getLogger("qsd.jobs")

CANCELED = "Operation canceled"


@attrs.frozen
class JobOptions:
    """How a job is named, and what happens by itself at its end."""

    id: str
    auto_finalize: bool = True
    auto_dismiss: bool = True


@attrs.frozen
class Tell:
    """A verb of the user's. ``value`` is what the verb needs: ``force`` of cancel, a speed."""

    verb: Verb
    value: Any = None


class Emit(Protocol):
    """Tells all monitors of an event."""

    def __call__(self, name: str, data: dict[str, Any] | None = None) -> None: ...


class Job(Actor):
    """See the module."""

    kind = "job"
    type: ClassVar[JobType]

    def __init__(self, options: JobOptions) -> None:
        super().__init__(f"job {options.id}")
        self.id = options.id
        self.options = options
        self.status = JobStatus.UNDEFINED
        self.error: str | None = None
        self.progress = 0
        self.total = 0
        # Cancelled by force: whatever the work comes to, it ends as cancelled.
        self.is_cancelled = False
        self.is_user_paused = False
        # It is about to be started, and there is no way back: who cancels it now cancels its work.
        self.is_starting = False
        self.has_run = trio.Event()
        self.concluded = trio.Event()
        self._pauses = AsyncValue(0)
        self._scope = trio.CancelScope()
        self._was_told_to_stop = False
        self.group: JobGroup
        self._emit: Emit

    def bind(self, group: JobGroup, emit: Emit) -> None:
        """Belong to a group of jobs that end together; events go to ``emit``."""
        self.group = group
        self._emit = emit

    # -- what a kind of job is ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Do the work. Raises QmpError or OSError; is cancelled at any await when the job is cancelled by force.

        What runs beside it runs in nurseries of its own.
        """
        raise NotImplementedError

    async def prepare(self) -> None:
        """Do what can still fail when the work is done. Raises QmpError or OSError; then ``abort`` follows."""

    async def commit(self) -> None:
        """Make the work count. Must not fail."""

    async def abort(self) -> None:
        """Undo the work, as far as it had come. Must not fail."""

    async def clean(self) -> None:
        """Let go of what the job used. Must not fail."""

    def will_cancel(self, *, force: bool) -> bool:
        """Whether cancelling means to give the work up; else ``run`` sees to an orderly end of it by itself."""
        return True

    def complete(self) -> None:
        """Come to an end although there is always more to do. Raises QmpError."""
        raise QmpError(f"The active block job '{self.id}' cannot be completed")

    def set_speed(self, speed: int) -> None:
        """Work at ``speed`` units per second at most; 0 is without limit. Raises QmpError."""
        raise QmpError("Speed is not supported for this job")

    def change(self, options: Any) -> None:
        """Work otherwise from now on (``BlockJobChangeOptions``). Raises QmpError."""
        raise QmpError("Job type does not support change")

    def resumed(self) -> None:
        """The user lets the job go on."""

    def on_status(self, status: JobStatus) -> None:
        """The status has changed and been told (block jobs have more to tell)."""

    def on_concluding(self) -> None:
        """The job is about to be concluded (block jobs tell how it ended)."""

    # -- for ``run`` --------------------------------------------------------------------------------------------

    async def pause_point(self) -> None:
        """Stop here while the job is paused. Also a checkpoint: a cancelled job ends here."""
        if not self._pauses.value:
            await trio.lowlevel.checkpoint()
            return
        before = self.status
        self.change_status(JobStatus.STANDBY if before is JobStatus.READY else JobStatus.PAUSED)
        try:
            await self._pauses.wait_value(0)
        finally:
            self.change_status(before)
        # Who cancels a paused job lets it go on first.
        await trio.lowlevel.checkpoint_if_cancelled()

    def become_ready(self) -> None:
        """The work is done as far as it can be, and goes on until ``complete``."""
        self.change_status(JobStatus.READY)

    @property
    def is_to_pause(self) -> bool:
        """Whether the next ``pause_point`` will hold."""
        return bool(self._pauses.value)

    def pause_for_user(self) -> None:
        """Pause until the user resumes the job."""
        if not self.is_user_paused:
            self.is_user_paused = True
            self.hold_back()

    def show_progress(self, done: int, total: int) -> None:
        """What ``query-jobs`` shows."""
        self.progress, self.total = done, total

    def hold_back(self) -> None:
        """Pause without the user's doing; ends with ``let_on``. Nests."""
        self._pauses.value += 1

    def let_on(self) -> None:
        """End one ``hold_back``."""
        self._pauses.value -= 1

    # -- status -------------------------------------------------------------------------------------------------

    def change_status(self, status: JobStatus) -> None:
        """Go on to ``status``, as the table allows, and tell everybody."""
        assert status in FOLLOWERS[self.status], f"{self.name} cannot go from {self.status.value} to {status.value}"
        self.status = status
        self._emit("JOB_STATUS_CHANGE", {"id": self.id, "status": status.value})
        self.on_status(status)

    def info(self) -> JobInfo:
        """What ``query-jobs`` tells."""
        return JobInfo(
            id=self.id,
            type=self.type,
            status=self.status,
            current_progress=self.progress,
            total_progress=self.total,
            error=self.error,
        )

    def statistics(self) -> dict[str, Any]:
        """The actor's facts and the job's."""
        progress = f"{self.progress}/{self.total}"
        return super().statistics() | {"type": self.type.value, "status": self.status.value, "progress": progress}

    # -- life ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin the work."""
        self.change_status(JobStatus.RUNNING)
        self.spawn(self._work, name="work")

    async def _work(self) -> None:
        # The outcome of the work is its reply, so this is where exceptions are caught: one nobody planned for ends
        # the job, not the daemon.
        try:
            with self._scope:
                await self.run()
        except Exception as error:  # noqa: BLE001  # it is the reply
            self.fail(error)
        finally:
            self.has_run.set()
        if self.is_cancelled:
            self.cancelled()
        self.group.has_run(self)

    async def attempt(self, step: Callable[[], Awaitable[None]]) -> bool:
        """Run one of the steps at the end; what it raises becomes the job's error."""
        try:
            await step()
        except Exception as error:  # noqa: BLE001  # it is the reply
            self.fail(error)
            return False
        return True

    def fail(self, error: BaseException) -> None:
        """Note why the job fails; the first reason counts."""
        while isinstance(error, BaseExceptionGroup):  # a nursery's; the first failure is as good as any
            error = error.exceptions[0]
        if isinstance(error, QmpError):
            text = error.desc
        elif isinstance(error, OSError) and error.errno:
            text = errno_text(error.errno)
        else:
            log.error("%s failed by a defect", self.name, exc_info=error)
            text = f"Internal error: {error!r}"
        self.error = self.error or text

    async def _serve(self) -> None:
        await super()._serve()
        self._was_told_to_stop = True

    async def stopping(self) -> None:
        """The floor closes, or the job is gone. Its end comes before its actor's, unless that crashes."""
        if self._was_told_to_stop and not self.concluded.is_set():
            self.cancel(force=True)
            await self.concluded.wait()

    # -- verbs --------------------------------------------------------------------------------------------------

    @receives(Tell)
    async def _tell(self, message: Tell) -> trio.Event | None:
        return self.obey(message.verb, message.value)

    def obey(self, verb: Verb, value: Any) -> trio.Event | None:
        """Obey a verb; the event to wait for before the user is answered, if any. Raises QmpError."""
        if verb is Verb.RESUME and not self.is_user_paused:
            raise QmpError("Can't resume a job that was not paused")
        check_verb(self.id, self.status, verb)
        if verb is Verb.CANCEL:
            return self.cancel(force=value)
        if verb is Verb.FINALIZE:
            return self.group.finalize()
        if verb is Verb.DISMISS:
            self.group.dismiss(self)
        elif verb is Verb.PAUSE:
            self._pause()
        elif verb is Verb.RESUME:
            self._resume()
        elif verb is Verb.COMPLETE:
            self.complete()
        elif verb is Verb.SET_SPEED:
            self.set_speed(value)
        else:
            assert verb is Verb.CHANGE
            self.change(value)
        return None

    def _pause(self) -> None:
        if self.is_user_paused:
            raise QmpError("Job is already paused")
        self.pause_for_user()

    def _resume(self) -> None:
        if self.is_user_paused:
            self.is_user_paused = False
            self.resumed()
            self.let_on()

    def cancel(self, *, force: bool) -> trio.Event | None:
        """Give the job up, or end it early (``force`` off, and it knows how). What to wait for, if anything."""
        self._resume()
        if self.status is JobStatus.CREATED and not self.is_starting:
            self.has_run.set()
        if self.has_run.is_set():
            return self.group.cancel(self)
        if self.will_cancel(force=force) or force:
            self.is_cancelled = True
            self._scope.cancel()
        return None

    def cancelled(self) -> None:
        """Note that the job ends as cancelled, unless it failed before."""
        self.is_cancelled = True
        self.error = self.error or CANCELED
