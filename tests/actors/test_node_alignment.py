"""Nodes with a request alignment: neighbours that share a block do not undo each other, however late they end."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import trio
import trio.testing

from qsd.actors.node import Node
from qsd.actors.supervisor import Floor, Supervisor
from qsd.drivers.base import Driver, Limits, Mode
from qsd.messages import Op, ReplyQueue, Request

ALIGNMENT = 512
SIZE = 64 * ALIGNMENT


class LateDisk(Driver):
    """Takes aligned requests and does them when told, in any order: an engine's completions."""

    name = "late"

    def __init__(self, chance: random.Random) -> None:
        host: Any = None
        super().__init__("disk", None, Mode(discard_unmap=True), host)
        self.data = bytearray(chance.randbytes(SIZE))
        self.limits = Limits(request_alignment=ALIGNMENT)
        self.length = SIZE
        self.pending: list[Request] = []

    async def open(self) -> None:
        """Open from the beginning."""

    def submit(self, batch: list[Request]) -> None:
        for request in batch:
            assert (request.offset | request.length) % ALIGNMENT == 0, "the node aligns"
            self.started()
            self.pending.append(request)

    def end_one(self, chance: random.Random) -> None:
        request = self.pending.pop(chance.randrange(len(self.pending)))
        place = slice(request.offset, request.offset + request.length)
        if request.op == Op.READ:
            assert request.buffer is not None
            request.buffer[:] = self.data[place]
        elif request.op == Op.WRITE:
            assert request.buffer is not None
            self.data[place] = request.buffer
        elif request.op in (Op.WRITE_ZEROES, Op.DISCARD):
            self.data[place] = bytes(request.length)
        self.finished()
        request.complete()


def pieces(chance: random.Random) -> list[tuple[int, int]]:
    """The disk cut into ranges; some begin and end on blocks, most do not."""
    cuts = {0, SIZE}
    for _ in range(80):
        cut = chance.randrange(SIZE)
        cuts.add(cut // ALIGNMENT * ALIGNMENT if chance.random() < 0.3 else cut)
    ordered = sorted(cuts)
    found = list(itertools.pairwise(ordered))
    chance.shuffle(found)
    return found


@pytest.mark.parametrize("seed", range(12))
async def test_neighbours_do_not_undo_each_other(seed: int) -> None:
    chance = random.Random(seed)
    disk = LateDisk(chance)
    expected = bytearray(disk.data)
    replies = ReplyQueue(lambda: None)
    async with Supervisor() as supervisor:
        node = Node("disk", disk)
        await supervisor.start(node, Floor.NODES)
        node.set_writable(writable=True)
        requests = []
        for start, end in pieces(chance):
            op = chance.choice((Op.READ, Op.WRITE, Op.WRITE, Op.WRITE_ZEROES))
            data = bytearray(chance.randbytes(end - start))
            if op == Op.WRITE:
                expected[start:end] = data
            elif op == Op.WRITE_ZEROES:
                expected[start:end] = bytes(end - start)
            buffer = None if op == Op.WRITE_ZEROES else memoryview(data)
            requests.append(Request(op.value, start, end - start, buffer, replies))
        # Aligned writes first: those that nobody tracks are under way when the first unaligned one comes.
        requests.sort(key=lambda request: (request.offset | request.length) % ALIGNMENT != 0)
        count = len(requests)
        while len(replies.ready) < count:
            if requests and chance.random() < 0.7:
                some = [requests.pop(0) for _ in range(min(len(requests), chance.randrange(1, 6)))]
                node.submit(some)
            elif disk.pending:
                disk.end_one(chance)
            await trio.testing.wait_all_tasks_blocked()
        assert not [request for request in replies.ready if request.error]
        assert disk.data == expected
        for request in replies.ready:
            if request.op == Op.READ:
                assert request.buffer is not None
                # Nobody writes what another reads: the pieces are disjoint.
                assert bytes(request.buffer) == expected[request.offset : request.offset + request.length]


@pytest.mark.parametrize(("start", "end", "blocks"), [(10, 500, 0), (10, 1000, 0), (10, 1024, 1), (512, 1700, 2)])
async def test_discard_gives_up_whole_blocks_only(start: int, end: int, blocks: int) -> None:
    """One within a block went on with a length below nothing."""
    chance = random.Random(1)
    disk = LateDisk(chance)
    asked: list[int] = []
    replies = ReplyQueue(lambda: None)
    async with Supervisor() as supervisor:
        node = Node("disk", disk)
        await supervisor.start(node, Floor.NODES)
        node.set_writable(writable=True)
        node.submit([Request(Op.DISCARD.value, start, end - start, None, replies)])
        while not replies.ready:
            await trio.testing.wait_all_tasks_blocked()
            while disk.pending:
                asked.append(disk.pending[0].length)
                disk.end_one(chance)
    assert not replies.ready[0].error
    assert asked == [blocks * ALIGNMENT] * bool(blocks)


async def test_settle_waits_for_what_came_before_and_keeps_the_rest_back() -> None:
    chance = random.Random(1)
    disk = LateDisk(chance)
    replies = ReplyQueue(lambda: None)
    async with Supervisor() as supervisor:
        node = Node("disk", disk)
        await supervisor.start(node, Floor.NODES)
        node.submit([Request(Op.READ.value, 0, 512, memoryview(bytearray(512)), replies)])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.settle)
            await trio.testing.wait_all_tasks_blocked()
            node.submit([Request(Op.READ.value, 512, 512, memoryview(bytearray(512)), replies)])
            assert len(disk.pending) == 1
            disk.end_one(chance)
        assert [request.offset for request in replies.ready] == [0]
        assert [request.offset for request in disk.pending] == [512]
        disk.end_one(chance)


async def test_unaligned_write_keeps_what_an_earlier_write_of_the_block_brings() -> None:
    """The earlier one is not tracked: the node was all aligned until then."""
    chance = random.Random(1)
    disk = LateDisk(chance)
    replies = ReplyQueue(lambda: None)
    async with Supervisor() as supervisor:
        node = Node("disk", disk)
        await supervisor.start(node, Floor.NODES)
        node.set_writable(writable=True)
        node.submit([Request(Op.WRITE.value, 0, 512, memoryview(b"w" * 512), replies)])
        node.submit([Request(Op.WRITE.value, 0, 10, memoryview(b"u" * 10), replies)])
        await trio.testing.wait_all_tasks_blocked()
        while disk.pending:
            # The newest first: the worst order for the one that came before.
            disk.pending.insert(0, disk.pending.pop())
            disk.end_one(First())
            await trio.testing.wait_all_tasks_blocked()
    assert len(replies.ready) == 2
    assert disk.data[:512] == b"u" * 10 + b"w" * 502


class First(random.Random):
    """Chooses the first of everything."""

    def randrange(self, *_args: Any) -> int:  # type: ignore[override]
        return 0
