"""Jobs of any type: what they are, the commands that steer them, the event of their status."""

from __future__ import annotations

from enum import Enum

from qsd.qapi.core import SCHEMA, Command, Event, enum, struct


@enum("JobType")
class JobType(str, Enum):
    """All that users may name, of which there are stream, create and amend."""

    COMMIT = "commit"
    STREAM = "stream"
    MIRROR = "mirror"
    BACKUP = "backup"
    CREATE = "create"
    AMEND = "amend"
    SNAPSHOT_LOAD = "snapshot-load"
    SNAPSHOT_SAVE = "snapshot-save"
    SNAPSHOT_DELETE = "snapshot-delete"


@enum("JobStatus")
class JobStatus(str, Enum):
    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


@struct("JobInfo")
class JobInfo:
    """Progress is in a unit of the job's own; only its parts of the total mean something."""

    id: str
    type: JobType
    status: JobStatus
    current_progress: int
    total_progress: int
    error: str | None = None


@struct("job-cancel-arg")
class JobArgs:
    id: str


@struct("JOB_STATUS_CHANGE-arg")
class JobStatusChangeData:
    id: str
    status: JobStatus


SCHEMA.declare(
    Command("job-cancel", args=JobArgs),
    Command("job-complete", args=JobArgs),
    Command("job-dismiss", args=JobArgs),
    Command("job-finalize", args=JobArgs),
    Command("job-pause", args=JobArgs),
    Command("job-resume", args=JobArgs),
    Command("query-jobs", returns=tuple[JobInfo, ...]),
    Event("JOB_STATUS_CHANGE", data=JobStatusChangeData),
)
