"""One change of the graph: described on a snapshot, planned as a whole, carried out as a transaction.

The transaction goes through the nodes concerned from the top of the graph down: each is held, so that it has
nothing in flight, and prepared before the next. What a driver still has to write to its child while it prepares
therefore reaches a child that is not held yet.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import attrs

from qsd.actors import transaction
from qsd.actors.bitmap_keeping import StartWriting, StopWriting, must_stop
from qsd.actors.change_steps import Activity, Firm, Firmness, FlushBelow, Hold, Permissions, Reopen, Swap
from qsd.actors.depth import new_heights
from qsd.actors.edges import Edge, NodeState, RootEdge, disown, info_of, length_changed
from qsd.actors.topology import NewMode, Topology, edge_facts, pretending, rights_of
from qsd.actors.transaction import Action
from qsd.block.graph import NodeFacts
from qsd.block.permissions import Perm
from qsd.block.plan import Plan, Rights, plan_permissions
from qsd.errors import QmpError

if TYPE_CHECKING:
    from qsd.actors.node import Node

log = logging.getLogger("qsd.graph")

# How many levels a near change goes down one by one, before it looks at all that is below.
_LEVELS = 4


class Change:
    """Describe with the methods, then ``run``. The caller holds the topology's lock from the first to the last.

    ``touched`` are the nodes the change is about, new children included. ``thawed`` are the edges it may change
    although a job has frozen them. ``is_near`` looks no further down than permissions change: for edges with both
    ends ``touched``, and all nodes above the lower ends where they might close a cycle.
    """

    def __init__(
        self,
        topology: Topology,
        touched: Iterable[Node],
        firmness: Firmness = Firmness.MAY_FAIL,
        thawed: Iterable[Edge] = (),
        *,
        is_near: bool = False,
    ) -> None:
        assert topology.lock.locked(), "the graph is changed under its lock"
        self._topology = topology
        self._firmness = firmness
        self._thawed = frozenset(edge.key for edge in thawed)
        self._is_near = is_near
        self._before = topology.snapshot(touched, is_near=is_near)
        self.snapshot = self._before
        self._attached: list[Edge] = []
        self._detached: list[Edge] = []
        # By the key of the edge's parent; None for root edges.
        self._swaps: dict[int | None, list[tuple[Edge, Node]]] = {}
        self._modes: dict[int, NewMode] = {}
        self._activity: dict[int, bool] = {}
        self._wanted: dict[RootEdge, Rights] = {}
        self._failures: list[tuple[Node, Exception]] = []
        self._heights: dict[Node, int] = {}
        # Nodes whose children are looked at in any case: a driver may want something else of them.
        self._asked = frozenset(self._before.nodes) if is_near else frozenset()

    # -- describing -------------------------------------------------------------------------------------------

    def attach(self, edge: Edge) -> None:
        """Add an edge. Raises QmpError (cycle, inactive child)."""
        facts = edge_facts(edge)
        if isinstance(edge, RootEdge):
            rights = rights_of(edge, active=self._facts(edge.node).active)
            facts = attrs.evolve(facts, perm=rights.perm, shared=rights.shared)
        self.snapshot = self.snapshot.with_edge(facts)
        self._attached.append(edge)

    def detach(self, edge: Edge) -> None:
        """Take an edge away. Raises QmpError (frozen by a job)."""
        self._check_free(edge)
        self.snapshot = self.snapshot.without_edges([edge.key])
        self._detached.append(edge)

    def swap(self, edge: Edge, child: Node) -> None:
        """Let ``edge`` lead to ``child``. Raises QmpError (cycle, inactive child, frozen by a job)."""
        self._check_free(edge)
        facts = attrs.evolve(edge_facts(edge), child=info_of(child).key)
        self.snapshot = self.snapshot.without_edges([edge.key]).with_edge(facts)
        parent = info_of(edge.parent).key if edge.parent is not None else None
        self._swaps.setdefault(parent, []).append((edge, child))

    def _check_free(self, edge: Edge) -> None:
        if edge.freezes and edge.key not in self._thawed:
            assert edge.parent is not None
            raise QmpError(
                f"Cannot change frozen '{edge.name}' link from '{edge.parent.name}' to '{edge.node.name}'"
            )

    def reopen(self, node: Node, new: NewMode) -> None:
        """Give a node new options and another mode."""
        facts = attrs.evolve(self._facts(node), read_only=new.mode.read_only, changing=True)
        self._put(node, facts)
        self._modes[info_of(node).key] = new

    def activate(self, node: Node, *, active: bool) -> None:
        """Let a node take part in I/O, or no longer; its root users get or lose what they want."""
        self._put(node, attrs.evolve(self._facts(node), active=active))
        self._activity[info_of(node).key] = active
        for edge in info_of(node).parents:
            if isinstance(edge, RootEdge):
                self._show(edge, rights_of(edge, active=active))

    def want(self, edge: RootEdge, rights: Rights) -> None:
        """Let a root user use and share something else."""
        self._wanted[edge] = rights
        if self._facts(edge.node).active:
            self._show(edge, rights)

    def edges_to(self, node: Node) -> list[Edge]:
        """Who uses ``node`` when the change has been made as far as described, newest first."""
        nodes = [self._topology.living[key] for key in self._before.nodes]
        edges = {edge.key: edge for each in nodes for edge in info_of(each).parents}
        edges.update((edge.key, edge) for edge in self._attached)
        return [edges[facts.key] for facts in self.snapshot.edges_to(info_of(node).key)]

    def children_of(self, node: Node) -> set[str]:
        """The names of the children ``node`` then has."""
        edges = (*info_of(node).children.values(), *(edge for edge in self._attached if edge.parent is node))
        return {edge.name for edge in edges if edge not in self._detached}

    def is_active(self, node: Node) -> bool:
        """Whether ``node`` then takes part in I/O."""
        return self._facts(node).active

    def _facts(self, node: Node) -> NodeFacts:
        return self.snapshot.nodes[info_of(node).key]

    def _put(self, node: Node, facts: NodeFacts) -> None:
        self.snapshot = self.snapshot.with_node(info_of(node).key, facts)

    def _show(self, edge: RootEdge, rights: Rights) -> None:
        edges = tuple(
            attrs.evolve(facts, perm=rights.perm, shared=rights.shared) if facts.key == edge.key else facts
            for facts in self.snapshot.edges
        )
        self.snapshot = attrs.evolve(self.snapshot, edges=edges)

    # -- doing ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Plan and do it. Raises QmpError with the graph as it was before."""
        await transaction.run(self.actions())
        self.tell()
        if self._failures:
            await self._give_up()

    async def _give_up(self) -> None:
        """Inactivate again what could not go on where its image's last owner left it; raises why."""
        topology = self._topology
        nodes = [topology.living[key] for key, active in self._activity.items() if active]
        try:
            if nodes:
                undo = Change(topology, nodes, Firmness.MUST_SUCCEED)
                for edge in self._attached:
                    undo.detach(edge)
                for node in nodes:
                    undo.activate(node, active=False)
                await undo.run()
        finally:
            for node, _error in self._failures:
                node.release()
        raise self._failures[0][1]

    def actions(self) -> Iterator[Action]:
        """The actions that do it; planned when the first is asked for. Raises QmpError.

        For a change that is a part of something larger, which calls ``tell`` when all is committed.
        """
        self._heights = self._new_heights()
        plan = self._plan_all()
        for edge, child in self._swaps.get(None, ()):
            yield Hold(edge.node)
            yield Swap(edge, child)
        for key in self._before.order_towards(self.snapshot):
            yield from self._actions(self._topology.living[key], plan)
        yield _Edges(self._topology, self, plan)

    def _new_heights(self) -> dict[Node, int]:
        new = [(edge, edge.node) for edge in self._attached]
        new.extend(swap for swaps in self._swaps.values() for swap in swaps)
        return new_heights(new, self._detached)

    def _plan_all(self) -> Plan:
        """A plan for everything whose permissions change. Raises QmpError."""
        try:
            plan = self._plan()
            for _level in range(_LEVELS):
                if not self._grow(plan, is_near=True):
                    return plan
                plan = self._plan()
        except QmpError:
            # Of a node that was not looked at yet, it may be what it will not do any more that is in the way.
            if not self._look_below(self._before.nodes, is_near=False):
                raise
            return self._plan()
        return self._plan() if self._grow(plan, is_near=False) else plan

    def _plan(self) -> Plan:
        try:
            return plan_permissions(self.snapshot, self._rule)
        except QmpError:
            # The reference looks first at what a new user needs, and then at what it does not share.
            new = {edge.key for edge in self._attached if isinstance(edge, RootEdge)}
            edges = (
                attrs.evolve(facts, shared=Perm.ALL) if facts.key in new else facts for facts in self.snapshot.edges
            )
            plan_permissions(attrs.evolve(self.snapshot, edges=tuple(edges)), self._rule)
            raise

    def _grow(self, plan: Plan, *, is_near: bool) -> bool:
        """Look at the children of nodes whose permissions change, too; whether there were any not looked at yet."""
        living = self._topology.living
        keys = [key for key in plan.nodes if key in self._asked or plan.nodes[key] != info_of(living[key]).rights]
        return self._look_below(keys, is_near=is_near)

    def _look_below(self, keys: Iterable[int], *, is_near: bool) -> bool:
        """Look at the children of nodes; whether there were any not looked at yet."""
        if not self._is_near:
            return False
        edges = (edge for key in keys for edge in info_of(self._topology.living[key]).children.values())
        found = {edge.node for edge in edges if info_of(edge.node).key not in self._before.nodes}
        if found:
            more = self._topology.snapshot(found, is_near=is_near)
            self._before = self._before.joined(more)
            self.snapshot = self.snapshot.joined(more.without_edges(edge.key for edge in self._detached))
        return bool(found)

    def _rule(self, key: int, name: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        driver = self._topology.living[key].driver
        new = self._modes.get(key)
        if key in self._activity:
            mode = driver.mode if new is None else new.mode
            options = driver.options if new is None else new.options
            new = NewMode(options, attrs.evolve(mode, active=self._activity[key]))
        with pretending(driver, new):
            return driver.child_permissions(name, perm, shared)

    def _actions(self, node: Node, plan: Plan) -> list[Action]:
        info = info_of(node)
        key = info.key
        is_new = key in self._modes or key in self._swaps or key in self._activity
        if not is_new and plan.nodes[key] == info.rights:
            return []
        if info.state is NodeState.BROKEN:
            return [Swap(edge, child) for edge, child in self._swaps.get(key, ())]
        actions: list[Action] = [Hold(node), *self._writing(node)]
        if self._activity.get(key) is False or key in self._modes:
            actions.append(self._as_firm(FlushBelow(node)))
        actions.extend(Swap(edge, child) for edge, child in self._swaps.get(key, ()))
        if key in self._modes:
            actions.append(Reopen(node, self._modes[key]))
        actions.append(Permissions(node, plan.nodes[key], self._firmness))
        if key in self._activity:
            actions.append(Activity(node, active=self._activity[key]))
        return actions

    def _writing(self, node: Node) -> Iterator[Action]:
        """What has to be done when the image will be written from now on, or no longer."""
        key = info_of(node).key
        active = self._activity.get(key, node.active)
        read_only = self._modes[key].mode.read_only if key in self._modes else node.mode.read_only
        if must_stop(node, active=active, read_only=read_only):
            yield self._as_firm(StopWriting(node, is_inactivation=not active))
        if active and not node.active:
            yield StartWriting(node, self._failures, is_activation=True)
        elif active and node.mode.read_only and not read_only:
            yield StartWriting(node, self._failures, is_activation=False)

    def _as_firm(self, action: Action) -> Action:
        return action if self._firmness is Firmness.MAY_FAIL else Firm(action)

    def apply(self, plan: Plan) -> None:
        """Write the outcome into the live graph. Part of the commit."""
        topology = self._topology
        for node, height in self._heights.items():
            info_of(node).height = height
        for edge in self._detached:
            _unlink(topology, edge)
        for edge in self._attached:
            _link(topology, edge)
        for edge, rights in self._wanted.items():
            edge.wanted = rights
        live = {edge.key: edge for key in self._before.nodes for edge in info_of(topology.living[key]).parents}
        for edge_key, rights in plan.edges.items():
            edge = live[edge_key]
            edge.perm, edge.shared = rights.perm, rights.shared
        for node_key, rights in plan.nodes.items():
            info_of(topology.living[node_key]).rights = rights

    def tell(self) -> None:
        """Tell those above what has changed below them. Call once everything is committed."""
        topology = self._topology
        parents = {key for key in self._swaps if key is not None}
        for key in parents:
            topology.living[key].driver.children_changed()
        for edge in (*self._attached, *self._detached):
            if edge.parent is not None and info_of(edge.parent).state is NodeState.OPEN:
                edge.parent.driver.children_changed()
        for key in self._modes.keys() | self._activity.keys() | parents:
            length_changed(topology.living[key])
        for edge, _child in self._swaps.get(None, ()):
            assert isinstance(edge, RootEdge)
            if edge.options.on_swap is not None:
                edge.options.on_swap()

    @property
    def left_alone(self) -> list[Node]:
        """After ``run``: nodes that lost a parent and have nobody left."""
        lost = [edge.node for edge in self._detached]
        swapped = {edge.key for swaps in self._swaps.values() for edge, _child in swaps}
        lost.extend(self._topology.living[facts.child] for facts in self._before.edges if facts.key in swapped)
        return self._topology.orphans(dict.fromkeys(lost))


def _parent(edge: Edge) -> Node:
    assert edge.parent is not None
    return edge.parent


def _link(topology: Topology, edge: Edge) -> None:
    info_of(edge.node).parents.append(edge)
    if isinstance(edge, RootEdge):
        topology.roots.append(edge)
        edge.is_attached = True
    else:
        parent = _parent(edge)
        info_of(parent).children[edge.name] = edge
        parent.driver.children[edge.name] = edge


def _unlink(topology: Topology, edge: Edge) -> None:
    info_of(edge.node).parents.remove(edge)
    if isinstance(edge, RootEdge):
        topology.roots.remove(edge)
        edge.is_attached = False
    else:
        parent = _parent(edge)
        info_of(parent).children.pop(edge.name, None)
        parent.driver.children.pop(edge.name, None)
        disown(parent, edge.node)


@attrs.define(eq=False)
class _Edges(Action):
    """The last step: the outcome becomes the live graph."""

    topology: Topology
    change: Change
    plan: Plan

    def commit(self) -> None:
        self.change.apply(self.plan)
