"""Block nodes: the options that make one, and the commands that act on nodes."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from qsd.qapi.core import SCHEMA, Alternate, Command, Event, NullType, Uint64, branch, enum, member, struct, union


@enum("BlockdevDriver")
class BlockdevDriver(str, Enum):
    COMPRESS = "compress"
    FILE = "file"
    HOST_DEVICE = "host_device"
    LUKS = "luks"
    NULL_AIO = "null-aio"
    NULL_CO = "null-co"
    QCOW2 = "qcow2"
    RAW = "raw"


@enum("BlockdevDiscardOptions")
class BlockdevDiscardOptions(str, Enum):
    IGNORE = "ignore"
    UNMAP = "unmap"


@enum("BlockdevDetectZeroesOptions")
class BlockdevDetectZeroesOptions(str, Enum):
    OFF = "off"
    ON = "on"
    UNMAP = "unmap"


@enum("BlockdevAioOptions")
class BlockdevAioOptions(str, Enum):
    THREADS = "threads"
    NATIVE = "native"
    IO_URING = "io_uring"


@enum("OnOffAuto")
class OnOffAuto(str, Enum):
    AUTO = "auto"
    ON = "on"
    OFF = "off"


@struct("BlockdevCacheOptions")
class BlockdevCacheOptions:
    direct: bool | None = None
    no_flush: bool | None = None


@union("BlockdevOptions", tag="driver")
class BlockdevOptions:
    """What every node takes; a value is one of the subclasses below, chosen by ``driver``."""

    driver: BlockdevDriver
    node_name: str | None = None
    discard: BlockdevDiscardOptions | None = None
    cache: BlockdevCacheOptions | None = None
    active: bool | None = None
    read_only: bool | None = None
    auto_read_only: bool | None = None
    force_share: bool | None = None
    detect_zeroes: BlockdevDetectZeroesOptions | None = None


# A child: the name of an existing node, or the options of one to be made for this parent.
BlockdevRef = Annotated[str | BlockdevOptions, Alternate("BlockdevRef")]
# The same, or NULL: explicitly no child.
BlockdevRefOrNull = Annotated[str | BlockdevOptions | NullType, Alternate("BlockdevRefOrNull")]
StrOrNull = Annotated[str | NullType, Alternate("StrOrNull")]


@branch(
    BlockdevOptions,
    BlockdevDriver.FILE,
    BlockdevDriver.HOST_DEVICE,
    name="BlockdevOptionsFile",
    features=("dynamic-auto-read-only",),
)
class BlockdevOptionsFile(BlockdevOptions):
    filename: str
    pr_manager: str | None = None
    locking: OnOffAuto | None = None
    aio: BlockdevAioOptions | None = None
    aio_max_batch: int | None = None
    drop_cache: bool | None = None
    x_check_cache_dropped: bool | None = member(default=None, features=("unstable",))


@branch(BlockdevOptions, BlockdevDriver.NULL_AIO, BlockdevDriver.NULL_CO, name="BlockdevOptionsNull")
class BlockdevOptionsNull(BlockdevOptions):
    """``size`` in bytes (default 1 GiB), ``latency_ns`` added to every request."""

    size: int | None = None
    latency_ns: Uint64 | None = None
    read_zeroes: bool | None = None


@branch(BlockdevOptions, BlockdevDriver.COMPRESS, name="BlockdevOptionsGenericFormat")
class BlockdevOptionsGenericFormat(BlockdevOptions):
    """Nothing but what the node lies on."""

    file: BlockdevRef


@branch(BlockdevOptions, BlockdevDriver.RAW, name="BlockdevOptionsRaw")
class BlockdevOptionsRaw(BlockdevOptions):
    file: BlockdevRef
    offset: int | None = None
    size: int | None = None


@struct("blockdev-del-arg")
class BlockdevDelArgs:
    node_name: str


@struct("blockdev-reopen-arg")
class BlockdevReopenArgs:
    options: tuple[BlockdevOptions, ...]


@struct("blockdev-set-active-arg")
class BlockdevSetActiveArgs:
    node_name: str | None = None
    active: bool


@struct("block_resize-arg")
class BlockResizeArgs:
    device: str | None = None
    node_name: str | None = None
    size: int


@struct("block-set-write-threshold-arg")
class BlockSetWriteThresholdArgs:
    """``write_threshold`` is an offset in bytes; 0 disarms."""

    node_name: str
    write_threshold: Uint64


@struct("BLOCK_WRITE_THRESHOLD-arg")
class BlockWriteThresholdData:
    node_name: str
    amount_exceeded: Uint64
    write_threshold: Uint64


@struct("BLOCK_IMAGE_CORRUPTED-arg")
class BlockImageCorruptedData:
    """``fatal``: the image has been marked, and is served no more."""

    device: str
    node_name: str | None = None
    msg: str
    offset: int | None = None
    size: int | None = None
    fatal: bool


SCHEMA.declare(
    Command("blockdev-add", args=BlockdevOptions),
    Command("blockdev-del", args=BlockdevDelArgs),
    Command("blockdev-reopen", args=BlockdevReopenArgs),
    Command("blockdev-set-active", args=BlockdevSetActiveArgs),
    Command("block_resize", args=BlockResizeArgs),
    Command("block-set-write-threshold", args=BlockSetWriteThresholdArgs),
    Event("BLOCK_IMAGE_CORRUPTED", data=BlockImageCorruptedData),
    Event("BLOCK_WRITE_THRESHOLD", data=BlockWriteThresholdData),
)
