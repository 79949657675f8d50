"""The queries about block nodes: what they are, what they were asked for, and the graph they form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import attrs

from qsd.actors.edges import Edge, info_of
from qsd.actors.node import Node
from qsd.block.dirty import NamedBitmap
from qsd.block.permissions import PERM_NAMES, Perm
from qsd.commands.context import Context
from qsd.commands.registry import Ready, command
from qsd.drivers.filenames import name_of, names_kept
from qsd.qapi.rows import Rows
from qsd.qapi.schema.block_info import QueryBlockArgs, QueryBlockstatsArgs, QueryNamedBlockNodesArgs

if TYPE_CHECKING:
    from qsd.drivers.base import Driver

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
# Characters of a JSON name that are told.
_MAX_NAME: Final = 4095
_NO_THROTTLING = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)


@command("query-block")
async def query_block(_context: Context, _args: QueryBlockArgs) -> list[Json]:
    """Devices, of which a storage daemon has none."""
    return []


@command("query-named-block-nodes")
async def query_named_block_nodes(context: Context, args: QueryNamedBlockNodesArgs) -> Ready:
    """All nodes, newest first. ``flat`` leaves the backing chains out of the images."""
    images = _Images()
    with names_kept():
        nodes = reversed(context.services.graph.nodes)
        return Ready([_device_info(node, images, flat=bool(args.flat)) for node in nodes])


def _device_info(node: Node, images: _Images, *, flat: bool) -> Json:
    mode = node.mode
    image, depth = images.of(node, flat=flat)
    info: Json = {
        "node-name": node.name,
        "drv": node.driver.name,
        "file": _shown_name(node.driver),
        "ro": mode.read_only,
        "active": node.active,
        "encrypted": node.driver.is_encrypted(),
        "backing_file_depth": depth,
        "detect_zeroes": mode.detect_zeroes.value,
        "write_threshold": _signed(node.write_threshold),
        "cache": {"writeback": True, "direct": mode.cache_direct, "no-flush": mode.cache_no_flush},
        "children": [{"child": name, "node-name": edge.node.name} for name, edge in _newest_first(node)],
        "image": image,
        **_NO_THROTTLING,
    }
    if node.bitmaps:
        info["dirty-bitmaps"] = Rows(list(node.bitmaps)[::-1], _bitmap_info)
    backing = _children(node).get("backing")
    if backing is not None:
        info["backing_file"] = _shown_name(backing.node.driver)
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


def _shown_name(driver: Driver) -> str:
    """A name as it is told: of a JSON one that is very long only the beginning, as the reference does."""
    name = name_of(driver)
    return name if len(name) <= _MAX_NAME or not name.startswith("json:") else name[: _MAX_NAME - 3] + "..."


def _not_known(node: Node, known: Mapping[Node, Any], below: Callable[[Node], Edge | None]) -> list[Node]:
    """From the first that is known, or stands on nothing, up to ``node``."""
    chain = [node]
    while chain[-1] not in known and (edge := below(chain[-1])) is not None:
        chain.append(edge.node)
    return chain[::-1]


@attrs.define(eq=False)
class _Images:
    """The images of one answer. Every one is made once, although it is a part of all above it."""

    _known: dict[Node, tuple[Json, int]] = attrs.field(factory=dict)

    def of(self, node: Node, *, flat: bool) -> tuple[Json, int]:
        """The image, and how many are below it; ``flat``: on its own."""
        if flat:
            return _image_info(node, None), 0
        chain = _not_known(node, self._known, _below)
        known = self._known.get(chain[0])
        for each in chain:
            if each not in self._known:
                below, depth = (None, 0) if known is None else (known[0], known[1] + 1)
                self._known[each] = _image_info(each, below), depth
            known = self._known[each]
        assert known is not None
        return known


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
        "filename": _shown_name(driver),
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
        ("snapshots", driver.snapshot_rows() or None),
    ):
        if fact is not None:
            image[name] = fact
    if below is not None:
        image["backing-image"] = below
    return image


@command("query-blockstats")
async def query_blockstats(context: Context, args: QueryBlockstatsArgs) -> Ready:
    """Counters: of devices, of which there are none, or of all nodes, oldest first."""
    nodes = context.services.graph.nodes if args.query_nodes else []
    known: dict[Node, Json] = {}
    for node in nodes:
        # Those of a node are a part of those of all above it.
        for each in _not_known(node, known, _file):
            if each not in known:
                file = _file(each)
                known[each] = _statistics(each, None if file is None else known[file.node])
    return Ready([known[node] for node in nodes])


def _file(node: Node) -> Edge | None:
    # Backing files are told for devices only, of which there are none.
    return _children(node).get("file")


def _statistics(node: Node, file: Json | None) -> Json:
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
    if file is not None:
        answer["parent"] = file
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
