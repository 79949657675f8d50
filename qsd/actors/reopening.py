"""blockdev-reopen: new options for several nodes, all or none.

An option left out goes back to its default, ``discard`` aside: who only exchanges the backing file, say, does not
want the guest's discards to end. Several entries for one node are one, in which the later ones rule.
Children whose options stand inside the parent's are reopened with it.
A child given by name is exchanged when it is another node, else left as it is; but where its options stood inside
the parent's, what is said now about the parent's cache and about read-only is said about the child, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import attrs

from qsd.actors.change import Change
from qsd.actors.edges import Edge, Truncate, info_of
from qsd.actors.node_options import check_detect_zeroes, resolve_mode
from qsd.actors.topology import NewMode, Topology
from qsd.drivers.base import ChildRole, Mode
from qsd.errors import QmpError
from qsd.qapi.core import NULL

if TYPE_CHECKING:
    from qsd.actors.node import Node
    from qsd.qapi.schema.block import BlockdevOptions

# The children that may become other nodes.
_EXCHANGED: Final = frozenset({"file", "backing"})
UNKNOWN_NODE = "Failed to find node with node-name='{}'"
NO_DEFAULT = "Option '{}' cannot be reset to its default value"
UNKNOWN_CHILD = "Cannot find device='' nor node-name='{}'"


@attrs.define(eq=False)
class _Plan:
    """What the options ask for, gathered before anything is changed."""

    modes: dict[Node, NewMode] = attrs.field(factory=dict)
    swaps: list[tuple[Edge, Node]] = attrs.field(factory=list)
    added: list[Edge] = attrs.field(factory=list)
    removed: list[Edge] = attrs.field(factory=list)

    @property
    def touched(self) -> list[Node]:
        nodes = [*self.modes, *(child for _edge, child in self.swaps), *(edge.node for edge, _child in self.swaps)]
        return [*nodes, *(edge.node for edge in (*self.added, *self.removed))]


async def reopen(topology: Topology, wanted: Iterable[BlockdevOptions], truncate: Truncate) -> list[Node]:
    """Do it under the topology's lock; the nodes that nobody uses any more. Raises QmpError."""
    nodes: dict[Node, BlockdevOptions] = {}
    for options in wanted:
        node = _find(topology, options.node_name)
        nodes[node] = _joined(nodes[node], options) if node in nodes else options
    plan = _Plan()
    for node, options in nodes.items():
        _gather(topology, plan, truncate, node, options, None, ChildRole.DATA)
    change = Change(topology, plan.touched)
    for edge in plan.removed:
        change.detach(edge)
    for edge, child in plan.swaps:
        change.swap(edge, child)
    for edge in plan.added:
        change.attach(edge)
    for node, new in plan.modes.items():
        change.reopen(node, new)
    await change.run()
    return change.left_alone


def _joined(first: Any, later: Any) -> Any:
    """What is said about one node in two entries: the later one rules where both say something."""
    if type(first) is not type(later) or not attrs.has(type(later)):
        return first if later is None else later
    names = [field.name for field in attrs.fields(type(later))]
    return type(later)(**{name: _joined(getattr(first, name), getattr(later, name)) for name in names})


def _find(topology: Topology, name: str | None) -> Node:
    if name is None:
        raise QmpError("node-name not specified")
    node = topology.find(name, UNKNOWN_NODE)
    if info_of(node).is_auto_named:
        raise QmpError("Cannot change the option 'node-name'")
    return node


def _gather(
    topology: Topology,
    plan: _Plan,
    truncate: Truncate,
    node: Node,
    options: BlockdevOptions,
    inherited: Mode | None,
    role: ChildRole,
) -> None:
    mode = attrs.evolve(resolve_mode(options, inherited, role), active=node.active)
    if options.discard is None and inherited is None:
        mode = attrs.evolve(mode, discard_unmap=node.mode.discard_unmap)
    check_detect_zeroes(mode)
    _check_fixed(node, options)
    plan.modes[node] = NewMode(options, mode)
    for name, child_role in node.driver.child_specs:
        value = getattr(options, name.replace("-", "_"))
        edge = info_of(node).children.get(name)
        if value is None:
            if edge is not None and info_of(edge.node).inline_parent is node:
                # Nothing is said about a node that lives by what is said here.
                raise QmpError(NO_DEFAULT.format("driver"))
            continue
        if value is NULL:
            if edge is not None:
                plan.removed.append(edge)
        elif isinstance(value, str):
            if edge is None or edge.node.name != value:
                _refer(topology, plan, truncate, node, name, child_role, value)
            else:
                _pass_on(plan, edge, options, mode)
        elif edge is not None and info_of(edge.node).inline_parent is node:
            if value.node_name is not None and value.node_name != edge.node.name:
                raise QmpError("Cannot change the option 'node-name'")
            _gather(topology, plan, truncate, edge.node, value, mode, child_role)
        else:
            raise QmpError(f"Cannot change the option '{name}.driver'")


def _pass_on(plan: _Plan, edge: Edge, given: BlockdevOptions, mode: Mode) -> None:
    node, info = edge.node, info_of(edge.node)
    if info.inline_parent is not edge.parent or node in plan.modes:
        return
    passed = {name: getattr(mode, name) for name in _said(given) - _said(info.options)}
    if edge.role is ChildRole.COW:
        passed.pop("read_only", None)
    if passed:
        new = attrs.evolve(node.mode, **passed)
        plan.modes[node] = NewMode(info.options, new)
        for below in info.children.values():
            _pass_on(plan, below, given, new)


def _said(options: BlockdevOptions) -> set[str]:
    """The members of a ``Mode`` that options say something about and children inherit."""
    cache = options.cache
    said = {
        "read_only": options.read_only,
        "cache_direct": cache and cache.direct,
        "cache_no_flush": cache and cache.no_flush,
    }
    return {name for name, value in said.items() if value is not None}


def _refer(
    topology: Topology, plan: _Plan, truncate: Truncate, node: Node, name: str, role: ChildRole, child_name: str
) -> None:
    edge = info_of(node).children.get(name)
    if name not in _EXCHANGED:
        raise QmpError(f"Cannot change the option '{name}'")
    child = topology.find(child_name, UNKNOWN_CHILD)
    if edge is None:
        plan.added.append(Edge(node, name, child, role, truncate))
    else:
        plan.swaps.append((edge, child))


def _check_fixed(node: Node, options: BlockdevOptions) -> None:
    """What no reopen changes."""
    if not node.driver.can_reopen:
        raise QmpError(
            f"Block format '{node.driver.name}' used by node '{node.name}' does not support reopening files"
        )
    before: Any = info_of(node).options
    driver = node.driver
    for name in driver.lasting:
        if getattr(before, name) is not None and getattr(options, name, None) is None:
            raise QmpError(NO_DEFAULT.format(_shown(name)))
    if options.driver is not before.driver:
        raise QmpError("Cannot change the option 'driver'")
    for name in driver.lasting:
        if name in driver.fixed and getattr(options, name) != getattr(before, name):
            raise QmpError(f"Cannot change the option '{_shown(name)}'")
    if node.mode.force_share and options.force_share is None:
        raise QmpError(NO_DEFAULT.format("force-share"))
    if (
        getattr(options, "backing", NULL) is None
        and driver.can_have_backing()
        and ("backing" in info_of(node).children or "backing-filename" in driver.image_facts())
    ):
        raise QmpError(f"backing is missing for '{node.name}'")
    if options.force_share is not None:
        # Not even what it is: as with the reference, a node that was opened so can never be reopened.
        raise QmpError("Cannot change the option 'force-share'")
    # The reference takes the new value without doing anything about it, and refuses every reopen after that.
    if options.active is not None and options.active != node.active:
        raise QmpError("Cannot change the option 'active'")


def _shown(name: str) -> str:
    return name.replace("_", "-")
