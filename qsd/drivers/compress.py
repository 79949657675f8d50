"""compress: what is written through it is written compressed; everything else passes.

Requests come in whole clusters of the format below (the request alignment), so that the node puts smaller writes
together with what is there. As in the reference a compressed write never goes over data that is there already: the
format refuses it (EIO).
"""

from __future__ import annotations

from typing import ClassVar

from qsd.drivers.filenames import object_text, tree_text
from qsd.drivers.filters import FilterDriver
from qsd.drivers.mapped import fill_zeroes
from qsd.errors import QmpError
from qsd.messages import Flag, Op, Request

_WRITE = Op.WRITE.value
_COMPRESSED = Flag.COMPRESSED.value
_TRANSFERS = (Op.READ.value, _WRITE)


class CompressDriver(FilterDriver):
    """See the module."""

    name: ClassVar[str] = "compress"
    can_reopen: ClassVar[bool] = False

    async def open(self) -> None:
        """Refuse what cannot hold compressed data."""
        below = self.below
        if not below.can_compress():
            raise QmpError(f"Compression is not supported for underlying format: {below.name}")
        await super().open()

    def refresh_length(self) -> None:
        """The child's length; requests in its clusters."""
        super().refresh_length()
        self.limits.request_alignment = self.below.image_facts()["cluster-size"]

    def submit(self, batch: list[Request]) -> None:
        """Pass on; the disk's last cluster may end before the cluster does."""
        end = self.children["file"].length
        for request in batch:
            if request.op == _WRITE:
                request.flags |= _COMPRESSED
            if request.offset + request.length > end:
                self._cut(request, end)
        super().submit(batch)

    def _cut(self, request: Request, end: int) -> None:
        inside = max(0, end - request.offset)
        if request.op in _TRANSFERS:
            assert request.buffer is not None
            if request.op != _WRITE:
                fill_zeroes(request.buffer[inside:])
            request.buffer = request.buffer[:inside]
        request.length = inside

    def can_compress(self) -> bool:
        """One is enough."""
        return False

    def filename(self) -> str:
        """A disk of its own."""
        return "json:" + object_text(self.name, {"file": tree_text(self.below)})
