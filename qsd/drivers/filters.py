"""The base of filters, and those that jobs put above the nodes they work on, where users see them."""

from __future__ import annotations

from typing import Any, ClassVar

from qsd.block.permissions import Perm
from qsd.drivers.base import ChildRole, Mode, limits_above
from qsd.drivers.passing import PassingDriver
from qsd.messages import Extent, Op, ReplyQueue, Request

_BLOCK_STATUS = Op.BLOCK_STATUS.value


class Deeper(ReplyQueue):
    """Under a BLOCK_STATUS that passes a filter: as in the reference, what the filtered node has itself counts as
    the filter's, and what lies further down is one layer deeper.
    """

    __slots__ = ("reply",)

    def __init__(self, reply: ReplyQueue) -> None:
        self.ready = []
        self.armed = True
        self.reply = reply

    def notify(self) -> None:
        """The answer has come."""
        request = self.ready.pop()
        request.reply = self.reply
        if not request.error:
            request.result = [
                Extent(extent.length, extent.state, extent.depth + (extent.depth > 1)) for extent in request.result
            ]
        request.complete(request.error)


class FilterDriver(PassingDriver):
    """Passes everything to its child, and is what its child is."""

    is_filter: ClassVar[bool] = True
    child_specs: ClassVar[tuple[tuple[str, ChildRole], ...]] = (("file", ChildRole.FILTERED),)
    can_truncate: ClassVar[bool] = True

    async def open(self) -> None:
        """Be as long as the child."""
        self.refresh_length()

    def submit(self, batch: list[Request]) -> None:
        """Pass on."""
        for request in batch:
            if request.op == _BLOCK_STATUS:
                request.reply = Deeper(request.reply)
        self.children["file"].submit(batch)

    async def truncate(self, size: int, *, exact: bool = True) -> None:
        """Resize the child."""
        await self.children["file"].truncate(size, exact=exact)
        self.refresh_length()

    def refresh_length(self) -> None:
        """The child's length; limits above it."""
        self.length = self.children["file"].length
        self.limits = limits_above(self.children["file"].limits)

    def commit_reopen(self, options: Any, mode: Mode) -> None:
        """The child may be another."""
        super().commit_reopen(options, mode)
        self.refresh_length()

    def can_compress(self) -> bool:
        """As the child."""
        return self.below.can_compress()


class StreamFilter(FilterDriver):
    """What stands above a node that is being streamed into. (What the job copies it copies below the filter.)"""

    name: ClassVar[str] = "copy-on-read"

    def child_permissions(self, name: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """Besides what its users do, data is copied, which changes nothing for them."""
        unchanged = Perm.WRITE_UNCHANGED
        return (perm | unchanged if self.mode.active else perm), shared | unchanged
