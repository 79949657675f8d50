"""The image of an overlay that blockdev-snapshot-sync makes, and the node it opens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import trio

from qsd.actors.jobs.create import JobCreateHost
from qsd.drivers.file_create import remove_file
from qsd.drivers.implicit import format_options, protocol_options
from qsd.drivers.registry import CREATORS, DRIVERS
from qsd.errors import QmpError
from qsd.qapi.core import NULL
from qsd.qapi.schema.block import BlockdevCacheOptions, BlockdevDiscardOptions
from qsd.qapi.schema.create import BlockdevCreateOptions
from qsd.qapi.schema.snapshots import BlockdevSnapshotSync, NewImageMode
from qsd.qapi.visit import from_json

if TYPE_CHECKING:
    from qsd.actors.node import Node
    from qsd.commands.context import Services
    from qsd.qapi.schema.block import BlockdevOptions

DEFAULT_FORMAT = "qcow2"


async def make_overlay(services: Services, args: BlockdevSnapshotSync, node: Node, name: str) -> Node:
    """Make the image for an overlay of ``node`` (unless it exists) and open it, with one pin of the caller's.

    ``name`` is what it calls its backing file. Raises QmpError; an image that was made stays.
    """
    wanted = args.format or DEFAULT_FORMAT
    if args.mode is not NewImageMode.EXISTING:
        await _create(services, wanted, args.snapshot_file, node, name)
    return await services.graph.tools.opener.open(_options(wanted, args, node))


async def _create(services: Services, wanted: str, filename: str, node: Node, backing: str) -> None:
    driver = DRIVERS.get(wanted)
    if driver is None:
        raise QmpError(f"Unknown file format '{wanted}'")
    # The reference makes raw images the old way only, which is enough for what it complains about next.
    if wanted not in CREATORS and wanted != "raw":
        raise QmpError(f"Format driver '{wanted}' does not support image creation")
    file = protocol_options(filename)
    if not driver.can_have_backing():
        raise QmpError(f"Backing file not supported for file format '{wanted}'")
    if backing == filename:
        raise QmpError("Error: Trying to create an image with the same filename as the backing file")
    host = JobCreateHost(services.creating, _ignore_progress)
    image = {
        "driver": wanted,
        "file": file,
        "size": node.length,
        "backing-file": backing,
        "backing-fmt": node.driver.name,
    }
    if file["driver"] not in CREATORS:
        await _make(host, image)
        return
    await _make(host, {**file, "size": 0})
    try:
        await _make(host, image)
    except QmpError:
        # On a full disk it would keep what space there was. The reference takes it away, too.
        await trio.to_thread.run_sync(remove_file, file["filename"])
        raise


async def _make(host: JobCreateHost, tree: dict[str, Any]) -> None:
    await CREATORS[tree["driver"]](host, from_json(BlockdevCreateOptions, tree))


def _ignore_progress(_done: int, _total: int) -> None:
    """Nobody is told."""


def _options(wanted: str, args: BlockdevSnapshotSync, node: Node) -> BlockdevOptions:
    """How the overlay is opened: without a backing file, and otherwise as the node is."""
    if wanted.startswith("null"):
        raise QmpError(f"The only allowed filename for this driver is '{wanted}://'")
    options: Any = format_options(args.snapshot_file, "", wanted)[0]
    mode = node.mode
    backing = {"backing": NULL} if DRIVERS[wanted].can_have_backing() else {}
    opened: BlockdevOptions = attrs.evolve(
        options,
        node_name=args.snapshot_node_name,
        read_only=mode.read_only,
        cache=BlockdevCacheOptions(direct=mode.cache_direct, no_flush=mode.cache_no_flush),
        discard=BlockdevDiscardOptions.UNMAP if mode.discard_unmap else BlockdevDiscardOptions.IGNORE,
        **backing,
    )
    return opened
