"""What is told about nodes: their description, their image, their counters and the graph they form."""

from __future__ import annotations

from enum import Enum

from qsd.qapi.core import SCHEMA, Command, Uint64, branch, enum, legacy_union, struct, union
from qsd.qapi.schema.block import BlockdevDetectZeroesOptions, BlockdevDriver
from qsd.qapi.schema.luks import QCryptoBlockInfoLUKS
from qsd.qapi.schema.qcow2 import ImageInfoSpecificQCow2


@struct("BlockdevChild")
class BlockdevChild:
    child: str
    node_name: str


@struct("BlockdevCacheInfo")
class BlockdevCacheInfo:
    writeback: bool
    direct: bool
    no_flush: bool


@struct("BlockDirtyInfo")
class BlockDirtyInfo:
    name: str | None = None
    count: int
    granularity: int
    recording: bool
    busy: bool
    persistent: bool
    inconsistent: bool | None = None


@struct("SnapshotInfo")
class SnapshotInfo:
    id: str
    name: str
    vm_state_size: int
    date_sec: int
    date_nsec: int
    vm_clock_sec: int
    vm_clock_nsec: int
    icount: int | None = None


@struct("BlockLimitsInfo")
class BlockLimitsInfo:
    """Sizes in bytes, ``max_iov`` and ``max_hw_iov`` in elements."""

    request_alignment: int
    max_discard: int | None = None
    discard_alignment: int | None = None
    max_write_zeroes: int | None = None
    write_zeroes_alignment: int | None = None
    opt_transfer: int | None = None
    max_transfer: int | None = None
    max_hw_transfer: int | None = None
    max_iov: int
    max_hw_iov: int | None = None
    min_mem_alignment: int
    opt_mem_alignment: int


@struct("ImageInfoSpecificFile")
class ImageInfoSpecificFile:
    extent_size_hint: Uint64 | None = None


@enum("ImageInfoSpecificKind")
class ImageInfoSpecificKind(str, Enum):
    FILE = "file"
    QCOW2 = "qcow2"
    LUKS = "luks"


@legacy_union(
    "ImageInfoSpecific",
    {
        ImageInfoSpecificKind.FILE: ImageInfoSpecificFile,
        ImageInfoSpecificKind.QCOW2: ImageInfoSpecificQCow2,
        ImageInfoSpecificKind.LUKS: QCryptoBlockInfoLUKS,
    },
)
class ImageInfoSpecific:
    type: ImageInfoSpecificKind
    data: ImageInfoSpecificFile | ImageInfoSpecificQCow2 | QCryptoBlockInfoLUKS


@struct("ImageInfo")
class ImageInfo:
    filename: str
    format: str
    dirty_flag: bool | None = None
    actual_size: int | None = None
    virtual_size: int
    cluster_size: int | None = None
    encrypted: bool | None = None
    compressed: bool | None = None
    backing_filename: str | None = None
    full_backing_filename: str | None = None
    backing_filename_format: str | None = None
    snapshots: tuple[SnapshotInfo, ...] | None = None
    limits: BlockLimitsInfo | None = None
    format_specific: ImageInfoSpecific | None = None
    backing_image: ImageInfo | None = None


@struct("BlockDeviceInfo", dashed=("node-name", "dirty-bitmaps"))
class BlockDeviceInfo:
    file: str
    node_name: str
    ro: bool
    drv: str
    backing_file: str | None = None
    backing_file_depth: int
    children: tuple[BlockdevChild, ...]
    active: bool
    encrypted: bool
    detect_zeroes: BlockdevDetectZeroesOptions
    bps: int
    bps_rd: int
    bps_wr: int
    iops: int
    iops_rd: int
    iops_wr: int
    image: ImageInfo
    bps_max: int | None = None
    bps_rd_max: int | None = None
    bps_wr_max: int | None = None
    iops_max: int | None = None
    iops_rd_max: int | None = None
    iops_wr_max: int | None = None
    bps_max_length: int | None = None
    bps_rd_max_length: int | None = None
    bps_wr_max_length: int | None = None
    iops_max_length: int | None = None
    iops_rd_max_length: int | None = None
    iops_wr_max_length: int | None = None
    iops_size: int | None = None
    group: str | None = None
    cache: BlockdevCacheInfo
    write_threshold: int
    dirty_bitmaps: tuple[BlockDirtyInfo, ...] | None = None


@struct("query-named-block-nodes-arg")
class QueryNamedBlockNodesArgs:
    flat: bool | None = None


@enum("BlockDeviceIoStatus")
class BlockDeviceIoStatus(str, Enum):
    OK = "ok"
    FAILED = "failed"
    NOSPACE = "nospace"


@struct("BlockInfo", dashed=("io-status",))
class BlockInfo:
    device: str
    qdev: str | None = None
    type: str
    removable: bool
    locked: bool
    inserted: BlockDeviceInfo | None = None
    tray_open: bool | None = None
    io_status: BlockDeviceIoStatus | None = None


@struct("query-block-arg")
class QueryBlockArgs:
    flat: bool | None = None


@struct("BlockLatencyHistogramInfo")
class BlockLatencyHistogramInfo:
    boundaries: tuple[Uint64, ...]
    bins: tuple[Uint64, ...]


@struct("BlockDeviceTimedStats", dashed=())
class BlockDeviceTimedStats:
    interval_length: int
    min_rd_latency_ns: int
    max_rd_latency_ns: int
    avg_rd_latency_ns: int
    min_wr_latency_ns: int
    max_wr_latency_ns: int
    avg_wr_latency_ns: int
    min_zone_append_latency_ns: int
    max_zone_append_latency_ns: int
    avg_zone_append_latency_ns: int
    min_flush_latency_ns: int
    max_flush_latency_ns: int
    avg_flush_latency_ns: int
    avg_rd_queue_depth: float
    avg_wr_queue_depth: float
    avg_zone_append_queue_depth: float


@struct("BlockDeviceStats", dashed=())
class BlockDeviceStats:
    rd_bytes: int
    wr_bytes: int
    zone_append_bytes: int
    unmap_bytes: int
    rd_operations: int
    wr_operations: int
    zone_append_operations: int
    flush_operations: int
    unmap_operations: int
    rd_total_time_ns: int
    wr_total_time_ns: int
    zone_append_total_time_ns: int
    flush_total_time_ns: int
    unmap_total_time_ns: int
    wr_highest_offset: int
    rd_merged: int
    wr_merged: int
    zone_append_merged: int
    unmap_merged: int
    idle_time_ns: int | None = None
    failed_rd_operations: int
    failed_wr_operations: int
    failed_zone_append_operations: int
    failed_flush_operations: int
    failed_unmap_operations: int
    invalid_rd_operations: int
    invalid_wr_operations: int
    invalid_zone_append_operations: int
    invalid_flush_operations: int
    invalid_unmap_operations: int
    account_invalid: bool
    account_failed: bool
    timed_stats: tuple[BlockDeviceTimedStats, ...]
    rd_latency_histogram: BlockLatencyHistogramInfo | None = None
    wr_latency_histogram: BlockLatencyHistogramInfo | None = None
    zone_append_latency_histogram: BlockLatencyHistogramInfo | None = None
    flush_latency_histogram: BlockLatencyHistogramInfo | None = None


@union("BlockStatsSpecific", tag="driver")
class BlockStatsSpecific:
    driver: BlockdevDriver


@branch(BlockStatsSpecific, BlockdevDriver.FILE, BlockdevDriver.HOST_DEVICE, name="BlockStatsSpecificFile")
class BlockStatsSpecificFile(BlockStatsSpecific):
    discard_nb_ok: Uint64
    discard_nb_failed: Uint64
    discard_bytes_ok: Uint64


@struct("BlockStats")
class BlockStats:
    device: str | None = None
    qdev: str | None = None
    node_name: str | None = None
    stats: BlockDeviceStats
    driver_specific: BlockStatsSpecific | None = None
    parent: BlockStats | None = None
    backing: BlockStats | None = None


@struct("query-blockstats-arg")
class QueryBlockstatsArgs:
    query_nodes: bool | None = None


@enum("XDbgBlockGraphNodeType")
class XDbgBlockGraphNodeType(str, Enum):
    BLOCK_BACKEND = "block-backend"
    BLOCK_JOB = "block-job"
    BLOCK_DRIVER = "block-driver"


@enum("BlockPermission")
class BlockPermission(str, Enum):
    CONSISTENT_READ = "consistent-read"
    WRITE = "write"
    WRITE_UNCHANGED = "write-unchanged"
    RESIZE = "resize"


@struct("XDbgBlockGraphNode")
class XDbgBlockGraphNode:
    id: Uint64
    type: XDbgBlockGraphNodeType
    name: str


@struct("XDbgBlockGraphEdge")
class XDbgBlockGraphEdge:
    parent: Uint64
    child: Uint64
    name: str
    perm: tuple[BlockPermission, ...]
    shared_perm: tuple[BlockPermission, ...]


@struct("XDbgBlockGraph")
class XDbgBlockGraph:
    nodes: tuple[XDbgBlockGraphNode, ...]
    edges: tuple[XDbgBlockGraphEdge, ...]


SCHEMA.declare(
    Command("query-block", args=QueryBlockArgs, returns=tuple[BlockInfo, ...]),
    Command("query-blockstats", args=QueryBlockstatsArgs, returns=tuple[BlockStats, ...]),
    Command("query-named-block-nodes", args=QueryNamedBlockNodesArgs, returns=tuple[BlockDeviceInfo, ...]),
    Command("x-debug-query-block-graph", returns=XDbgBlockGraph, features=("unstable",)),
)
