"""blockdev-create and x-blockdev-amend through the whole daemon, held against the reference's (11.1.3) answers."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from typing import Any

from harness import Qmp

SUCCESS = ["created", "running", "waiting", "pending", "concluded"]
FAILURE = ["created", "running", "aborting", "concluded"]
LONG = "x" * 300

# Options, the job's error (None: success), the size of the file afterwards (None: there is none).
FILES: list[tuple[dict[str, Any], str | None, int | None]] = [
    ({"filename": "a", "size": 1 << 20}, None, 1 << 20),
    ({"filename": "a", "size": 0}, None, 0),
    ({"filename": "a", "size": 1}, None, 512),
    ({"filename": "a", "size": 511}, None, 512),
    ({"filename": "a", "size": 513}, None, 513),
    ({"filename": "a", "size": 1000001}, None, 1000001),
    ({"filename": "a", "size": 5000, "preallocation": "falloc"}, None, 5000),
    ({"filename": "a", "size": 1, "preallocation": "falloc"}, None, 512),
    ({"filename": "a", "size": 0, "preallocation": "falloc"}, None, 0),
    ({"filename": "a", "size": (1 << 20) + 5, "preallocation": "full"}, None, (1 << 20) + 5),
    ({"filename": "a", "size": 1, "preallocation": "full"}, None, 1),
    ({"filename": "a", "size": 0, "preallocation": "full"}, None, 0),
    ({"filename": "a", "size": 4096, "nocow": True}, None, 4096),
    ({"filename": "a", "size": 4096, "extent-size-hint": 65536}, None, 4096),
    ({"filename": "a", "size": 4096, "extent-size-hint": 0}, None, 4096),
    ({"filename": "file:zz", "size": 512}, None, 512),
    ({"filename": "", "size": 1}, "Could not create '': No such file or directory", None),
    ({"filename": "/nope/x", "size": 1}, "Could not create '/nope/x': No such file or directory", None),
    ({"filename": ".", "size": 1}, "Could not create '.': Is a directory", None),
    ({"filename": LONG, "size": 1}, f"Could not create '{LONG}': File name too long", None),
    ({"filename": "b", "size": -1}, "Could not resize file: Invalid argument", 0),
    ({"filename": "b", "size": 1 << 63}, "Could not resize file: Invalid argument", 0),
    ({"filename": "b", "size": (1 << 63) - 1}, "Could not resize file: File too large", 0),
    ({"filename": "b", "size": 512, "preallocation": "metadata"}, "Unsupported preallocation mode: metadata", 0),
    ({"filename": "c", "size": 1, "extent-size-hint": 1 << 32}, "Extent size hint is too large", None),
    ({"filename": "/dev/null", "size": 5}, "Could not resize file: Invalid argument", 0),
]


def create(qmp: Qmp, **options: Any) -> str | None:
    """Create an image; the job's error, after the events and the query were found right."""
    del qmp.events[:]
    qmp.execute("blockdev-create", job_id="j", options=options)
    return job_error(qmp, "create")


def job_error(qmp: Qmp, kind: str) -> str | None:
    qmp.events.append(qmp.wait_event("JOB_STATUS_CHANGE", lambda data: data["status"] == "concluded"))
    (job,) = qmp.execute("query-jobs")
    statuses = [event["data"]["status"] for event in qmp.events]
    assert statuses == (FAILURE if "error" in job else SUCCESS)
    qmp.execute("job-dismiss", id="j")
    assert qmp.wait_event("JOB_STATUS_CHANGE", lambda data: data["status"] == "null")
    error: str | None = job.pop("error", None)
    assert job == {"id": "j", "type": kind, "status": "concluded", "current-progress": 1, "total-progress": 1}
    return error


def test_files(daemon: Any, tmp_path: Path) -> None:
    qmp = daemon().qmp()
    for options, error, size in FILES:
        assert create(qmp, driver="file", **options) == error, options
        path = tmp_path / options["filename"]
        if size is not None:
            assert path.stat().st_size == size, options
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~0o022
    assert not (tmp_path / "c").exists()


def test_old_contents_are_gone(daemon: Any, tmp_path: Path) -> None:
    qmp = daemon().qmp()
    old = tmp_path / "old"
    for preallocation in ("off", "falloc", "full"):
        old.write_bytes(b"x" * 100000)
        assert create(qmp, driver="file", filename="old", size=5000, preallocation=preallocation) is None
        assert old.read_bytes() == bytes(5000)
        allocated = old.stat().st_blocks * 512
        assert (allocated >= 5000) or preallocation == "off"


# The byte another process has locked, and the job's error.
LOCKS = [
    (100, None),
    (101, None),
    (103, 'Failed to get shared "resize" lock'),
    (200, None),
    (201, 'Failed to get "write" lock'),
    (202, None),
    (203, 'Failed to get "resize" lock'),
]


def test_locks_of_others(daemon: Any, tmp_path: Path) -> None:
    qmp = daemon().qmp()
    image = tmp_path / "image"
    for byte, error in LOCKS:
        image.write_bytes(b"x" * 6000)
        with image.open("rb") as holder:
            fcntl.fcntl(holder, 37, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
            assert create(qmp, driver="file", filename="image", size=512) == error, byte
        assert image.stat().st_size == (512 if error is None else 6000)


def test_refusals(daemon: Any, tmp_path: Path) -> None:
    qmp = daemon().qmp()
    (tmp_path / "a").touch()
    qmp.execute("blockdev-add", driver="file", node_name="n", filename="a")
    no_create, no_amend = "Driver does not support blockdev-create", "Driver does not support x-blockdev-amend"
    for driver in ("raw", "null-co", "host_device"):
        assert qmp.refusal("blockdev-create", job_id="j", options={"driver": driver}) == no_create
    for node, driver, text in [
        ("zz", "file", "Cannot find device='' nor node-name='zz'"),
        ("n", "raw", "x-blockdev-amend doesn't support changing the block driver"),
        ("n", "file", no_amend),
    ]:
        assert qmp.refusal("x-blockdev-amend", job_id="j", node_name=node, options={"driver": driver}) == text
    # The driver is looked at before the job's id, and no job is left behind.
    assert qmp.refusal("blockdev-create", job_id="1", options={"driver": "raw"}) == no_create
    options = {"driver": "file", "filename": "b", "size": 0}
    assert qmp.refusal("blockdev-create", job_id="1", options=options) == "Invalid job ID '1'"
    assert qmp.execute("query-jobs") == []
    assert qmp.events == []
    assert not (tmp_path / "b").exists()
    for verb in ("cancel", "complete", "dismiss", "finalize", "pause", "resume"):
        assert qmp.refusal(f"job-{verb}", id="j") == "Job not found"


def test_cancelling_a_job_that_writes(daemon: Any, tmp_path: Path) -> None:
    """The file would take an hour; ``quit`` ends jobs and tells it in the order clients know."""
    running = daemon()
    qmp = running.qmp()
    options = {"driver": "file", "filename": "big", "size": 1 << 40, "preallocation": "full"}
    qmp.execute("blockdev-create", job_id="one", options=options)
    assert qmp.refusal("job-complete", id="one").startswith("Job 'one' in state 'running' cannot accept command")
    qmp.execute("job-cancel", id="one")
    qmp.wait_event("JOB_STATUS_CHANGE", lambda data: data["status"] == "concluded")
    (job,) = qmp.execute("query-jobs")
    assert job["error"] == "Operation canceled"
    del qmp.events[:]
    qmp.execute("blockdev-create", job_id="two", options={**options, "filename": "big2"})
    qmp.execute("quit")
    events = [*qmp.events, *qmp.rest()]
    told = [(event["data"]["id"], event["data"]["status"]) for event in events]
    assert told[-4:] == [("two", "aborting"), ("two", "concluded"), ("two", "null"), ("one", "null")]
    assert running.wait() == 0
