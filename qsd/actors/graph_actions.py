"""Transactions that change the graph and the images in it: what an action is, and how several are carried out.

An action goes through these steps, every one for all actions in order before the next:

- ``stage``: what takes its time and can be thrown away (making and opening an overlay); I/O goes on meanwhile;
- ``describe`` and ``prepare``, with the nodes that any action is ``concerned`` with drained: first the changes of
  the graph that it wants, then what else it does. Each sees what those before it described and did. After the last
  the described change of the graph is planned and prepared as a whole;
- ``commit`` of all, or ``abort`` in reverse, then ``clean`` in reverse, still drained;
- ``unstage`` in reverse, whatever happened, and after a success ``settle``, when I/O goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import attrs

from qsd.actors import transaction
from qsd.actors.change import Change
from qsd.actors.change_steps import Firmness
from qsd.actors.drain import drained
from qsd.actors.opening import shielded
from qsd.actors.transaction import Action, Wrapper

if TYPE_CHECKING:
    from qsd.actors.edges import Edge, RootEdge, RootOptions, Truncate
    from qsd.actors.node import Node
    from qsd.actors.opening import Opener
    from qsd.actors.topology import Topology


@attrs.frozen
class GraphTools:
    """What actions work on."""

    topology: Topology
    opener: Opener
    truncate: Truncate
    # Makes a root edge that is not attached yet.
    make_root: Callable[[Node, RootOptions], RootEdge]


class GraphAction(Action):
    """See the module. Everything does nothing until it is overridden."""

    # Whether a near ``Change`` of what is ``touched`` will do: chains are long, and mostly changed at their ends.
    is_near: ClassVar[bool] = True

    @property
    def concerned(self) -> list[Node]:
        """The nodes to be drained."""
        return []

    @property
    def touched(self) -> list[Node]:
        """The nodes whose edges it changes, and those it connects them with."""
        return []

    @property
    def firmness(self) -> Firmness:
        """Whether drivers may refuse the change."""
        return Firmness.MAY_FAIL

    @property
    def thawed(self) -> list[Edge]:
        """The edges it may change although a job has frozen them."""
        return []

    async def stage(self, earlier: Sequence[GraphAction]) -> None:
        """Get ready beforehand. Raises QmpError and leaves nothing."""

    async def unstage(self) -> None:
        """Let go of what ``stage`` made, where nobody uses it. Must not raise."""

    def describe(self, change: Change) -> None:
        """Check what the action needs, and say how it changes the graph. Raises QmpError.

        Also called to rehearse, for changes that are never made.
        """

    async def settle(self) -> None:
        """Do what was left until I/O goes on. Must not raise."""


@attrs.define(eq=False)
class _Step(Wrapper):
    """An action, after it has described itself."""

    action: GraphAction
    change: Change

    async def prepare(self) -> None:
        self.action.describe(self.change)
        await super().prepare()


def _change(topology: Topology, actions: Sequence[GraphAction]) -> Change:
    touched = [node for action in actions for node in action.touched]
    thawed = [edge for action in actions for edge in action.thawed]
    is_firm = bool(actions) and all(action.firmness is Firmness.MUST_SUCCEED for action in actions)
    firmness = Firmness.MUST_SUCCEED if is_firm else Firmness.MAY_FAIL
    return Change(topology, touched, firmness, thawed, is_near=all(action.is_near for action in actions))


async def rehearse(topology: Topology, actions: Sequence[GraphAction]) -> None:
    """See whether ``actions`` can be described one after the other. Raises QmpError."""
    async with topology.lock:
        change = _change(topology, actions)
        for action in actions:
            action.describe(change)


async def transact(tools: GraphTools, actions: Sequence[GraphAction]) -> None:
    """Carry out all of ``actions`` or none. Raises QmpError."""
    staged: list[GraphAction] = []
    left: list[Node] = []
    try:
        for action in actions:
            await action.stage(staged)
            staged.append(action)
        left = await _carry_out(tools.topology, actions)
    finally:
        for action in reversed(staged):
            await shielded(action.unstage)
        await shielded(tools.opener.close_unwanted, left)
    for action in actions:
        await action.settle()


async def _carry_out(topology: Topology, actions: Sequence[GraphAction]) -> list[Node]:
    async with topology.lock, drained(topology, [node for action in actions for node in action.concerned]):
        change = _change(topology, actions)
        steps: list[Action] = [_Step(action, change) for action in actions]
        await transaction.run([*steps, transaction.Group(change.actions())])
        change.tell()
        return change.left_alone
