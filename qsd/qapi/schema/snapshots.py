"""Snapshots: overlays put above nodes, snapshots inside images, the name of the backing file."""

from __future__ import annotations

from enum import Enum

from qsd.qapi.core import SCHEMA, Command, enum, struct
from qsd.qapi.schema.block_info import SnapshotInfo


@enum("NewImageMode")
class NewImageMode(str, Enum):
    EXISTING = "existing"
    ABSOLUTE_PATHS = "absolute-paths"


@struct("BlockdevSnapshot")
class BlockdevSnapshot:
    node: str
    overlay: str


@struct("BlockdevSnapshotSync")
class BlockdevSnapshotSync:
    device: str | None = None
    node_name: str | None = None
    snapshot_file: str
    snapshot_node_name: str | None = None
    format: str | None = None
    mode: NewImageMode | None = None


@struct("BlockdevSnapshotInternal")
class BlockdevSnapshotInternal:
    device: str
    name: str


@struct("blockdev-snapshot-delete-internal-sync-arg")
class BlockdevSnapshotDeleteInternalArgs:
    device: str
    id: str | None = None
    name: str | None = None


@struct("change-backing-file-arg")
class ChangeBackingFileArgs:
    device: str
    image_node_name: str
    backing_file: str


SCHEMA.declare(
    Command("blockdev-snapshot", args=BlockdevSnapshot, features=("allow-write-only-overlay",)),
    Command("blockdev-snapshot-sync", args=BlockdevSnapshotSync),
    Command("blockdev-snapshot-internal-sync", args=BlockdevSnapshotInternal),
    Command(
        "blockdev-snapshot-delete-internal-sync", args=BlockdevSnapshotDeleteInternalArgs, returns=SnapshotInfo
    ),
    Command("change-backing-file", args=ChangeBackingFileArgs),
)
