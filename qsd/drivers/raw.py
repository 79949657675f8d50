"""raw: the child's bytes as they are, or a window of them (``offset``, ``size``)."""

from __future__ import annotations

import errno
from typing import Any, ClassVar

from qsd.block.permissions import Perm
from qsd.drivers.base import SECTOR, ChildRole, limits_above
from qsd.drivers.filenames import name_above_file
from qsd.drivers.gather import Callback
from qsd.drivers.passing import PassingDriver
from qsd.drivers.probing import format_of
from qsd.drivers.spot import Spot, end_epoch
from qsd.errors import QmpError
from qsd.messages import BlockState, Extent, Flag, Op, Request


class RawDriver(PassingDriver):
    """See the module."""

    name: ClassVar[str] = "raw"
    is_format: ClassVar[bool] = True
    child_specs: ClassVar[tuple[tuple[str, ChildRole], ...]] = (("file", ChildRole.DATA),)
    can_truncate: ClassVar[bool] = True

    async def open(self) -> None:
        """Check the window against the child."""
        self._offset, self.length = self._window(self.options)
        self._bind()

    def _bind(self) -> None:
        child = self.children["file"]
        # Whole sectors where the first one is looked at when it is written.
        self.limits = limits_above(child.limits, request_alignment=SECTOR if self.is_probed else 1)
        end_epoch()
        # Nodes are as long as whole sectors. Behind an odd offset the last of them is not whole in the child.
        self._inside = child.length - self._offset
        self._is_torn = -(-self.length // SECTOR) * SECTOR > self._inside

    def _window(self, options: Any) -> tuple[int, int]:
        offset, size = options.offset or 0, options.size
        total = self.children["file"].length
        for name, value in (("offset", offset), ("size", size or 0)):
            if value < 0:
                raise QmpError(f"Value '{value}' is out of range for parameter '{name}'")
        if offset > total:
            raise QmpError(f"Offset ({offset}) cannot be greater than size of the containing file ({total})")
        if size is None:
            return offset, total - offset
        if offset + size > total:
            raise QmpError(
                f"The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the "
                f" actual size of the containing file ({total})"
            )
        if size % SECTOR:
            raise QmpError("Specified size is not multiple of 512")
        return offset, size

    @property
    def _is_window(self) -> bool:
        return bool(self.options.offset) or self.options.size is not None

    def submit(self, batch: list[Request]) -> None:
        """Pass on, shifted."""
        if self.is_probed:
            batch = [request for request in batch if not _turns_into_format(request)]
        if self._is_torn:
            batch = [request for request in batch if not self._reaches_over(request)]
        offset = self._offset
        if offset:
            for request in batch:
                if request.op != Op.FLUSH:
                    request.offset += offset
        self.children["file"].submit(batch)

    def spot(self) -> Spot | None:
        """The child's; a window is left to the usual way."""
        return None if self._is_torn or self._is_window else self.children["file"].spot()

    def _reaches_over(self, request: Request) -> bool:
        """Serve a request that reaches over the child's end: there it reads as zeroes, and takes no data."""
        inside = max(0, self._inside - request.offset)
        if request.length <= inside or request.op == Op.FLUSH:
            return False
        buffer = request.buffer
        if request.op == Op.WRITE:
            request.complete(errno.ENOSPC)
            return True
        if buffer is not None:
            buffer[inside:] = bytes(request.length - inside)
            buffer = buffer[:inside]
        if not inside:
            request.result = [Extent(request.length, BlockState.ZERO | BlockState.ALLOCATED)]
            request.complete()
            return True

        def ended(part: Request) -> None:
            self.finished()
            request.result = part.result
            request.complete(part.error)

        self.started()
        flags = request.flags & ~Flag.MAY_LEND
        part = Request(request.op, request.offset + self._offset, inside, buffer, Callback(ended), flags)
        part.extents_wanted = request.extents_wanted
        self.children["file"].submit([part])
        return True

    async def prepare_reopen(self, options: Any, mode: Any) -> None:
        """The window may change."""
        self._next = self._window(options)

    def commit_reopen(self, options: Any, mode: Any) -> None:
        """Take the window."""
        super().commit_reopen(options, mode)
        self._offset, self.length = self._next
        self._bind()

    def child_permissions(self, name: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """What the parents need; a window must not be cut off under them."""
        return perm, shared & ~Perm.RESIZE if self._is_window else shared

    async def truncate(self, size: int, *, exact: bool = True) -> None:
        """Resize the child, unless the size is fixed by an option."""
        if self.options.size is not None:
            raise QmpError("Cannot resize fixed-size raw disks")
        await self.children["file"].truncate(self._offset + size, exact=exact)
        self.refresh_length()

    def grow(self, size: int) -> bool:
        """Grow the child, unless the size is fixed by an option."""
        if size <= self.length:
            return True
        if self.options.size is not None:
            raise OSError(errno.ENOSPC, "the window ends here")
        if not self.children["file"].grow(self._offset + size):
            return False
        self.refresh_length()
        return True

    def refresh_length(self) -> None:
        """The child has another length, or other limits."""
        if self.options.size is None:
            self.length = max(0, self.children["file"].length - self._offset)
        self._bind()

    def filename(self) -> str:
        """The child's, unless a window makes it another disk."""
        shown = {name: value for name in ("offset", "size") if (value := getattr(self.options, name)) is not None}
        return name_above_file(self, {name: str(value) for name, value in shown.items()})


def _turns_into_format(request: Request) -> bool:
    """Refuse a write after which probing would find something else than raw.

    What the guest writes there would be believed by the next to open the image: a backing file's name, for one.
    """
    buffer = request.buffer
    if request.op != Op.WRITE or request.offset or buffer is None or format_of(bytes(buffer[:SECTOR])) == "raw":
        return False
    request.complete(errno.EPERM)
    return True
