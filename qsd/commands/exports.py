"""Commands about exports and the NBD server."""

from __future__ import annotations

from typing import Any

from qsd.commands.context import Context
from qsd.commands.registry import command
from qsd.qapi.schema.exports import BlockExportOptionsNbd, BlockExportRemoveMode, BlockExportType


@command("nbd-server-start")
async def nbd_server_start(context: Context, args: Any) -> None:
    """Listen for NBD clients."""
    await context.services.nbd.start(args, allow_fd=False)


@command("nbd-server-stop")
async def nbd_server_stop(context: Context, _args: Any) -> None:
    """Close the listener and every NBD export."""
    await context.services.nbd.stop()


@command("block-export-add")
async def block_export_add(context: Context, args: Any) -> None:
    """Create an export."""
    await context.services.exports.add(args)


@command("block-export-del")
async def block_export_del(context: Context, args: Any) -> None:
    """Begin the end of an export; BLOCK_EXPORT_DELETED says when it is gone."""
    context.services.exports.delete(args.id, hard=args.mode is BlockExportRemoveMode.HARD)


@command("query-block-exports")
async def query_block_exports(context: Context, _args: Any) -> list[dict[str, Any]]:
    """All exports, newest first."""
    return [
        {
            "id": entry.id,
            "type": entry.export.type_name,
            "node-name": entry.edge.node_name,
            "shutting-down": entry.is_shutting_down,
        }
        for entry in context.services.exports.entries()
    ]


@command("nbd-server-add")
async def nbd_server_add(context: Context, args: Any) -> None:
    """The old way to add an export: its id is its name; a read-only node is silently exported read-only."""
    node = context.services.graph.find(args.device, "Cannot find device='{}' nor node-name='{}'")
    name = args.device if args.name is None else args.name
    await context.services.exports.add(
        BlockExportOptionsNbd(
            type=BlockExportType.NBD,
            id=name,
            node_name=node.name,
            name=name,
            writable=bool(args.writable) and not node.mode.read_only,
            description=args.description,
            bitmaps=None if args.bitmap is None else (args.bitmap,),
        )
    )


@command("nbd-server-remove")
async def nbd_server_remove(context: Context, args: Any) -> None:
    """The old way to delete an export."""
    context.services.exports.delete(args.name, hard=args.mode is BlockExportRemoveMode.HARD)
