"""Every operation of the graph with a fault at each of its steps: all is undone, and it can be done again.

A step is a call of a driver that waits (``World.pass_point``). A fault is an error of any kind there, or the end of
the daemon beginning there.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from fake_bitmap_store import Stored
from graph_fakes import DiskOptions, Format, FormatOptions, RawOptions, World, check_plan, running_graph, state_of

from qsd.actors.bitmaps import AddBitmap
from qsd.actors.edges import RootOptions
from qsd.actors.graph import Graph
from qsd.actors.snapshots import InternalSnapshotAction, SnapshotAction
from qsd.block.bitmap import DirtyBitmap
from qsd.block.permissions import Perm
from qsd.errors import ActorStopped, QmpError
from qsd.qapi.core import NULL

READER = RootOptions(Perm.CONSISTENT_READ)
WRITER = RootOptions(Perm.CONSISTENT_READ | Perm.WRITE)
SIZE = 1 << 16
Operation = Callable[[Graph], Awaitable[Any]]

ERRORS: dict[str, Callable[[], Exception]] = {
    "QmpError": lambda: QmpError("it fails"),
    "OSError": lambda: OSError(errno.EIO, "it fails"),
    "MemoryError": MemoryError,
}


def disk(name: str | None = None, filename: str = "a", **more: Any) -> DiskOptions:
    return DiskOptions(node_name=name, filename=filename, **more)


def form(name: str, file: Any, backing: Any = NULL, **more: Any) -> FormatOptions:
    return FormatOptions(node_name=name, file=file, backing=backing, **more)


async def _nothing(_graph: Graph) -> None:
    return


async def _one(graph: Graph, **more: Any) -> None:
    await graph.add(form("q", disk("f"), **more))


async def _used(graph: Graph) -> None:
    await _one(graph)
    await graph.attach("q", WRITER)


async def _inactive(graph: Graph) -> None:
    await _one(graph)
    await graph.set_active("q", active=False)


async def _overlay(graph: Graph) -> None:
    await _used(graph)
    await graph.add(form("o", disk("g", "b")))


async def _two_files(graph: Graph) -> None:
    await graph.add(RawOptions(node_name="r", file=disk("f")))
    await graph.add(disk("g", "b"))
    await graph.attach("r", WRITER)


async def _snapshot(graph: Graph) -> None:
    await _one(graph)
    await graph.transact([InternalSnapshotAction(tools=graph.tools, device="q", name="s")])


async def _chain(graph: Graph) -> None:
    await graph.add(form("q", disk("f"), disk("base", "b")))


def _snapshots(graph: Graph) -> Awaitable[None]:
    tools = graph.tools
    add = AddBitmap(topology=graph.topology, node_name="q", name="new", granularity=512)
    return graph.transact(
        [
            add,
            InternalSnapshotAction(tools=tools, device="q", name="s"),
            SnapshotAction(tools=tools, node_name="q", overlay_name="o"),
        ]
    )


# What there is before, and what is done.
OPERATIONS: dict[str, tuple[Operation, Operation]] = {
    "add": (_nothing, _one),
    "add with a backing file": (_nothing, _chain),
    "delete": (_one, lambda graph: graph.delete("q")),
    "attach": (_one, lambda graph: graph.attach("q", WRITER)),
    "attach what is to be opened": (_nothing, lambda graph: graph.attach_ref(form("q", disk("f")), WRITER)),
    "attach and activate": (_inactive, lambda graph: graph.attach("q", WRITER)),
    "detach": (_used, lambda graph: graph.roots[0].detach()),
    "ask for less": (_used, lambda graph: graph.roots[0].set_permissions(Perm.CONSISTENT_READ, Perm.ALL)),
    "move": (_two_files, lambda graph: graph.move(graph.roots[0], "g")),
    "inactivate": (_one, lambda graph: graph.set_active("q", active=False)),
    "inactivate all": (_one, lambda graph: graph.set_active(None, active=False)),
    "activate": (_inactive, lambda graph: graph.set_active("q", active=True)),
    "reopen": (_one, lambda graph: graph.reopen((form("q", disk()),))),
    "reopen read-only": (_one, lambda graph: graph.reopen((form("q", "f", read_only=True),))),
    "exchange the file": (_two_files, lambda graph: graph.reopen((RawOptions(node_name="r", file="g"),))),
    "give up the backing file": (_chain, lambda graph: graph.reopen((form("q", "f"),))),
    "resize": (_two_files, lambda graph: graph.resize("r", 512)),
    "snapshots": (_overlay, _snapshots),
    "delete a snapshot": (_snapshot, lambda graph: graph.delete_snapshot("q", None, "s")),
    "name a backing file": (_chain, lambda graph: graph.change_backing_file("q", "q", "other")),
}
# Steps of letting go, which must not fail. Whoever lets go of something does not get it back.
_FINAL = {"close"}
_FINAL_OPERATIONS = {"detach", "delete"}


@attrs.define(eq=False)
class Faulty(World):
    """Lets the step ``number`` from now on meet ``fault``."""

    number: int = -1
    fault: Callable[[], None] | None = None
    steps: list[str] = attrs.field(factory=list)

    async def pass_point(self, what: str, name: str) -> None:
        await super().pass_point(what, name)
        if self.fault is not None:
            self.steps.append(what)
            if len(self.steps) == self.number + 1:
                self.fault()


def _raise(make: Callable[[], Exception]) -> None:
    raise make()


@asynccontextmanager
async def prepared(name: str) -> AsyncIterator[tuple[Graph, Faulty]]:
    async with running_graph(Faulty()) as (graph, world):
        assert isinstance(world, Faulty)
        for filename in "ab":
            world.contents[filename] = bytearray(SIZE)
        world.bitmaps["q"] = {"kept": Stored(DirtyBitmap(SIZE, 512), is_auto=True)}
        await OPERATIONS[name][0](graph)
        yield graph, world


def in_images(world: World) -> Any:
    return (
        {name: [one.is_in_use for one in image.values()] for name, image in world.bitmaps.items()},
        {name: [one.name for one in found] for name, found in world.snapshots.items() if found},
        dict(world.backing_names),
    )


async def steps_of(name: str) -> list[str]:
    async with prepared(name) as (graph, world):
        world.fault = lambda: None
        await OPERATIONS[name][1](graph)
        steps = list(world.steps)
        world.fault = None
    return steps


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("kind", ERRORS)
async def test_an_error_anywhere_undoes_the_operation(
    name: str, kind: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = await steps_of(name)
    for number, step in enumerate(steps):
        if step in _FINAL or name in _FINAL_OPERATIONS:
            continue
        if (step, kind) == ("stored", "QmpError"):
            continue  # that says that nothing was stored
        async with prepared(name) as (graph, world):
            before = state_of(graph, world), in_images(world)
            world.number, world.fault = number, partial(_raise, ERRORS[kind])
            where = f"{name}: {kind} in step {number} of {steps}"
            with trio.fail_after(5):
                try:
                    await OPERATIONS[name][1](graph)
                except (QmpError, OSError, MemoryError):
                    assert (state_of(graph, world), in_images(world)) == before, where
                    world.fault = None
                    await OPERATIONS[name][1](graph)
            world.fault = None
            assert not any(node.is_held for node in graph.nodes), where
            check_plan(graph)
    capsys.readouterr()
    caplog.clear()


@pytest.mark.parametrize("kind", ERRORS)
async def test_an_error_while_it_closes_keeps_no_node(
    kind: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """The descriptor stayed open, with its locks, when something else failed before it was to be closed."""
    steps = await steps_of("delete")
    for number, step in enumerate(steps):
        if step in _FINAL:
            continue
        async with prepared("delete") as (graph, world):
            world.number, world.fault = number, partial(_raise, ERRORS[kind])
            with trio.fail_after(5):
                await graph.delete("q")
            world.fault = None
            assert not world.open, step
            assert not graph.topology.living
            await _one(graph)
    capsys.readouterr()
    caplog.clear()


@pytest.mark.parametrize("kind", ERRORS)
async def test_who_could_not_be_attached_is_not_there_although_inactivating_fails_too(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_driver: Any) -> None:
        raise QmpError("it cannot be inactivated")

    async with prepared("attach and activate") as (graph, world):
        with monkeypatch.context() as patch:
            patch.setattr(Format, "inactivate", fail)
            world.number, world.fault = 2, partial(_raise, ERRORS[kind])
            with pytest.raises((QmpError, MemoryError)):
                await graph.attach("q", WRITER)
        assert world.steps[2] == "load"
        world.fault = None
        assert not graph.roots
        assert not any(node.is_held for node in graph.nodes)
        await graph.delete("q")


@pytest.mark.parametrize("name", OPERATIONS)
async def test_the_daemon_ends_in_the_middle_of_an_operation(
    name: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = await steps_of(name)
    for number in range(len(steps)):
        # ``running_graph`` looks at what is left.
        async with prepared(name) as (graph, world), trio.open_nursery() as nursery:
            world.number = number
            world.fault = lambda: nursery.start_soon(graph._supervisor.close)
            with trio.fail_after(5):
                with suppress(QmpError, ActorStopped):
                    await OPERATIONS[name][1](graph)
            world.fault = None
        assert all(one.is_in_use is False for one in world.bitmaps["q"].values()), f"{name}: {steps[: number + 1]}"
    capsys.readouterr()
