"""block-stream on images in memory: what is copied, what the graph looks like, what users write meanwhile."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from cow_fakes import BLOCK, CowOptions, House, running_house, settle
from trio.testing import MockClock

from qsd.actors.edges import RootEdge, RootOptions
from qsd.actors.jobs.stream import StreamJob
from qsd.block.permissions import Perm
from qsd.errors import QmpError
from qsd.messages import Op
from qsd.qapi.core import NULL
from qsd.qapi.schema.jobs import JobStatus

WRITE = RootOptions(Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL & ~Perm.RESIZE)
DONE = ["created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]


@pytest.fixture
async def house(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    monkeypatch.setattr(StreamJob, "largest_step", 8 * BLOCK)
    async with running_house() as made:
        yield made


async def chain(house: House, **more: Any) -> RootEdge:
    """base <- mid <- top, with a user on top."""
    house.image("base", dict.fromkeys(range(32), 1), length=48)
    house.image("mid", {**dict.fromkeys(range(8, 16), 2), 20: None})
    house.image("top", {0: 3, 9: 3})
    await house.node("base", NULL, read_only=True)
    await house.node("mid", "base", read_only=True)
    await house.node("top", "mid", **more)
    return await house.graph.attach("top", WRITE)


def expected() -> list[int]:
    return [3] + [1] * 7 + [2, 3] + [2] * 6 + [1] * 4 + [0] + [1] * 11 + [0] * 32


async def test_image_opened_without_its_backing_file_keeps_the_name(house: House) -> None:
    house.image("top", {0: 3})
    house.shelf.images["top"].backing = ("base", "cow")
    await house.node("top", NULL)
    await house.execute("block-stream", job_id="j", device="top")
    await settle()
    assert house.told == DONE
    assert house.shelf.images["top"].backing == ("base", "cow")


async def test_whole_chain(house: House) -> None:
    edge = await chain(house)
    assert await house.contents("top") == expected()
    await house.execute("block-stream", job_id="j", device="top")
    await settle()
    assert house.told == DONE
    assert await house.contents("top") == expected()
    assert "backing" not in house.graph.find("top").driver.children
    # What nobody holds is not copied; what a short base does not have counts as zeroes of its own.
    assert house.allocated("top") == {*range(32), *range(48, 64)}
    assert house.shelf.images["top"].blocks[20] is None
    assert house.shelf.images["top"].backing == ("", "")
    assert (edge.node_name, [node.name for node in house.graph.nodes]) == ("top", ["base", "mid", "top"])
    (done,) = house.of("BLOCK_JOB_COMPLETED")
    assert done == {"type": "stream", "device": "j", "len": 64 * BLOCK, "offset": 64 * BLOCK, "speed": 0}
    await edge.detach()


@pytest.mark.parametrize("how", [{"base_node": "base"}, {"base": "base"}, {"bottom": "mid"}])
async def test_down_to_a_base(house: House, how: dict[str, str]) -> None:
    edge = await chain(house)
    await house.execute("block-stream", job_id="j", device="top", **how)
    await settle()
    assert house.told == DONE
    assert await house.contents("top") == expected()
    assert house.graph.find("top").driver.children["backing"].node_name == "base"
    assert house.allocated("top") == {0, *range(8, 16), 20}
    assert house.shelf.images["top"].backing == ("base", "cow")
    await edge.detach()


async def test_name_of_the_backing_file(house: House) -> None:
    edge = await chain(house)
    await house.execute("block-stream", job_id="j", device="top", base_node="base", backing_file="other")
    await settle()
    assert house.shelf.images["top"].backing == ("other", "cow")
    await house.execute("block-stream", job_id="j", device="top", base_node="base", backing_file="x" * 200)
    await settle()
    assert house.of("BLOCK_JOB_COMPLETED")[1]["error"] == "Invalid argument"
    assert house.graph.find("top").driver.children["backing"].node_name == "base"
    await edge.detach()


async def test_inline_chain_is_closed(house: House) -> None:
    house.image("base", {0: 1})
    house.image("top")
    options: Any = CowOptions
    inline = options(node_name="inner", image="base")
    await house.node("top", inline)
    await house.execute("block-stream", job_id="j", device="top")
    await settle()
    assert [node.name for node in house.graph.nodes] == ["top"]
    assert (await house.contents("top"))[0] == 1


async def test_filter_while_it_works(house: House) -> None:
    edge = await chain(house)
    await house.execute("block-stream", job_id="j", device="top", speed=1, filter_node_name="flt")
    await settle()
    assert edge.node_name == "flt"
    (info,) = await house.execute("query-block-jobs")
    assert info["status"] == "running"
    assert not info["busy"]
    busy = "Node 'top' is busy: block device is in use by block job: stream"
    house.image("over")
    await house.node("over", NULL)
    for name, arguments in [
        ("block-stream", {"job_id": "k", "device": "top"}),
        ("blockdev-del", {"node_name": "top"}),
        ("blockdev-snapshot", {"node": "top", "overlay": "over"}),
    ]:
        assert await house.refusal(name, **arguments) == busy
    with pytest.raises(QmpError, match=busy):
        await house.graph.resize("top", 0)
    text = await house.refusal("blockdev-del", node_name="mid")
    assert text == "Node 'mid' is busy: block device is in use by block job: stream"
    # As in the reference: who works on it counts as a user of the filter, which so is nobody's root.
    assert await house.refusal("blockdev-del", node_name="flt") == "Node flt is in use"
    text = await house.refusal("change-backing-file", device="flt", image_node_name="top", backing_file="x")
    assert text == "Need a root block node"
    await house.execute("job-cancel", id="j")
    await settle()
    assert edge.node_name == "top"
    assert [node.name for node in house.graph.nodes] == ["base", "mid", "top", "over"]
    assert house.graph.find("top").driver.children["backing"].node_name == "mid"
    await edge.detach()


async def test_refusals(house: House) -> None:
    edge = await chain(house)
    house.image("lone")
    await house.node("lone", NULL)
    for arguments, text in [
        ({"device": "zz"}, "Cannot find device='zz' nor node-name='zz'"),
        ({"base": "zz"}, "Can't find 'zz' in the backing chain"),
        ({"base": "mid", "base_node": "x"}, "'base' and 'base-node' cannot be specified at the same time"),
        ({"base": "mid", "bottom": "x"}, "'base' and 'bottom' cannot be specified at the same time"),
        ({"bottom": "mid", "base_node": "x"}, "'bottom' and 'base-node' cannot be specified at the same time"),
        ({"base_node": "zz"}, "Cannot find device='' nor node-name='zz'"),
        ({"base_node": "top"}, "Node 'top' is not a backing image of 'top'"),
        ({"base_node": "lone"}, "Node 'lone' is not a backing image of 'top'"),
        ({"bottom": "zz"}, "Cannot find device='' nor node-name='zz'"),
        ({"backing_file": "q"}, "backing file specified, but streaming the entire chain"),
        ({"job_id": "1"}, "Invalid job ID '1'"),
        ({"filter_node_name": "1"}, "Could not create node: Invalid node-name: '1'"),
        ({"filter_node_name": "top"}, "Could not create node: Duplicate nodes with node-name='top'"),
    ]:
        assert await house.refusal("block-stream", **{"job_id": "j", "device": "top", **arguments}) == text
    assert await house.refusal("block-stream", device="top") == "Invalid job ID ''"
    assert house.heard == []
    text = await house.refusal("block-stream", job_id="j", device="top", speed=-1)
    assert text == "Parameter 'speed' expects a non-negative value"
    assert house.told == ["created", "null"]
    assert edge.node_name == "top"
    assert [node.name for node in house.graph.nodes] == ["base", "mid", "top", "lone"]
    await edge.detach()


async def test_start_that_the_graph_refuses(house: House) -> None:
    await (await chain(house)).detach()
    # Somebody resizes the top, which the job does not share.
    edge = await house.graph.attach("top", RootOptions(Perm.RESIZE))
    text = await house.refusal("block-stream", job_id="j", device="top")
    # The job's filter, which the user would be above.
    assert text.startswith("Permission conflict on node '#block")
    assert house.told == ["created", "null"]
    assert [node.name for node in house.graph.nodes] == ["base", "mid", "top"]
    await edge.detach()


async def test_chain_that_changes_before_the_start_is_refused(house: House) -> None:
    """The job would have named a base that the image does not have any more."""
    edge = await chain(house)
    options: Any = CowOptions
    told: list[str] = []

    async def stream() -> None:
        told.append(await house.refusal("block-stream", job_id="j", device="top", base_node="base"))

    async with trio.open_nursery() as nursery, house.graph.topology.lock:
        # What came first has its turn first.
        nursery.start_soon(house.graph.reopen, (options(node_name="top", image="top", backing=NULL),))
        await settle()
        nursery.start_soon(stream)
        await settle()
    assert told == ["The backing chain of 'top' has changed"]
    assert not house.told
    assert [node.name for node in house.graph.nodes] == ["base", "mid", "top"]
    await edge.detach()


async def test_cancelled_before_it_begins(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known by its id before the graph has its turn. Starting it all the same was the end of the daemon."""
    edge = await chain(house)
    lock = house.graph.topology.lock
    told: list[str] = []
    created = trio.Event()
    create = house.jobs.create

    async def create_and_wait(*args: Any) -> None:
        await create(*args)
        created.set()
        await settle()

    async def stream() -> None:
        told.append(await house.refusal("block-stream", job_id="j", device="top"))

    with monkeypatch.context() as patch:
        patch.setattr(house.jobs, "create", create_and_wait)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream)
            await created.wait()
            async with lock:
                assert [job["status"] for job in await house.execute("query-jobs")] == ["created"]
                with trio.fail_after(5):
                    await house.execute("job-cancel", id="j")
    assert told == ["Operation canceled"]
    assert house.told == ["created", "aborting", "concluded", "null"]
    assert [node.name for node in house.graph.nodes] == ["base", "mid", "top"]
    await house.execute("block-stream", job_id="j", device="top")
    await settle()
    assert await house.contents("top") == expected()
    await edge.detach()


async def test_cancelled_while_it_begins(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    edge = await chain(house)
    describe = StreamJob.describe_start

    def describe_and_cancel(job: StreamJob, change: Any) -> None:
        describe(job, change)
        job.cancel(force=True)

    with monkeypatch.context() as patch:
        patch.setattr(StreamJob, "describe_start", describe_and_cancel)
        await house.execute("block-stream", job_id="j", device="top")
    await settle()
    assert house.told == ["created", "running", "aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]
    assert [node.name for node in house.graph.nodes] == ["base", "mid", "top"]
    assert edge.node_name == "top"
    await house.execute("block-stream", job_id="j", device="top")
    await settle()
    assert await house.contents("top") == expected()
    await edge.detach()


async def test_frozen_links(house: House) -> None:
    edge = await chain(house)
    await house.execute("block-stream", job_id="j", device="top", base_node="base", speed=1)
    await settle()
    options: Any = CowOptions
    reopened = (options(node_name="top", image="top", backing=NULL),)
    with pytest.raises(Exception, match="Cannot change frozen 'backing' link from 'top' to 'mid'"):
        await house.graph.reopen(reopened)
    await house.execute("job-cancel", id="j")
    await settle()
    await house.graph.reopen(reopened)
    assert "backing" not in house.graph.find("top").driver.children
    await edge.detach()


# -- while users write --------------------------------------------------------------------------------------------


async def test_what_a_user_writes_is_never_overwritten(house: House) -> None:
    """A write that comes while its block is being copied waits, and wins."""
    edge = await chain(house)
    house.shelf.held[Op.READ, "top"] = []
    async with trio.open_nursery() as nursery:
        await house.execute("block-stream", job_id="j", device="top")
        await settle()
        # The first step is between reading and writing.
        nursery.start_soon(edge.write, 2 * BLOCK, bytes([9]) * BLOCK)
        nursery.start_soon(edge.write, 40 * BLOCK, bytes([9]) * BLOCK)
        await settle()
        assert house.allocated("top") == {0, 9, 40}
        while house.jobs.find("j") is not None:
            house.shelf.let_go(Op.READ, "top")
            house.shelf.held[Op.READ, "top"] = []
            await settle()
        del house.shelf.held[Op.READ, "top"]
    assert house.told == DONE
    wanted = expected()
    wanted[2] = wanted[40] = 9
    assert await house.contents("top") == wanted
    await edge.detach()


async def test_drain_waits_for_the_step_and_the_job_for_the_drain(house: House) -> None:
    edge = await chain(house)
    top = house.graph.find("top")
    house.shelf.held[Op.READ, "top"] = []
    await house.execute("block-stream", job_id="j", device="top")
    await settle()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(top.hold)
        await settle()
        assert top.in_flight
        # The step goes on to its end, and no other begins.
        while house.shelf.held[Op.READ, "top"]:
            house.shelf.let_go(Op.READ, "top")
            house.shelf.held[Op.READ, "top"] = []
            await settle()
    del house.shelf.held[Op.READ, "top"]
    await settle()
    job = house.jobs.find("j")
    found = job is not None and job.progress, house.allocated("top")
    top.release()
    await settle()
    assert found == (8 * BLOCK, {*range(8), 9})
    assert house.told == DONE
    await edge.detach()


# -- pauses, speed, errors ----------------------------------------------------------------------------------------


async def test_pausing_between_steps(house: House, autojump_clock: MockClock) -> None:
    edge = await chain(house)
    await house.execute("block-stream", job_id="j", device="top", speed=BLOCK)
    await settle()
    await house.execute("job-pause", id="j")
    await settle()
    (info,) = await house.execute("query-block-jobs")
    assert (info["paused"], info["status"], info["offset"]) == (True, "paused", 8 * BLOCK)
    await trio.sleep(1000)
    assert house.jobs.find("j").progress == 8 * BLOCK  # type: ignore[union-attr]  # it is there
    await house.execute("block-job-resume", device="j")
    started = trio.current_time()
    while house.jobs.find("j") is not None:
        await trio.sleep(1)
    # 31 blocks are copied at a block a second; the last step need not be waited for.
    assert 20 <= trio.current_time() - started <= 40
    assert house.told.count("paused") == 1
    await edge.detach()


async def test_changing_the_speed_takes_effect_at_once(house: House, autojump_clock: MockClock) -> None:
    edge = await chain(house)
    await house.execute("block-stream", job_id="j", device="top", speed=1)
    await settle()
    await house.execute("block-job-set-speed", device="j", speed=0)
    await settle()
    assert house.told == DONE
    assert house.of("BLOCK_JOB_COMPLETED")[0]["speed"] == 0
    assert trio.current_time() < 1
    await edge.detach()


async def test_error_that_is_reported(house: House) -> None:
    edge = await chain(house)
    house.shelf.failing[Op.WRITE, "top"] = errno.EIO
    await house.execute("block-stream", job_id="j", device="top")
    await settle()
    assert house.told == [
        *("created", "running", "BLOCK_JOB_ERROR", "aborting", "BLOCK_JOB_COMPLETED", "concluded", "null")
    ]
    assert house.of("BLOCK_JOB_ERROR") == [{"device": "j", "operation": "read", "action": "report"}]
    assert house.of("BLOCK_JOB_COMPLETED")[0]["error"] == "Input/output error"
    assert house.graph.find("top").driver.children["backing"].node_name == "mid"
    assert edge.node_name == "top"
    await edge.detach()


@pytest.mark.parametrize(
    ("policy", "number", "status"),
    [("stop", errno.EIO, "failed"), ("stop", errno.ENOSPC, "nospace"), ("enospc", errno.ENOSPC, "nospace")],
)
async def test_error_that_stops(house: House, policy: str, number: int, status: str) -> None:
    edge = await chain(house)
    house.shelf.failing[Op.WRITE, "top"] = number
    await house.execute("block-stream", job_id="j", device="top", on_error=policy)
    await settle()
    assert house.told == ["created", "running", "BLOCK_JOB_ERROR", "paused"]
    (info,) = await house.execute("query-block-jobs")
    assert (info["io-status"], info["paused"], info["offset"]) == (status, True, BLOCK)
    house.shelf.failing.clear()
    await house.execute("job-resume", id="j")
    await settle()
    assert house.told[4:] == ["running", *DONE[2:]]
    assert await house.contents("top") == expected()
    await edge.detach()


async def test_error_that_is_ignored_still_fails_the_job(house: House, autojump_clock: MockClock) -> None:
    edge = await chain(house)
    house.shelf.failing[Op.WRITE, "top"] = errno.EIO
    await house.execute("block-stream", job_id="j", device="top", on_error="ignore")
    await trio.sleep(100)
    # Three of the steps have something to copy, and one only zeroes besides.
    assert house.told[2:6] == ["BLOCK_JOB_ERROR"] * 4
    (done,) = house.of("BLOCK_JOB_COMPLETED")
    assert (done["offset"], done["error"]) == (64 * BLOCK, "Input/output error")
    await edge.detach()


# -- the end ------------------------------------------------------------------------------------------------------


async def test_finalizing_by_hand(house: House) -> None:
    edge = await chain(house)
    await house.execute("block-stream", job_id="j", device="top", auto_finalize=False, auto_dismiss=False)
    await settle()
    assert house.told == ["created", "running", "waiting", "pending", "BLOCK_JOB_PENDING"]
    assert house.graph.find("top").driver.children["backing"].node_name == "mid"
    await house.execute("job-finalize", id="j")
    assert house.told[5:] == ["BLOCK_JOB_COMPLETED", "concluded"]
    assert "backing" not in house.graph.find("top").driver.children
    job = house.jobs.find("j")
    assert job is not None
    assert job.status is JobStatus.CONCLUDED
    await house.execute("block-job-dismiss", id="j")
    await edge.detach()


async def test_shutdown_while_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StreamJob, "largest_step", 8 * BLOCK)
    async with running_house() as house:
        await chain(house)
        await house.execute("block-stream", job_id="j", device="top", speed=1)
        await settle()
    assert house.told[-4:] == ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]


@pytest.mark.parametrize("wrong", [{"speed": -1}, {"filter_node_name": "top"}, {"filter_node_name": "1st"}])
async def test_top_is_read_only_again_where_the_job_does_not_start(house: House, wrong: dict[str, Any]) -> None:
    house.image("top")
    await house.node("top", NULL, read_only=True)
    await house.refusal("block-stream", job_id="j", device="top", **wrong)
    assert house.graph.find("top").mode.read_only
    await house.execute("block-stream", job_id="j", device="top")
    await settle()
    assert not house.graph.find("top").mode.read_only  # as after any stream


async def test_top_stays_writable_for_who_writes_when_a_job_does_not_start(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.image("top")
    await house.node("top", NULL, read_only=True)
    create = house.jobs.create

    async def meanwhile(*args: Any) -> None:
        await create(*args)
        await house.graph.attach("top", WRITE)

    monkeypatch.setattr(house.jobs, "create", meanwhile)
    await house.refusal("block-stream", job_id="j", device="top", speed=-1)
    assert not house.graph.find("top").mode.read_only
