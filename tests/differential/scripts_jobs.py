"""Jobs as they are seen: events in order, each verb in each status, errors, and what may go on beside them."""

from __future__ import annotations

import struct
from typing import Any

from script import NEGOTIATE, Differs, Script, call
from scripts_block import unix
from scripts_images import ABORT, amend, image, transaction
from scripts_nodes import GRAPH, Steps, add, delete, options, reopen, resize

MIB = 1 << 20
CLUSTER = 65536


def until(status: str, job: str = "j") -> str:
    return f"until {job} {status}"


def create(job: str, /, **given: Any) -> dict[str, Any]:
    return call("blockdev-create", job_id=job, options={"driver": "file", "filename": "made", "size": 512, **given})


def stream(**more: Any) -> dict[str, Any]:
    return call("block-stream", **{"job_id": "j", "device": "top", **more})


LOOK: Steps = [call("query-jobs"), call("query-block-jobs")]
_BY_JOB = ("pause", "resume", "complete", "finalize", "dismiss", "cancel")


def verb(name: str, job: str = "j") -> dict[str, Any]:
    return call(f"job-{name}", id=job)


def block_verb(name: str, **more: Any) -> dict[str, Any]:
    member = "id" if name in ("finalize", "dismiss", "change") else "device"
    return call(f"block-job-{name}", **{member: "j", **more})


def speed(value: Any) -> dict[str, Any]:
    return block_verb("set-speed", speed=value)


def verbs(*without: str) -> Steps:
    """All verbs but those, which do something here."""
    steps: Steps = []
    for name in _BY_JOB:
        if name not in without:
            steps += [verb(name), block_verb(name)]
    return [*steps, *([] if "speed" in without else [speed(1), speed(-1)]), block_verb("change", type="stream")]


def chain(path: str = "img", size: int = MIB) -> Steps:
    """``top`` is over a file whose bytes all are data."""
    return [
        NEGOTIATE,
        *image("top", size=size),
        delete("top"),
        add(options("raw", "base", file={"driver": "file", "filename": path, "node-name": "f"})),
        add(options("qcow2", "top", file="top-file", backing="base")),
    ]


# Nothing can be told a job between its creation and its end, unless it waits for something.
_ENDS: Steps = [
    *chain(),
    *(
        step
        for finalize in (True, False)
        for dismiss in (True, False)
        for step in (
            reopen(options("qcow2", "top", file="top-file", backing="base")),
            stream(auto_finalize=finalize, auto_dismiss=dismiss),
            *([] if finalize else [until("pending"), *LOOK, *verbs("cancel", "finalize"), verb("finalize")]),
            until("null" if dismiss else "concluded"),
            *LOOK,
            *([] if dismiss else [*verbs("dismiss"), verb("dismiss"), until("null")]),
            call("query-blockstats"),
            add(options("qcow2", "again", file="top-file", backing="base")),
        )
    ),
    stream(auto_finalize=False),
    until("pending"),
    verb("cancel"),
    until("null"),
    stream(auto_finalize=False, auto_dismiss=False),
    until("pending"),
    block_verb("cancel"),
    until("concluded"),
    *LOOK,
    block_verb("dismiss"),
    until("null"),
    stream(auto_finalize=False),
    until("pending"),
    block_verb("finalize"),
    until("null"),
]

# A job at a speed of 1 has time for one step.
_STEERED: Steps = [
    *chain("big", 8 * MIB),
    stream(speed=-1),
    stream(speed=1),
    until("running"),
    stream(),
    stream(job_id="k"),
    stream(job_id="k", device="base"),
    create("j"),
    *verbs("cancel", "pause", "speed"),
    speed(-1),
    speed(1),
    call("query-jobs"),
    verb("pause"),
    until("paused"),
    *LOOK,
    *verbs("cancel", "resume", "speed"),
    speed(2),
    block_verb("cancel"),
    block_verb("cancel", force=False),
    verb("resume"),
    until("running"),
    verb("resume"),
    block_verb("pause"),
    until("paused"),
    block_verb("resume"),
    until("running"),
    verb("pause"),
    until("paused"),
    verb("cancel"),
    until("null"),
    *LOOK,
    stream(speed=1, auto_dismiss=False),
    until("running"),
    block_verb("cancel", force=True),
    until("concluded"),
    *LOOK,
    *verbs("dismiss"),
    Differs(stream(), "a job that has ended needs its nodes no more"),
    stream(device="nope"),
    create("j"),
    block_verb("dismiss"),
    until("null"),
    stream(speed=1),
    until("running"),
    verb("pause"),
    until("paused"),
    block_verb("cancel", force=True),
    until("null"),
    stream(speed=1),
    until("running"),
    block_verb("cancel"),
    until("null"),
    stream(speed=1),
    until("running"),
    speed(0),
    until("null"),
]

_BESIDE: Steps = [
    *chain(),
    *image("over"),
    delete("over"),
    add(options("qcow2", "over", file="over-file", backing=None)),
    call("nbd-server-start", addr=unix("n")),
    stream(speed=1, filter_node_name="filter"),
    until("running"),
    GRAPH,
    *(delete(name) for name in ("top", "base", "filter", "f", "top-file")),
    *(resize(name, 2 * MIB) for name in ("top", "base", "filter", "top-file")),
    reopen(options("qcow2", "top", file="top-file", backing="base")),
    reopen(options("qcow2", "top", file="top-file", backing=None)),
    reopen(options("qcow2", "top", file="top-file", backing="base", read_only=True)),
    reopen(options("raw", "base", file="f", read_only=True)),
    *(
        call("block-export-add", id="x", type="nbd", node_name=name, name="x", writable=True)
        for name in ("base", "f", "top-file")
    ),
    call("blockdev-snapshot", node="top", overlay="over"),
    call("blockdev-snapshot", node="base", overlay="over"),
    call("blockdev-snapshot", node="filter", overlay="over"),
    call("blockdev-snapshot-sync", node_name="base", snapshot_file="x", snapshot_node_name="x"),
    call("blockdev-snapshot-internal-sync", device="top", name="s"),
    call("change-backing-file", device="top", image_node_name="top", backing_file="x"),
    amend("top", driver="qcow2"),
    call("block-dirty-bitmap-add", node="top", name="b", persistent=True),
    call("block-dirty-bitmap-remove", node="top", name="b"),
    call("blockdev-set-active", node_name="top", active=False),
    transaction(("blockdev-snapshot", {"node": "base", "overlay": "over"})),
    transaction(("block-dirty-bitmap-add", {"node": "top", "name": "b"}), ABORT),
    add(options("qcow2", "mine", file="over-file", backing="top")),
    add(options("raw", "mine", file="top", size=512)),
    GRAPH,
    call("query-jobs"),
    Differs(call("blockdev-set-active", active=False), "the reference's job goes on writing"),
]


def damaged(clusters: int = 4) -> bytes:
    """An image whose cluster 2 cannot be inflated; the others hold data."""
    refcounts, block, l1, l2, data = (CLUSTER * index for index in range(1, 6))
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        *(b"QFI\xfb", 3, 0, 0, 16, clusters * CLUSTER, 0, 1, l1, refcounts, 1, 0, 0, 0, 0, 0, 4, 104),
    )
    entries = [(1 << 63) | (data + CLUSTER * index) for index in range(clusters)]
    entries[2] = (1 << 62) | (data + 2 * CLUSTER)
    used = 5 + clusters
    parts = [
        header,
        struct.pack(">Q", block),
        struct.pack(">H", 1) * used,
        struct.pack(">Q", (1 << 63) | l2),
        struct.pack(f">{clusters}Q", *entries),
        *[b"\xff" * CLUSTER] * clusters,
    ]
    return b"".join(part.ljust(CLUSTER, b"\0") for part in parts)


_FAILING: Steps = [
    NEGOTIATE,
    *image("top", size=4 * CLUSTER),
    delete("top"),
    add(options("qcow2", "bad", file={"driver": "file", "filename": "bad"}, read_only=True)),
    add(options("qcow2", "top", file="top-file", backing="bad")),
    stream(),
    until("null"),
    stream(auto_dismiss=False, on_error="report"),
    until("concluded"),
    *LOOK,
    verb("dismiss"),
    until("null"),
    stream(auto_finalize=False, auto_dismiss=False, on_error="enospc"),
    until("concluded"),
    *LOOK,
    verb("dismiss"),
    until("null"),
    stream(on_error="stop"),
    until("paused"),
    *LOOK,
    verb("pause"),
    block_verb("cancel"),
    verb("resume"),
    until("paused"),
    *LOOK,
    block_verb("cancel", force=True),
    until("null"),
    stream(on_error="stop"),
    until("paused"),
    verb("cancel"),
    until("null"),
    stream(on_error="ignore", auto_dismiss=False),
    until("concluded"),
    *LOOK,
    verb("dismiss"),
    until("null"),
    stream(on_error="nope"),
    stream(base_node="bad", on_error="ignore"),
    until("null"),
    GRAPH,
]

_MADE: Steps = [
    NEGOTIATE,
    create("j"),
    until("concluded"),
    create("k", size=-1),
    until("concluded", "k"),
    create("l", filename="nope/made"),
    until("concluded", "l"),
    *LOOK,
    *(step for job in ("j", "k", "l") for step in (verb("dismiss", job), until("null", job))),
    *image("n"),
    amend("n", driver="qcow2"),
    until("concluded"),
    *LOOK,
    *verbs("dismiss"),
    amend("n", driver="qcow2"),
    verb("dismiss"),
    until("null"),
    amend("n", driver="qcow2", encrypt={"format": "qcow"}),
    until("concluded"),
    *LOOK,
    verb("dismiss"),
    until("null"),
]

# How far a job comes in a step.
_FAR = frozenset({"current-progress", "offset"})
_BAD = {"bad": damaged()}

SCRIPTS: dict[str, Script] = {
    "ends of jobs": Script(_ENDS),
    "jobs steered": Script(_STEERED, files={"big": bytes(8 * MIB)}, unseen=_FAR),
    "beside a job": Script(_BESIDE, unseen=_FAR),
    "jobs that fail": Script(_FAILING, files=_BAD),
    "jobs that make": Script(_MADE),
}
