"""What nodes have in common that are what their child ``file`` is: facts and internal snapshots are the child's."""

from __future__ import annotations

from typing import Any

from qsd.drivers.base import Driver
from qsd.drivers.filenames import name_of
from qsd.drivers.snapshots import InternalSnapshot
from qsd.qapi.rows import Rows


class PassingDriver(Driver):
    """See the module."""

    @property
    def below(self) -> Driver:
        """The child's driver."""
        child: Any = self.children["file"]
        driver: Driver = child.node.driver
        return driver

    def filename(self) -> str:
        """The child's."""
        return name_of(self.below)

    def allocated_size(self) -> int | None:
        """The child's."""
        return self.below.allocated_size()

    def dirty_flag(self) -> bool | None:
        """The child's."""
        return self.below.dirty_flag()

    def image_facts(self) -> dict[str, Any]:
        """The child's cluster size."""
        return cluster_size(self.below)

    # A snapshot of the child is one of the disk.

    def can_snapshot(self) -> bool:
        """As the child."""
        return self.below.can_snapshot()

    def snapshots(self) -> list[InternalSnapshot]:
        """The child's."""
        return self.below.snapshots()

    def find_snapshot(self, snapshot_id: str | None, name: str | None) -> InternalSnapshot | None:
        """In the child."""
        return self.below.find_snapshot(snapshot_id, name)

    def snapshot_rows(self) -> Rows[Any]:
        """The child's."""
        return self.below.snapshot_rows()

    async def create_snapshot(self, name: str, now_ns: int) -> str:
        """In the child."""
        return await self.below.create_snapshot(name, now_ns)

    async def delete_snapshot(self, snapshot_id: str) -> None:
        """In the child."""
        await self.below.delete_snapshot(snapshot_id)


def cluster_size(below: Driver) -> dict[str, Any]:
    """The cluster size as a member of ImageInfo, where the driver has one."""
    facts = below.image_facts()
    return {name: facts[name] for name in ("cluster-size",) if name in facts}
