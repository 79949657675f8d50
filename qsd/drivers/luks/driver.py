"""luks: the child's bytes, decrypted. The header is in front of the data, or in the child ``header``.

As in the reference a discard does nothing, zeroes are written as encrypted zeroes, and all of the volume is data.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from typing import Any, ClassVar

import trio

from qsd.block.permissions import Perm
from qsd.drivers.base import SECTOR, Child, ChildRole, Driver, Host, Limits, Mode, limits_above
from qsd.drivers.filenames import object_text, tree_text
from qsd.drivers.luks.amend import amend_volume
from qsd.drivers.luks.header import Header
from qsd.drivers.luks.sealed import SealedChild, Sealer
from qsd.drivers.luks.volume import ChildArea, Volume, open_volume, read_again, volume_info
from qsd.drivers.passing import cluster_size
from qsd.errors import QmpError, errno_text
from qsd.messages import BlockState, Extent, Op, Request

_DATA = BlockState.DATA | BlockState.ALLOCATED
MAX_LENGTH = (1 << 63) - 1


class LuksDriver(Driver):
    """See the module."""

    name: ClassVar[str] = "luks"
    is_format: ClassVar[bool] = True
    child_specs: ClassVar[tuple[tuple[str, ChildRole], ...]] = (
        ("file", ChildRole.DATA),
        ("header", ChildRole.DATA),
    )
    late_children: ClassVar[frozenset[str]] = frozenset({"header"})
    can_truncate: ClassVar[bool] = True
    can_amend: ClassVar[bool] = True
    amends_read_only: ClassVar[bool] = True
    lasting: ClassVar[tuple[str, ...]] = ("key_secret",)
    fixed: ClassVar[frozenset[str]] = frozenset(lasting)

    def __init__(self, node_name: str, options: Any, mode: Mode, host: Host) -> None:
        super().__init__(node_name, options, mode, host)
        self.limits = Limits(request_alignment=SECTOR)
        self._amending = trio.Lock()

    # -- life -------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Unlock the volume with the secret ``key-secret``."""
        if self.options.header is not None and "header" not in self.children:
            await self.host.open_child("header", ChildRole.DATA, self.options.header)
        if self.options.key_secret is None:
            raise QmpError("Parameter 'key-secret' is required for cipher")
        password = self.host.secret(self.options.key_secret)
        header = self.children.get("header")
        self._header_name = header.node_name if header is not None else None
        area = ChildArea(header or self._file)
        self._volume = await open_volume(area, password, is_detached=header is not None)
        self._offset = self._volume.header.payload_offset
        if self._offset > self._file.length:
            raise QmpError(f"Could not refresh total sector count: {errno_text(errno.EIO)}")
        self._sealer = Sealer(self, self._volume.cipher)
        self._sealed = SealedChild(self._sealer, self._file, self._offset)
        self.refresh_length()

    async def close(self) -> None:
        """Free the buffers at once."""
        self._sealer.let_go()

    @property
    def _file(self) -> Child:
        return self.children["file"]

    @property
    def volume(self) -> Volume:
        """The open volume."""
        return self._volume

    def refresh_length(self) -> None:
        """What the child has behind the payload's offset, and its limits."""
        self.limits = limits_above(self._file.limits, request_alignment=SECTOR)
        self.length = max(0, self._file.length - self._offset)

    def child_permissions(self, name: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """What the parents need, and always reading; while key slots change, nobody else may look at them."""
        if self.amending and name == ("header" if "header" in self.children else "file"):
            return perm | Perm.CONSISTENT_READ | Perm.WRITE, shared & ~(Perm.CONSISTENT_READ | Perm.WRITE)
        return perm | Perm.CONSISTENT_READ, shared

    async def prepare_reopen(self, options: Any, mode: Mode) -> None:
        """The header cannot move. Another file may only be one with the same key: the guest would write noise."""
        if isinstance(options.header, str) and options.header != self._header_name:
            raise QmpError("Cannot change the option 'header'")
        self._next = await self._look_again()

    def commit_reopen(self, options: Any, mode: Mode) -> None:
        """Take the key slots and the length as they are there."""
        super().commit_reopen(options, mode)
        self._volume.renew(*self._next)
        self.refresh_length()

    async def activate(self) -> None:
        """Another owner may have changed the key slots: the next key must not get a slot that is taken by now."""
        self._volume.renew(*await self._look_again())
        self.refresh_length()

    async def _look_again(self) -> tuple[Header, Header]:
        """The header as it was known and as it is now. Raises QmpError when the volume is another one."""
        volume = self._volume
        before = volume.header
        try:
            found = await read_again(volume, volume.area)
        except OSError as error:
            raise QmpError(f"Could not read the LUKS header: {errno_text(error.errno or 0)}") from None
        if found is None or found.payload_offset != self._offset:
            raise QmpError("The LUKS volume is another one than it was")
        return before, found

    # -- data -------------------------------------------------------------------------------------------------

    def submit(self, batch: list[Request]) -> None:
        """Answer what the file need not know, and pass on the rest."""
        for request in batch:
            if request.op in _ANSWERED:
                self._answer(batch)
                return
        self._sealed.submit(batch)

    def _answer(self, batch: list[Request]) -> None:
        rest = []
        for request in batch:
            if request.op in _ANSWERED:
                _ANSWERED[request.op](request)
            else:
                rest.append(request)
        if rest:
            self._sealed.submit(rest)

    # -- change -----------------------------------------------------------------------------------------------

    async def truncate(self, size: int, *, exact: bool = True) -> None:
        """Resize the child."""
        if size > MAX_LENGTH - self._offset:
            raise QmpError("The requested file size is too large")
        await self._file.truncate(self._offset + size, exact=exact)
        self.length = size

    async def amend(self, options: Any, *, force: bool) -> None:
        """Add or erase key slots."""
        async with self._amending:
            try:
                await amend_volume(
                    self._volume,
                    options,
                    force=force,
                    secret=self.host.secret,
                    opened_with=self.options.key_secret,
                )
            except OSError as error:
                raise QmpError(f"Could not write the LUKS header: {errno_text(error.errno or errno.EIO)}") from None

    # -- facts ------------------------------------------------------------------------------------------------

    def filename(self) -> str:
        """How the node could be opened again; the password stays a name."""
        shown = {name: tree_text(driver_of(child)) for name, child in self.children.items()}
        return "json:" + object_text(self.name, shown | {"key-secret": json.dumps(self.options.key_secret)})

    def format_specific(self) -> dict[str, Any] | None:
        """``ImageInfoSpecific`` of kind luks."""
        return {"type": "luks", "data": volume_info(self._volume)}

    def image_facts(self) -> dict[str, Any]:
        """The file's cluster size."""
        return cluster_size(driver_of(self._file))

    def is_encrypted(self) -> bool:
        """It is."""
        return True

    def dirty_flag(self) -> bool | None:
        """Never dirty."""
        return False

    def allocated_size(self) -> int | None:
        """The children's together."""
        sizes = [driver_of(child).allocated_size() for child in self.children.values()]
        return None if None in sizes else sum(sizes)


def driver_of(child: Child) -> Any:
    """The driver below an edge."""
    edge: Any = child
    return edge.node.driver


def _discard(request: Request) -> None:
    request.complete(0)


def _block_status(request: Request) -> None:
    request.result = [Extent(request.length, _DATA)]
    request.complete(0)


_ANSWERED: dict[int, Callable[[Request], None]] = {
    Op.DISCARD.value: _discard,
    Op.BLOCK_STATUS.value: _block_status,
}
