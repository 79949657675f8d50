"""The steps of a change of the graph, for one node each, as actions that can be undone."""

from __future__ import annotations

import logging
from enum import Enum
from typing import TYPE_CHECKING

import attrs

from qsd.actors.drain import Drained
from qsd.actors.edges import Edge, disown, info_of, owners_of
from qsd.actors.transaction import Action, Wrapper
from qsd.block.plan import WRITING, Rights
from qsd.drivers.calls import call
from qsd.errors import FAILURES, QmpError, errno_text
from qsd.messages import Op

if TYPE_CHECKING:
    from qsd.actors.node import Node
    from qsd.actors.topology import NewMode

log = logging.getLogger("qsd.graph")


class Firmness(Enum):
    """Whether a driver may refuse. Letting go of something cannot fail: who has left does not come back."""

    MAY_FAIL = "may fail"
    MUST_SUCCEED = "must succeed"


class Hold(Action):
    """A drained scope for one node."""

    def __init__(self, node: Node) -> None:
        self._scope = Drained(node)

    async def prepare(self) -> None:
        await self._scope.begin()

    async def clean(self) -> None:
        self._scope.end()


@attrs.define(eq=False)
class FlushBelow(Action):
    """Everything written so far reaches the disk, past the funnel that holds the node, and the image is complete.

    Before its node is inactive, or has other options and perhaps other children.
    """

    node: Node

    async def prepare(self) -> None:
        node = self.node
        if not node.active or node.mode.read_only or (node.mode.cache_no_flush and not node.driver.children):
            return
        try:
            await call(node.driver, Op.FLUSH, 0, 0)
        except OSError as error:
            raise QmpError(errno_text(error.errno or 0)) from None
        await node.driver.inactivate()


class Firm(Wrapper):
    """A step that is taken although it cannot be taken in full: there is no way back."""

    async def prepare(self) -> None:
        """Do as much of it as can be done."""
        try:
            await super().prepare()
        except FAILURES as error:
            log.error("%r is not complete: %s", self.action, error)


@attrs.define(eq=False)
class Swap(Action):
    """An edge leads elsewhere already while its parent prepares, as the parent has to look at its new child."""

    edge: Edge
    child: Node
    before: Node = attrs.field(init=False)

    def commit(self) -> None:
        """What lived for a node further up, or for one in between, lives for the node it is now below."""
        parent = self.edge.parent
        if parent is not None:
            is_heir = parent in owners_of(self.child)
            disown(parent, self.before)
            if is_heir:
                info_of(self.child).inline_parent = parent

    async def prepare(self) -> None:
        self.before = self.edge.node
        self._move(self.before, self.child)

    def abort(self) -> None:
        self._move(self.child, self.before)

    def _move(self, source: Node, target: Node) -> None:
        info_of(source).parents.remove(self.edge)
        self.edge.bind(target)
        info_of(target).parents.append(self.edge)
        info_of(target).parents.sort(key=lambda edge: edge.key)


@attrs.define(eq=False)
class Reopen(Action):
    """New options for one node's driver."""

    node: Node
    new: NewMode

    async def prepare(self) -> None:
        await self.node.driver.prepare_reopen(self.new.options, self.new.mode)

    def commit(self) -> None:
        self.node.driver.commit_reopen(self.new.options, self.new.mode)
        info_of(self.node).options = self.new.options

    def abort(self) -> None:
        self.node.driver.abort_reopen()


@attrs.define(eq=False)
class Permissions(Action):
    """What the users of one node need together, told to its driver."""

    node: Node
    rights: Rights
    firmness: Firmness
    is_refused: bool = False

    async def prepare(self) -> None:
        try:
            await self.node.driver.prepare_permissions(self.rights.perm, self.rights.shared)
        except FAILURES as error:
            if self.firmness is Firmness.MAY_FAIL:
                raise
            log.warning("%s keeps permissions nobody uses: %s", self.node.name, error)
            self.is_refused = True

    def commit(self) -> None:
        if not self.is_refused:
            self.node.driver.commit_permissions()
        # Also takes over what the driver's new descriptor has changed.
        self.node.set_writable(writable=bool(self.rights.perm & WRITING))

    def abort(self) -> None:
        if not self.is_refused:
            self.node.driver.abort_permissions()


@attrs.define(eq=False)
class Activity(Action):
    """A node begins or ends to take part. What it is may have been changed by another owner meanwhile."""

    node: Node
    active: bool = attrs.field(kw_only=True)

    def commit(self) -> None:
        driver = self.node.driver
        driver.mode = attrs.evolve(driver.mode, active=self.active)
        if self.active:
            driver.refresh_length()
        self.node.set_active(active=self.active)
