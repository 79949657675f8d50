"""``transaction``: several actions, all or none."""

from __future__ import annotations

from enum import Enum
from typing import Any

from qsd.qapi.core import SCHEMA, Command, enum, legacy_union, struct
from qsd.qapi.schema.bitmaps import BlockDirtyBitmap, BlockDirtyBitmapAdd, BlockDirtyBitmapMerge
from qsd.qapi.schema.snapshots import BlockdevSnapshot, BlockdevSnapshotInternal, BlockdevSnapshotSync


@struct("Abort")
class Abort:
    """An action that fails."""


@enum("ActionCompletionMode")
class ActionCompletionMode(str, Enum):
    INDIVIDUAL = "individual"
    GROUPED = "grouped"


@enum("TransactionActionKind")
class TransactionActionKind(str, Enum):
    ABORT = "abort"
    BLOCK_DIRTY_BITMAP_ADD = "block-dirty-bitmap-add"
    BLOCK_DIRTY_BITMAP_CLEAR = "block-dirty-bitmap-clear"
    BLOCK_DIRTY_BITMAP_DISABLE = "block-dirty-bitmap-disable"
    BLOCK_DIRTY_BITMAP_ENABLE = "block-dirty-bitmap-enable"
    BLOCK_DIRTY_BITMAP_MERGE = "block-dirty-bitmap-merge"
    BLOCK_DIRTY_BITMAP_REMOVE = "block-dirty-bitmap-remove"
    BLOCKDEV_SNAPSHOT = "blockdev-snapshot"
    BLOCKDEV_SNAPSHOT_INTERNAL_SYNC = "blockdev-snapshot-internal-sync"
    BLOCKDEV_SNAPSHOT_SYNC = "blockdev-snapshot-sync"


@legacy_union(
    "TransactionAction",
    {
        TransactionActionKind.ABORT: Abort,
        TransactionActionKind.BLOCK_DIRTY_BITMAP_ADD: BlockDirtyBitmapAdd,
        TransactionActionKind.BLOCK_DIRTY_BITMAP_CLEAR: BlockDirtyBitmap,
        TransactionActionKind.BLOCK_DIRTY_BITMAP_DISABLE: BlockDirtyBitmap,
        TransactionActionKind.BLOCK_DIRTY_BITMAP_ENABLE: BlockDirtyBitmap,
        TransactionActionKind.BLOCK_DIRTY_BITMAP_MERGE: BlockDirtyBitmapMerge,
        TransactionActionKind.BLOCK_DIRTY_BITMAP_REMOVE: BlockDirtyBitmap,
        TransactionActionKind.BLOCKDEV_SNAPSHOT: BlockdevSnapshot,
        TransactionActionKind.BLOCKDEV_SNAPSHOT_INTERNAL_SYNC: BlockdevSnapshotInternal,
        TransactionActionKind.BLOCKDEV_SNAPSHOT_SYNC: BlockdevSnapshotSync,
    },
)
class TransactionAction:
    type: TransactionActionKind
    data: Any


@struct("TransactionProperties")
class TransactionProperties:
    completion_mode: ActionCompletionMode | None = None


@struct("transaction-arg")
class TransactionArgs:
    actions: tuple[TransactionAction, ...]
    properties: TransactionProperties | None = None


SCHEMA.declare(Command("transaction", args=TransactionArgs))
