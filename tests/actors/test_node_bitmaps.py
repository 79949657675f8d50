"""Dirty bitmaps of nodes: what is marked and when, and actions that are undone when a later one fails."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from graph_fakes import DiskOptions, RawOptions, World, running_graph, state_of
from watching import Turns

from qsd.actors import bitmaps
from qsd.actors.bitmaps import AddBitmap, BitmapAction, ClearBitmap, MergeBitmaps, RemoveBitmap, SwitchBitmap
from qsd.actors.edges import RootEdge, RootOptions
from qsd.actors.graph import Graph
from qsd.actors.node import Node
from qsd.block.bitmap_blocks import BLOCK
from qsd.block.permissions import Perm
from qsd.errors import QmpError
from qsd.messages import Op, ReplyQueue, Request

WRITER = RootOptions(Perm.CONSISTENT_READ | Perm.WRITE)
SIZE = 1 << 20
G = 512

Bench = tuple[Graph, World]


@attrs.define(eq=False, kw_only=True)
class Abort(BitmapAction):
    """Fails, so that all before it are undone."""

    must_drain = False
    node_name: str = ""
    name: str = ""

    async def prepare(self) -> None:
        raise QmpError("aborted")


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """Disk ``f``, raw ``r`` upon it."""
    async with running_graph() as (graph, world):
        world.contents["a"] = bytearray(SIZE)
        await graph.add(DiskOptions(node_name="f"))
        await graph.add(RawOptions(node_name="r", file="f"))
        yield graph, world


async def do(graph: Graph, *kinds: tuple[Any, dict[str, Any]]) -> None:
    await graph.transact([kind(topology=graph.topology, **arguments) for kind, arguments in kinds])


async def add(graph: Graph, name: str, node: str = "f", **more: Any) -> None:
    await do(graph, (AddBitmap, {"node_name": node, "name": name, "granularity": G} | more))


def dirty(graph: Graph, name: str, node: str = "f") -> list[tuple[int, int]]:
    return list(graph.find(node).bitmaps.find(name).bits.dirty_areas())


def send(target: RootEdge | Node, *requests: tuple[Op, int, int]) -> ReplyQueue:
    queue = ReplyQueue(lambda: None)
    batch = []
    for op, offset, length in requests:
        buffer = memoryview(bytearray(length)) if op in (Op.READ, Op.WRITE) else None
        batch.append(Request(op.value, offset, length, buffer, queue))
    target.submit(batch)
    return queue


async def test_every_layer_marks_its_own(bench: Bench) -> None:
    graph, _world = bench
    await do(graph, (AddBitmap, {"node_name": "r", "name": "m"}), (AddBitmap, {"node_name": "f", "name": "m"}))
    edge = await graph.attach("r", WRITER)
    send(edge, (Op.WRITE, 70000, 10), (Op.READ, 0, 512), (Op.WRITE, 200_000, 100_000))
    expected = [(65536, 65536), (196608, 131072)]
    assert dirty(graph, "m", "r") == dirty(graph, "m") == expected
    await edge.detach()


async def test_batch_of_plain_writes_stays_on_the_fast_path(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, _world = bench
    await add(graph, "one")
    await add(graph, "two", granularity=4096)
    await add(graph, "off", is_disabled=True)
    edge = await graph.attach("f", WRITER)
    monkeypatch.setattr(Node, "_sort", lambda *_: pytest.fail("the careful pass"))
    send(edge, (Op.WRITE, 5000, 10), (Op.READ, 8192, 512), (Op.WRITE, 6144, 512))
    assert dirty(graph, "one") == [(4608, 512), (6144, 512)]
    assert dirty(graph, "two") == [(4096, 4096)]
    assert dirty(graph, "off") == []
    monkeypatch.undo()
    await edge.detach()


@pytest.mark.parametrize(
    ("op", "offset", "length", "marked"),
    [
        (Op.WRITE_ZEROES, 1000, 100, [(512, 1024)]),
        (Op.WRITE, 1000, 0, []),
        (Op.WRITE, SIZE - 10, 20, []),  # refused
        (Op.DISCARD, 1000, 100, []),  # ignored by the node
        (Op.FLUSH, 0, 0, []),
        (Op.CACHE, 0, 4096, []),
    ],
)
async def test_only_what_changes_the_disk_is_marked(
    bench: Bench, op: Op, offset: int, length: int, marked: list[tuple[int, int]]
) -> None:
    graph, _world = bench
    await add(graph, "m")
    edge = await graph.attach("f", WRITER)
    queue = send(edge, (op, offset, length))
    assert len(queue.ready) == 1
    assert dirty(graph, "m") == marked
    await edge.detach()


async def test_write_without_permission_is_not_marked(bench: Bench) -> None:
    graph, _world = bench
    await add(graph, "m")
    assert send(graph.find("f"), (Op.WRITE, 0, 512)).ready[0].error
    assert dirty(graph, "m") == []


async def test_unaligned_write_marks_whole_blocks(bench: Bench) -> None:
    graph, _world = bench
    node = graph.find("f")
    node.driver.limits.request_alignment = 4096
    node.refresh()
    await add(graph, "m")
    edge = await graph.attach("f", WRITER)
    queue = send(edge, (Op.WRITE, 8292, 1))
    await node.hold()
    node.release()
    assert not queue.ready[0].error
    assert dirty(graph, "m") == [(8192, 4096)]
    await edge.detach()


async def test_bitmaps_follow_the_length_of_their_node(bench: Bench) -> None:
    graph, _world = bench
    await add(graph, "m")
    await add(graph, "m", node="r")
    edge = await graph.attach("r", WRITER)
    send(edge, (Op.WRITE, 0, SIZE))
    await edge.detach()
    await graph.resize("r", 1536)
    assert dirty(graph, "m") == dirty(graph, "m", "r") == [(0, 1536)]
    await graph.resize("r", SIZE)
    assert dirty(graph, "m") == dirty(graph, "m", "r") == [(0, 1536)]
    assert graph.find("r").bitmaps.find("m").bits.size == SIZE


@pytest.mark.parametrize("kind", [ClearBitmap, SwitchBitmap, AddBitmap])
async def test_what_is_under_way_ends_first(bench: Bench, kind: Any, autojump_clock: Any) -> None:
    """A write that was taken before belongs to the time before, one that comes meanwhile to the time after."""
    graph, _world = bench
    await add(graph, "m", is_disabled=kind is SwitchBitmap)
    edge = await graph.attach("f", WRITER)
    driver: Any = graph.find("f").driver
    driver.holding = True
    send(edge, (Op.WRITE, 0, 512))
    more: dict[str, Any] = {"enabled": True} if kind is SwitchBitmap else {}
    name = "new" if kind is AddBitmap else "m"
    if kind is AddBitmap:
        more["granularity"] = G
    async with trio.open_nursery() as nursery:
        nursery.start_soon(do, graph, (kind, {"node_name": "f", "name": name} | more))
        await trio.testing.wait_all_tasks_blocked()
        driver.holding = False
        send(edge, (Op.WRITE, 1024, 512))
        driver.let_go()
    assert dirty(graph, name) == [(1024, 512)]
    await edge.detach()


async def test_aborted_actions_leave_everything_as_it_was(bench: Bench) -> None:
    graph, world = bench
    edge = await graph.attach("f", WRITER)
    await add(graph, "a")
    send(edge, (Op.WRITE, 0, 512))
    await add(graph, "b", is_disabled=True)
    await add(graph, "c", granularity=4096)
    send(edge, (Op.WRITE, 8192, 512))
    before = state_of(graph, world)
    with pytest.raises(QmpError, match="aborted"):
        await do(
            graph,
            (AddBitmap, {"node_name": "f", "name": "new"}),
            (AddBitmap, {"node_name": "r", "name": "new"}),
            (MergeBitmaps, {"node_name": "f", "name": "b", "sources": [("f", "a"), ("f", "c")]}),
            (SwitchBitmap, {"node_name": "f", "name": "b", "enabled": True}),
            (ClearBitmap, {"node_name": "f", "name": "a"}),
            (SwitchBitmap, {"node_name": "f", "name": "a", "enabled": False}),
            (RemoveBitmap, {"node_name": "f", "name": "c"}),
            (Abort, {}),
        )
    assert state_of(graph, world) == before
    send(edge, (Op.WRITE, 16384, 512))
    assert dirty(graph, "a") == [(0, 512), (8192, 512), (16384, 512)]
    assert dirty(graph, "b") == []
    assert dirty(graph, "c") == [(8192, 4096), (16384, 4096)]
    await edge.detach()


async def test_actions_see_what_came_before_them(bench: Bench) -> None:
    graph, _world = bench
    edge = await graph.attach("f", WRITER)
    await add(graph, "a")
    send(edge, (Op.WRITE, 0, 512))
    await do(
        graph,
        (AddBitmap, {"node_name": "r", "name": "copy", "granularity": 4096, "is_disabled": True}),
        (MergeBitmaps, {"node_name": "r", "name": "copy", "sources": [("f", "a")]}),
        (ClearBitmap, {"node_name": "f", "name": "a"}),
        (AddBitmap, {"node_name": "f", "name": "short"}),
        (RemoveBitmap, {"node_name": "f", "name": "short"}),
    )
    assert dirty(graph, "copy", "r") == [(0, 4096)]
    assert dirty(graph, "a") == []
    assert graph.find("f").bitmaps.get("short") is None
    await edge.detach()


async def test_removed_bitmap_is_busy_until_it_is_gone(bench: Bench) -> None:
    graph, _world = bench
    await add(graph, "a")
    remove = (RemoveBitmap, {"node_name": "f", "name": "a"})
    for again, text in [
        (remove, "currently in use"),
        ((SwitchBitmap, {"node_name": "f", "name": "a", "enabled": False}), "currently in use"),
        ((AddBitmap, {"node_name": "f", "name": "a"}), "Bitmap already exists: a"),
    ]:
        with pytest.raises(QmpError, match=text):
            await do(graph, remove, again)
    bitmap = graph.find("f").bitmaps.find("a")
    assert (bitmap.is_busy, bitmap.is_recording) == (False, True)


async def test_merge_of_several_is_all_or_nothing(bench: Bench) -> None:
    graph, _world = bench
    edge = await graph.attach("f", WRITER)
    await add(graph, "a")
    await add(graph, "b", is_disabled=True)
    send(edge, (Op.WRITE, 0, 512))
    await graph.add(DiskOptions(node_name="other", filename="b"))
    await add(graph, "c", node="other")
    with pytest.raises(QmpError, match="Bitmaps are of different sizes"):
        await do(graph, (MergeBitmaps, {"node_name": "f", "name": "b", "sources": [("f", "a"), ("other", "c")]}))
    assert dirty(graph, "b") == []
    await edge.detach()


async def test_large_merge_lets_others_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, world = bench
    monkeypatch.setattr(bitmaps, "STEPS", 1)
    world.contents["large"] = bytearray(100 * BLOCK * 8 * G)
    await graph.add(DiskOptions(node_name="large", filename="large"))
    for name in ("target", "clean", "dirty"):
        await add(graph, name, node="large")
    bits = graph.find("large").bitmaps.find("dirty").bits
    bits.load(0, b"\x55" * bits.data_length)
    turns = Turns()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.run)
        seen = []
        for source in ("clean", "dirty"):
            turns.count = 0
            merge = {"node_name": "large", "name": "target", "sources": [("large", source)]}
            await do(graph, (MergeBitmaps, merge))
            seen.append(turns.count)
        nursery.cancel_scope.cancel()
    assert seen[1] >= seen[0] + 90
    assert graph.find("large").bitmaps.find("target").bits.digest() == bits.digest()
