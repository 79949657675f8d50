"""What every block driver has to do: one list of checks, for a node opened in a whole daemon.

``CHECKS`` are functions of a ``Rig``: the top node of a stack, used through a root edge as an export or a job uses
it, with a model of its bytes. A driver takes part by a ``Subject``: how to make its nodes, and what it can do.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio
from whole_daemon import Whole, whole_daemon

from qsd.actors.edges import RootEdge, RootOptions, info_of
from qsd.actors.node import Node
from qsd.block.permissions import Perm
from qsd.drivers.base import SECTOR
from qsd.drivers.calls import call
from qsd.drivers.spot import Finder
from qsd.errors import QmpError
from qsd.messages import BlockState, Flag, Op, ReplyQueue, Request

SIZE = (1 << 20) + 5 * 512
LARGEST = 150_000
# Read at a time on the spot.
PIECE = 3000
Options = dict[str, Any]


@attrs.frozen
class Subject:
    """A stack of nodes and what its top can do.

    ``nodes(place)`` are blockdev-add's arguments, the last one for the node ``top``; files named there exist.
    ``prepare`` may do more before (create an image). ``stores``: reads give what was written. ``resizes``: any
    size. ``begins``: what a disk of that length holds before anything is written, None when nobody knows (an
    encrypted one decrypts what was there). ``alignment``: what the top is to report as its request alignment.
    ``is_torn``: the last sector is not whole below, and takes no data. ``is_spotted``: it is read on the spot.
    """

    nodes: Callable[[Path], list[Options]]
    prepare: Callable[[Whole], Awaitable[None]] | None = None
    stores: bool = True
    resizes: bool = True
    alignment: int = 1
    is_torn: bool = False
    is_spotted: bool = False
    begins: Callable[[int], bytes] | None = bytes
    reopens: tuple[Options, ...] = ({}, {"discard": "unmap"}, {"cache": {"no-flush": True}})


@attrs.define(eq=False)
class Rig:
    """The node under test and what it should hold."""

    subject: Subject
    whole: Whole
    edge: RootEdge
    options: list[Options]
    model: bytearray
    finder: Finder | None = None
    spotted: int = 0
    chance: random.Random = attrs.field(factory=lambda: random.Random(5))

    @property
    def node(self) -> Node:
        return self.edge.node

    @property
    def below(self) -> list[Node]:
        """The nodes the top reaches for its bytes."""
        nodes = self.whole.daemon.services.graph.nodes
        return [node for node in nodes if node is not self.node and not node.driver.children]

    @property
    def chain(self) -> list[Node]:
        """The top and the files below it."""
        nodes = [self.node]
        while (edge := info_of(nodes[-1]).children.get("file")) is not None:
            nodes.append(edge.node)
        return nodes

    def piece(self, low: int = 0, high: int | None = None) -> tuple[int, int]:
        """A random range inside [low, high)."""
        end = len(self.model) - (SECTOR if self.subject.is_torn else 0)
        high = min(high or end, end)
        start = self.chance.randrange(low, high)
        length = self.chance.randrange(1, min(LARGEST, high - start) + 1)
        if self.chance.random() < 0.4:
            start = max(low, start // 4096 * 4096)
            length = min(-(-length // 4096) * 4096, high - start)
        return start, length

    def written(self, start: int, data: bytes) -> None:
        if self.subject.stores:
            self.model[start : start + len(data)] = data

    async def write(self, start: int, data: bytes, flags: Flag = Flag.NONE) -> None:
        await self.edge.write(start, data, flags)
        self.written(start, data)

    async def expect(self, start: int, length: int) -> None:
        found = await self.edge.read(start, length)
        if found != self.model[start : start + length]:
            first = next(i for i in range(length) if found[i] != self.model[start + i])
            raise AssertionError(f"{start}+{length}: byte {start + first} is not what it should be")
        self.expect_on_the_spot(start, length)

    def expect_on_the_spot(self, start: int, length: int) -> None:
        """What is read on the spot, by who keeps the way to it as long as that may be kept, is the same."""
        if self.finder is None or self.finder.target is not self.edge:
            self.finder = Finder(self.edge)
        find = self.finder.find()
        for at in range(start, start + length, PIECE) if find is not None else ():
            expected = self.model[at : min(at + PIECE, start + length)]
            place = find(at, len(expected)) if find is not None and expected else None
            if place is not None:
                fd, where, _flags = place
                assert os.pread(fd, len(expected), where) == expected, f"on the spot: {at}+{len(expected)}"
                self.spotted += 1

    async def adopt(self, start: int, length: int) -> None:
        """Take over what is in a range now, each byte of which may have become zero."""
        found = await self.edge.read(start, length)
        for at in range(start, start + length, SECTOR):
            old, new = self.model[at : at + SECTOR], found[at - start : at - start + SECTOR]
            old = old[: start + length - at]
            assert old == new or all(after in (0, before) for after, before in zip(new, old, strict=True)), at
        self.written(start, found)

    async def expect_all(self) -> None:
        step = 1 << 18
        for start in range(0, len(self.model), step):
            await self.expect(start, min(step, len(self.model) - start))

    async def fill(self) -> None:
        """Noise in the first half, in pieces; something in the second."""
        half = len(self.model) // 2
        for start in range(0, half, 100_000):
            await self.write(start, self.chance.randbytes(min(100_000, half - start)))
        await self.write(half + 70_001, b"lonely")


# -- the checks -------------------------------------------------------------------------------------------------


async def keeps_what_is_written(rig: Rig) -> None:
    """Any range, aligned or not, with FUA or not, also after a flush; then everything."""
    for _ in range(30):
        start, length = rig.piece()
        await rig.write(start, rig.chance.randbytes(length), rig.chance.choice((Flag.NONE, Flag.FUA)))
        await rig.expect(*rig.piece())
        if rig.chance.random() < 0.2:
            await rig.edge.flush()
    await rig.expect_all()


async def does_nothing_for_no_bytes(rig: Rig) -> None:
    """Length 0 is fine anywhere up to the end, and changes nothing; block status of nothing is an error."""
    await rig.fill()
    for start in (0, 1, SECTOR, len(rig.model)):
        assert await rig.edge.read(start, 0) == b""
        await rig.edge.write(start, b"", Flag.FUA)
        await rig.edge.write_zeroes(start, 0, Flag.MAY_UNMAP)
        await rig.edge.discard(start, 0)
        await call(rig.edge, Op.CACHE, start, 0)
        assert await error_of(call(rig.edge, Op.BLOCK_STATUS, start, 0)) == errno.EINVAL
    await rig.expect_all()


async def ends_at_its_end(rig: Rig) -> None:
    """The last byte is there, the next is not, and what reaches over the end is refused whole."""
    await rig.fill()
    end = rig.node.length
    if not rig.subject.is_torn:
        await rig.write(end - 3, b"end")
    await rig.expect(end - 3, 3)
    for start, length in ((end - 1, 2), (end, 1), (end + SECTOR, SECTOR), (1 << 62, 1), ((1 << 63) - 1, 1)):
        buffer = memoryview(bytearray(b"x" * length))
        for op in (Op.READ, Op.WRITE, Op.WRITE_ZEROES, Op.DISCARD, Op.BLOCK_STATUS, Op.CACHE):
            lent = buffer if op in (Op.READ, Op.WRITE) else None
            assert await error_of(call(rig.edge, op, start, length, lent)) == errno.EIO, (op, start, length)
    await rig.expect_all()
    assert rig.node.length == end


async def zeroes(rig: Rig) -> None:
    """With every set of flags: zero inside, untouched outside; NO_FALLBACK may refuse having done a part."""
    for flags in (a | b | c for a in (0, Flag.FUA) for b in (0, Flag.MAY_UNMAP) for c in (0, Flag.NO_FALLBACK)):
        await rig.fill()
        for start, length in (*(rig.piece() for _ in range(4)), (0, 65536), (65536 - 1, 2)):
            error = await error_of(rig.edge.write_zeroes(start, length, flags))
            if error:
                assert error == errno.ENOTSUP, errno.errorcode[error]
                assert flags & Flag.NO_FALLBACK
                await rig.adopt(start, length)
            else:
                rig.written(start, bytes(length))
            await rig.expect(max(0, start - 5000), min(length + 10_000, len(rig.model) - max(0, start - 5000)))
    await rig.expect_all()


async def discards(rig: Rig) -> None:
    """What was discarded is as it was or zero, byte for byte, and stays so; its neighbours do not change."""
    await rig.fill()
    for start, length in (*(rig.piece() for _ in range(8)), (0, len(rig.model)), (1, 3), (4096, 65536)):
        await rig.edge.discard(start, length)
        await rig.adopt(start, length)
        await rig.expect_all()
        await rig.write(start, rig.chance.randbytes(min(length, 9000)))


async def tells_what_is_where(rig: Rig) -> None:
    """The extents of any range tile it from its start on, and what they call zero reads as zeroes."""
    await rig.fill()
    await rig.edge.write_zeroes(200_000, 100_000, Flag.MAY_UNMAP)
    rig.written(200_000, bytes(100_000))
    for most in (1, 2, 1000):
        for start, length in (*(rig.piece() for _ in range(5)), (0, rig.node.length), (rig.node.length - 1, 1)):
            at = start
            while at < start + length:
                extents = await rig.edge.block_status(at, start + length - at, most)
                assert 1 <= len(extents) <= most
                for extent in extents:
                    assert extent.length > 0
                    if extent.state & BlockState.ZERO:
                        await rig.expect(at, extent.length)
                        assert not any(rig.model[at : at + extent.length])
                    at += extent.length
            assert at == start + length, "extents reach further than was asked"


async def caches(rig: Rig) -> None:
    """CACHE brings nothing to harm."""
    await rig.fill()
    for start, length in (*(rig.piece() for _ in range(5)), (0, len(rig.model))):
        assert await error_of(call(rig.edge, Op.CACHE, start, length)) in (0, errno.ENOTSUP)
    await rig.expect_all()


async def answers_each_request_of_a_batch(rig: Rig) -> None:
    """Exactly once, bad ones among them, in whatever order."""
    await rig.fill()
    cells = 64
    cell = len(rig.model) // cells
    wake = trio.Event()
    replies = ReplyQueue(lambda: wake.set())
    batch = []
    wanted: dict[int, int] = {}
    for number in range(cells):
        start = number * cell + rig.chance.randrange(3)
        length = rig.chance.randrange(1, cell - 3)
        op = rig.chance.choice((Op.READ, Op.WRITE, Op.WRITE_ZEROES, Op.FLUSH, Op.BLOCK_STATUS))
        data = bytearray(rig.chance.randbytes(length) if op == Op.WRITE else length)
        wanted[number] = 0
        if number % 9 == 4 and op != Op.FLUSH:
            start += rig.node.length
            wanted[number] = errno.EIO
        elif op in (Op.WRITE, Op.WRITE_ZEROES):
            rig.written(start, bytes(data))
        buffer = memoryview(data) if op in (Op.READ, Op.WRITE) else None
        size = 0 if op == Op.FLUSH else length
        batch.append(Request(op, 0 if op == Op.FLUSH else start, size, buffer, replies, 0, (number, op, start)))
    rig.edge.submit(batch)
    ended: list[Request] = []
    while len(ended) < cells:
        if not replies.ready:
            wake = trio.Event()
            replies.armed = True
            await wake.wait()
        done, replies.ready = replies.ready, []
        ended += done
    assert {request.tag[0]: request.error for request in ended} == wanted
    assert len(ended) == cells
    for request in ended:
        number, op, start = request.tag
        if op == Op.READ and not wanted[number]:
            assert request.buffer is not None
            assert bytes(request.buffer) == rig.model[start : start + len(request.buffer)]
    await rig.expect_all()


async def is_resized(rig: Rig) -> None:
    """Grown it ends in zeroes, also where it was cut off before; or it says that it cannot."""
    await rig.fill()
    whole = rig.whole
    size = rig.node.length
    if rig.subject.is_torn:
        return  # it gets longer by what is missing of the last sector
    if not rig.subject.resizes or not all(node.driver.can_truncate for node in rig.chain):
        try:
            await whole.run("block_resize", node_name="top", size=size + (1 << 20))
        except QmpError as error:
            assert error.desc in (  # noqa: PT017  # one of them
                "Image format driver does not support resize",
                "Cannot resize fixed-size raw disks",
                "Cannot grow device files",
            )
        else:
            raise AssertionError("it was resized")
        assert rig.node.length == size
        await rig.expect_all()
        return
    for new in (size + (1 << 20), size + 512, size - 200 * 512, size + 65536, size):
        await whole.run("block_resize", node_name="top", size=new)
        assert rig.node.length == rig.edge.length == new
        del rig.model[new:]
        added = new - len(rig.model)
        if added > 0 and rig.subject.begins is None:
            rig.model.extend(await rig.edge.read(len(rig.model), added))
        else:
            rig.model.extend(bytes(max(0, added)))
        await rig.expect_all()
        await rig.write(new - 5, b"tail!")


async def goes_on_while_it_is_drained_and_reopened(rig: Rig) -> None:
    """Nothing is lost, doubled or mixed up while writers write and the graph changes."""
    await rig.fill()
    parts = 6
    share = len(rig.model) // parts
    running = True

    async def work(number: int) -> None:
        while running:
            await trio.lowlevel.checkpoint()  # a driver that answers on the spot never waits
            start, length = rig.piece(number * share, (number + 1) * share)
            if rig.chance.random() < 0.3:
                await rig.edge.write_zeroes(start, length, Flag.MAY_UNMAP)
                rig.written(start, bytes(length))
            else:
                await rig.write(start, rig.chance.randbytes(length))
            await rig.expect(*rig.piece(number * share, (number + 1) * share))

    async with trio.open_nursery() as nursery:
        for number in range(parts):
            nursery.start_soon(work, number)
        for round_ in range(6):
            more = rig.subject.reopens[round_ % len(rig.subject.reopens)]
            await rig.whole.run("blockdev-reopen", options=[{**rig.options[-1], **more}])
            await rig.node.hold()
            assert rig.node.in_flight == 0
            rig.node.release()
            await rig.edge.flush()
        running = False
    await rig.expect_all()


async def refuses_writes_when_it_may_not(rig: Rig) -> None:
    """An inactive node is not written."""
    await rig.fill()
    await rig.edge.flush()
    await rig.whole.run("blockdev-set-active", node_name="top", active=False)
    for op in (Op.WRITE, Op.WRITE_ZEROES, Op.DISCARD, Op.FLUSH):
        buffer = memoryview(bytearray(b"x" * SECTOR)) if op == Op.WRITE else None
        length = 0 if op == Op.FLUSH else SECTOR
        assert await error_of(call(rig.edge, op, 0, length, buffer)) == errno.EPERM, op
    await rig.whole.run("blockdev-set-active", node_name="top", active=True)
    await rig.expect_all()
    await rig.write(0, b"again")
    await rig.expect_all()


async def hands_errors_up(rig: Rig) -> None:
    """What the lowest nodes cannot do is that error above, and the node goes on when they can again."""
    await rig.fill()
    await rig.edge.flush()
    for failing in (Op.READ, Op.WRITE, Op.FLUSH):
        for node in rig.below:
            fail(node, failing)
        start, data = 8192, rig.chance.randbytes(4096)
        if failing == Op.READ:
            got = await error_of(rig.edge.read(start, 4096))
        elif failing == Op.WRITE:
            got = await error_of(rig.edge.write(start, data))
        else:
            await rig.write(start, data)
            got = await error_of(rig.edge.flush())
        if rig.below:
            assert got == errno.EIO, (failing, got)
        for node in rig.below:
            heal(node)
        await rig.write(start, data)
        await rig.edge.flush()
        await rig.expect_all()


async def survives_callers_that_go_away(rig: Rig) -> None:
    """A cancelled caller's request ends on its own; others are not touched."""
    await rig.fill()
    for _ in range(20):
        start, length = rig.piece()
        with trio.CancelScope() as scope:
            scope.cancel()
            await rig.edge.write(start, bytes(rig.model[start : start + length]))
    await rig.node.quiesce()
    await rig.expect_all()


async def is_the_same_when_opened_again(rig: Rig) -> None:
    """Closed (by deletion) and opened anew, it holds what it held."""
    await rig.fill()
    await rig.edge.write_zeroes(100_000, 200_000, Flag.MAY_UNMAP)
    rig.written(100_000, bytes(200_000))
    await rig.edge.detach()
    for options in reversed(rig.options):
        await rig.whole.run("blockdev-del", node_name=options["node-name"])
    assert rig.whole.daemon.services.graph.nodes == []
    await open_nodes(rig.whole, rig.options)
    rig.edge = await use(rig.whole)
    await rig.expect_all()


CHECKS: tuple[Callable[[Rig], Awaitable[None]], ...] = (
    keeps_what_is_written,
    does_nothing_for_no_bytes,
    ends_at_its_end,
    zeroes,
    discards,
    tells_what_is_where,
    caches,
    answers_each_request_of_a_batch,
    is_resized,
    goes_on_while_it_is_drained_and_reopened,
    refuses_writes_when_it_may_not,
    hands_errors_up,
    survives_callers_that_go_away,
    is_the_same_when_opened_again,
)


# -- the rig ----------------------------------------------------------------------------------------------------


async def error_of(operation: Awaitable[Any]) -> int:
    """The errno an operation ends with, 0 when it succeeds."""
    try:
        await operation
    except OSError as error:
        return error.errno or -1
    return 0


def fail(node: Node, op: Op) -> None:
    """Let requests of one kind fail at the node's driver."""
    inner = node.driver.submit

    def submit(batch: list[Request]) -> None:
        good = []
        for request in batch:
            if request.op == op:
                request.complete(errno.EIO)
            else:
                good.append(request)
        inner(good)

    submit.inner = inner  # type: ignore[attr-defined]
    node.driver.submit = submit  # type: ignore[method-assign]


def heal(node: Node) -> None:
    """End ``fail``."""
    node.driver.submit = node.driver.submit.inner  # type: ignore[method-assign, attr-defined]


async def open_nodes(whole: Whole, options: list[Options]) -> None:
    for one in options:
        await whole.run("blockdev-add", **one)


async def use(whole: Whole, name: str = "top") -> RootEdge:
    perm = Perm.CONSISTENT_READ | Perm.WRITE
    return await whole.daemon.services.graph.attach(name, RootOptions(perm, Perm.ALL, allow_inactive=True))


async def check_block_driver(subject: Subject, place: Path) -> None:
    """Run all checks in one daemon, each with the files as they were when the first began."""
    async with whole_daemon(place) as whole:
        if subject.prepare is not None:
            await subject.prepare(whole)
        # (A link leads to a device, which is not taken away.)
        files = {path: path.read_bytes() for path in place.iterdir()}
        spotted = 0
        for check in CHECKS:
            for path, content in files.items():
                path.write_bytes(content)
            try:
                async with _rig_of(subject, whole) as rig:
                    with trio.fail_after(60):
                        await check(rig)
                    spotted += rig.spotted
            except BaseException as error:
                error.add_note(f"check: {check.__name__}")
                raise
        assert spotted or not subject.is_spotted


@asynccontextmanager
async def _rig_of(subject: Subject, whole: Whole) -> AsyncIterator[Rig]:
    """The subject's nodes; afterwards they are deleted, and no descriptor is left of them."""
    before = len(os.listdir("/proc/self/fd"))
    options = subject.nodes(whole.place)
    await open_nodes(whole, options)
    edge = await use(whole)
    assert edge.limits.request_alignment == subject.alignment
    assert (edge.spot() is not None) == subject.is_spotted
    length = edge.length
    model = bytearray(await edge.read(0, length) if subject.begins is None else subject.begins(length))
    rig = Rig(subject, whole, edge, options, model)
    await rig.expect_all()
    yield rig
    await rig.edge.detach()
    for one in reversed(options):
        await whole.run("blockdev-del", node_name=one["node-name"])
    assert whole.daemon.services.graph.nodes == []
    assert len(os.listdir("/proc/self/fd")) == before
