"""Two operations of the graph at once: the second begins at every step of the first.

Whatever comes of them, both are answered, no node stays held, permissions are what planning anew gives, what is
closed is closed (``running_graph``), and the graph goes on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import pytest
import trio
from fake_bitmap_store import Stored
from graph_fakes import DiskOptions, FormatOptions, RawOptions, World, check_plan, running_graph

from qsd.actors.bitmaps import AddBitmap, ClearBitmap, RemoveBitmap
from qsd.actors.edges import RootEdge, RootOptions
from qsd.actors.graph import Graph
from qsd.actors.snapshots import AbortAction, InternalSnapshotAction, SnapshotAction
from qsd.block.bitmap import DirtyBitmap
from qsd.block.permissions import Perm
from qsd.errors import QmpError
from qsd.qapi.core import NULL

READER = RootOptions(Perm.CONSISTENT_READ)
WRITER = RootOptions(Perm.CONSISTENT_READ | Perm.WRITE)
MOVABLE = RootOptions(Perm.CONSISTENT_READ | Perm.WRITE, allow_inactive=True)
RESIZER = RootOptions(Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE)
SIZE = 1 << 16
Operation = Callable[[Graph], Awaitable[Any]]


def disk(name: str | None, filename: str, **more: Any) -> DiskOptions:
    return DiskOptions(node_name=name, filename=filename, **more)


def form(name: str, file: Any, backing: Any = NULL, **more: Any) -> FormatOptions:
    return FormatOptions(node_name=name, file=file, backing=backing, **more)


def user(graph: Graph, name: str) -> RootEdge:
    found = [edge for edge in graph.roots if edge.name == name]
    if not found:
        raise QmpError("it has gone")
    return found[0]


def bitmap(kind: Any, name: str, **more: Any) -> Operation:
    return lambda graph: graph.transact(
        [kind(topology=graph.topology, node_name="q", name=name, **more)],
    )


def actions(*make: Callable[[Any], Any]) -> Operation:
    return lambda graph: graph.transact([each(graph.tools) for each in make])


def _overlay(tools: Any) -> Any:
    return SnapshotAction(tools=tools, node_name="q", overlay_name="o")


def _internal(tools: Any) -> Any:
    return InternalSnapshotAction(tools=tools, device="q", name="s")


async def _use_for_a_moment(graph: Graph) -> None:
    edge = await graph.attach("q", WRITER)
    await edge.write(512, b"for a moment")
    await edge.detach()


async def _write(graph: Graph) -> None:
    edge = user(graph, "on q")
    if not edge.node.active:
        raise QmpError("it is somebody else's")
    try:
        await edge.write(1024, b"written")
    except OSError as error:
        raise QmpError(str(error)) from None


OPERATIONS: dict[str, Operation] = {
    "add": lambda graph: graph.add(RawOptions(node_name="new", file="r")),
    "add above": lambda graph: graph.add(form("new", "d", "o")),
    "delete": lambda graph: graph.delete("o"),
    "delete what is used": lambda graph: graph.delete("r"),
    "delete a file": lambda graph: graph.delete("d"),
    "use": _use_for_a_moment,
    "write": _write,
    "detach": lambda graph: user(graph, "on q").detach(),
    "detach the other": lambda graph: user(graph, "on r").detach(),
    "ask for less": lambda graph: user(graph, "on q").set_permissions(Perm.CONSISTENT_READ, Perm.ALL),
    "move": lambda graph: graph.move(user(graph, "on r"), "d"),
    "inactivate": lambda graph: graph.set_active("q", active=False),
    "inactivate all": lambda graph: graph.set_active(None, active=False),
    "activate all": lambda graph: graph.set_active(None, active=True),
    "reopen": lambda graph: graph.reopen((form("q", disk("f", "f")),)),
    "reopen read-only": lambda graph: graph.reopen((form("o", "g", read_only=True),)),
    "reopen another file": lambda graph: graph.reopen((RawOptions(node_name="r", file="d"),)),
    "resize": lambda graph: graph.resize("r", 512),
    "grow": lambda graph: user(graph, "on r").truncate(2 * SIZE),
    "snapshot": actions(_overlay),
    "snapshots": actions(_internal, _overlay),
    "failing snapshots": actions(_internal, _overlay, lambda _tools: AbortAction()),
    "internal snapshot": actions(_internal),
    "delete a snapshot": lambda graph: graph.delete_snapshot("q", None, "kept"),
    "add a bitmap": bitmap(AddBitmap, "new", granularity=512, is_persistent=True),
    "remove a bitmap": bitmap(RemoveBitmap, "kept"),
    "clear a bitmap": bitmap(ClearBitmap, "kept"),
}


# Who lets go of a node has nothing under way there.
_NEVER = {"grow", "detach the other"}


@attrs.define(eq=False)
class Meeting(World):
    """Calls ``meet`` at the step ``number`` from when it was set."""

    number: int = -1
    steps: int = 0
    meet: Callable[[], None] | None = None

    async def pass_point(self, what: str, name: str) -> None:
        if self.meet is not None:
            if self.steps == self.number:
                self.meet()
            self.steps += 1
        await super().pass_point(what, name)


async def prepare(graph: Graph, world: World) -> None:
    for filename in "dfgh":
        world.contents[filename] = bytearray(SIZE)
    world.bitmaps["q"] = {"kept": Stored(DirtyBitmap(SIZE, 512), is_auto=True)}
    await graph.add(form("q", disk("f", "f")))
    await graph.transact([InternalSnapshotAction(tools=graph.tools, device="q", name="kept")])
    await graph.add(disk("g", "g"))
    await graph.add(form("o", "g"))
    await graph.add(disk("h", "h"))
    await graph.add(RawOptions(node_name="r", file="h"))
    await graph.add(disk("d", "d"))
    await graph.attach("q", attrs.evolve(MOVABLE, name="on q"))
    await graph.attach("r", attrs.evolve(RESIZER, name="on r"))


async def meet(first: str, second: str, number: int) -> int:
    """Let ``second`` begin at a step of ``first``; how many steps there were."""
    async with running_graph(Meeting()) as (graph, world):
        assert isinstance(world, Meeting)
        await prepare(graph, world)
        answers: dict[str, str] = {}

        async def do(name: str) -> None:
            try:
                await OPERATIONS[name](graph)
            except QmpError as error:
                answers[name] = error.desc
            else:
                answers[name] = ""

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                world.number = number
                world.meet = lambda: nursery.start_soon(do, second)
                await do(first)
                steps = world.steps
                world.meet = None
        assert not any(node.is_held for node in graph.topology.living.values()), answers
        assert not any(node.info.pins for node in graph.topology.living.values()), answers
        assert set(graph.topology._taken) == {node.name for node in graph.topology.living.values()}
        check_plan(graph)
        for name, node in graph.topology.nodes.items():
            state = (name, node.info.state.value, answers)
            assert state[1] == "open", state
            for child in node.driver.children.values():
                assert child.node in graph.topology.living.values(), state
                assert child.node.active or not node.active, state
        with trio.fail_after(5):
            for edge in graph.roots:
                await edge.detach()
            for node in list(graph.topology.nodes.values()):
                if node.info.is_monitor_owned and not node.info.parents:
                    await graph.delete(node.name)
    return steps


@pytest.mark.parametrize("first", OPERATIONS)
async def test_meeting(first: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    for second in OPERATIONS:
        if {first, second} == _NEVER:
            continue
        number = 0
        while number <= await meet(first, second, number):
            number += 1
    assert "crashed" not in caplog.text
    caplog.clear()
    capsys.readouterr()
