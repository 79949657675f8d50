"""Block jobs: what is told about them, and the commands that only they know or that are older than ``job-*``."""

from __future__ import annotations

from enum import Enum

from qsd.qapi.core import SCHEMA, Command, Event, branch, enum, struct, union
from qsd.qapi.schema.block_info import BlockDeviceIoStatus
from qsd.qapi.schema.jobs import JobStatus, JobType


@enum("BlockdevOnError")
class BlockdevOnError(str, Enum):
    """What a job does about an I/O error; ``enospc`` stops for want of space and reports the rest, as ``auto``."""

    REPORT = "report"
    IGNORE = "ignore"
    ENOSPC = "enospc"
    STOP = "stop"
    AUTO = "auto"


@enum("BlockErrorAction")
class BlockErrorAction(str, Enum):
    IGNORE = "ignore"
    REPORT = "report"
    STOP = "stop"


@enum("IoOperationType")
class IoOperationType(str, Enum):
    READ = "read"
    WRITE = "write"


@union("BlockJobInfo", tag="type")
class BlockJobInfo:
    """``len`` and ``offset`` are in bytes, of what there is to do; ``speed`` in bytes per second."""

    type: JobType
    device: str
    len: int
    offset: int
    busy: bool
    paused: bool
    speed: int
    io_status: BlockDeviceIoStatus
    ready: bool
    status: JobStatus
    auto_finalize: bool
    auto_dismiss: bool
    error: str | None = None


@enum("MirrorCopyMode")
class MirrorCopyMode(str, Enum):
    BACKGROUND = "background"
    WRITE_BLOCKING = "write-blocking"


@union("BlockJobChangeOptions", tag="type")
class BlockJobChangeOptions:
    """``type`` says which members there are, and need not be the job's."""

    id: str
    type: JobType


@branch(BlockJobChangeOptions, JobType.MIRROR, name="BlockJobChangeOptionsMirror")
class BlockJobChangeOptionsMirror(BlockJobChangeOptions):
    copy_mode: MirrorCopyMode


@struct("block-job-cancel-arg")
class BlockJobCancelArgs:
    device: str
    force: bool | None = None


@struct("block-job-set-speed-arg")
class BlockJobSetSpeedArgs:
    device: str
    speed: int


@struct("block-job-pause-arg")
class BlockJobDeviceArgs:
    device: str


@struct("block-job-finalize-arg")
class BlockJobIdArgs:
    id: str


@struct("block-stream-arg")
class BlockStreamArgs:
    """``speed`` in bytes per second."""

    job_id: str | None = None
    device: str
    base: str | None = None
    base_node: str | None = None
    backing_file: str | None = None
    backing_mask_protocol: bool | None = None
    bottom: str | None = None
    speed: int | None = None
    on_error: BlockdevOnError | None = None
    filter_node_name: str | None = None
    auto_finalize: bool | None = None
    auto_dismiss: bool | None = None


@struct("BLOCK_JOB_COMPLETED-arg")
class BlockJobCompletedData:
    type: JobType
    device: str
    len: int
    offset: int
    speed: int
    error: str | None = None


@struct("BLOCK_JOB_CANCELLED-arg")
class BlockJobCancelledData:
    type: JobType
    device: str
    len: int
    offset: int
    speed: int


@struct("BLOCK_JOB_READY-arg")
class BlockJobReadyData:
    type: JobType
    device: str
    len: int
    offset: int
    speed: int


@struct("BLOCK_JOB_PENDING-arg")
class BlockJobPendingData:
    type: JobType
    id: str


@struct("BLOCK_JOB_ERROR-arg")
class BlockJobErrorData:
    device: str
    operation: IoOperationType
    action: BlockErrorAction


SCHEMA.declare(
    Command("block-stream", args=BlockStreamArgs),
    Command("query-block-jobs", returns=tuple[BlockJobInfo, ...]),
    Command("block-job-change", args=BlockJobChangeOptions),
    Command("block-job-cancel", args=BlockJobCancelArgs),
    Command("block-job-set-speed", args=BlockJobSetSpeedArgs),
    Command("block-job-pause", args=BlockJobDeviceArgs, features=("deprecated",)),
    Command("block-job-resume", args=BlockJobDeviceArgs, features=("deprecated",)),
    Command("block-job-complete", args=BlockJobDeviceArgs, features=("deprecated",)),
    Command("block-job-finalize", args=BlockJobIdArgs, features=("deprecated",)),
    Command("block-job-dismiss", args=BlockJobIdArgs, features=("deprecated",)),
    Event("BLOCK_JOB_COMPLETED", data=BlockJobCompletedData),
    Event("BLOCK_JOB_CANCELLED", data=BlockJobCancelledData),
    Event("BLOCK_JOB_READY", data=BlockJobReadyData),
    Event("BLOCK_JOB_PENDING", data=BlockJobPendingData),
    Event("BLOCK_JOB_ERROR", data=BlockJobErrorData),
)
