"""Dirty bitmaps: the commands that make and change them."""

from __future__ import annotations

from typing import Annotated

from qsd.qapi.core import SCHEMA, Alternate, Command, Uint32, struct


@struct("BlockDirtyBitmap")
class BlockDirtyBitmap:
    node: str
    name: str


# A bitmap of the node that is spoken of, by its name, or one of any node.
BlockDirtyBitmapOrStr = Annotated[str | BlockDirtyBitmap, Alternate("BlockDirtyBitmapOrStr")]


@struct("BlockDirtyBitmapAdd")
class BlockDirtyBitmapAdd:
    """``granularity`` in bytes; by default the image's cluster size, or 64 KiB."""

    node: str
    name: str
    granularity: Uint32 | None = None
    persistent: bool | None = None
    disabled: bool | None = None


@struct("BlockDirtyBitmapMerge")
class BlockDirtyBitmapMerge:
    node: str
    target: str
    bitmaps: tuple[BlockDirtyBitmapOrStr, ...]


@struct("BlockDirtyBitmapSha256")
class BlockDirtyBitmapSha256:
    sha256: str


SCHEMA.declare(
    Command("block-dirty-bitmap-add", args=BlockDirtyBitmapAdd),
    Command("block-dirty-bitmap-remove", args=BlockDirtyBitmap),
    Command("block-dirty-bitmap-clear", args=BlockDirtyBitmap),
    Command("block-dirty-bitmap-enable", args=BlockDirtyBitmap),
    Command("block-dirty-bitmap-disable", args=BlockDirtyBitmap),
    Command("block-dirty-bitmap-merge", args=BlockDirtyBitmapMerge),
    Command(
        "x-debug-block-dirty-bitmap-sha256",
        args=BlockDirtyBitmap,
        returns=BlockDirtyBitmapSha256,
        features=("unstable",),
    ),
)
