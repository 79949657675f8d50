"""The queries about block nodes: what they are, what they were asked for, and the graph they form."""

from __future__ import annotations

from typing import Any

from qsd.actors.edges import Edge, info_of
from qsd.actors.node import Node
from qsd.block.dirty import NamedBitmap
from qsd.block.permissions import PERM_NAMES, Perm
from qsd.commands.context import Context
from qsd.commands.registry import command
from qsd.qapi.schema.block_info import QueryBlockArgs, QueryBlockstatsArgs, QueryNamedBlockNodesArgs

Json = dict[str, Any]

# What the reference measures for devices only: absent work and time are 0 for nodes.
_NOT_COUNTED = dict.fromkeys(
    (
        *(f"{what}_total_time_ns" for what in ("rd", "wr", "zone_append", "flush", "unmap")),
        *(f"{what}_merged" for what in ("rd", "wr", "zone_append", "unmap")),
        *(f"failed_{what}_operations" for what in ("rd", "wr", "zone_append", "flush", "unmap")),
        *(f"invalid_{what}_operations" for what in ("rd", "wr", "zone_append", "flush", "unmap")),
        "zone_append_bytes",
        "zone_append_operations",
    ),
    0,
)
_NO_THROTTLING = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)


@command("query-block")
async def query_block(_context: Context, _args: QueryBlockArgs) -> list[Json]:
    """Devices, of which a storage daemon has none."""
    return []


@command("query-named-block-nodes")
async def query_named_block_nodes(context: Context, args: QueryNamedBlockNodesArgs) -> list[Json]:
    """All nodes, newest first. ``flat`` leaves the backing chains out of the images."""
    images: dict[Node, Json] = {}
    return [_device_info(node, images, flat=bool(args.flat)) for node in reversed(context.services.graph.nodes)]


def _device_info(node: Node, images: dict[Node, Json], *, flat: bool) -> Json:
    mode = node.mode
    chain = [] if flat else _backing_chain(node)
    info: Json = {
        "node-name": node.name,
        "drv": node.driver.name,
        "file": node.driver.filename(),
        "ro": mode.read_only,
        "active": node.active,
        "encrypted": node.driver.is_encrypted(),
        "backing_file_depth": len(chain),
        "detect_zeroes": mode.detect_zeroes.value,
        "write_threshold": _signed(node.write_threshold),
        "cache": {"writeback": True, "direct": mode.cache_direct, "no-flush": mode.cache_no_flush},
        "children": [{"child": name, "node-name": edge.node.name} for name, edge in _newest_first(node)],
        "image": _image_with_chain(node, chain, images),
        **_NO_THROTTLING,
    }
    if node.bitmaps:
        info["dirty-bitmaps"] = [_bitmap_info(bitmap) for bitmap in reversed(list(node.bitmaps))]
    backing = _children(node).get("backing")
    if backing is not None:
        info["backing_file"] = backing.node.driver.filename()
    return info


def _bitmap_info(bitmap: NamedBitmap) -> Json:
    info: Json = {
        "recording": bitmap.is_recording,
        "persistent": bitmap.is_persistent,
        "busy": bitmap.is_busy,
        "granularity": bitmap.bits.granularity,
        "count": bitmap.bits.dirty_bytes,
    }
    if bitmap.name is not None:
        info["name"] = bitmap.name
    if bitmap.is_inconsistent:
        info["inconsistent"] = True
    return info


def _signed(number: int) -> int:
    # Set as an unsigned number, told as a signed one (BlockDeviceInfo).
    return number - (1 << 64) if number >= 1 << 63 else number


def _children(node: Node) -> dict[str, Edge]:
    return info_of(node).children


def _newest_first(node: Node) -> list[tuple[str, Edge]]:
    return list(reversed(_children(node).items()))


def _below(node: Node) -> Edge | None:
    """The edge to what a filter filters, or to the backing file."""
    return _children(node).get("file" if node.driver.is_filter else "backing")


def _backing_chain(node: Node) -> list[Node]:
    chain: list[Node] = []
    edge = _below(node)
    while edge is not None:
        chain.append(edge.node)
        edge = _below(edge.node)
    return chain


def _image_with_chain(node: Node, chain: list[Node], images: dict[Node, Json]) -> Json:
    """The image with those below it. ``images`` are known from one question: every one is part of all above it."""
    image: Json | None = None
    for each in reversed((node, *chain)):
        known = images.get(each)
        image = known if known is not None else images.setdefault(each, _image_info(each, image))
    assert image is not None
    return image


def _image_info(node: Node, below: Json | None) -> Json:
    driver = node.driver
    limits = driver.limits
    shown: Json = {
        "request-alignment": limits.request_alignment,
        "min-mem-alignment": limits.min_mem_alignment,
        "opt-mem-alignment": limits.opt_mem_alignment,
        "max-iov": limits.max_iov,
    }
    for name, value in (
        ("max-transfer", limits.max_transfer),
        ("max-hw-transfer", limits.max_hw_transfer),
        ("max-hw-iov", limits.max_hw_iov),
        ("write-zeroes-alignment", limits.pwrite_zeroes_alignment),
        ("discard-alignment", limits.pdiscard_alignment),
    ):
        if value:
            shown[name] = value
    image: Json = {
        "filename": driver.filename(),
        "format": driver.name,
        "virtual-size": node.length,
        "limits": shown,
        **driver.image_facts(),
    }
    if driver.is_encrypted():
        image["encrypted"] = True
    for name, fact in (
        ("actual-size", driver.allocated_size()),
        ("dirty-flag", driver.dirty_flag()),
        ("format-specific", driver.format_specific()),
        ("snapshots", [snapshot.as_json() for snapshot in driver.snapshots()] or None),
    ):
        if fact is not None:
            image[name] = fact
    if below is not None:
        image["backing-image"] = below
    return image


@command("query-blockstats")
async def query_blockstats(context: Context, args: QueryBlockstatsArgs) -> list[Json]:
    """Counters: of devices, of which there are none, or of all nodes, oldest first."""
    return [_statistics(node) for node in context.services.graph.nodes] if args.query_nodes else []


def _statistics(node: Node) -> Json:
    stats = node.stats
    answer: Json = {
        "node-name": node.name,
        "stats": {
            "rd_bytes": stats.rd_bytes,
            "wr_bytes": stats.wr_bytes,
            "unmap_bytes": stats.unmap_bytes,
            "rd_operations": stats.rd_operations,
            "wr_operations": stats.wr_operations,
            "flush_operations": stats.flush_operations,
            "unmap_operations": stats.unmap_operations,
            "wr_highest_offset": stats.wr_highest_offset,
            "account_invalid": False,
            "account_failed": False,
            "timed_stats": [],
            **_NOT_COUNTED,
        },
    }
    specific = node.driver.driver_statistics()
    if specific is not None:
        answer["driver-specific"] = specific
    children = _children(node)
    for name, shown in (("file", "parent"), ("backing", "backing")):
        if name in children:
            answer[shown] = _statistics(children[name].node)
    return answer


@command("x-debug-query-block-graph")
async def x_debug_query_block_graph(context: Context, _args: None) -> Json:
    """Nodes and edges with permissions, newest first; who uses a node from outside is a nameless block-backend.

    The numbers hold for one answer: they count what is met on the way from the oldest user down.
    """
    graph = context.services.graph
    numbers: dict[object, int] = {}
    nodes: list[Json] = []
    edges: list[Json] = []

    def number(thing: object) -> int:
        return numbers.setdefault(thing, len(numbers) + 1)

    def draw(parent: object, edge: Edge) -> None:
        edges.append(
            {
                "parent": number(parent),
                "child": number(edge.node),
                "name": edge.name,
                "perm": _perm_names(edge.perm),
                "shared-perm": _perm_names(edge.shared),
            }
        )

    for root in graph.roots:
        job = root.options.job
        if job is None:
            nodes.append({"id": number(root), "type": "block-backend", "name": ""})
        elif job not in numbers:
            nodes.append({"id": number(job), "type": "block-job", "name": job.id})
        draw(job or root, root)
    for node in graph.nodes:
        nodes.append({"id": number(node), "type": "block-driver", "name": node.name})
        for edge in _children(node).values():
            draw(node, edge)
    return {"nodes": nodes[::-1], "edges": edges[::-1]}


def _perm_names(perm: Perm) -> list[str]:
    return [text.replace(" ", "-") for bit, text in reversed(PERM_NAMES) if perm & bit]
