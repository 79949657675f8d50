"""Random transactions while clients write: the model knows only which layer is on top and which names are taken.

Whatever happens, no write is lost, refused or done twice, and it is in the layer that was on top: what a client
sent before a transaction ended may be in the old one, what it sends later is in the new one.
"""

from __future__ import annotations

from typing import Any

import attrs
import trio
import trio.testing
from graph_fakes import World, check_plan, running_graph, state_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_snapshots import WRITE, Client, add, internal, snapshot, sync

from qsd.actors.graph import Graph
from qsd.actors.graph_actions import GraphAction
from qsd.actors.snapshots import AbortAction
from qsd.errors import QmpError

CLIENTS = 2
SPARE = ["o0", "o1", "o2", "o3"]
CLIENT = st.integers(0, CLIENTS - 1)
ACTIONS = st.one_of(
    st.tuples(st.just("snapshot"), CLIENT, st.sampled_from(SPARE)),
    st.tuples(st.just("sync"), CLIENT, st.sampled_from(["s0", "s1", "s2", "s3"])),
    st.tuples(st.just("internal"), CLIENT, st.sampled_from("xyz")),
    st.tuples(st.sampled_from(["abort", "fail"]), CLIENT, st.just("")),
)
# The actions of a transaction, after how many turns of the loop each write comes in, which driver refuses.
STEPS = st.tuples(
    st.lists(ACTIONS, max_size=4),
    st.lists(st.integers(0, 12), max_size=6),
    st.sampled_from([None, None, None, "o0", "s0", "n0"]),
)


class Late(GraphAction):
    """Fails after everything before it was prepared."""

    async def prepare(self) -> None:
        raise QmpError("late")


@attrs.define
class Model:
    """Chains from the bottom up, and the names of internal snapshots by node."""

    chains: list[list[str]]
    snapshots: dict[str, list[str]] = attrs.field(factory=dict)

    def copy(self) -> Model:
        snapshots = {node: list(names) for node, names in self.snapshots.items()}
        return Model([list(chain) for chain in self.chains], snapshots)

    def try_one(self, kind: str, client: int, name: str) -> bool:
        top = self.chains[client][-1]
        used = {layer for chain in self.chains for layer in chain}
        if kind in ("snapshot", "sync"):
            self.chains[client].append(name)
            return name not in used
        if kind == "internal":
            names = self.snapshots.setdefault(top, [])
            names.append(name)
            return name not in names[:-1]
        return False


class Run:
    def __init__(self, graph: Graph, world: World, clients: list[Client]) -> None:
        self.graph, self.world, self.clients = graph, world, clients
        self.model = Model([[f"n{number}"] for number in range(CLIENTS)])
        # For every write of a client: the layers it may be in.
        self.places: list[list[set[str]]] = [[] for _ in clients]

    async def step(self, actions: list[tuple[str, int, str]], pauses: list[int], refusing: str | None) -> None:
        trial = self.model.copy()
        made: list[GraphAction] = []
        is_possible = True
        for kind, client, name in actions:
            top = trial.chains[client][-1]
            is_possible = trial.try_one(kind, client, name) and is_possible
            made.append(self.make(kind, top, name))
        before = state_of(self.graph, self.world)
        if refusing is not None:
            self.world.fail.add(("permissions", refusing))
        failed = False

        async def transact() -> None:
            nonlocal failed
            try:
                await self.graph.transact(made)
            except QmpError:
                failed = True

        for number in range(CLIENTS):
            self.write_one(number, {self.model.chains[number][-1]})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transact)
            for pause in pauses:
                for _ in range(pause):
                    await trio.lowlevel.checkpoint()
                for number in range(CLIENTS):
                    self.write_one(number, {self.model.chains[number][-1], trial.chains[number][-1]})
        self.world.fail.clear()
        await trio.testing.wait_all_tasks_blocked()
        if failed:
            assert not is_possible or refusing is not None
            assert state_of(self.graph, self.world) == before
        else:
            assert is_possible
            self.model = trial
        self.check()

    def make(self, kind: str, top: str, name: str) -> GraphAction:
        tools: dict[str, Any] = {"snapshot": snapshot, "sync": sync, "internal": internal}
        if kind in tools:
            action: GraphAction = tools[kind](self.graph, top, name)
            return action
        return AbortAction() if kind == "abort" else Late()

    def write_one(self, number: int, places: set[str]) -> None:
        self.clients[number].write()
        self.places[number].append(places)

    def check(self) -> None:
        check_plan(self.graph)
        for client, chain, places in zip(self.clients, self.model.chains, self.places, strict=True):
            assert client.edge.node_name == chain[-1]
            assert client.errors == [0] * client.sent
            for above, below in zip(chain[1:], chain, strict=False):
                assert self.graph.find(above).driver.children["backing"].node_name == below
            for number, allowed in enumerate(places):
                start = 1024 + 8 * number
                data = bytes([(number + 1) % 251 + 1] * 8)
                found = {name for name in chain if self.world.contents[name][start : start + 8] == data}
                assert len(found) == 1
                assert found <= allowed
        for node, names in self.model.snapshots.items():
            assert [each.name for each in self.world.snapshots.get(node, [])] == names


class Writer(Client):
    """Writes behind what the fakes write themselves."""

    def write(self) -> Any:
        return self.write_at(1024 + 8 * self.sent, bytes([(self.sent + 1) % 251 + 1] * 8))


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, min_size=1, max_size=10))
def test_random_transactions_lose_no_write(
    steps: list[tuple[list[tuple[str, int, str]], list[int], str | None]],
) -> None:
    async def main() -> None:
        async with running_graph() as (graph, world):
            await add(graph, *(f"n{number}" for number in range(CLIENTS)), *SPARE)
            clients = [Writer(await graph.attach(f"n{number}", WRITE)) for number in range(CLIENTS)]
            run = Run(graph, world, clients)
            for step in steps:
                await run.step(*step)
            for client in clients:
                await client.edge.detach()

    trio.run(main)
