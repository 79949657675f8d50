"""Jobs: the table of states, pausing, cancelling, the end of one and of a group, crashes, shutdown."""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator

import pytest
import trio
from job_fakes import Office, Work, running_office, settle

from qsd.actors.jobs.group import JobGroup
from qsd.actors.jobs.states import FOLLOWERS, VERBS, Verb
from qsd.errors import QmpError
from qsd.qapi.schema.jobs import JobStatus

# The reference's table, feature map 2.2: status, what may follow, which verbs are heard.
TABLE = """
undefined | created                         |
created   | running aborting null           | cancel pause resume set-speed change
running   | paused ready waiting aborting   | cancel pause resume set-speed change
paused    | running                         | cancel pause resume set-speed change
ready     | standby waiting aborting        | cancel pause resume set-speed change complete
standby   | ready                           | cancel pause resume set-speed change complete
waiting   | pending aborting                | cancel
pending   | aborting concluded              | cancel finalize
aborting  | concluded                       |
concluded | null                            | dismiss
null      |                                 |
"""


@pytest.fixture
async def office() -> AsyncIterator[Office]:
    async with running_office() as made:
        yield made


async def running(office: Office, name: str = "j", **options: bool) -> Work:
    job = Work(name, **options)
    await office.jobs.start(job)
    await settle()
    return job


def test_tables_are_the_reference_s() -> None:
    rows = {row.split("|")[0].strip(): row.split("|")[1:] for row in TABLE.strip().splitlines()}
    assert rows.keys() == {status.value for status in JobStatus}
    for status in JobStatus:
        followers, verbs = (set(cell.split()) for cell in rows[status.value])
        assert {each.value for each in FOLLOWERS[status]} == followers
        assert {each.value for each in VERBS[status]} == verbs


async def test_job_that_succeeds(office: Office) -> None:
    job = await running(office)
    job.tell_work("finish")
    await settle()
    assert office.of("j") == ["created", "running", "waiting", "pending", "concluded", "null"]
    assert job.steps == ["prepare", "commit", "clean"]
    assert await office.refusal("j", Verb.DISMISS) == "Job not found"
    await job.stopped.wait()


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (QmpError("as told"), "as told"),
        (OSError(errno.ENOSPC, "x"), "No space left on device"),
    ],
)
async def test_job_that_fails(office: Office, failure: Exception, text: str) -> None:
    job = await running(office, auto_dismiss=False)
    job.tell_work(failure)
    await settle()
    assert office.of("j") == ["created", "running", "aborting", "concluded"]
    assert job.steps == ["abort", "clean"]
    (info,) = office.jobs.query()
    assert (info.status, info.error) == (JobStatus.CONCLUDED, text)
    assert await office.refusal("j", Verb.DISMISS) is None
    assert office.of("j")[-1] == "null"


async def test_job_with_a_defect_is_concluded_and_the_daemon_lives(
    office: Office, caplog: pytest.LogCaptureFixture
) -> None:
    job = await running(office, auto_dismiss=False)
    with caplog.at_level(logging.CRITICAL, "qsd.jobs"):
        job.tell_work(ZeroDivisionError("oh"))
        await settle()
    assert office.of("j") == ["created", "running", "aborting", "concluded"]
    assert job.error == "Internal error: ZeroDivisionError('oh')"


async def test_job_whose_actor_crashes_is_concluded_with_its_group(
    office: Office, caplog: pytest.LogCaptureFixture
) -> None:
    group = JobGroup(office.jobs)
    crashing, other = Work("a", auto_dismiss=False), Work("b")
    for job in (crashing, other):
        await office.jobs.create(job, group)
    for job in (crashing, other):
        job.start()
    await settle()

    async def crash() -> None:
        raise ZeroDivisionError("oh")

    with caplog.at_level(logging.CRITICAL, "qsd.supervisor"):
        crashing.spawn(crash, name="crash")
        await settle()
    assert crashing.stopped.is_set()
    assert office.of("a") == ["created", "running", "aborting", "concluded"]
    assert office.of("b") == ["created", "running", "aborting", "concluded", "null"]
    assert crashing.error == "Internal error: ZeroDivisionError('oh')"
    text = await office.refusal("a", Verb.PAUSE)
    assert text == "Job 'a' in state 'concluded' cannot accept command verb 'pause'"
    assert await office.refusal("a", Verb.DISMISS) is None
    assert not office.jobs.jobs()


async def test_ids(office: Office) -> None:
    await running(office)
    for name, text in [("j", "Job ID 'j' already in use"), ("1", "Invalid job ID '1'"), ("", "Invalid job ID ''")]:
        with pytest.raises(QmpError) as caught:
            await office.jobs.start(Work(name))
        assert caught.value.desc == text
    assert [info.id for info in office.jobs.query()] == ["j"]
    await running(office, "k")
    assert [info.id for info in office.jobs.query()] == ["k", "j"]


async def test_pause_and_resume(office: Office) -> None:
    job = await running(office)
    assert await office.refusal("j", Verb.RESUME) == "Can't resume a job that was not paused"
    assert await office.refusal("j", Verb.PAUSE) is None
    assert await office.refusal("j", Verb.PAUSE) == "Job is already paused"
    await settle()
    assert job.status is JobStatus.PAUSED
    job.tell_work("ready")
    await settle()
    assert job.status is JobStatus.PAUSED
    assert await office.refusal("j", Verb.RESUME) is None
    await settle()
    assert job.status is JobStatus.READY
    assert await office.refusal("j", Verb.PAUSE) is None
    await settle()
    assert job.status is JobStatus.STANDBY
    # Heard while it stands by; done when it goes on.
    assert await office.refusal("j", Verb.COMPLETE) is None
    await settle()
    assert job.status is JobStatus.STANDBY
    assert await office.refusal("j", Verb.RESUME) is None
    await settle()
    assert office.of("j")[2:] == [
        *("paused", "running", "ready", "standby", "ready", "waiting", "pending", "concluded", "null")
    ]


async def test_pauses_of_user_and_drain_add_up(office: Office) -> None:
    job = await running(office)
    job.hold_back()
    assert await office.refusal("j", Verb.PAUSE) is None
    await settle()
    job.let_on()
    await settle()
    assert job.status is JobStatus.PAUSED
    assert await office.refusal("j", Verb.RESUME) is None
    await settle()
    assert job.status is JobStatus.RUNNING


async def test_cancelling_a_paused_job_lets_it_run_once_more(office: Office) -> None:
    job = await running(office)
    await office.jobs.tell("j", Verb.PAUSE)
    await settle()
    await office.jobs.tell("j", Verb.CANCEL, True)
    await settle()
    assert office.of("j") == ["created", "running", "paused", "running", "aborting", "concluded", "null"]
    assert job.error == "Operation canceled"


async def test_soft_cancel_is_up_to_the_job(office: Office) -> None:
    job = await running(office)
    job.ends_softly = True
    await office.jobs.tell("j", Verb.CANCEL, False)
    await settle()
    assert office.of("j")[2:] == ["waiting", "pending", "concluded", "null"]
    assert job.error is None


async def test_finalizing_by_hand(office: Office) -> None:
    job = await running(office, auto_finalize=False)
    job.tell_work("finish")
    await settle()
    assert office.of("j") == ["created", "running", "waiting", "pending"]
    assert job.steps == []
    # The answer comes when it is done.
    await office.jobs.tell("j", Verb.FINALIZE)
    assert office.of("j")[4:] == ["concluded", "null"]
    assert job.steps == ["prepare", "commit", "clean"]


async def test_cancelling_a_pending_job_undoes_its_work(office: Office) -> None:
    job = await running(office, auto_finalize=False)
    job.tell_work("finish")
    await settle()
    await office.jobs.tell("j", Verb.CANCEL, True)
    assert office.of("j")[4:] == ["aborting", "concluded", "null"]
    assert job.steps == ["abort", "clean"]


@pytest.mark.parametrize("step", ["prepare", "commit"])
async def test_cancelling_while_it_is_finalized(office: Office, step: str) -> None:
    """It is too late: the answer comes when the work counts."""
    job = await running(office)
    job.gates[step] = trio.Event()
    job.tell_work("finish")
    await settle()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(office.jobs.tell, "j", Verb.CANCEL, True)
        await settle()
        job.gates[step].set()
    assert job.steps == ["prepare", "commit", "clean"]
    assert job.error is None


async def test_failing_to_prepare_undoes_the_work(office: Office) -> None:
    job = await running(office, auto_dismiss=False)
    job.failing["prepare"] = OSError(errno.EIO, "x")
    job.tell_work("finish")
    await settle()
    assert office.of("j")[2:] == ["waiting", "pending", "aborting", "concluded"]
    assert job.steps == ["prepare", "abort", "clean"]
    assert job.error == "Input/output error"


async def test_job_that_cannot_be_started_is_taken_back(office: Office) -> None:
    job = Work("j")
    await office.jobs.create(job)
    office.jobs.discard(job)
    assert office.of("j") == ["created", "null"]
    await job.stopped.wait()
    assert job.steps == []
    await running(office, "j")


# -- groups ---------------------------------------------------------------------------------------------------


async def group_of(office: Office, *jobs: Work) -> JobGroup:
    group = JobGroup(office.jobs)
    for job in jobs:
        await office.jobs.create(job, group)
    for job in reversed(jobs):
        job.start()
    await settle()
    return group


async def test_group_waits_for_the_last(office: Office) -> None:
    one, two = Work("a"), Work("b")
    await group_of(office, one, two)
    one.tell_work("finish")
    await settle()
    assert one.status is JobStatus.WAITING
    two.tell_work("finish")
    await settle()
    # Observed with two backups in one transaction of the reference.
    assert office.heard == [
        *(("a", "created"), ("b", "created"), ("b", "running"), ("a", "running")),
        *(("a", "waiting"), ("b", "waiting"), ("b", "pending"), ("a", "pending")),
        *(("b", "concluded"), ("b", "null"), ("a", "concluded"), ("a", "null")),
    ]


async def test_one_job_finalized_by_hand_holds_its_group(office: Office) -> None:
    one, two = Work("a", auto_finalize=False), Work("b")
    await group_of(office, one, two)
    for job in (one, two):
        job.tell_work("finish")
    await settle()
    assert (one.status, two.status) == (JobStatus.PENDING, JobStatus.PENDING)
    await office.jobs.tell("b", Verb.FINALIZE)
    assert office.heard[-4:] == [("b", "concluded"), ("b", "null"), ("a", "concluded"), ("a", "null")]


@pytest.mark.parametrize("stage", ["created", "running", "paused", "ready", "waiting", "pending"])
async def test_one_failure_cancels_the_others_wherever_they_are(office: Office, stage: str) -> None:
    one, two = Work("a"), Work("b", auto_finalize=False)
    if stage == "created":
        group = JobGroup(office.jobs)
        for job in (one, two):
            await office.jobs.create(job, group)
        two.start()
    else:
        await group_of(office, one, two)
    if stage in ("waiting", "pending"):
        one.tell_work("finish")
    if stage == "pending":
        two.tell_work("finish")
    if stage == "ready":
        one.tell_work("ready")
    if stage == "paused":
        await office.jobs.tell("a", Verb.PAUSE)
    await settle()
    assert one.status.value == stage
    if stage == "pending":
        await office.jobs.tell("b", Verb.CANCEL, True)
    else:
        two.tell_work(OSError(errno.EIO, "x"))
    await settle()
    assert one.steps == two.steps == ["abort", "clean"]
    assert one.error == "Operation canceled"
    assert two.error == ("Operation canceled" if stage == "pending" else "Input/output error")
    assert not office.jobs.jobs()


async def test_second_job_of_a_group_fails_to_prepare(office: Office) -> None:
    one, two = Work("a"), Work("b")
    await group_of(office, one, two)
    one.failing["prepare"] = QmpError("no")
    for job in (one, two):
        job.tell_work("finish")
    await settle()
    assert one.steps == two.steps == ["prepare", "abort", "clean"]
    assert (one.error, two.error) == ("no", "Operation canceled")


async def test_dropping_jobs_that_never_started(office: Office) -> None:
    """The reference hangs when a transaction that holds two jobs is aborted."""
    group = JobGroup(office.jobs)
    one, two = Work("a"), Work("b")
    for job in (one, two):
        await office.jobs.create(job, group)
    one.cancel(force=True)
    await group.ended.wait()
    assert office.of("a") == office.of("b") == ["created", "aborting", "concluded", "null"]


# -- the end of the daemon ------------------------------------------------------------------------------------


async def test_shutdown_cancels_and_forgets_all() -> None:
    async with running_office() as office:
        paused = await running(office, "p")
        await office.jobs.tell("p", Verb.PAUSE)
        pending = await running(office, "q", auto_finalize=False)
        pending.tell_work("finish")
        done = await running(office, "d", auto_dismiss=False)
        done.tell_work("finish")
        created = Work("c")
        await office.jobs.create(created)
        await settle()
    assert office.of("p")[2:] == ["paused", "running", "aborting", "concluded", "null"]
    assert office.of("q")[3:] == ["pending", "aborting", "concluded", "null"]
    assert office.of("d")[4:] == ["concluded", "null"]
    assert office.of("c") == ["created", "aborting", "concluded", "null"]
    gone = [name for name, status in office.heard if status == "null"]
    assert (set(gone[:3]), gone[3]) == ({"c", "q", "p"}, "d")
    assert all(job.steps == ["abort", "clean"] for job in (paused, pending, created))
