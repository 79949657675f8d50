"""Images that QMP makes, and what is done to them: dirty bitmaps, snapshots, the verbs of jobs; mostly refusals."""

from __future__ import annotations

from typing import Any

from script import NEGOTIATE, Differs, Script, Step, call

MIB = 1 << 20
STATES = 5  # created, running, waiting, pending, concluded


def job(command: dict[str, Any], *, is_failure: bool = False) -> list[Step]:
    """A job of one step (aborting stands for waiting and pending when it fails), looked at and dismissed."""
    name = command["arguments"]["job-id"]
    waits: list[Step] = ["event JOB_STATUS_CHANGE"] * (STATES - is_failure)
    jobs: list[Step] = [call("query-jobs"), call("job-dismiss", id=name), "event JOB_STATUS_CHANGE"]
    return [command, *waits, *jobs]


def create(**options: Any) -> dict[str, Any]:
    return call("blockdev-create", job_id="j", options={key.replace("_", "-"): v for key, v in options.items()})


def image(name: str, size: int = MIB, **options: Any) -> list[Step]:
    """Make a qcow2 image and open it."""
    file = {"driver": "file", "filename": f"{name}.qcow2"}
    return [
        *job(create(driver="file", filename=f"{name}.qcow2", size=0)),
        call("blockdev-add", node_name=f"{name}-file", **file),
        *job(create(driver="qcow2", file=f"{name}-file", size=size, **options)),
        call("blockdev-add", driver="qcow2", node_name=name, file=f"{name}-file", backing=None),
    ]


def add(node: Any, name: Any, **options: Any) -> dict[str, Any]:
    return call("block-dirty-bitmap-add", node=node, name=name, **options)


def verb(name: str, node: str, bitmap: str) -> dict[str, Any]:
    return call(f"block-dirty-bitmap-{name}", node=node, name=bitmap)


def merge(target: str, *bitmaps: Any) -> dict[str, Any]:
    return call("block-dirty-bitmap-merge", node="n", target=target, bitmaps=list(bitmaps))


def transaction(*actions: tuple[str, dict[str, Any]], **options: Any) -> dict[str, Any]:
    return call("transaction", actions=[{"type": kind, "data": data} for kind, data in actions], **options)


def bitmap_action(name: str, bitmap: str, node: str = "n", **options: Any) -> tuple[str, dict[str, Any]]:
    return f"block-dirty-bitmap-{name}", {"node": node, "name": bitmap, **options}


ABORT: tuple[str, dict[str, Any]] = ("abort", {})
GROUPED = {"completion-mode": "grouped"}
VERBS = ("remove", "clear", "enable", "disable")

_BITMAPS: list[Step | Differs] = [
    NEGOTIATE,
    *image("n"),
    *image("old", version="v2"),
    call("blockdev-add", driver="raw", node_name="r", file={"driver": "file", "filename": "img"}),
    call("block-dirty-bitmap-add"),
    call("block-dirty-bitmap-add", node="n"),
    *(
        add("r", f"g{size}", granularity=size)
        for size in (0, 1, 511, 512, 513, 1 << 31, 1 << 32, -1, 1 << 63, 1 << 64)
    ),
    *(
        add(node, name, persistent=node == "n")
        for name in (
            "",
            "x" * 1023,
            "x" * 1024,
            "é" * 511,
            "é" * 512,
            "a b",
            "a\nb",
            "\u0001",
            '"',
            "\\",
            "/",
            "..",
        )
        for node in ("r", "n")
    ),
    add("nope", "x"),
    add("old", "x", persistent=True),
    add("r", "x", persistent=True),
    add("n-file", "x", persistent=True),
    add("n", "kept", persistent=True, disabled=True),
    add("n", "kept"),
    add("n", "a", granularity=4096),
    add("n", "b", granularity=65536),
    *(verb(name, node, bitmap) for name in VERBS for node, bitmap in (("n", "nope"), ("nope", "a"), ("n", ""))),
    *(call(f"block-dirty-bitmap-{name}") for name in VERBS),
    merge("a", "b"),
    merge("b", {"node": "r", "name": "g512"}, "a"),
    merge("a", "a"),
    merge("a", "nope"),
    merge("nope", "a"),
    merge("a", {"node": "nope", "name": "a"}),
    merge("a", {"node": "n"}),
    merge("a", 1),
    merge("a", {"node": "old", "name": "nope"}),
    call("x-debug-block-dirty-bitmap-sha256", node="n", name="a"),
    call("x-debug-block-dirty-bitmap-sha256", node="n", name="nope"),
    transaction(bitmap_action("remove", "a"), bitmap_action("add", "a")),
    transaction(bitmap_action("remove", "a"), bitmap_action("clear", "a")),
    transaction(bitmap_action("remove", "a"), bitmap_action("remove", "a")),
    transaction(bitmap_action("remove", "a"), ABORT),
    transaction(bitmap_action("add", "c", persistent=True), bitmap_action("clear", "c"), ABORT),
    transaction(bitmap_action("add", "c"), bitmap_action("add", "c")),
    transaction(bitmap_action("add", "c"), bitmap_action("disable", "c"), bitmap_action("remove", "nope")),
    verb("remove", "n", "c"),
    transaction(bitmap_action("clear", "a"), properties=GROUPED),
    transaction(ABORT, properties=GROUPED),
    transaction(properties=GROUPED),
    transaction(("nope", {})),
    transaction(("block-dirty-bitmap-add", {"node": "n"})),
    call("nbd-server-start", addr={"type": "unix", "data": {"path": "n"}}),
    call("block-export-add", id="e", type="nbd", node_name="n", name="e", writable=True, bitmaps=["a", "a"]),
    call("block-export-add", id="f", type="nbd", node_name="n", name="f", bitmaps=["b"]),
    call("block-export-add", id="f", type="nbd", node_name="n", name="f", bitmaps=["x" * 1024]),
    *(verb(name, "n", "a") for name in VERBS),
    merge("a", "b"),
    merge("b", "a"),
    transaction(bitmap_action("clear", "b"), bitmap_action("clear", "a")),
    call("block_resize", node_name="n", size=2 * MIB),
    call("block-export-del", id="e"),
    "event BLOCK_EXPORT_DELETED",
    call("block_resize", node_name="n", size=2 * MIB),
    call("x-debug-block-dirty-bitmap-sha256", node="n", name="b"),
    call("blockdev-reopen", options=[{"driver": "qcow2", "node-name": "n", "file": "n-file", "read-only": True}]),
    verb("clear", "n", "kept"),
    verb("remove", "n", "kept"),
    verb("enable", "n", "kept"),
    transaction(bitmap_action("clear", "b"), bitmap_action("clear", "kept")),
    call("blockdev-del", node_name="n"),
]


def sync(**options: Any) -> dict[str, Any]:
    return call("blockdev-snapshot-sync", **options)


def snapshot(node: str, overlay: str) -> dict[str, Any]:
    return call("blockdev-snapshot", node=node, overlay=overlay)


def internal(**options: Any) -> dict[str, Any]:
    return call("blockdev-snapshot-internal-sync", **options)


def delete(**options: Any) -> dict[str, Any]:
    return call("blockdev-snapshot-delete-internal-sync", **options)


def rename(device: str, node: str, name: str) -> dict[str, Any]:
    return call("change-backing-file", device=device, image_node_name=node, backing_file=name)


_SNAPSHOTS: list[Step | Differs] = [
    NEGOTIATE,
    *(step for name in ("a", "b", "c") for step in image(name)),
    call("blockdev-add", driver="raw", node_name="r", file={"driver": "file", "filename": "img"}),
    call("nbd-server-start", addr={"type": "unix", "data": {"path": "n"}}),
    call("block-export-add", id="e", type="nbd", node_name="a", name="e", writable=True),
    sync(),
    sync(node_name="a"),
    sync(snapshot_file="x"),
    sync(node_name="nope", snapshot_file="x"),
    sync(device="nope", snapshot_file="x"),
    sync(node_name="a", snapshot_file="x"),
    sync(node_name="a", snapshot_file="x", snapshot_node_name="b"),
    sync(node_name="a", snapshot_file="x", snapshot_node_name="1"),
    sync(node_name="a", snapshot_file="x", snapshot_node_name="x", format="nope"),
    sync(node_name="a", snapshot_file="x", snapshot_node_name="x", format="raw"),
    sync(node_name="a", snapshot_file="x", snapshot_node_name="x", mode="nope"),
    sync(node_name="a", snapshot_file="nope", snapshot_node_name="x", mode="existing"),
    sync(node_name="a", snapshot_file="nope/x", snapshot_node_name="x"),
    sync(node_name="a", snapshot_file="", snapshot_node_name="x"),
    sync(node_name="a", snapshot_file="a.qcow2", snapshot_node_name="x"),
    sync(node_name="a", snapshot_file="top", snapshot_node_name="top"),
    call("query-block-exports"),
    sync(node_name="a", snapshot_file="x", snapshot_node_name="x"),
    snapshot("nope", "b"),
    snapshot("top", "nope"),
    snapshot("b", "b"),
    snapshot("b", "top"),
    snapshot("b", "r"),
    snapshot("b", "a"),
    snapshot("top", "b"),
    call("query-block-exports"),
    snapshot("c", "b"),
    *(internal(**options) for options in ({}, {"device": "c"}, {"device": "nope", "name": "s"})),
    *(internal(device=device, name="s") for device in ("top", "r", "c-file", "c", "c")),
    internal(device="c", name=""),
    delete(device="c"),
    delete(device="nope", name="s"),
    delete(device="r", name="s"),
    delete(device="top", name="s"),
    delete(device="c", name="nope"),
    delete(device="c", id="2"),
    delete(device="c", id="1", name="nope"),
    delete(device="c", id="", name="s"),
    transaction(("blockdev-snapshot-internal-sync", {"device": "c", "name": "t"}), ABORT),
    delete(device="c", name="t"),
    rename("nope", "b", "x"),
    rename("b", "nope", "x"),
    rename("b", "c", "x"),
    rename("c", "c", "x"),
    rename("top", "top", "x"),
    rename("b", "b", "x" * 1024),
    rename("b", "b", "elsewhere"),
    rename("b", "top", "elsewhere"),
    transaction(
        ("blockdev-snapshot-sync", {"node-name": "b", "snapshot-file": "t", "snapshot-node-name": "t"}), ABORT
    ),
    call("query-block-exports"),
    transaction(
        ("blockdev-snapshot-sync", {"node-name": "b", "snapshot-file": "t", "snapshot-node-name": "t"}),
        ("blockdev-snapshot-sync", {"node-name": "b", "snapshot-file": "u", "snapshot-node-name": "u"}),
    ),
    call("query-block-exports"),
]

_OF_JOBS = ("cancel", "pause", "resume", "complete", "dismiss", "finalize")
_OF_BLOCK_JOBS = {name: "id" if name in ("dismiss", "finalize") else "device" for name in _OF_JOBS}


def change(name: Any, **options: Any) -> dict[str, Any]:
    return call("block-job-change", id=name, **options)


def every_verb(name: str) -> list[Step]:
    return [
        change(name, type="stream"),
        *(call(f"job-{each}", id=name) for each in _OF_JOBS if each != "dismiss"),
        *(call(f"block-job-{each}", **{member: name}) for each, member in _OF_BLOCK_JOBS.items()),
        call("block-job-set-speed", device=name, speed=1),
    ]


def amend(node: str, **options: Any) -> dict[str, Any]:
    return call("x-blockdev-amend", job_id="j", node_name=node, options=options)


_JOBS: list[Step | Differs] = [
    NEGOTIATE,
    *every_verb("nope"),
    call("job-dismiss", id="nope"),
    *(call(f"job-{each}") for each in _OF_JOBS),
    *(call("block-job-change", **options) for options in ({}, {"id": "x"}, {"id": 1, "type": "stream"})),
    *(change("nope", type=kind) for kind in ("mirror", "create", "snapshot-load", "nope")),
    *(change("nope", type="mirror", copy_mode=mode) for mode in ("background", "nope")),
    change("nope", type="backup", copy_mode="background"),
    *image("n"),
    create(driver="file", filename="made", size=512),
    *["event JOB_STATUS_CHANGE"] * STATES,
    *every_verb("j"),
    create(driver="file", filename="made", size=512),
    call("query-block-jobs"),
    call("job-dismiss", id="j"),
    "event JOB_STATUS_CHANGE",
    call("job-dismiss", id="j"),
    *(
        call("blockdev-create", job_id=name, options={"driver": "file", "filename": "x", "size": 0})
        for name in ("", "1", "a b")
    ),
    create(driver="nope"),
    create(driver="null-co", size=0),
    create(driver="file", size=0),
    *job(create(driver="file", filename="nope/x", size=0), is_failure=True),
    *job(create(driver="qcow2", file="n", size=-1), is_failure=True),
    *job(create(driver="qcow2", file="nope", size=0), is_failure=True),
    *job(create(driver="qcow2", file="n-file", size=0), is_failure=True),
    amend("nope", driver="qcow2"),
    amend("n", driver="luks"),
    amend("n-file", driver="file", filename="x"),
    *(
        call("block-stream", device="n", job_id="j", **options)
        for options in (
            {"speed": -1},
            {"base": "x"},
            {"base_node": "x"},
            {"base_node": "n"},
            {"base": "x", "base_node": "n"},
            {"bottom": "x"},
            {"backing_file": "x"},
            {"on_error": "x"},
            {"filter_node_name": "n"},
        )
    ),
    call("block-stream", device="n"),
    call("block-stream", device="n", job_id="1"),
    call("block-stream", device="nope", job_id="j"),
    call("query-jobs"),
]

# Nothing has to be written where nothing is to be changed.
_NOTHING_AMENDED: list[Step | Differs] = [
    NEGOTIATE,
    *image("n"),
    *job(amend("n", driver="qcow2")),
    call("blockdev-reopen", options=[{"driver": "qcow2", "node-name": "n", "file": "n-file", "read-only": True}]),
    *job(amend("n", driver="qcow2")),
    call("blockdev-reopen", options=[{"driver": "qcow2", "node-name": "n", "file": "n-file"}]),
    call("blockdev-set-active", node_name="n", active=False),
    *job(amend("n", driver="qcow2")),
]

SCRIPTS: dict[str, Script] = {
    "nothing amended": Script(_NOTHING_AMENDED),
    "dirty bitmaps": Script(_BITMAPS),
    "snapshots": Script(_SNAPSHOTS),
    "jobs and their verbs": Script(_JOBS),
}
