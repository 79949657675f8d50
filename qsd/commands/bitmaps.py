"""The commands about dirty bitmaps, and the actions that a transaction makes of their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qsd.actors.bitmaps import (
    AddBitmap,
    BitmapAction,
    ClearBitmap,
    MergeBitmaps,
    RemoveBitmap,
    SwitchBitmap,
    find_bitmap,
)
from qsd.actors.topology import Topology
from qsd.commands.context import Context
from qsd.commands.registry import command
from qsd.qapi.schema.bitmaps import (
    BlockDirtyBitmap,
    BlockDirtyBitmapAdd,
    BlockDirtyBitmapMerge,
    BlockDirtyBitmapSha256,
)


def _add(topology: Topology, args: BlockDirtyBitmapAdd) -> BitmapAction:
    return AddBitmap(
        topology=topology,
        node_name=args.node,
        name=args.name,
        granularity=args.granularity,
        is_persistent=bool(args.persistent),
        is_disabled=bool(args.disabled),
    )


def _remove(topology: Topology, args: BlockDirtyBitmap) -> BitmapAction:
    return RemoveBitmap(topology=topology, node_name=args.node, name=args.name)


def _clear(topology: Topology, args: BlockDirtyBitmap) -> BitmapAction:
    return ClearBitmap(topology=topology, node_name=args.node, name=args.name)


def _enable(topology: Topology, args: BlockDirtyBitmap) -> BitmapAction:
    return SwitchBitmap(topology=topology, node_name=args.node, name=args.name, enabled=True)


def _disable(topology: Topology, args: BlockDirtyBitmap) -> BitmapAction:
    return SwitchBitmap(topology=topology, node_name=args.node, name=args.name, enabled=False)


def _merge(topology: Topology, args: BlockDirtyBitmapMerge) -> BitmapAction:
    sources = [(args.node, one) if isinstance(one, str) else (one.node, one.name) for one in args.bitmaps]
    return MergeBitmaps(topology=topology, node_name=args.node, name=args.target, sources=sources)


# The command's name, which is that of the action in a transaction, and what makes the action of its arguments.
BITMAP_ACTIONS: dict[str, Callable[[Topology, Any], BitmapAction]] = {
    "block-dirty-bitmap-add": _add,
    "block-dirty-bitmap-remove": _remove,
    "block-dirty-bitmap-clear": _clear,
    "block-dirty-bitmap-enable": _enable,
    "block-dirty-bitmap-disable": _disable,
    "block-dirty-bitmap-merge": _merge,
}


def _declare(name: str, make: Callable[[Topology, Any], BitmapAction]) -> None:
    @command(name)
    async def change(context: Context, args: Any) -> None:
        graph = context.services.graph
        await graph.change_bitmaps([make(graph.topology, args)])


for _name, _make in BITMAP_ACTIONS.items():
    _declare(_name, _make)


@command("x-debug-block-dirty-bitmap-sha256")
async def x_debug_block_dirty_bitmap_sha256(context: Context, args: BlockDirtyBitmap) -> BlockDirtyBitmapSha256:
    """The digest of a bitmap's bits."""
    _node, bitmap = find_bitmap(context.services.graph.topology, args.node, args.name)
    return BlockDirtyBitmapSha256(sha256=bitmap.bits.digest())
