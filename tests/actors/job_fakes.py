"""Jobs for tests: their work is what the test says, order by order, and every step at the end is noted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import attrs
import trio
import trio.testing

from qsd.actors.events import Emitted, EventBus
from qsd.actors.jobs.job import Job, JobOptions
from qsd.actors.jobs.states import Verb
from qsd.actors.jobs.table import Jobs
from qsd.actors.supervisor import Floor, Supervisor
from qsd.errors import QmpError
from qsd.qapi.schema.jobs import JobType


class Work(Job):
    """``tell_work`` an exception to raise, ``"finish"`` or ``"ready"``."""

    type: ClassVar[JobType] = JobType.CREATE

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(JobOptions(name, **options))
        self._office, self._orders = trio.open_memory_channel[Any](100)
        self.steps: list[str] = []
        self.failing: dict[str, Exception] = {}
        self.gates: dict[str, trio.Event] = {}
        self.is_asked_to_complete = False
        # What a soft cancel means once it is ready: an orderly end.
        self.ends_softly = False

    def tell_work(self, order: Any) -> None:
        self._office.send_nowait(order)

    async def run(self) -> None:
        while True:
            order = await self._next_order()
            await self.pause_point()
            if order == "finish":
                return
            if order == "ready":
                self.become_ready()
            elif isinstance(order, Exception):
                raise order

    async def _next_order(self) -> Any:
        """The next order; pauses while it waits, as work does that looks often whether it is to pause."""
        order = None
        while order is None:

            async def take(scope: trio.CancelScope) -> None:
                nonlocal order
                order = await self._orders.receive()
                scope.cancel()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(take, nursery.cancel_scope)
                await self._pauses.wait_value(lambda count: count > 0)
                nursery.cancel_scope.cancel()
            await self.pause_point()
        return order

    async def _step(self, name: str) -> None:
        self.steps.append(name)
        if name in self.gates:
            await self.gates[name].wait()
        if name in self.failing:
            raise self.failing[name]

    async def prepare(self) -> None:
        await self._step("prepare")

    async def commit(self) -> None:
        await self._step("commit")

    async def abort(self) -> None:
        await self._step("abort")

    async def clean(self) -> None:
        await self._step("clean")

    def complete(self) -> None:
        self.tell_work("finish")

    def will_cancel(self, *, force: bool) -> bool:
        if self.ends_softly and not force:
            self.tell_work("finish")
            return False
        return True


@attrs.define(eq=False)
class Office:
    """A table of jobs with what monitors heard."""

    jobs: Jobs
    heard: list[tuple[str, str]] = attrs.field(factory=list)

    def hear(self, event: Emitted) -> None:
        data = event.message["data"]
        self.heard.append((data["id"], data["status"]))

    def of(self, name: str) -> list[str]:
        """What was heard of one job."""
        return [status for job, status in self.heard if job == name]

    async def refusal(self, name: str, verb: Verb, value: Any = None) -> str | None:
        """Tell a verb; why it was refused, or None."""
        try:
            await self.jobs.tell(name, verb, value)
        except QmpError as error:
            return error.desc
        return None


@asynccontextmanager
async def running_office() -> AsyncIterator[Office]:
    """A table of jobs on a supervisor."""
    bus = EventBus()
    async with Supervisor() as supervisor:
        office = Office(Jobs(supervisor, bus))
        bus.subscribe(office.hear)
        await supervisor.start(office.jobs, Floor.JOBS)
        yield office
    assert supervisor.fatal is None
    assert not office.jobs.jobs()


async def settle() -> None:
    """Let everything happen that can happen by itself."""
    await trio.testing.wait_all_tasks_blocked()
