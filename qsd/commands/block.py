"""Commands about block nodes."""

from __future__ import annotations

from typing import Any

from qsd.actors import graph as messages
from qsd.actors.edges import info
from qsd.actors.node import Node
from qsd.block.permissions import PERM_NAMES, Perm
from qsd.commands.context import Context
from qsd.commands.registry import command
from qsd.errors import QmpError

# Counters the reference keeps for devices only, or that need completion times; they are 0 there for nodes as well.
_NOT_COUNTED = (
    "zone_append_bytes",
    "zone_append_operations",
    "rd_total_time_ns",
    "wr_total_time_ns",
    "zone_append_total_time_ns",
    "flush_total_time_ns",
    "unmap_total_time_ns",
    "rd_merged",
    "wr_merged",
    "zone_append_merged",
    "unmap_merged",
    "failed_rd_operations",
    "failed_wr_operations",
    "failed_zone_append_operations",
    "failed_flush_operations",
    "failed_unmap_operations",
    "invalid_rd_operations",
    "invalid_wr_operations",
    "invalid_zone_append_operations",
    "invalid_flush_operations",
    "invalid_unmap_operations",
)


@command("blockdev-add")
async def blockdev_add(context: Context, args: Any) -> None:
    """Open a node, with its inline children, or nothing."""
    await context.services.graph.ref.ask(messages.AddNode(args))


@command("blockdev-del")
async def blockdev_del(context: Context, args: Any) -> None:
    """Close a node that nobody uses."""
    await context.services.graph.ref.ask(messages.DeleteNode(args.node_name))


@command("blockdev-reopen")
async def blockdev_reopen(context: Context, args: Any) -> None:
    """Change the options of several nodes, all or none."""
    await context.services.graph.ref.ask(messages.Reopen(args.options))


@command("block_resize")
async def block_resize(context: Context, args: Any) -> None:
    """Give a node another length. ``device`` names devices, of which there are none here."""
    if args.node_name is None:
        raise QmpError(f"Cannot find device='{args.device or ''}' nor node-name=''")
    await context.services.graph.ref.ask(messages.Resize(args.node_name, args.size))


@command("blockdev-set-active")
async def blockdev_set_active(context: Context, args: Any) -> None:
    """Take part in I/O, or leave the image to somebody else."""
    await context.services.graph.ref.ask(messages.SetActive(args.node_name, args.active))


@command("block-set-write-threshold")
async def block_set_write_threshold(context: Context, args: Any) -> None:
    """Arm the one-shot event at an offset; 0 disarms."""
    node = context.services.graph.find(args.node_name)
    if node is None:
        raise QmpError(f"Device '{args.node_name}' not found")
    node.set_write_threshold(args.write_threshold)


@command("query-block")
async def query_block(_context: Context, _args: Any) -> list[Any]:
    """Devices: a storage daemon has none."""
    return []


@command("query-named-block-nodes")
async def query_named_block_nodes(context: Context, _args: Any) -> list[dict[str, Any]]:
    """All nodes, newest first. No driver has a backing file yet, so ``flat`` changes nothing."""
    return [_describe(node) for node in context.services.graph.nodes()]


def _describe(node: Node) -> dict[str, Any]:
    mode, driver, limits = node.mode, node.driver, node.limits
    image: dict[str, Any] = {
        "filename": driver.filename(),
        "format": driver.name,
        "virtual-size": node.length,
        "limits": {
            "request-alignment": limits.request_alignment,
            "min-mem-alignment": limits.min_mem_alignment,
            "opt-mem-alignment": limits.opt_mem_alignment,
            "max-iov": limits.max_iov,
        },
    }
    allocated = driver.allocated_size()
    if allocated is not None:
        image["actual-size"] = allocated
    specific = driver.format_specific()
    if specific is not None:
        image["format-specific"] = specific
    rates = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")
    return {
        "node-name": node.name,
        "drv": driver.name,
        "file": driver.filename(),
        "ro": mode.read_only,
        "active": node.active,
        "encrypted": False,
        "backing_file_depth": 0,
        "detect_zeroes": mode.detect_zeroes.value,
        "cache": {"writeback": True, "direct": mode.cache_direct, "no-flush": mode.cache_no_flush},
        "write_threshold": node.write_threshold,
        "children": [{"child": name, "node-name": child.node_name} for name, child in driver.children.items()],
        "image": image,
        **dict.fromkeys(rates, 0),
    }


@command("query-blockstats")
async def query_blockstats(context: Context, args: Any) -> list[dict[str, Any]]:
    """Counters of every node when asked for nodes; there are no devices."""
    if not args.query_nodes:
        return []
    return [_statistics(node) for node in context.services.graph.nodes()]


def _statistics(node: Node) -> dict[str, Any]:
    stats = node.stats
    answer: dict[str, Any] = {
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
            **dict.fromkeys(_NOT_COUNTED, 0),
        },
    }
    specific = node.driver.driver_statistics()
    if specific is not None:
        answer["driver-specific"] = specific
    file = node.driver.children.get("file")
    if file is not None:
        child = _child(node, "file")
        answer["parent"] = _statistics(child)
    return answer


def _child(node: Node, name: str) -> Node:
    """The node at the other end of a child edge."""
    edge: Any = node.driver.children[name]
    child: Node = edge.node
    return child


@command("x-debug-query-block-graph")
async def x_debug_query_block_graph(context: Context, _args: Any) -> dict[str, Any]:
    """Nodes and edges with their permissions; outside users appear as unnamed block backends."""
    nodes: list[dict[str, Any]] = []
    edges: list[dict[str, Any]] = []
    numbers: dict[object, int] = {}

    def number(item: object, kind: str, name: str) -> int:
        if item not in numbers:
            numbers[item] = len(numbers) + 1
            nodes.append({"id": numbers[item], "type": kind, "name": name})
        return numbers[item]

    all_nodes = context.services.graph.nodes()
    for node in all_nodes:
        number(node, "block-driver", node.name)
    for node in all_nodes:
        for edge in info(node).parents:
            parent = edge.parent
            edges.append(
                {
                    "parent": number(edge, "block-backend", "") if parent is None else numbers[parent],
                    "child": numbers[node],
                    "name": edge.name,
                    "perm": _perm_names(edge.perm),
                    "shared-perm": _perm_names(edge.shared),
                }
            )
    return {"nodes": nodes, "edges": edges}


def _perm_names(perm: Perm) -> list[str]:
    return [name.replace(" ", "-") for bit, name in PERM_NAMES if perm & bit]
