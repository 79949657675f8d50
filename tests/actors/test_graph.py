"""The graph actor: nodes come and go whole, used nodes stay, and what fails leaves no trace."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from graph_fakes import DiskOptions, FormatOptions, RawOptions, World, running_graph, state_of

from qsd.actors.edges import NodeState, RootOptions, info_of
from qsd.actors.graph import Graph
from qsd.actors.node import Node
from qsd.actors.supervisor import Floor
from qsd.block.graph import UNNAMED
from qsd.block.permissions import Perm
from qsd.drivers.base import Mode
from qsd.errors import QmpError
from qsd.messages import Op, ReplyQueue, Request
from qsd.qapi.schema.block import BlockdevCacheOptions, BlockdevDetectZeroesOptions

READ = RootOptions(Perm.CONSISTENT_READ)
WRITE = RootOptions(Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL & ~Perm.RESIZE)


@pytest.fixture
async def bench() -> AsyncIterator[tuple[Graph, World]]:
    async with running_graph() as both:
        yield both


Bench = tuple[Graph, World]


async def refused(bench: Bench, function: Any, *args: Any, **kwargs: Any) -> str:
    """The error text of an operation, after checking that it left everything as it was."""
    before = state_of(*bench)
    with pytest.raises(QmpError) as caught:
        await function(*args, **kwargs)
    assert state_of(*bench) == before
    return caught.value.desc


def disk(name: str | None = None, **more: Any) -> DiskOptions:
    return DiskOptions(node_name=name, **more)


def raw(name: str | None, file: Any, **more: Any) -> RawOptions:
    return RawOptions(node_name=name, file=file, **more)


def names(graph: Graph) -> list[str]:
    return [node.name for node in graph.nodes]


# -- adding ---------------------------------------------------------------------------------------------------


async def test_add_with_inline_child_makes_both(bench: Bench) -> None:
    graph, world = bench
    await graph.add(raw("r", disk()))
    child, parent = graph.nodes
    assert child.name.startswith("#block0")
    assert len(child.name) == len("#block000")
    assert parent.name == "r"
    assert parent.length == 4096
    assert await parent.read(0, 4) == b"\0\0\0\0"
    assert world.open == {"r", child.name}


async def test_add_needs_a_name(bench: Bench) -> None:
    text = await refused(bench, bench[0].add, disk())
    assert text == "'node-name' must be specified for the root node"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (disk(""), "Invalid node-name: ''"),
        (disk("1x"), "Invalid node-name: '1x'"),
        (disk("é"), "Invalid node-name: 'é'"),
        (disk("x" * 32), "Node name too long"),
        (disk("f"), "Duplicate nodes with node-name='f'"),
        (raw("r", "nope"), "Cannot find device='nope' nor node-name='nope'"),
        (raw("r", "r"), "Cannot find device='r' nor node-name='r'"),
        # The child comes first, so its trouble is told first.
        (raw("1", "nope"), "Cannot find device='nope' nor node-name='nope'"),
        (raw("r", disk("r")), "Duplicate nodes with node-name='r'"),
        (raw("r", raw("s", disk("f"))), "Duplicate nodes with node-name='f'"),
        (disk("x", force_share=True), "force-share=on can only be used with read-only images"),
        (
            disk("x", detect_zeroes=BlockdevDetectZeroesOptions.UNMAP),
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        ),
    ],
)
async def test_add_of_bad_options_is_refused(bench: Bench, options: Any, text: str) -> None:
    await bench[0].add(disk("f"))
    assert await refused(bench, bench[0].add, options) == text


@pytest.mark.parametrize("where", ["leaf", "mid", "top"])
async def test_add_that_fails_to_open_leaves_nothing(bench: Bench, where: str) -> None:
    graph, world = bench
    world.fail.add(("open", where))
    text = await refused(bench, graph.add, raw("top", raw("mid", disk("leaf"))))
    assert text == f"open of {where} fails"
    world.fail.clear()
    await graph.add(raw("top", raw("mid", disk("leaf"))))
    assert names(graph) == ["leaf", "mid", "top"]


async def test_add_whose_permissions_clash_leaves_nothing(bench: Bench) -> None:
    graph, _world = bench
    await graph.add(disk("f"))
    await graph.add(FormatOptions(node_name="one", file="f"))
    text = await refused(bench, graph.add, FormatOptions(node_name="two", file="f"))
    assert text == (
        "Permission conflict on node 'f': permissions 'write, resize' are both required by node 'one' "
        "(uses node 'f' as 'file' child) and unshared by node 'two' (uses node 'f' as 'file' child)."
    )


async def test_add_locked_out_by_another_open_leaves_nothing(bench: Bench) -> None:
    graph, _world = bench
    await graph.add(FormatOptions(node_name="one", file=disk("f")))
    text = await refused(bench, graph.add, FormatOptions(node_name="two", file=disk("g")))
    assert text == 'Failed to get "write, resize" lock'


async def test_add_writing_format_over_read_only_file_is_refused(bench: Bench) -> None:
    await bench[0].add(disk("f", read_only=True))
    text = await refused(bench, bench[0].add, FormatOptions(node_name="q", file="f"))
    assert text == "Block node is read-only"


async def test_inline_children_inherit(bench: Bench) -> None:
    graph, _world = bench
    cache = BlockdevCacheOptions(direct=True, no_flush=True)
    await graph.add(raw("r", disk("f"), read_only=True, force_share=True, cache=cache))
    assert graph.find("f").mode == Mode(
        read_only=True, force_share=True, discard_unmap=True, cache_direct=True, cache_no_flush=True
    )
    await graph.add(raw("s", disk("g", read_only=False, cache=BlockdevCacheOptions(direct=False)), cache=cache))
    assert graph.find("g").mode == Mode(discard_unmap=True, cache_no_flush=True)


async def test_backing_file_an_image_names_belongs_to_it(bench: Bench) -> None:
    graph, world = bench
    world.named_backing["top"] = DiskOptions(filename="base")
    await graph.add(FormatOptions(node_name="top", file=DiskOptions(node_name="f")))
    backing = info_of(graph.find("top")).children["backing"].node
    assert backing.mode.read_only
    assert info_of(backing).pins == 0
    assert info_of(backing).inline_parent is graph.find("top")
    await graph.delete("top")
    assert not graph.nodes


@pytest.mark.parametrize("where", ["base", "top"])
async def test_open_that_fails_closes_the_backing_file_the_image_names(bench: Bench, where: str) -> None:
    graph, world = bench
    world.named_backing["top"] = DiskOptions(node_name="base", filename="base")
    world.fail.add(("open", where))
    with pytest.raises(QmpError, match=f"open of {where} fails"):
        await graph.add(FormatOptions(node_name="top", file=DiskOptions(node_name="f")))
    assert not graph.nodes
    assert not world.open
    assert not world.locks


async def test_referenced_children_do_not_inherit(bench: Bench) -> None:
    graph, _world = bench
    await graph.add(disk("f"))
    await graph.add(raw("r", "f", read_only=True))
    assert graph.find("f").mode == Mode()


async def test_slow_open_holds_up_nobody_and_keeps_its_name(bench: Bench) -> None:
    graph, world = bench
    reached, go = world.gate("open", "slow")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(graph.add, disk("slow"))
        await reached.wait()
        await graph.add(raw("r", disk("f")))
        edge = await graph.attach("r", WRITE)
        await edge.detach()
        assert await refused(bench, graph.add, disk("slow")) == "Duplicate nodes with node-name='slow'"
        assert await refused(bench, graph.add, raw("x", "slow")) == (
            "Cannot find device='slow' nor node-name='slow'"
        )
        go.set()
    assert names(graph) == ["slow", "f", "r"]  # in the order in which they were begun


async def test_child_of_a_node_being_opened_cannot_be_deleted(bench: Bench) -> None:
    graph, world = bench
    await graph.add(disk("f"))
    reached, go = world.gate("open", "r")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(graph.add, raw("r", "f"))
        await reached.wait()
        assert await refused(bench, graph.delete, "f") == "Block device f is in use"
        go.set()
    assert names(graph) == ["f", "r"]


async def test_add_goes_on_when_its_asker_has_left(bench: Bench) -> None:
    graph, world = bench
    reached, go = world.gate("open", "f")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(graph.add, disk("f"))
        await reached.wait()
        nursery.cancel_scope.cancel()
    reached, _ = world.gate("open", "g")
    world.gates.clear()
    go.set()
    await graph.add(disk("g"))
    assert "f" in names(graph)


# -- deleting -------------------------------------------------------------------------------------------------


async def test_delete_takes_inline_children_along(bench: Bench) -> None:
    graph, world = bench
    await graph.add(raw("r", raw("m", disk("f"))))
    world.log.clear()
    await graph.delete("r")
    assert names(graph) == []
    assert world.log == ["close r", "close m", "close f"]
    await graph.add(disk("f"))


async def test_format_still_has_its_file_when_it_closes(bench: Bench) -> None:
    graph, world = bench
    await graph.add(FormatOptions(node_name="q", file=disk("f")))
    await graph.delete("q")
    assert world.contents["a"].startswith(b"closed clean")


async def test_inline_child_stays_while_somebody_refers_to_it(bench: Bench) -> None:
    graph, _world = bench
    await graph.add(raw("one", disk("f")))
    await graph.add(raw("two", "f"))
    edge = await graph.attach("f", READ)
    assert await refused(bench, graph.delete, "f") == "Node f is in use"
    await graph.delete("one")
    await graph.delete("two")
    assert names(graph) == ["f"]
    await edge.detach()
    assert names(graph) == []


async def test_delete_of_used_nodes_is_refused(bench: Bench) -> None:
    graph, _world = bench
    await graph.add(disk("f"))
    await graph.add(raw("r", "f"))
    await graph.add(raw("i", disk("in", filename="b")))
    await graph.add(FormatOptions(node_name="q", file=disk(filename="c"), backing="i"))
    assert await refused(bench, graph.delete, "f") == "Block device f is in use"
    assert await refused(bench, graph.delete, "in") == "Node in is not owned by the monitor"
    assert await refused(bench, graph.delete, "i") == "Node 'i' is busy: node is used as backing hd of 'q'"
    assert await refused(bench, graph.delete, "zz") == "Failed to find node with node-name='zz'"
    edge = await graph.attach("r", READ)
    assert await refused(bench, graph.delete, "r") == "Node r is in use"
    await edge.detach()
    await graph.delete("r")


async def test_delete_waits_for_what_is_in_flight(bench: Bench) -> None:
    graph, _world = bench
    await graph.add(disk("f"))
    driver: Any = graph.find("f").driver
    edge = await graph.attach("f", READ)
    driver.holding = True
    reply = ReplyQueue(lambda: None)
    edge.submit([Request(Op.READ, 0, 4, memoryview(bytearray(4)), reply)])
    gone = trio.Event()

    async def let_go_of_it() -> None:
        await edge.detach()
        await graph.delete("f")
        gone.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(let_go_of_it)
        await trio.testing.wait_all_tasks_blocked()
        assert not gone.is_set()
        assert not reply.ready
        driver.let_go()
    assert [request.error for request in reply.ready] == [0]
    assert names(graph) == []


# -- root edges -----------------------------------------------------------------------------------------------


async def test_attach_takes_and_detach_returns_permissions(bench: Bench) -> None:
    graph, world = bench
    await graph.add(raw("r", disk("f")))
    idle = dict(world.locks)
    assert all(lock == (Perm.NONE, Perm.ALL) for lock in idle.values())
    edge = await graph.attach("r", WRITE)
    assert list(world.locks.values()) == [(WRITE.perm, WRITE.shared)]
    await edge.write(512, b"hello")
    assert await edge.read(512, 5) == b"hello"
    await edge.set_permissions(Perm.CONSISTENT_READ, Perm.ALL)
    assert list(world.locks.values()) == [(Perm.CONSISTENT_READ, Perm.ALL)]
    with pytest.raises(PermissionError):
        await edge.write(512, b"hello")
    await edge.detach()
    await edge.detach()
    assert list(world.locks.values()) == [(Perm.NONE, Perm.ALL)]
    assert graph.roots == []


async def test_attach_refused_leaves_no_trace(bench: Bench) -> None:
    graph, _world = bench
    await graph.add(disk("f", read_only=True))
    await graph.add(raw("r", "f"))
    assert await refused(bench, graph.attach, "r", WRITE) == "Block node is read-only"
    assert await refused(bench, graph.attach, "zz", READ) == "Cannot find device='' nor node-name='zz'"
    edge = await graph.attach("r", READ)
    assert await refused(bench, edge.set_permissions, Perm.WRITE, Perm.ALL) == "Block node is read-only"
    other = await graph.attach("r", RootOptions(Perm.CONSISTENT_READ, Perm.ALL & ~Perm.RESIZE))
    assert await refused(bench, edge.set_permissions, Perm.RESIZE, Perm.ALL) == (
        f"Permission conflict on node 'r': permissions 'resize' are both required by {UNNAMED} "
        f"(uses node 'r' as 'root' child) and unshared by {UNNAMED} (uses node 'r' as 'root' child)."
    )
    await edge.detach()
    await other.detach()


async def test_attach_abandoned_by_its_asker_is_undone(bench: Bench) -> None:
    graph, world = bench
    await graph.add(disk("f"))
    reached, go = world.gate("permissions", "f")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(graph.attach, "f", READ)
        await reached.wait()
        nursery.cancel_scope.cancel()
    go.set()
    await graph.add(disk("g"))
    await trio.testing.wait_all_tasks_blocked()
    assert graph.roots == []
    await graph.delete("f")


async def test_move_takes_a_user_to_another_node(bench: Bench) -> None:
    graph, world = bench
    swapped: list[str] = []
    await graph.add(raw("one", disk("f")))
    await graph.add(disk("g", filename="b"))
    edge = await graph.attach("one", RootOptions(WRITE.perm, on_swap=lambda: swapped.append(edge.node.name)))
    await graph.move(edge, "g")
    assert swapped == ["g"]
    await edge.write(0, b"there")
    assert world.contents["b"].startswith(b"there")
    await graph.delete("one")
    await edge.detach()


async def test_removal_succeeds_even_when_a_driver_refuses_to_let_go(bench: Bench) -> None:
    graph, world = bench
    await graph.add(disk("f"))
    edge = await graph.attach("f", READ)
    world.fail.add(("permissions", "f"))
    await edge.detach()
    assert graph.roots == []
    world.fail.clear()


# -- length ---------------------------------------------------------------------------------------------------


async def test_resize_is_seen_by_everybody_above(bench: Bench) -> None:
    graph, _world = bench
    told: list[int] = []
    await graph.add(disk("f"))
    await graph.add(raw("r", "f"))
    await graph.add(raw("s", "r"))
    edge = await graph.attach("s", RootOptions(Perm.CONSISTENT_READ, on_resize=lambda: told.append(edge.length)))
    await graph.resize("r", 8192)
    assert told == [8192]
    assert [node.length for node in graph.nodes] == [8192] * 3
    await graph.resize("f", 1000)
    assert told == [8192, 1024]
    assert len(graph.roots) == 1


async def test_resize_texts(bench: Bench) -> None:
    graph, _world = bench
    await graph.add(disk("f"))
    await graph.add(raw("w", "f", size=512))
    await graph.add(disk("ro", filename="b", read_only=True))
    await graph.add(raw("over", "ro"))
    await graph.add(FormatOptions(node_name="q", file=disk(filename="c")))
    await graph.add(disk("off", filename="d", active=False))
    size = "Parameter 'size' expects a >0 size"
    window = (
        f"Permission conflict on node 'f': permissions 'resize' are both required by {UNNAMED} "
        "(uses node 'f' as 'root' child) and unshared by node 'w' (uses node 'f' as 'file' child)."
    )
    for args, text in [
        (("zz", -1), "Cannot find device='' nor node-name='zz'"),
        ((None, 1), "Cannot find device='' nor node-name=''"),
        ((None, 1, "f"), "Cannot find device='f' nor node-name=''"),
        (("f", -1), size),
        (("f", 1), window),
        (("w", 512), "Cannot resize fixed-size raw disks"),
        (("ro", 1), "Image is read-only"),
        (("over", 1), "Image is read-only"),
        (("q", 1), "Image format driver does not support resize"),
        (("off", 1), "Permission 'resize' unavailable on inactive node"),
        (("off", -1), size),
    ]:
        assert await refused(bench, graph.resize, *args) == text


# -- the life of the actor ------------------------------------------------------------------------------------


async def test_shutdown_closes_parents_first_and_stays_clean(bench: Bench) -> None:
    graph, world = bench
    await graph.add(disk("f"))
    await graph.add(FormatOptions(node_name="q", file="f"))
    await graph.add(raw("r", "q"))
    world.log.clear()
    await graph._supervisor.close_floor(Floor.GRAPH)
    assert world.log == ["close r", "close q", "close f"]
    assert world.contents["a"].startswith(b"closed clean")


async def test_shutdown_gives_up_an_open_that_hangs(bench: Bench) -> None:
    graph, world = bench
    reached, _go = world.gate("open", "f")
    ended: list[str] = []

    async def add() -> None:
        try:
            await graph.add(raw("r", disk("f")))
        except Exception as error:  # noqa: BLE001
            ended.append(type(error).__name__)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(add)
        await reached.wait()
        await graph._supervisor.close_floor(Floor.GRAPH)
    assert ended == ["ActorStopped"]
    assert graph._supervisor.actors(Floor.NODES) == []


async def test_crashed_node_answers_eio_and_can_be_deleted(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    graph, _world = bench
    await graph.add(raw("r", disk("f")))
    await graph.add(disk("g", filename="b"))
    node: Node = graph.find("f")
    edge = await graph.attach("r", WRITE)

    async def crash() -> None:
        raise RuntimeError("a bug")

    node.spawn(crash, name="crash")
    await node.stopped.wait()
    await trio.testing.wait_all_tasks_blocked()
    assert "f crashed" in caplog.text
    assert node.info.state is NodeState.BROKEN
    with pytest.raises(OSError, match="Input/output error"):
        await edge.read(0, 4)
    await edge.detach()
    assert await graph.find("g").read(0, 1) == b"\0"
    await graph.delete("r")
    assert names(graph) == ["g"]
