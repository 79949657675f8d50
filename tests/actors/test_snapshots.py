"""Snapshots and transactions on fakes: who uses what afterwards, what happens to requests, all or nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing
from graph_fakes import DiskOptions, FormatOptions, RawOptions, World, check_plan, running_graph, state_of
from watching import note_calls

from qsd.actors import depth, topology
from qsd.actors.bitmaps import AddBitmap, ClearBitmap, MergeBitmaps, RemoveBitmap, SwitchBitmap
from qsd.actors.edges import RootEdge, RootOptions
from qsd.actors.graph import Graph
from qsd.actors.graph_actions import GraphAction
from qsd.actors.node import Node
from qsd.actors.snapshots import AbortAction, InternalSnapshotAction, SnapshotAction, SnapshotSyncAction
from qsd.block.permissions import Perm
from qsd.errors import QmpError
from qsd.messages import Op, ReplyQueue, Request
from qsd.qapi.core import NULL

READ = RootOptions(Perm.CONSISTENT_READ)
WRITE = RootOptions(Perm.CONSISTENT_READ | Perm.WRITE)

Bench = tuple[Graph, World]


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with running_graph() as both:
        yield both


def format_on(name: str, backing: Any = None, **more: Any) -> FormatOptions:
    """A format on a disk of its own, both with names."""
    file = DiskOptions(node_name=f"{name}-file", filename=name)
    return FormatOptions(node_name=name, file=file, backing=backing, **more)


async def add(graph: Graph, *names: str, **more: Any) -> None:
    for name in names:
        await graph.add(format_on(name, **more))


def snapshot(graph: Graph, node: str, overlay: str) -> GraphAction:
    return SnapshotAction(tools=graph.tools, node_name=node, overlay_name=overlay)


def sync(graph: Graph, node: str | None, overlay: str | None, **more: Any) -> SnapshotSyncAction:
    async def make(_node: Node, _name: str) -> Node:
        assert overlay is not None
        return await graph.tools.opener.open(format_on(overlay, NULL, **more))

    return SnapshotSyncAction(tools=graph.tools, device=None, node_name=node, overlay_name=overlay, make=make)


def internal(graph: Graph, node: str, name: str) -> GraphAction:
    return InternalSnapshotAction(tools=graph.tools, device=node, name=name)


async def refused(bench: Bench, *actions: GraphAction) -> str:
    graph, world = bench
    before = state_of(graph, world)
    contents = {name: bytes(data) for name, data in world.contents.items()}
    with pytest.raises(QmpError) as caught:
        await graph.transact(actions)
    assert state_of(graph, world) == before
    assert {name: bytes(world.contents[name]) for name in contents} == contents
    return caught.value.desc


def backing_of(graph: Graph, name: str) -> str | None:
    child = graph.find(name).driver.children.get("backing")
    return None if child is None else child.node_name


# -- overlays ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deleted", [False, True])
async def test_amending_ends_where_it_began(bench: Bench, deleted: bool) -> None:
    """The edge leads to the overlay by then: the node below kept the image for itself for ever."""
    graph, _world = bench
    await add(graph, "a", "b")
    below, overlay = graph.find("a"), graph.find("b")
    edge = await graph.attach("a", RootOptions(Perm.CONSISTENT_READ, needs_active=True, amends=True))
    await graph.transact([snapshot(graph, "a", "b")])
    assert edge.node is overlay
    assert (below.driver.amending, overlay.driver.amending) == (1, 0)
    if deleted:
        await graph.reopen((format_on("b", NULL),))
        await graph.delete("a")
    await edge.detach()
    assert (below.driver.amending, overlay.driver.amending) == (0, 0)
    check_plan(graph)


async def test_users_move_to_the_overlay(bench: Bench) -> None:
    graph, world = bench
    await add(graph, "base", "over")
    swapped: list[str] = []
    options = RootOptions(WRITE.perm, on_swap=lambda: swapped.append(edge.node_name))
    edge = await graph.attach("base", options)
    reader = await graph.attach("base", READ)
    await edge.write(0, b"before")
    await graph.transact([snapshot(graph, "base", "over")])
    assert (edge.node_name, reader.node_name, swapped) == ("over", "over", ["over"])
    assert backing_of(graph, "over") == "base"
    await edge.write(0, b"after!")
    assert (world.contents["base"][:6], world.contents["over"][:6]) == (b"before", b"after!")
    base = graph.find("base")
    assert base.mode.read_only
    assert graph.find("base-file").mode.read_only
    assert not base.writable
    assert graph.find("over").writable
    for each in (edge, reader):
        await each.detach()


async def test_nodes_above_move_too(bench: Bench) -> None:
    graph, world = bench
    await add(graph, "base", "over")
    await graph.add(RawOptions(node_name="raw", file="base"))
    edge = await graph.attach("raw", WRITE)
    await graph.transact([snapshot(graph, "base", "over")])
    await edge.write(0, b"after!")
    assert graph.find("raw").driver.children["file"].node_name == "over"
    assert (world.contents["base"][:6], world.contents["over"][:6]) == (bytes(6), b"after!")
    await edge.detach()


async def test_file_of_its_own_option_stays_as_it_says(bench: Bench) -> None:
    graph, _world = bench
    file = DiskOptions(node_name="file", filename="base", read_only=False)
    await graph.add(FormatOptions(node_name="base", file=file))
    await add(graph, "over")
    await graph.transact([snapshot(graph, "base", "over")])
    assert graph.find("base").mode.read_only
    assert not graph.find("file").mode.read_only


async def test_node_that_cannot_become_read_only_is_a_backing_file_all_the_same(bench: Bench) -> None:
    graph, world = bench
    await add(graph, "base", "over")
    world.fail.add(("reopen", "base"))
    await graph.transact([snapshot(graph, "base", "over")])
    assert backing_of(graph, "over") == "base"
    assert not graph.find("base").mode.read_only
    world.fail.clear()


async def test_texts(bench: Bench) -> None:
    graph, _world = bench
    await add(graph, "a", "b", "c")
    await add(graph, "ro", read_only=True)
    await add(graph, "child")
    await add(graph, "one", "two", backing="child")
    await graph.add(RawOptions(node_name="raw", file=DiskOptions(filename="r")))
    edge = await graph.attach("a", WRITE)
    for node, overlay, text in [
        ("zz", "b", "Cannot find device='zz' nor node-name='zz'"),
        ("a", "zz", "Cannot find device='zz' nor node-name='zz'"),
        ("child", "zz", "Node 'child' is busy: node is used as backing hd of 'two'"),
        ("a", "a", "The overlay is already in use"),
        ("a", "a-file", "The overlay is already in use"),
        ("b", "a", "The overlay is already in use"),
        ("b", "b", "Making 'b' a backing child of 'b' would create a cycle"),
        ("a", "raw", "The overlay does not support backing images"),
        ("a", "one", "The overlay already has a backing image"),
        ("a", "ro", "Block node is read-only"),
    ]:
        assert await refused(bench, snapshot(graph, node, overlay)) == text
    for action, text in [
        (sync(graph, None, "x"), "Cannot find device='' nor node-name=''"),
        (sync(graph, "zz", "x"), "Cannot find device='' nor node-name='zz'"),
        (sync(graph, "child", None), "Node 'child' is busy: node is used as backing hd of 'two'"),
        (sync(graph, "a", None), "New overlay node-name missing"),
        (sync(graph, "a", "b"), "New overlay node-name already in use"),
    ]:
        assert await refused(bench, action) == text
    await edge.detach()


async def test_overlay_made_for_it_lives_with_its_users(bench: Bench) -> None:
    graph, _world = bench
    await add(graph, "base")
    edge = await graph.attach("base", WRITE)
    await graph.transact([sync(graph, "base", "over")])
    assert edge.node_name == "over"
    assert not graph.find("over").info.is_monitor_owned
    await edge.detach()
    with pytest.raises(QmpError):
        graph.find("over")
    assert graph.find("base").mode.read_only


async def test_overlay_made_for_nobody_closes_at_once(bench: Bench) -> None:
    graph, world = bench
    await add(graph, "base")
    await graph.transact([sync(graph, "base", "over")])
    assert [node.name for node in graph.nodes] == ["base-file", "base"]
    assert "close over" in world.log
    assert graph.find("base").mode.read_only


# -- requests -----------------------------------------------------------------------------------------------------


class Client:
    """Writes numbered blocks over an edge without waiting, as an export does."""

    def __init__(self, edge: RootEdge) -> None:
        self.edge = edge
        self.replies = ReplyQueue(lambda: None)
        self.sent = 0

    def write(self) -> Request:
        return self.write_at(8 * self.sent, bytes([self.sent + 1] * 8))

    def write_at(self, offset: int, data: bytes) -> Request:
        request = Request(Op.WRITE.value, offset, len(data), memoryview(bytearray(data)), self.replies)
        self.sent += 1
        self.edge.submit([request])
        return request

    @property
    def errors(self) -> list[int]:
        return [request.error for request in self.replies.ready]


async def test_what_was_sent_before_is_in_the_node_and_what_comes_after_in_the_overlay(bench: Bench) -> None:
    graph, world = bench
    await add(graph, "base", "over")
    client = Client(await graph.attach("base", WRITE))
    disk: Any = graph.find("base-file").driver
    disk.holding = True
    client.write()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(graph.transact, [snapshot(graph, "base", "over")])
        await trio.testing.wait_all_tasks_blocked()
        # The snapshot waits for the first; these two wait for the snapshot.
        client.write()
        client.write()
        assert client.errors == []
        disk.let_go()
    client.write()
    await trio.testing.wait_all_tasks_blocked()
    assert client.errors == [0, 0, 0, 0]
    assert world.contents["base"][:32] == bytes([1] * 8 + [0] * 24)
    assert world.contents["over"][:32] == bytes([0] * 8 + [2] * 8 + [3] * 8 + [4] * 8)
    await client.edge.detach()


async def test_requests_go_on_after_a_failed_snapshot(bench: Bench) -> None:
    graph, world = bench
    await add(graph, "base", "over")
    client = Client(await graph.attach("base", WRITE))
    # The overlay is the last to be asked, with its writer; by then the edge leads to it.
    reached, go = world.gate("permissions", "over")
    world.fail.add(("permissions", "over"))
    async with trio.open_nursery() as nursery:

        async def attempt() -> None:
            with pytest.raises(QmpError):
                await graph.transact([snapshot(graph, "base", "over")])

        nursery.start_soon(attempt)
        await reached.wait()
        client.write()
        assert client.errors == []
        go.set()
    assert client.errors == [0]
    assert client.edge.node_name == "base"
    assert world.contents["base"][:8] == bytes([1] * 8)
    await client.edge.detach()


class _Failing(GraphAction):
    """Fails as late as an action can."""

    async def prepare(self) -> None:
        raise QmpError("too late")


# -- transactions -------------------------------------------------------------------------------------------------


async def test_nothing_to_do(bench: Bench) -> None:
    await bench[0].transact([])


async def test_each_action_sees_those_before(bench: Bench) -> None:
    graph, _world = bench
    await add(graph, "a", "b", "o1", "o2")
    edges = [await graph.attach(name, WRITE) for name in ("a", "b")]
    await graph.transact([sync(graph, "a", "t1"), sync(graph, "t1", "t2"), internal(graph, "t2", "s")])
    await graph.transact([snapshot(graph, "b", "o1"), snapshot(graph, "o1", "o2")])
    assert [edge.node_name for edge in edges] == ["t2", "o2"]
    assert [backing_of(graph, name) for name in ("t2", "t1", "o2", "o1")] == ["t1", "a", "o1", "b"]
    assert [graph.find(name).mode.read_only for name in ("t2", "t1", "a", "o2", "o1")] == [
        *(False, True, True, False, True)
    ]
    assert [snapshot.name for snapshot in graph.find("t2").driver.snapshots()] == ["s"]
    for edge in edges:
        await edge.detach()


async def test_refusals_that_come_from_earlier_actions(bench: Bench) -> None:
    graph, _world = bench
    await add(graph, "a", "b", "o")
    for actions, text in [
        ([sync(graph, "a", "t1"), sync(graph, "a", "t2")], "Node 'a' is busy: node is used as backing hd of 't1'"),
        ([sync(graph, "a", "t"), sync(graph, "b", "t")], "New overlay node-name already in use"),
        ([snapshot(graph, "a", "o"), snapshot(graph, "b", "o")], "The overlay already has a backing image"),
        ([sync(graph, "a", "t"), internal(graph, "a", "s")], "Need a root block node"),
        (
            [internal(graph, "a", "s"), internal(graph, "a", "s")],
            "Snapshot with name 's' already exists on device 'a'",
        ),
    ]:
        assert await refused(bench, *actions) == text


async def test_backing_file_is_neither_resized_nor_deleted(bench: Bench) -> None:
    graph, _world = bench
    await add(graph, "a", "over")
    await graph.transact([snapshot(graph, "a", "over")])
    await add(graph, "other", backing="a")
    # The newest is named.
    for refused_at in (graph.resize("a", 1 << 20), graph.delete("a")):
        with pytest.raises(QmpError, match=r"^Node 'a' is busy: node is used as backing hd of 'other'$"):
            await refused_at


async def test_no_overlay_is_made_after_an_action_on_bitmaps_that_cannot_be_done(bench: Bench) -> None:
    graph, _world = bench
    await add(graph, "a")
    one = {"topology": graph.topology, "node_name": "a-file", "name": "b"}
    unknown = "Dirty bitmap 'b' not found"
    cannot: list[tuple[Any, dict[str, Any], str]] = [
        (ClearBitmap, {}, unknown),
        (RemoveBitmap, {}, unknown),
        (SwitchBitmap, {"enabled": True}, unknown),
        (MergeBitmaps, {"sources": []}, unknown),
        (AddBitmap, {"granularity": 3}, "Granularity must be power of 2 and at least 512"),
    ]
    for kind, more, text in cannot:
        overlay = sync(graph, "a", "t")
        made: list[Node] = []

        async def make(node: Node, _name: str, made: list[Node] = made) -> Node:
            made.append(node)
            raise QmpError("made")

        overlay.make = make
        assert await refused(bench, kind(**one, **more), overlay) == text
        assert made == []


async def test_bitmaps_that_earlier_actions_add_are_there_for_later_ones(bench: Bench) -> None:
    graph, _world = bench
    await add(graph, "a")
    one = {"topology": graph.topology, "node_name": "a-file", "name": "b"}
    edge = await graph.attach("a", WRITE)
    adding = [AddBitmap(**one), AddBitmap(**{**one, "name": "c"})]
    merge = MergeBitmaps(**one, sources=[("a-file", "c")])
    await graph.transact([*adding, ClearBitmap(**one), merge, sync(graph, "a", "t")])
    assert edge.node_name == "t"
    assert [bitmap.name for bitmap in graph.find("a-file").bitmaps] == ["b", "c"]
    await edge.detach()


@pytest.mark.parametrize("last", [AbortAction(), _Failing()], ids=["abort", "fails late"])
async def test_all_or_nothing(bench: Bench, last: GraphAction) -> None:
    graph, world = bench
    await add(graph, "a", "b", "c", "over")
    edges = [await graph.attach(name, WRITE) for name in "abc"]
    text = await refused(
        bench, sync(graph, "a", "t"), internal(graph, "b", "s"), snapshot(graph, "c", "over"), last
    )
    assert text in ("Transaction aborted using Abort action", "too late")
    assert [edge.node_name for edge in edges] == ["a", "b", "c"]
    assert world.snapshots.get("b", []) == []
    assert "t" not in world.open
    for edge in edges:
        await edge.write(0, b"still goes")
        await edge.detach()


@pytest.mark.parametrize("where", ["t", "base"])
async def test_permissions_refused_by_a_driver_undo_all(bench: Bench, where: str) -> None:
    graph, world = bench
    await add(graph, "base")
    edge = await graph.attach("base", WRITE)

    class Saboteur(GraphAction):
        async def prepare(self) -> None:
            world.fail.add(("permissions", where))

        def abort(self) -> None:
            world.fail.clear()

    try:
        text = await refused(bench, sync(graph, "base", "t"), Saboteur())
        assert text == f"permissions of {where} fails"
    finally:
        world.fail.clear()
    await edge.write(0, b"still goes")
    await edge.detach()


# -- internal snapshots -------------------------------------------------------------------------------------------


async def test_internal_snapshot_while_requests_come(bench: Bench) -> None:
    graph, world = bench
    await add(graph, "a")
    client = Client(await graph.attach("a", WRITE))
    reached, go = world.gate("create", "a")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(graph.transact, [internal(graph, "a", "s")])
        await reached.wait()
        client.write()
        assert client.errors == []
        go.set()
    await trio.testing.wait_all_tasks_blocked()
    assert client.errors == [0]
    assert [snapshot.name for snapshot in graph.find("a").driver.snapshots()] == ["s"]
    await client.edge.detach()


async def test_internal_snapshot_texts(bench: Bench) -> None:
    graph, world = bench
    await add(graph, "a", "child")
    await add(graph, "ro", read_only=True)
    await graph.add(DiskOptions(node_name="disk", filename="d"))
    await graph.add(RawOptions(node_name="raw", file="child"))
    await graph.transact([internal(graph, "a", "s")])
    world.fail.add(("create", "a"))
    for node, name, text in [
        ("zz", "s", "Cannot find device='zz' nor node-name='zz'"),
        ("child", "s", "Need a root block node"),
        ("ro", "", "Device 'ro' is read only"),
        ("disk", "", "Block format 'disk' used by device 'disk' does not support internal snapshots"),
        ("a", "", "Name is empty"),
        ("a", "s", "Snapshot with name 's' already exists on device 'a'"),
    ]:
        assert await refused(bench, internal(graph, node, name)) == text
    with pytest.raises(QmpError) as caught:
        await graph.transact([internal(graph, "a", "t")])
    assert caught.value.desc == "Failed to create snapshot 't' on device 'a': No space left on device"


async def test_deleting_internal_snapshots(bench: Bench) -> None:
    graph, _world = bench
    await add(graph, "a", "child")
    await graph.add(DiskOptions(node_name="disk", filename="d"))
    await graph.add(RawOptions(node_name="raw", file="child"))
    for name in ("s", "t", "u"):
        await graph.transact([internal(graph, "a", name)])
    for device, number, name, text in [
        ("zz", "1", None, "Cannot find device='zz' nor node-name='zz'"),
        ("child", "1", None, "Need a root block node"),
        ("disk", None, None, "Name or id must be provided"),
        ("disk", "1", None, "Failed to get a snapshot list: Operation not supported"),
        ("a", None, "q", "Snapshot with id 'null' and name 'q' does not exist on device 'a'"),
        ("a", "9", None, "Snapshot with id '9' and name 'null' does not exist on device 'a'"),
        ("a", "1", "t", "Snapshot with id '1' and name 't' does not exist on device 'a'"),
        ("a", "", None, "Snapshot with id '' and name 'null' does not exist on device 'a'"),
    ]:
        with pytest.raises(QmpError) as caught:
            await graph.delete_snapshot(device, number, name)
        assert caught.value.desc == text
    assert (await graph.delete_snapshot("a", "2", "t")).name == "t"
    assert (await graph.delete_snapshot("a", None, "u")).id == "3"
    assert [snapshot.name for snapshot in graph.find("a").driver.snapshots()] == ["s"]


# -- the name of the backing file ---------------------------------------------------------------------------------


async def test_changing_the_backing_file(bench: Bench) -> None:
    graph, world = bench
    await add(graph, "base", "other")
    await add(graph, "mid", backing="base", read_only=True)
    await add(graph, "top", backing="mid")
    await add(graph, "side", backing="other")
    await graph.add(RawOptions(node_name="raw", file="top"))
    for device, image, text in [
        ("zz", "zz", "Cannot find device='zz' nor node-name='zz'"),
        ("top", "zz", "Need a root block node"),
        ("raw", "zz", "Cannot find device='' nor node-name='zz'"),
        ("raw", "base", "not allowing backing file change on an image without a backing file"),
        ("side", "mid", "'side' and image file are not in the same chain"),
    ]:
        with pytest.raises(QmpError) as caught:
            await graph.change_backing_file(device, image, "x")
        assert caught.value.desc == text
    await graph.delete("raw")
    before = state_of(graph, world)
    await graph.change_backing_file("top", "top", "x")
    await graph.change_backing_file("top", "mid", "")
    assert world.backing_names == {"top": ("x", "format"), "mid": ("", "format")}
    assert state_of(graph, world) == before
    world.fail.add(("rename", "mid"))
    with pytest.raises(QmpError) as caught:
        await graph.change_backing_file("top", "mid", "y")
    assert caught.value.desc == "Could not change backing file to 'y': No space left on device"
    assert graph.find("mid").mode.read_only


async def test_snapshots_of_a_long_chain_look_at_few_nodes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every node of a chain was looked at ten times for each snapshot: 500 of them took half a minute."""
    graph, _world = bench
    await add(graph, "n0", *(f"n{number}" for number in range(1, 20)))
    edge = await graph.attach("n0", WRITE)
    looked = [note_calls(monkeypatch, topology, "facts_of"), note_calls(monkeypatch, depth, "info_of")]
    costs = []
    for number in range(1, 40):
        for each in looked:
            each.clear()
        make = snapshot if number < 20 else sync
        await graph.transact([make(graph, f"n{number - 1}", f"n{number}")])
        costs.append([len(each) for each in looked])
    assert costs[18] == costs[4]
    assert costs[38] == costs[23]
    check_plan(graph)
    await edge.detach()


async def test_cycles_are_seen_wherever_they_would_be(bench: Bench) -> None:
    """A filter nobody uses is no user of the overlay, and may be what is to get it."""
    graph, _world = bench
    await add(graph, "over")
    for name, below in (("a", "over"), ("b", "a"), ("c", "b")):
        await graph.add(RawOptions(node_name=name, file=below))
    for node in "abc":
        text = f"Making '{node}' a backing child of 'over' would create a cycle"
        assert await refused(bench, snapshot(graph, node, "over")) == text
