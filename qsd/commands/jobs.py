"""The commands about jobs of any type, and the jobs that make or amend images."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from qsd.actors.jobs.create import AmendJob, CreateJob
from qsd.actors.jobs.states import Verb
from qsd.commands.context import Context
from qsd.commands.registry import command
from qsd.drivers.registry import CREATORS
from qsd.errors import QmpError
from qsd.qapi.schema.create import BlockdevAmendArgs, BlockdevCreateArgs
from qsd.qapi.schema.jobs import JobArgs, JobInfo, JobStatus


def _verb_command(verb: Verb, value: object = None) -> Callable[[Context, JobArgs], Awaitable[None]]:
    async def tell(context: Context, args: JobArgs) -> None:
        await context.services.jobs.tell(args.id, verb, value)

    return tell


command("job-cancel")(_verb_command(Verb.CANCEL, True))  # by force
command("job-complete")(_verb_command(Verb.COMPLETE))
command("job-dismiss")(_verb_command(Verb.DISMISS))
command("job-finalize")(_verb_command(Verb.FINALIZE))
command("job-pause")(_verb_command(Verb.PAUSE))
command("job-resume")(_verb_command(Verb.RESUME))


@command("query-jobs")
async def query_jobs(context: Context, _args: None) -> list[JobInfo]:
    """All jobs, newest first."""
    return context.services.jobs.query()


@command("blockdev-create")
async def blockdev_create(context: Context, args: BlockdevCreateArgs) -> None:
    """Make a new image, as a job."""
    creator = CREATORS.get(args.options.driver.value)
    if creator is None:
        raise QmpError("Driver does not support blockdev-create")
    services = context.services
    await services.jobs.start(CreateJob(args.job_id, creator, args.options, services.creating))


@command("x-blockdev-amend")
async def x_blockdev_amend(context: Context, args: BlockdevAmendArgs) -> None:
    """Change properties of an image in place, as a job."""
    services = context.services
    node = services.graph.find(args.node_name)
    if node.driver.name != args.options.driver.value:
        raise QmpError("x-blockdev-amend doesn't support changing the block driver")
    if not node.driver.can_amend:
        raise QmpError("Driver does not support x-blockdev-amend")
    job = AmendJob(args.job_id, node, args.options, services.creating, force=bool(args.force))
    await services.jobs.create(job)
    try:
        await job.take_node()
    except BaseException:
        if job.status is JobStatus.CREATED:
            services.jobs.discard(job)
        raise
    if job.status is JobStatus.CREATED:
        job.start()
    else:
        # Cancelled meanwhile, by somebody else.
        await job.clean()
