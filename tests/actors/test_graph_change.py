"""Reopening and activation: several nodes change together or not at all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing
from graph_fakes import DiskOptions, FormatOptions, RawOptions, World, check_plan, running_graph, state_of
from watching import note_calls

from qsd.actors import topology
from qsd.actors.change import Change
from qsd.actors.edges import RootOptions
from qsd.actors.graph import Graph
from qsd.block.permissions import Perm
from qsd.drivers.base import Mode
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


async def refused(bench: Bench, function: Any, *args: Any, **kwargs: Any) -> str:
    before = state_of(*bench)
    with pytest.raises(QmpError) as caught:
        await function(*args, **kwargs)
    assert state_of(*bench) == before
    return caught.value.desc


def disk(name: str | None = None, **more: Any) -> DiskOptions:
    return DiskOptions(node_name=name, **more)


def raw(name: str | None, file: Any, **more: Any) -> RawOptions:
    return RawOptions(node_name=name, file=file, **more)


def child_of(graph: Graph, name: str) -> str:
    return graph.find(name).driver.children["file"].node_name


# -- reopen ---------------------------------------------------------------------------------------------------


async def test_reopen_of_nothing_succeeds(bench: Bench) -> None:
    await bench[0].reopen(())


async def test_reopen_texts(bench: Bench) -> None:
    graph, _world = bench
    await graph.add(disk("f"))
    await graph.add(raw("r", "f"))
    await graph.add(raw("rr", "r"))
    await graph.add(raw("i", disk("in", filename="b")))
    await graph.add(raw("j", disk(filename="b")))
    await graph.add(disk("shared", filename="c", force_share=True, read_only=True))
    auto = child_of(graph, "j")
    for options, text in [
        (raw(None, "f"), "node-name not specified"),
        (raw("zz", "f"), "Failed to find node with node-name='zz'"),
        (disk("r"), "Cannot change the option 'driver'"),
        (disk("f", filename="b"), "Cannot change the option 'filename'"),
        (raw("r", "zz"), "Cannot find device='' nor node-name='zz'"),
        (raw("r", "r"), "Making 'r' a file child of 'r' would create a cycle"),
        (raw("r", "rr"), "Making 'rr' a file child of 'r' would create a cycle"),
        (raw("r", disk("f")), "Cannot change the option 'file.driver'"),
        (raw("i", disk("f")), "Cannot change the option 'node-name'"),
        (disk(auto, filename="b"), "Cannot change the option 'node-name'"),
        (disk("f", force_share=True, read_only=True), "Cannot change the option 'force-share'"),
        (disk("shared", filename="c", read_only=True), "Option 'force-share' cannot be reset to its default value"),
        (disk("f", active=False), "Cannot change the option 'active'"),
    ]:
        assert await refused(bench, graph.reopen, (options,)) == text


async def test_reopen_returns_what_is_left_out_to_its_default(bench: Bench) -> None:
    graph, _world = bench
    await graph.add(raw("r", disk("f"), read_only=True, offset=512))
    assert graph.find("r").length == 4096 - 512
    await graph.reopen((raw("r", "f"),))
    assert graph.find("r").mode == Mode()
    assert graph.find("r").length == 4096
    # Given by name this time: the inline child keeps what it inherited.
    assert graph.find("f").mode == Mode(read_only=True, discard_unmap=True)
    await graph.reopen((raw("r", disk()),))
    assert graph.find("f").mode == Mode(discard_unmap=True)


async def test_reopen_tells_those_above_about_a_new_length(bench: Bench) -> None:
    graph, _world = bench
    told: list[int] = []
    await graph.add(raw("r", disk("f")))
    await graph.add(raw("s", "r"))
    edge = await graph.attach("s", RootOptions(Perm.CONSISTENT_READ, on_resize=lambda: told.append(edge.length)))
    await graph.reopen((raw("r", "f", size=1024),))
    assert told == [1024]


async def test_reopen_exchanges_a_child_under_a_user(bench: Bench) -> None:
    graph, world = bench
    await graph.add(raw("r", disk("f")))
    await graph.add(disk("g", filename="b"))
    edge = await graph.attach("r", WRITE)
    await graph.reopen((raw("r", "g"),))
    assert [node.name for node in graph.nodes] == ["r", "g"], "the inline child had only this parent"
    await edge.write(0, b"new")
    assert world.contents["b"].startswith(b"new")
    assert not world.contents["a"].startswith(b"new")
    assert [lock[0] for lock in world.locks.values()] == [WRITE.perm]


async def test_reopen_turns_a_chain_around_in_one_call(bench: Bench) -> None:
    graph, _world = bench
    await graph.add(disk("f"))
    await graph.add(raw("low", "f"))
    await graph.add(raw("high", "low"))
    # In this order the second step would find the cycle still there.
    text = await refused(bench, graph.reopen, (raw("low", "high"), raw("high", "f")))
    assert text == "Making 'high' a file child of 'low' would create a cycle"
    await graph.reopen((raw("high", "f"), raw("low", "high")))
    assert (child_of(graph, "low"), child_of(graph, "high")) == ("high", "f")


async def test_reopen_of_one_node_twice_takes_what_is_said_last(bench: Bench) -> None:
    graph, _world = bench
    await graph.add(disk("f"))
    await graph.add(disk("g", filename="b"))
    await graph.add(raw("r", "f"))
    await graph.reopen((raw("r", "f", size=512), raw("r", "g")))
    assert child_of(graph, "r") == "g"
    assert graph.find("r").length == 512  # as in the reference: the second entry does not speak of it


@pytest.mark.parametrize(("what", "who"), [("reopen", "b"), ("permissions", "f"), ("permissions", "b")])
async def test_reopen_that_fails_late_rolls_all_nodes_back(bench: Bench, what: str, who: str) -> None:
    graph, world = bench
    for name in "fg":
        await graph.add(disk(name, filename=name))
    await graph.add(raw("a", "f"))
    await graph.add(raw("b", "f"))
    edges = [await graph.attach(name, READ) for name in "ab"]
    world.fail.add((what, who))
    options = (raw("a", "g", read_only=True), raw("b", "g", size=512))
    assert await refused(bench, graph.reopen, options) == f"{what} of {who} fails"
    assert [await edge.read(0, 1) for edge in edges] == [b"\0", b"\0"]
    world.fail.clear()
    await graph.reopen(options)
    assert graph.find("a").mode.read_only
    assert graph.find("b").length == 512


async def test_reopen_read_only_under_a_writer_is_refused(bench: Bench) -> None:
    graph, _world = bench
    await graph.add(disk("f"))
    await graph.add(disk("ro", filename="b", read_only=True))
    await graph.add(raw("r", "f"))
    await graph.attach("r", WRITE)
    refusal = "Read-only block node '{}' cannot support read-write users"
    assert await refused(bench, graph.reopen, (raw("r", "f", read_only=True),)) == refusal.format("r")
    assert await refused(bench, graph.reopen, (disk("f", read_only=True),)) == refusal.format("f")
    assert await refused(bench, graph.reopen, (raw("r", "ro"),)) == "Block node is read-only"


async def test_reopen_backing_must_be_named_or_given_up(bench: Bench) -> None:
    graph, _world = bench
    await graph.add(disk("base", filename="b"))
    await graph.add(FormatOptions(node_name="q", file=disk("f"), backing="base"))
    options = FormatOptions(node_name="q", file="f")
    assert await refused(bench, graph.reopen, (options,)) == "backing is missing for 'q'"
    await graph.reopen((FormatOptions(node_name="q", file="f", backing=NULL),))
    assert list(graph.find("q").driver.children) == ["file"]
    await graph.reopen((FormatOptions(node_name="q", file="f", backing="base"),))
    assert graph.find("q").driver.children["backing"].node_name == "base"


async def test_reopen_waits_for_requests_and_holds_those_that_come(bench: Bench) -> None:
    graph, _world = bench
    await graph.add(raw("r", disk("f")))
    edge = await graph.attach("r", READ)
    driver: Any = graph.find("f").driver
    reply = ReplyQueue(lambda: None)

    def read(tag: int) -> None:
        edge.submit([Request(Op.READ, 0, 4, memoryview(bytearray(4)), reply, tag=tag)])

    driver.holding = True
    read(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(graph.reopen, (disk("f", read_only=True),))
        await trio.testing.wait_all_tasks_blocked()
        assert graph.find("f").is_held
        assert not graph.find("f").mode.read_only
        read(2)
        assert not reply.ready
        driver.let_go()
    assert [request.tag for request in reply.ready] == [1, 2]
    assert not graph.find("f").is_held


# -- activation -----------------------------------------------------------------------------------------------


def activity(graph: Graph) -> str:
    return "".join(node.name.upper() if node.active else node.name for node in graph.nodes)


async def chain(graph: Graph) -> None:
    """A disk with two windows onto it."""
    await graph.add(disk("s"))
    await graph.add(raw("p", "s"))
    await graph.add(raw("q", "s"))


@pytest.mark.parametrize("what", ["reopen", "truncate"])
async def test_resizing_waits_for_what_else_changes_a_node_and_the_other_way_round(bench: Bench, what: str) -> None:
    """A driver that is reopened reads its image anew: what it reads must not be half way to another size."""
    graph, world = bench
    await graph.add(raw("r", disk("f")))
    edge = await graph.attach("r", RootOptions(Perm.CONSISTENT_READ | Perm.RESIZE))
    reached, go = world.gate(what, "r")
    world.log.clear()

    async def reopen() -> None:
        await graph.reopen((raw("r", "f"),))

    async def resize() -> None:
        await edge.truncate(8192)

    first, second = (reopen, resize) if what == "reopen" else (resize, reopen)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(first)
        await reached.wait()
        nursery.start_soon(second)
        await trio.testing.wait_all_tasks_blocked()
        steps = {line.split()[0] for line in world.log} & {"reopen", "truncate"}
        assert steps == {what}
        go.set()
    assert {line.split()[0] for line in world.log} >= {"reopen", "truncate"}
    assert graph.find("r").length == 8192
    await edge.detach()


async def test_inactivation_spares_what_an_active_node_needs(bench: Bench) -> None:
    graph, _world = bench
    await chain(graph)
    assert await refused(bench, graph.set_active, "s", active=False) == "Node has active parent node"
    await graph.set_active("p", active=False)
    assert activity(graph) == "SpQ"
    await graph.set_active("q", active=False)
    assert activity(graph) == "spq"
    await graph.set_active("p", active=True)
    assert activity(graph) == "SPq"
    await graph.set_active(None, active=True)
    assert activity(graph) == "SPQ"
    await graph.set_active(None, active=False)
    await graph.set_active(None, active=False)
    assert activity(graph) == "spq"
    text = await refused(bench, graph.set_active, "zz", active=True)
    assert text == "Failed to find node with node-name='zz'"


async def test_writer_keeps_nodes_active_unless_it_allows_it(bench: Bench) -> None:
    graph, world = bench
    await chain(graph)
    edge = await graph.attach("s", WRITE)
    reader = await graph.attach("p", READ)
    one = "Failed to inactivate node: Operation not permitted"
    everything = "Failed to inactivate all nodes: Operation not permitted"
    assert await refused(bench, graph.set_active, None, active=False) == everything
    await graph.set_active("q", active=False)
    assert await refused(bench, graph.set_active, "p", active=False) == one
    assert activity(graph) == "SPq"
    await edge.detach()
    edge = await graph.attach("s", RootOptions(WRITE.perm, WRITE.shared, allow_inactive=True))
    await graph.set_active("p", active=False)
    assert activity(graph) == "spq", "a reader does not keep a node active"
    assert all(lock == (Perm.NONE, Perm.ALL) for lock in world.locks.values())
    with pytest.raises(PermissionError):
        await edge.write(0, b"x")
    assert await edge.read(0, 1) == b"\0"
    await graph.set_active("s", active=True)
    await edge.write(0, b"x")
    await edge.detach()
    await reader.detach()


async def test_what_is_amended_stays_active(bench: Bench) -> None:
    graph, _world = bench
    await graph.add(raw("r", disk("f")))
    edge = await graph.attach("r", RootOptions(Perm.CONSISTENT_READ, needs_active=True, amends=True))
    text = await refused(bench, lambda: graph.set_active("r", active=False))
    assert text == "Failed to inactivate node: Operation not permitted"
    await edge.detach()
    await graph.set_active("r", active=False)


async def test_inactive_child_is_refused_to_active_parents(bench: Bench) -> None:
    graph, _world = bench
    await graph.add(disk("off", active=False))
    text = "Inactive 'off' can't be a file child of active '{}'"
    assert await refused(bench, graph.add, raw("r", "off")) == text.format("r")
    await graph.add(raw("r", "off", active=False))
    await graph.add(raw("s", disk(filename="b")))
    assert await refused(bench, graph.reopen, (raw("s", "off"),)) == text.format("s")


async def test_attaching_to_an_inactive_node_activates_it(bench: Bench) -> None:
    graph, _world = bench
    await graph.add(disk("f", active=False))
    await graph.add(raw("r", "f", active=False))
    patient = await graph.attach("r", RootOptions(WRITE.perm, WRITE.shared, allow_inactive=True))
    assert activity(graph) == "fr"
    assert patient.perm is Perm.NONE
    edge = await graph.attach("r", READ)
    assert activity(graph) == "FR"
    await patient.write(0, b"x")
    await edge.detach()
    await patient.detach()


async def test_activation_that_meets_a_lock_changes_nothing(bench: Bench) -> None:
    graph, world = bench
    await chain(graph)
    await graph.set_active(None, active=False)
    edge = await graph.attach("p", RootOptions(Perm.WRITE, allow_inactive=True))
    world.locks["a", 0] = (Perm.NONE, Perm.CONSISTENT_READ)
    assert await refused(bench, graph.set_active, None, active=True) == 'Failed to get "write" lock'
    del world.locks["a", 0]
    await graph.set_active(None, active=True)
    await edge.detach()


async def test_activation_sees_what_another_owner_changed(bench: Bench) -> None:
    graph, world = bench
    await chain(graph)
    await graph.set_active(None, active=False)
    world.contents["a"] = bytearray(512)
    await graph.set_active(None, active=True)
    assert [node.length for node in graph.nodes] == [512] * 3


# -- many nodes -----------------------------------------------------------------------------------------------


async def test_long_chains_get_and_lose_permissions_all_the_way_down(bench: Bench) -> None:
    """Opening and closing look no further than permissions change: down to the end here, and round a corner."""
    graph, _world = bench
    await graph.add(disk("n0"))
    for number in range(1, 12):
        # The size keeps what is below from being resized.
        await graph.add(raw(f"n{number}", f"n{number - 1}", size=512 if number == 9 else None))
        check_plan(graph)
    user = await graph.attach("n8", RootOptions(Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED))
    check_plan(graph)
    for number in range(9, 12):
        await graph.add(FormatOptions(node_name=f"f{number}", file=f"n{number}", backing="n2", read_only=True))
        check_plan(graph)
    await user.detach()
    await graph.add(FormatOptions(node_name="top", file="n11", backing="f10", read_only=True))
    check_plan(graph)
    for name in ("top", "f11", "n11", "f10", "n10", "f9", "n9"):
        await graph.delete(name)
        check_plan(graph)


async def test_adding_to_a_long_chain_looks_at_few_nodes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every node of a chain was looked at four times for each new one: 200 overlays took seconds."""
    graph, _world = bench
    await graph.add(disk("n0"))
    looked = note_calls(monkeypatch, topology, "facts_of")
    costs = []
    for number in range(1, 40):
        looked.clear()
        file, backing = disk(filename=f"{number}"), f"n{number - 1}"
        await graph.add(FormatOptions(node_name=f"n{number}", file=file, backing=backing))
        costs.append(len(looked))
    assert costs[-1] == costs[4]


async def test_near_change_is_not_kept_back_by_what_it_ends(bench: Bench) -> None:
    """Of two ways to a node one is longer, and gives up what the other one needs."""
    graph, _world = bench
    await graph.add(disk("disk"))
    for name, below in (("a", "disk"), ("b", "a"), ("c", "b"), ("short", "disk")):
        await graph.add(raw(name, below))
    edge = await graph.attach("c", RootOptions(WRITE.perm, Perm.CONSISTENT_READ))
    async with graph.topology.lock:
        change = Change(graph.topology, [graph.find("c"), graph.find("short")], is_near=True)
        change.swap(edge, graph.find("short"))
        await change.run()
    check_plan(graph)
    assert graph.find("short").writable
    assert not graph.find("c").writable
    await edge.detach()
