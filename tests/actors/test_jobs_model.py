"""Random verbs and random ends of work against the law of jobs, written down once more as plain rules."""

from __future__ import annotations

import errno
from itertools import pairwise
from typing import Any

import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from job_fakes import Office, Work, running_office, settle

from qsd.actors.jobs.group import JobGroup
from qsd.actors.jobs.states import Verb
from qsd.errors import QmpError
from qsd.qapi.schema.jobs import JobStatus

VERBS = [Verb.CANCEL, Verb.PAUSE, Verb.RESUME, Verb.COMPLETE, Verb.FINALIZE, Verb.DISMISS, Verb.CHANGE]
# Which verbs are heard where; ``null`` is a job nobody finds.
HEARD = {
    "created": "cancel pause resume change",
    "running": "cancel pause resume change",
    "paused": "cancel pause resume change",
    "ready": "cancel pause resume complete change",
    "standby": "cancel pause resume complete change",
    "waiting": "cancel",
    "pending": "cancel finalize",
    "aborting": "",
    "concluded": "dismiss",
}
NEXT = {
    "created": "running aborting null",
    "running": "paused ready waiting aborting",
    "paused": "running",
    "ready": "standby waiting aborting",
    "standby": "ready",
    "waiting": "pending aborting",
    "pending": "aborting concluded",
    "aborting": "concluded",
    "concluded": "null",
}
JOB = st.integers(0, 3)
STEPS = st.one_of(
    st.tuples(JOB, st.sampled_from(VERBS)),
    st.tuples(JOB, st.sampled_from(VERBS)),
    st.tuples(JOB, st.sampled_from(["finish", "finish", "ready", "fail", "fail to prepare"])),
)
OPTIONS = st.tuples(st.booleans(), st.booleans())


def why_refused(job: Work, verb: Verb, was_paused: bool) -> str | None:
    if job.status is JobStatus.NULL:
        return "Job not found"
    if verb is Verb.RESUME and not was_paused:
        return "Can't resume a job that was not paused"
    if verb.value not in HEARD[job.status.value].split():
        return f"Job '{job.id}' in state '{job.status.value}' cannot accept command verb '{verb.value}'"
    if verb is Verb.PAUSE and was_paused:
        return "Job is already paused"
    if verb is Verb.CHANGE:
        return "Job type does not support change"
    return None


async def take(office: Office, job: Work, order: Any) -> None:
    if isinstance(order, Verb):
        expected = why_refused(job, order, job.is_user_paused)
        assert await office.refusal(job.id, order, order is Verb.CANCEL) == expected
    elif order == "fail to prepare":
        job.failing["prepare"] = QmpError("no")
    elif order == "fail":
        job.tell_work(OSError(errno.EIO, "x"))
    elif order != "ready" or job.status is JobStatus.RUNNING:
        job.tell_work(order)
    await settle()


def check(office: Office, jobs: list[Work]) -> None:
    for job in jobs:
        heard = office.of(job.id)
        assert heard[0] == "created"
        assert heard[-1] == job.status.value
        for before, after in pairwise(heard):
            assert after in NEXT[before].split(), heard
        done = [step for step in job.steps if step != "prepare"]
        if job.status in (JobStatus.CONCLUDED, JobStatus.NULL):
            assert done == [("commit" if job.error is None else "abort"), "clean"]
        else:
            assert done == []
    # All or nothing, as soon as one of the group has ended.
    group = [job for job in jobs[:2] if job.status in (JobStatus.CONCLUDED, JobStatus.NULL)]
    assert len({job.error is None for job in group}) < 2
    assert len(group) in (0, 2)


@settings(max_examples=150, deadline=None)
@given(st.lists(OPTIONS, min_size=4, max_size=4), st.lists(STEPS, max_size=30))
def test_random_verbs_follow_the_table(options: list[tuple[bool, bool]], steps: list[tuple[int, Any]]) -> None:
    async def main() -> None:
        async with running_office() as office:
            jobs = [
                Work(name, auto_finalize=finalize, auto_dismiss=dismiss)
                for name, (finalize, dismiss) in zip("abcd", options, strict=True)
            ]
            group = JobGroup(office.jobs)
            for job in jobs:
                await office.jobs.create(job, group if job in jobs[:2] else None)
            for job in jobs:
                job.start()
            await settle()
            for number, order in steps:
                await take(office, jobs[number], order)
                check(office, jobs)
        check(office, jobs)
        assert all(job.status is JobStatus.NULL for job in jobs)

    trio.run(main)
