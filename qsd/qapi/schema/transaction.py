"""``transaction``: several actions, all or none."""

from __future__ import annotations

from enum import Enum
from typing import Any

from qsd.qapi.core import SCHEMA, Command, enum, legacy_union, struct
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
    BLOCKDEV_SNAPSHOT = "blockdev-snapshot"
    BLOCKDEV_SNAPSHOT_INTERNAL_SYNC = "blockdev-snapshot-internal-sync"
    BLOCKDEV_SNAPSHOT_SYNC = "blockdev-snapshot-sync"


@legacy_union(
    "TransactionAction",
    {
        TransactionActionKind.ABORT: Abort,
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
