"""Draining a node under load: what came before ends, what comes meanwhile waits, nothing is lost or reordered."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qsd.actors.core import CRASH_GRACE
from qsd.actors.node import Node
from qsd.actors.supervisor import Floor, Supervisor
from qsd.drivers.base import Driver, Limits, Mode
from qsd.messages import Op, ReplyQueue, Request

SIZE = 1 << 20


class Slow(Driver):
    """Serves a request only when told so; ``order`` is what reached it."""

    name = "slow"

    def __init__(self, alignment: int = 1) -> None:
        nobody: Any = None
        super().__init__("slow", None, Mode(), nobody)
        self.length = SIZE
        self.limits = Limits(request_alignment=alignment)
        self.order: list[Any] = []
        self.waiting: list[Request] = []

    async def open(self) -> None:
        return

    def submit(self, batch: list[Request]) -> None:
        for request in batch:
            self.started()
            self.order.append(request.tag)
            self.waiting.append(request)

    def serve(self, count: int | None = None) -> None:
        """End the oldest ``count`` requests, or all."""
        now, self.waiting = self.waiting[:count], [] if count is None else self.waiting[count:]
        for request in now:
            self.finished()
            request.complete(0)


class Client:
    """Submits numbered requests and collects the numbers of those that have ended."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.reply = ReplyQueue(lambda: None)
        self.count = 0

    def send(self, *, op: Op = Op.READ, offset: int = 0, length: int = 512, many: int = 1) -> None:
        batch = []
        for _ in range(many):
            buffer = None if op is Op.FLUSH else memoryview(bytearray(length))
            batch.append(Request(op.value, offset, length, buffer, self.reply, tag=self.count))
            self.count += 1
        self.node.submit(batch)

    @property
    def ended(self) -> list[Any]:
        return [request.tag for request in self.reply.ready]

    @property
    def errors(self) -> set[int]:
        return {request.error for request in self.reply.ready}


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    async with Supervisor({Node.kind: _broken}) as supervisor:
        made = Node("n", Slow())
        made.set_writable(writable=True)
        await supervisor.start(made, Floor.NODES)
        yield made
        driver = made.driver
        assert isinstance(driver, Slow)
        driver.serve()


def _broken(actor: Any, _error: BaseException) -> None:
    actor.break_down()


def driver_of(node: Node) -> Slow:
    assert isinstance(node.driver, Slow)
    return node.driver


async def test_drain_ends_what_came_before_and_keeps_back_what_comes(node: Node) -> None:
    driver, client = driver_of(node), Client(node)
    client.send(many=10)
    drained = trio.Event()

    async def drain() -> None:
        await node.hold()
        drained.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drain)
        await wait_all_tasks_blocked()
        for _ in range(10):  # the load goes on: neither served nor seen by the driver
            client.send(many=3)
            driver.serve(1)
            await wait_all_tasks_blocked()
            assert drained.is_set() == (not driver.waiting)
    assert client.ended == list(range(10))
    assert driver.order == list(range(10))
    assert node.is_held
    assert node.in_flight == 0
    node.release()
    driver.serve()
    assert client.ended == driver.order == list(range(40))
    assert client.errors == {0}


async def test_drain_waits_for_requests_that_need_a_task_of_the_node() -> None:
    async with Supervisor() as supervisor:
        node = Node("n", Slow(alignment=512))
        node.set_writable(writable=True)
        await supervisor.start(node, Floor.NODES)
        driver, client = driver_of(node), Client(node)
        client.send(op=Op.WRITE, offset=3, length=5)  # read, change, write: two requests below
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.hold)
            for _ in range(2):
                await wait_all_tasks_blocked()
                assert client.ended == []
                driver.serve()
        assert client.ended == [0]
        assert node.in_flight == 0


async def test_drains_nest(node: Node) -> None:
    driver, client = driver_of(node), Client(node)
    await node.hold()
    await node.hold()
    client.send()
    node.release()
    assert driver.order == []
    node.release()
    assert driver.order == [0]


async def test_drain_that_is_given_up_lets_go_of_what_it_kept_back(node: Node) -> None:
    driver, client = driver_of(node), Client(node)
    client.send()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def drain() -> None:
                try:
                    await node.hold()
                finally:
                    node.release()

            nursery.start_soon(drain)
            await wait_all_tasks_blocked()
            client.send()
            assert driver.order == [0]
            scope.cancel()
    assert driver.order == [0, 1]
    assert not node.is_held


async def test_node_that_closes_under_load_ends_what_came_and_refuses_the_rest() -> None:
    async with Supervisor() as supervisor:
        node = Node("n", Slow())
        await supervisor.start(node, Floor.NODES)
        driver, client = driver_of(node), Client(node)
        client.send(many=3)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.stop, node)
            await wait_all_tasks_blocked()
            client.send(many=2)
            assert driver.order == [0, 1, 2]
            assert client.ended == []
            driver.serve()
        client.send()
    assert client.ended == [0, 1, 2, 3, 4, 5]
    assert [request.error for request in client.reply.ready] == [0, 0, 0, errno.EIO, errno.EIO, errno.EIO]
    assert driver.order == [0, 1, 2]


async def test_node_that_crashes_under_load_answers_everything(caplog: pytest.LogCaptureFixture) -> None:
    async with Supervisor({Node.kind: _broken}) as supervisor:
        node = Node("n", Slow(alignment=512))
        node.set_writable(writable=True)
        await supervisor.start(node, Floor.NODES)
        driver, client = driver_of(node), Client(node)
        client.send(op=Op.WRITE, offset=3, length=5)
        client.send(many=2)
        await wait_all_tasks_blocked()

        async def fail() -> None:
            raise RuntimeError("bad task")

        node.spawn(fail, name="bad task")
        await wait_all_tasks_blocked()
        client.send()
        driver.serve()
        with trio.fail_after(5):
            await node.stopped.wait()
        client.send()
    assert sorted(client.ended) == [0, 1, 2, 3, 4]
    assert client.errors == {0, errno.EIO}
    assert "n crashed" in caplog.text


async def test_node_that_crashes_does_not_wait_for_ever_for_what_will_never_end(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    async with Supervisor({Node.kind: _broken}) as supervisor:
        node = Node("n", Slow())
        await supervisor.start(node, Floor.NODES)
        client = Client(node)
        client.send()

        async def fail() -> None:
            raise RuntimeError("bad task")

        node.spawn(fail, name="bad task")
        await wait_all_tasks_blocked()
        assert "n: bad task failed: RuntimeError('bad task')" in caplog.text, "told before it is over"
        client.send()
        with trio.fail_after(CRASH_GRACE + 1):
            await node.stopped.wait()
        client.send()
    assert client.ended == [1, 2]
    assert client.errors == {errno.EIO}


async def test_driver_that_fails_half_way_breaks_its_node_and_holds_up_no_drain(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """What it had counted never ends: whoever drained the node waited for that, and so did the daemon's end."""
    driver, client = driver_of(node), Client(node)

    def fail(_batch: list[Request]) -> None:
        driver.started()
        raise RuntimeError("half way")

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            client.send()
            nursery.start_soon(node.hold)
            await wait_all_tasks_blocked()
            assert node.is_held
            node.release()
            driver.submit = fail  # type: ignore[method-assign]
            with pytest.raises(RuntimeError, match="half way"):
                client.send()
        await node.hold()
        node.release()
        await node.stopped.wait()
    client.send()
    assert client.errors == {errno.EIO}
    assert "n: requests failed: RuntimeError('half way')" in caplog.text
