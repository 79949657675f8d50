"""What a qcow2 node answers when it is asked about itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qsd.drivers.base import Host, Mode
from qsd.drivers.mapped import MappedDriver
from qsd.drivers.qcow2 import facts
from qsd.drivers.qcow2.layout import DIRTY
from qsd.drivers.snapshots import InternalSnapshot
from qsd.errors import QmpError

if TYPE_CHECKING:
    from qsd.drivers.qcow2.image import Image


class TellingDriver(MappedDriver):
    """The part of the driver that only looks; see the module."""

    image: Image

    def __init__(self, node_name: str, options: Any, mode: Mode, host: Host) -> None:
        super().__init__(node_name, options, mode, host)
        self._is_backing_overridden = False

    def allocated_size(self) -> int | None:
        """Bytes used on the host, by the image and its data file."""
        return facts.allocated_size(self.children)

    def dirty_flag(self) -> bool | None:
        """True when refcounts may be out of date."""
        return bool(self.image.header.incompatible & DIRTY)

    def filename(self) -> str:
        """The file's name, unless another backing file makes it another disk."""
        if not self._is_backing_overridden and not self.image.is_encrypted:
            return facts.name_of(self.children["file"])
        return facts.json_name(self.children, self.options, has_other_backing=self._is_backing_overridden)

    def image_facts(self) -> dict[str, Any]:
        """Cluster size and what the header says about a backing file."""
        return facts.image_facts(self.image.header, facts.name_of(self.children["file"]))

    def format_specific(self) -> dict[str, Any] | None:
        """``ImageInfoSpecificQCow2``."""
        bitmaps = [] if self.bitmap_store is None else self.bitmap_store.facts()
        return facts.format_specific(self.image.header, bitmaps, self.image.encryption)

    def is_encrypted(self) -> bool:
        """Whether the guest's data is."""
        return self.image.is_encrypted

    def can_snapshot(self) -> bool:
        """Always; with an external data file there is no list."""
        return True

    def require_snapshots(self) -> None:
        """What lies in another file is not counted. Raises QmpError."""
        if self.image.header.has_data_file:
            raise QmpError("Failed to get a snapshot list: Operation not supported")

    def snapshots(self) -> list[InternalSnapshot]:
        """In the order of the image's list."""
        return [snapshot.shown for snapshot in self.image.snapshots]
