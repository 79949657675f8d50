"""The commands about block jobs: those that start one, and those that were there before ``job-*``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from qsd.actors.edges import check_not_in_job
from qsd.actors.jobs.block_graph import StartJob
from qsd.actors.jobs.block_job import BlockJob, BlockJobOptions
from qsd.actors.jobs.states import Verb
from qsd.actors.jobs.stream import StreamJob, StreamTask, backing_chain
from qsd.actors.node import Node
from qsd.commands.context import Context, Services
from qsd.commands.registry import command
from qsd.errors import ErrorClass, QmpError
from qsd.qapi.schema.block_jobs import (
    BlockdevOnError,
    BlockJobCancelArgs,
    BlockJobChangeOptions,
    BlockJobInfo,
    BlockJobSetSpeedArgs,
    BlockStreamArgs,
)

UNKNOWN = "Cannot find device='{}' nor node-name='{}'"


def _find(services: Services, name: str) -> BlockJob:
    job = services.jobs.find(name)
    if not isinstance(job, BlockJob):
        raise QmpError(f"Block job '{name}' not found", error_class=ErrorClass.DEVICE_NOT_ACTIVE)
    return job


@command("query-block-jobs")
async def query_block_jobs(context: Context, _args: None) -> list[BlockJobInfo]:
    """All block jobs, newest first."""
    return [job.block_info() for job in context.services.jobs.jobs() if isinstance(job, BlockJob)]


@command("block-job-cancel")
async def block_job_cancel(context: Context, args: BlockJobCancelArgs) -> None:
    """Give a job up; without force, a job that is ready ends in order."""
    job = _find(context.services, args.device)
    if job.is_user_paused and not args.force:
        raise QmpError(f"The block job for device '{job.id}' is currently paused")
    await context.services.jobs.tell(job.id, Verb.CANCEL, bool(args.force))


@command("block-job-change")
async def block_job_change(context: Context, args: BlockJobChangeOptions) -> None:
    """Change how a job works while it does."""
    job = _find(context.services, args.id)
    await context.services.jobs.tell(job.id, Verb.CHANGE, args)


@command("block-job-set-speed")
async def block_job_set_speed(context: Context, args: BlockJobSetSpeedArgs) -> None:
    """Change the speed limit."""
    job = _find(context.services, args.device)
    await context.services.jobs.tell(job.id, Verb.SET_SPEED, args.speed)


def _verb_command(verb: Verb, member: str) -> Callable[[Context, Any], Awaitable[None]]:
    async def tell(context: Context, args: Any) -> None:
        job = _find(context.services, getattr(args, member))
        await context.services.jobs.tell(job.id, verb)

    return tell


command("block-job-pause")(_verb_command(Verb.PAUSE, "device"))
command("block-job-resume")(_verb_command(Verb.RESUME, "device"))
command("block-job-complete")(_verb_command(Verb.COMPLETE, "device"))
command("block-job-finalize")(_verb_command(Verb.FINALIZE, "id"))
command("block-job-dismiss")(_verb_command(Verb.DISMISS, "id"))


def _options(args: Any) -> BlockJobOptions:
    return BlockJobOptions(
        id=args.job_id or "",
        auto_finalize=args.auto_finalize is not False,
        auto_dismiss=args.auto_dismiss is not False,
        speed=args.speed or 0,
        filter_name=args.filter_node_name,
    )


async def _start(services: Services, job: BlockJob) -> None:
    await services.graph.transact([StartJob(jobs=services.jobs, job=job)])


# -- stream -----------------------------------------------------------------------------------------------------


@command("block-stream")
async def block_stream(context: Context, args: BlockStreamArgs) -> None:
    """Copy what a node's backing files hold into the node."""
    services = context.services
    await _start(services, StreamJob(_options(args), services.graph, _stream_task(services, args)))


def _stream_task(services: Services, args: BlockStreamArgs) -> StreamTask:
    for one, other in (("base", "base-node"), ("base", "bottom"), ("bottom", "base-node")):
        if None not in (getattr(args, one.replace("-", "_")), getattr(args, other.replace("-", "_"))):
            raise QmpError(f"'{one}' and '{other}' cannot be specified at the same time")
    top = services.graph.find(args.device, UNKNOWN)
    check_not_in_job(top)
    chain = backing_chain(top)
    base = _stream_base(services, args, chain)
    if base is None and args.backing_file is not None:
        raise QmpError("backing file specified, but streaming the entire chain")
    end = len(chain) if base is None else chain.index(base)
    return StreamTask(
        top=top,
        between=tuple(chain[1:end]),
        base=base,
        backing_file=args.backing_file,
        base_kind=_kind_of(base, masked=bool(args.backing_mask_protocol)),
        on_error=args.on_error or BlockdevOnError.REPORT,
    )


def _stream_base(services: Services, args: BlockStreamArgs, chain: list[Node]) -> Node | None:
    top = chain[0]
    if args.base is not None:
        found = next((node for node in chain[1:] if node.driver.filename() == args.base), None)
        if found is None:
            raise QmpError(f"Can't find '{args.base}' in the backing chain")
        return found
    name = args.base_node or args.bottom
    if name is None:
        return None
    node = services.graph.find(name)
    if args.base_node is not None:
        if node not in chain[1:]:
            raise QmpError(f"Node '{name}' is not a backing image of '{top.name}'")
        return node
    if node not in chain:
        raise QmpError(f"Node '{name}' is not in a chain starting from '{top.name}'")
    below = chain[chain.index(node) + 1 :]
    return below[0] if below else None


def _kind_of(base: Node | None, *, masked: bool) -> str:
    """The format that an image names with its backing file; ``masked``: raw where that is a protocol's node."""
    if base is None:
        return ""
    return "raw" if masked and not base.driver.is_format else base.driver.name
