"""``blockdev-create`` and ``x-blockdev-amend``: jobs that write a new image, or change one in place."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, ClassVar

import attrs
import trio

from qsd.actors.edges import RootEdge, RootOptions
from qsd.actors.graph import Graph
from qsd.actors.jobs.job import Job, JobOptions
from qsd.actors.node import Node
from qsd.actors.opening import shielded
from qsd.block.permissions import Perm
from qsd.drivers.base import Child
from qsd.drivers.creating import Creator
from qsd.qapi.schema.jobs import JobType

# How an image is written into: its old contents are nobody's any more. Readers may go on; of two images that are
# made in one file at the same time, neither would be whole.
_WRITE = RootOptions(
    Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE, Perm.ALL & ~(Perm.WRITE | Perm.RESIZE), needs_active=True
)
# The same for an image that is changed in place, which goes on being exported and keeps its length.
_AMEND = RootOptions(Perm.CONSISTENT_READ | Perm.WRITE, needs_active=True, amends=True)
_AMEND_READ_ONLY = RootOptions(Perm.CONSISTENT_READ, needs_active=True, amends=True)


@attrs.frozen
class CreateServices:
    """What creators are lent of the daemon."""

    graph: Graph
    secret: Callable[[str], bytes]
    warn: Callable[[str], None]


@attrs.frozen
class JobCreateHost:
    """The ``CreateHost`` of a job."""

    services: CreateServices
    show_progress: Callable[[int, int], None]

    def node(self, ref: Any) -> AbstractAsyncContextManager[Child]:
        """See ``CreateHost``."""
        return self._node(ref)

    @asynccontextmanager
    async def _node(self, ref: Any) -> AsyncIterator[Child]:
        edge = await self.services.graph.attach_ref(ref, _WRITE)
        try:
            yield edge
        finally:
            await shielded(edge.detach)

    def secret(self, name: str) -> bytes:
        """See ``CreateHost``."""
        return self.services.secret(name)

    def warn(self, text: str) -> None:
        """See ``CreateHost``."""
        self.services.warn(text)

    async def in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        """See ``CreateHost``."""
        return await trio.to_thread.run_sync(function, *args)

    def progress(self, done: int, total: int) -> None:
        """See ``CreateHost``."""
        self.show_progress(done, total)


class _OneStep(Job):
    """A job whose progress counts 0 of 1 and then 1 of 1, however it ends, where it cannot tell more."""

    async def run(self) -> None:
        """Do the work as one step."""
        self.show_progress(0, 1)
        try:
            await self.work()
        finally:
            self.show_progress(1, 1)

    async def work(self) -> None:
        """Do the work. Raises QmpError or OSError."""
        raise NotImplementedError


class CreateJob(_OneStep):
    """Make a new image. The user dismisses it, because its error is all there is to learn from it."""

    type: ClassVar[JobType] = JobType.CREATE

    def __init__(self, name: str, creator: Creator, options: Any, services: CreateServices) -> None:
        super().__init__(JobOptions(name, auto_dismiss=False))
        self._creator = creator
        self._image = options
        self._services = services

    async def work(self) -> None:
        """Let the creator write the image."""
        await self._creator(JobCreateHost(self._services, self.show_progress), self._image)


class AmendJob(_OneStep):
    """Change properties of an image that is in use."""

    type: ClassVar[JobType] = JobType.AMEND

    def __init__(self, name: str, node: Node, options: Any, services: CreateServices, *, force: bool) -> None:
        super().__init__(JobOptions(name, auto_dismiss=False))
        self._node = node
        self._changes = options
        self._services = services
        self._force = force
        self._edge: RootEdge | None = None

    async def take_node(self) -> None:
        """Get the right to change the image; before ``start``. Raises QmpError."""
        driver = self._node.driver
        is_spared = (driver.amends_read_only and driver.mode.read_only) or not _wishes(self._changes)
        rights = _AMEND_READ_ONLY if is_spared else _AMEND
        self._edge = await self._services.graph.attach(self._node.name, rights)

    async def work(self) -> None:
        """Let the driver change its image."""
        # Not the edge's node, which may be an overlay by now.
        await self._node.driver.amend(self._changes, force=self._force)

    async def clean(self) -> None:
        """Let go of the node."""
        edge, self._edge = self._edge, None
        if edge is not None:
            await edge.detach()


def _wishes(changes: Any) -> set[str]:
    """What amend options say beyond the driver's name."""
    return {name for name, value in vars(changes).items() if value is not None} - {"driver"}
