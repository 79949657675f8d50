"""The commands that act on block nodes."""

from __future__ import annotations

from functools import partial

from qsd.actors.events import EventBus
from qsd.actors.node import Node
from qsd.commands.context import Context
from qsd.commands.registry import command
from qsd.qapi.schema.block import (
    BlockdevDelArgs,
    BlockdevOptions,
    BlockdevReopenArgs,
    BlockdevSetActiveArgs,
    BlockResizeArgs,
    BlockSetWriteThresholdArgs,
)


@command("blockdev-add")
async def blockdev_add(context: Context, args: BlockdevOptions) -> None:
    """Open a node with its inline children."""
    await context.services.graph.add(args)


@command("blockdev-del")
async def blockdev_del(context: Context, args: BlockdevDelArgs) -> None:
    """Close a node nobody uses."""
    await context.services.graph.delete(args.node_name)


@command("blockdev-reopen")
async def blockdev_reopen(context: Context, args: BlockdevReopenArgs) -> None:
    """Give nodes new options, all or none."""
    await context.services.graph.reopen(args.options)


@command("blockdev-set-active")
async def blockdev_set_active(context: Context, args: BlockdevSetActiveArgs) -> None:
    """Activate or inactivate one node with what is below it, or all."""
    await context.services.graph.set_active(args.node_name, active=args.active)


@command("block_resize")
async def block_resize(context: Context, args: BlockResizeArgs) -> None:
    """Give a node another length. ``device`` only finds devices, of which there are none."""
    await context.services.graph.resize(args.node_name, args.size, args.device)


@command("block-set-write-threshold")
async def block_set_write_threshold(context: Context, args: BlockSetWriteThresholdArgs) -> None:
    """Tell once, by event, when a write goes beyond an offset."""
    node = context.services.graph.find(args.node_name, "Device '{}' not found")
    node.on_write_threshold = partial(_threshold_exceeded, context.services.events)
    node.set_write_threshold(args.write_threshold)


def _threshold_exceeded(events: EventBus, node: Node, amount: int, threshold: int) -> None:
    events.emit(
        "BLOCK_WRITE_THRESHOLD",
        {"node-name": node.name, "amount-exceeded": amount, "write-threshold": threshold},
    )
