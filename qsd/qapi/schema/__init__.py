"""The declarations: importing this package fills ``qsd.qapi.core.SCHEMA``."""

from qsd.qapi.schema import (
    bitmaps,
    block,
    block_info,
    block_jobs,
    chardev,
    control,
    create,
    exports,
    jobs,
    objects,
    snapshots,
    sockets,
    transaction,
)

__all__ = [
    "bitmaps",
    "block",
    "block_info",
    "block_jobs",
    "chardev",
    "control",
    "create",
    "exports",
    "jobs",
    "objects",
    "snapshots",
    "sockets",
    "transaction",
]
