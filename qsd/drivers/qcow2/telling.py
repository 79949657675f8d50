"""What a qcow2 node answers when it is asked where something is, and about itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from qsd.drivers.base import Child, Host, Mode
from qsd.drivers.filenames import name_above_file, place_of
from qsd.drivers.mapped import MappedDriver
from qsd.drivers.qcow2 import compressed, facts, snapshot_table
from qsd.drivers.qcow2.layout import DIRTY
from qsd.drivers.runs import Run
from qsd.drivers.snapshots import InternalSnapshot
from qsd.errors import QmpError
from qsd.qapi.rows import Rows

if TYPE_CHECKING:
    from qsd.drivers.qcow2.image import Image

# Clusters of an image that may be holes before it is looked at where they are.
SLACK: Final = 2


class TellingDriver(MappedDriver):
    """The part of the driver that only looks; see the module."""

    image: Image

    def __init__(self, node_name: str, options: Any, mode: Mode, host: Host) -> None:
        super().__init__(node_name, options, mode, host)
        # The name of the backing file that is the image's own: as the image has it, or as it was opened by that.
        self.own_backing = ""
        self._is_sparse: bool | None = None

    # -- where things are -------------------------------------------------------------------------------------

    def lookup(self, offset: int, length: int) -> Run:
        """The run at ``offset``."""
        return self.image.map.lookup(offset, length)

    def status(self, offset: int, length: int) -> tuple[int, int]:
        """Kind and length of the run at ``offset``."""
        return self.image.map.status(offset, length)

    @property
    def lends(self) -> bool:
        """Until clusters change their owners."""
        return self.image.lends

    @property
    def asks_data(self) -> bool:
        """True where much of the file is a hole: metadata was preallocated, and reads as zeroes.

        Room that the file has ahead is none of that. Counted in whole clusters, as the reference does.
        """
        if self._is_sparse is None:
            image = self.image
            size, cluster = facts.allocated_size({"file": image.file}), image.geometry.cluster_size
            used, end = (size or 0) // cluster, min(image.file.length, image.virgin or image.file.length)
            is_sparse = size is not None and max(used * 10 // 9, used + SLACK) <= -(-end // cluster)
            # What is encrypted is never known to be zeroes.
            self._is_sparse = is_sparse and not image.header.has_data_file and not image.is_encrypted
        return self._is_sparse

    def locate(self, where: int) -> tuple[Child, int, int]:
        """Where the bytes of a compressed L2 entry are."""
        offset, length = compressed.decode_entry(where, self.image.geometry.cluster_bits)
        return self.image.file, offset, length

    def unpack(self, where: int, data: memoryview) -> bytes | bytearray:
        """Inflate a cluster."""
        return self.image.inflater.inflate(data)

    def packed_skip(self, offset: int) -> int:
        """How far into its cluster an offset is."""
        return offset & (self.image.geometry.cluster_size - 1)

    # -- what it is made of -----------------------------------------------------------------------------------

    def allocated_size(self) -> int | None:
        """Bytes used on the host, by the image and its data file."""
        return facts.allocated_size(self.children)

    def dirty_flag(self) -> bool | None:
        """True when refcounts may be out of date."""
        return bool(self.image.header.incompatible & DIRTY)

    def filename(self) -> str:
        """The file's name, unless another backing file makes it another disk."""
        backing = self.children.get("backing")
        name = "" if backing is None else facts.name_of(backing)
        is_other = name != self.own_backing
        own = facts.naming_options(self.children, self.options, has_other_backing=is_other)
        return name_above_file(self, own)

    def image_facts(self) -> dict[str, Any]:
        """Cluster size and what the header says about a backing file."""
        return facts.image_facts(self.image.header, place_of(self))

    def format_specific(self) -> dict[str, Any] | None:
        """``ImageInfoSpecificQCow2``."""
        bitmaps = None if self.bitmap_store is None else self.bitmap_store.facts()
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

    def find_snapshot(self, snapshot_id: str | None, name: str | None) -> InternalSnapshot | None:
        """The first with that id and that name, each None for any."""
        found = snapshot_table.find(self.image.snapshots, snapshot_id, name)
        return None if found is None else found.shown

    def snapshot_rows(self) -> Rows[Any]:
        """``snapshots``, one after the other: there may be tens of thousands."""
        return Rows(self.image.snapshots, lambda snapshot: snapshot.shown.as_json())
