"""Random changes of the graph against the permission rules: what a change may do is worked out by a simple model.

The model knows nodes, who stands on whom and what each user needs; it never plans anything: it recomputes all
rights from scratch and looks for two users that do not go together. After every step the live graph must say the
same, and a refused step must have changed nothing.
"""

from __future__ import annotations

from typing import Any

import attrs
import trio
from graph_fakes import DiskOptions, FormatOptions, Kind, RawOptions, World, check_plan, running_graph, state_of
from hypothesis import given, settings
from hypothesis import strategies as st

from qsd.actors.edges import RootEdge, RootOptions
from qsd.actors.graph import Graph
from qsd.block.permissions import Perm
from qsd.errors import QmpError

READ, WRITE, UNCHANGED, RESIZE = Perm.CONSISTENT_READ, Perm.WRITE, Perm.WRITE_UNCHANGED, Perm.RESIZE
PERMS = st.sampled_from([Perm.NONE, READ, READ | WRITE, READ | UNCHANGED, RESIZE, WRITE | RESIZE])
SHARED = st.sampled_from([Perm.ALL, Perm.ALL, Perm.ALL & ~RESIZE, READ | UNCHANGED, Perm.NONE])
NAMES = st.sampled_from("abcd")
STEPS = st.one_of(
    st.tuples(st.just("add"), NAMES, st.sampled_from(list(Kind)), NAMES, st.booleans()),
    st.tuples(st.just("add"), NAMES, st.sampled_from(list(Kind)), NAMES, st.booleans()),
    st.tuples(st.just("add"), NAMES, st.just(Kind.DISK), NAMES, st.just(value=False)),
    st.tuples(st.just("delete"), NAMES),
    st.tuples(st.just("reopen"), st.lists(st.tuples(NAMES, NAMES, st.booleans()), min_size=1, max_size=3)),
    st.tuples(st.just("attach"), NAMES, PERMS, SHARED),
    st.tuples(st.just("detach"), st.integers(0, 9)),
    st.tuples(st.just("want"), st.integers(0, 9), PERMS, SHARED),
    st.tuples(st.just("active"), st.none() | NAMES, st.booleans()),
    st.tuples(st.just("fail"), st.sampled_from(["open", "permissions", "reopen"]), NAMES),
)


@attrs.define
class Thing:
    """A node of the model."""

    kind: Kind
    child: str | None
    read_only: bool
    active: bool = True


Rights = tuple[Perm, Perm]


class Model:
    """What the graph should be."""

    def __init__(self) -> None:
        self.things: dict[str, Thing] = {}
        self.users: dict[RootEdge, tuple[str, Rights]] = {}

    def rights(self) -> dict[str, list[Rights]]:
        """Per node, what each of its users uses and shares, worked out from the top."""
        result: dict[str, list[Rights]] = {name: [] for name in self.things}
        for name, rights in self.users.values():
            result[name].append(rights if self.things[name].active else (Perm.NONE, Perm.ALL))
        done: set[str] = set()
        while len(done) < len(self.things):
            for name, thing in self.things.items():
                above = {other for other, its in self.things.items() if its.child == name}
                if name not in done and above <= done:
                    done.add(name)
                    if thing.child is not None:
                        result[thing.child].append(needs(thing, result[name]))
        return result

    def is_sound(self) -> bool:
        """Whether all users go together, nobody writes where that is forbidden, and no active node stands on an
        inactive one."""
        for name, users in self.rights().items():
            thing = self.things[name]
            for number, (perm, _shared) in enumerate(users):
                others = [shared for other, (_perm, shared) in enumerate(users) if other != number]
                if any(perm & ~shared for shared in others):
                    return False
                if thing.read_only and perm & (Perm.WRITE | Perm.WRITE_UNCHANGED):
                    return False
                if not thing.active and perm & (Perm.WRITE | Perm.RESIZE):
                    return False
        return True


def needs(thing: Thing, users: list[Rights]) -> Rights:
    stable = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
    if thing.kind is Kind.FORMAT:
        if not thing.active:
            return Perm.NONE, Perm.ALL
        if thing.read_only:
            return Perm.CONSISTENT_READ, stable
        return Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE, stable
    perm, shared = Perm.NONE, Perm.ALL
    for one, other in users:
        perm |= one
        shared &= other
    return perm, shared


def options_of(name: str, thing: Thing) -> Any:
    if thing.kind is Kind.DISK:
        return DiskOptions(node_name=name, filename=name, read_only=thing.read_only)
    kind = RawOptions if thing.kind is Kind.RAW else FormatOptions
    return kind(node_name=name, file=thing.child, read_only=thing.read_only)


class Run:
    """One sequence of steps on a graph and its model side by side."""

    def __init__(self, graph: Graph, world: World) -> None:
        self.graph = graph
        self.world = world
        self.model = Model()
        self.refusals = 0

    async def step(self, step: tuple[Any, ...]) -> None:
        """Do it on the graph; a refusal must leave no trace, a success must leave the model's state."""
        if step[0] == "fail":
            self.world.fail = {step[1:]}
            return
        before = state_of(self.graph, self.world)
        try:
            await getattr(self, step[0])(*step[1:])
        except QmpError:
            self.refusals += 1
            assert state_of(self.graph, self.world) == before, step
        self.world.fail.clear()
        self.compare()

    def compare(self) -> None:
        graph, model = self.graph, self.model
        check_plan(graph)
        assert sorted(node.name for node in graph.nodes) == sorted(model.things)
        assert model.is_sound(), "the graph allowed what does not go together"
        expected = model.rights()
        for node in graph.nodes:
            thing = model.things[node.name]
            assert (node.mode.read_only, node.active) == (thing.read_only, thing.active)
            assert [edge.node_name for edge in node.driver.children.values()] == [thing.child] * bool(thing.child)
            rights = [(edge.perm, edge.shared) for edge in node.info.parents]
            assert sorted(rights) == sorted(expected[node.name])
            assert node.writable == any(perm & (Perm.WRITE | Perm.WRITE_UNCHANGED) for perm, _shared in rights)
            assert not node.is_held

    def must_be_refusable(self, trial: Model) -> None:
        """A refusal is right when an injected failure was armed or the outcome would be unsound."""
        assert self.world.fail or not trial.is_sound(), "refused without a reason"

    def trial(self) -> Model:
        trial = Model()
        trial.things = {name: attrs.evolve(thing) for name, thing in self.model.things.items()}
        trial.users = dict(self.model.users)
        return trial

    async def add(self, name: str, kind: Kind, child: str, read_only: bool) -> None:
        thing = Thing(kind, None if kind is Kind.DISK else child, read_only)
        things = self.model.things
        trial = self.trial()
        is_possible = name not in things and (thing.child is None or child in things)
        if is_possible:
            trial.things[name] = thing
            is_possible = thing.child is None or things[child].active
        try:
            await self.graph.add(options_of(name, thing))
        except QmpError:
            if is_possible:
                self.must_be_refusable(trial)
            raise
        assert is_possible
        self.model = trial

    async def delete(self, name: str) -> None:
        things = self.model.things
        is_used = any(thing.child == name for thing in things.values())
        is_used |= any(user == name for user, _rights in self.model.users.values())
        try:
            await self.graph.delete(name)
        except QmpError:
            assert is_used or name not in things
            raise
        assert not is_used
        del things[name]

    async def reopen(self, entries: list[tuple[str, str, bool]]) -> None:
        trial = self.trial()
        is_possible = True
        options = []
        last: dict[str, tuple[str, bool]] = {}
        for name, child, read_only in entries:
            thing = self.model.things.get(name)
            is_possible &= thing is not None
            options.append(options_of(name, Thing(thing.kind if thing else Kind.RAW, child, read_only)))
            last[name] = (child, read_only)
        for name, (child, read_only) in last.items():
            if not is_possible:
                break
            thing = trial.things[name]
            thing.read_only = read_only
            if thing.kind is not Kind.DISK and child != thing.child:
                is_possible = child in trial.things and not stands_on(trial, child, name)
                is_possible = is_possible and (trial.things[child].active or not thing.active)
                thing.child = child
        try:
            await self.graph.reopen(tuple(options))
        except QmpError:
            if is_possible:
                self.must_be_refusable(trial)
            raise
        assert is_possible
        self.model = trial

    async def attach(self, name: str, perm: Perm, shared: Perm) -> None:
        trial = self.trial()
        is_possible = name in trial.things
        if is_possible:
            activate(trial, name)
        try:
            edge = await self.graph.attach(name, RootOptions(perm, shared))
        except QmpError:
            if is_possible:
                trial.users[None] = (name, (perm, shared))  # type: ignore[index]  # a user that never was
                self.must_be_refusable(trial)
            raise
        trial.users[edge] = (name, (perm, shared))
        self.model = trial

    async def detach(self, number: int) -> None:
        edges = list(self.model.users)
        if edges:
            edge = edges[number % len(edges)]
            self.world.fail.clear()
            await edge.detach()
            del self.model.users[edge]

    async def want(self, number: int, perm: Perm, shared: Perm) -> None:
        edges = list(self.model.users)
        if not edges:
            return
        edge = edges[number % len(edges)]
        trial = self.trial()
        trial.users[edge] = (trial.users[edge][0], (perm, shared))
        try:
            await edge.set_permissions(perm, shared)
        except QmpError:
            self.must_be_refusable(trial)
            raise
        self.model = trial

    async def active(self, name: str | None, active: bool) -> None:
        trial = self.trial()
        things = trial.things
        is_possible = name is None or name in things
        if is_possible and active:
            for one in things if name is None else [name]:
                activate(trial, one)
        elif is_possible:
            is_possible = inactivate(trial, name)
        try:
            await self.graph.set_active(name, active=active)
        except QmpError:
            if is_possible:
                self.must_be_refusable(trial)
            raise
        assert is_possible
        self.model = trial


def stands_on(model: Model, top: str, below: str) -> bool:
    at: str | None = top
    while at is not None:
        if at == below:
            return True
        at = model.things[at].child
    return False


def activate(model: Model, name: str) -> None:
    at: str | None = name
    while at is not None:
        model.things[at].active = True
        at = model.things[at].child


def inactivate(model: Model, name: str | None) -> bool:
    things = model.things
    if name is not None and any(thing.child == name and thing.active for thing in things.values()):
        return False
    was_active = {one for one, thing in things.items() if thing.active}
    for start in list(things) if name is None else [name]:
        things[start].active = False
    at = things[name].child if name is not None else None
    while at is not None and not any(thing.child == at and thing.active for thing in things.values()):
        things[at].active = False
        at = things[at].child
    writing = Perm.WRITE | Perm.WRITE_UNCHANGED | Perm.RESIZE
    changed = {one for one in was_active if not things[one].active}
    return not any(user in changed and perm & writing for user, (perm, _shared) in model.users.values())


@settings(max_examples=120, deadline=None)
@given(st.lists(STEPS, min_size=5, max_size=40))
def test_random_changes_follow_the_rules(steps: list[tuple[Any, ...]]) -> None:
    async def main() -> None:
        async with running_graph() as (graph, world):
            run = Run(graph, world)
            for step in steps:
                await run.step(step)
            for edge in list(run.model.users):
                await edge.detach()

    trio.run(main)
