"""The commands about snapshots, and ``transaction``, which does several such things at once."""

from __future__ import annotations

from functools import partial
from typing import Any

from qsd.actors.graph_actions import GraphAction
from qsd.actors.snapshots import AbortAction, InternalSnapshotAction, SnapshotAction, SnapshotSyncAction
from qsd.commands.actions import ACTIONS, action
from qsd.commands.context import Context, Services
from qsd.commands.overlays import make_overlay
from qsd.commands.registry import command
from qsd.errors import QmpError
from qsd.qapi.schema.snapshots import (
    BlockdevSnapshot,
    BlockdevSnapshotDeleteInternalArgs,
    BlockdevSnapshotInternal,
    BlockdevSnapshotSync,
    ChangeBackingFileArgs,
)
from qsd.qapi.schema.transaction import Abort, ActionCompletionMode, TransactionArgs


@action("abort", is_command=False)
def _abort(_services: Services, _args: Abort) -> GraphAction:
    return AbortAction()


@action("blockdev-snapshot")
def _snapshot(services: Services, args: BlockdevSnapshot) -> GraphAction:
    return SnapshotAction(tools=services.graph.tools, node_name=args.node, overlay_name=args.overlay)


@action("blockdev-snapshot-sync")
def _snapshot_sync(services: Services, args: BlockdevSnapshotSync) -> GraphAction:
    return SnapshotSyncAction(
        tools=services.graph.tools,
        device=args.device,
        node_name=args.node_name,
        overlay_name=args.snapshot_node_name,
        make=partial(make_overlay, services, args),
    )


@action("blockdev-snapshot-internal-sync")
def _internal_snapshot(services: Services, args: BlockdevSnapshotInternal) -> GraphAction:
    return InternalSnapshotAction(tools=services.graph.tools, device=args.device, name=args.name)


@command("transaction")
async def transaction(context: Context, args: TransactionArgs) -> None:
    """Do all of the actions, or none."""
    mode = args.properties.completion_mode if args.properties is not None else None
    if mode is ActionCompletionMode.GROUPED:
        for each in args.actions:
            raise QmpError(
                f"Action '{each.type.value}' does not support transaction property completion-mode = grouped"
            )
    services = context.services
    await services.graph.transact([ACTIONS[each.type.value](services, each.data) for each in args.actions])


@command("blockdev-snapshot-delete-internal-sync")
async def delete_internal_snapshot(context: Context, args: BlockdevSnapshotDeleteInternalArgs) -> dict[str, Any]:
    """Delete an internal snapshot, and tell what it was."""
    return (await context.services.graph.delete_snapshot(args.device, args.id, args.name)).as_json()


@command("change-backing-file")
async def change_backing_file(context: Context, args: ChangeBackingFileArgs) -> None:
    """Write another name of the backing file into an image."""
    await context.services.graph.change_backing_file(args.device, args.image_node_name, args.backing_file)
