"""Nodes one kind at a time: what they take, refuse, report and become when they are reopened."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from script import NEGOTIATE, Differs, Script, Step, call
from scripts_block import export, node, unix

NODES = call("query-named-block-nodes")
FLAT = call("query-named-block-nodes", flat=True)
GRAPH = call("x-debug-query-block-graph")
STATISTICS = call("query-blockstats", query_nodes=True)

CACHE = "an empty object changes nothing"
BATCH = "the reference takes no number for the same number"
SHORTER = "the reference does not tell the nodes above that a window has another length"
EARLY = "the reference takes over the child's limits before the child has them"


def options(driver: str, name: str, /, **more: Any) -> dict[str, Any]:
    named = {key.replace("_", "-"): value for key, value in more.items()}
    return {"driver": driver, "node-name": name, **named}


def file(name: str = "f", /, **more: Any) -> dict[str, Any]:
    return options("file", name, **{"filename": "img", **more})


def raw(name: str = "r", /, **more: Any) -> dict[str, Any]:
    return options("raw", name, **{"file": "f", **more})


def add(given: dict[str, Any]) -> dict[str, Any]:
    return {"execute": "blockdev-add", "arguments": given}


def delete(name: str) -> dict[str, Any]:
    return call("blockdev-del", node_name=name)


def reopen(*given: Any) -> dict[str, Any]:
    return call("blockdev-reopen", options=list(given))


def active(value: Any, name: str | None = None) -> dict[str, Any]:
    return call("blockdev-set-active", active=value, **({} if name is None else {"node_name": name}))


def resize(name: str, size: Any) -> dict[str, Any]:
    return call("block_resize", node_name=name, size=size)


def threshold(value: Any) -> dict[str, Any]:
    return call("block-set-write-threshold", node_name="f", write_threshold=value)


Steps = list[Step | Differs]


def looks(*given: dict[str, Any]) -> Steps:
    """Each node is made, looked at and deleted."""
    steps: Steps = []
    for one in given:
        steps += [add(one), NODES, delete(one["node-name"])]
    return steps


def unlike(why: str, step: Step) -> Differs:
    return Differs(step, why)


# -- file -------------------------------------------------------------------------------------------------------

_FILE: Steps = [
    NEGOTIATE,
    node("file"),
    node("file", "f"),
    *(add(file(filename=name)) for name in (1, "", "nope", ".", "/dev/null", "/dev/zero", "nbd:img", "json:{}")),
    add(file(filename="host_device:img")),
    *looks(file(filename="file:img"), file(filename="./img")),
    *(add(file(aio=value)) for value in ("x", 1, "native")),
    *looks(file(aio="native", cache={"direct": True}), file(aio="io_uring"), file(aio="threads")),
    *(add(file(aio_max_batch=value)) for value in (1 << 63, "1")),
    *looks(file(aio_max_batch=-1), file(aio_max_batch=16)),
    add(file(locking="x")),
    *looks(*(file(locking=value) for value in ("on", "off", "auto"))),
    *(add(file(pr_manager=value)) for value in ("x", "")),
    add(file(drop_cache="off")),
    *looks(file(drop_cache=False), file(x_check_cache_dropped=True)),
    *(add(file(filename=".", read_only=value)) for value in (True, False)),
    add(file(filename="/proc/version", read_only=True, cache={"direct": True})),
    *(add(file(filename="/proc/self/mem", read_only=value)) for value in (True, False)),
    *(add(file(cache=value)) for value in ({"direct": 1}, {"writeback": True}, {"nope": True})),
    *looks(file(cache={"no-flush": True}), file(discard="unmap"), file(discard="ignore")),
    *(add(file(discard=value)) for value in ("x", True)),
    *(add(file(detect_zeroes=value)) for value in ("unmap", True)),
    *looks(file(detect_zeroes="on"), file(detect_zeroes="unmap", discard="unmap")),
    *looks(*(file(**{name: True}) for name in ("read_only", "auto_read_only"))),
    *looks(file(read_only=True, auto_read_only=True), file(read_only=True, force_share=True)),
    add(file(auto_read_only="on")),
    add(file(force_share=True)),
    add(file(read_only=True, force_share=True, locking="on")),
    delete("f"),
    *looks(file(active=False), file(active=True)),
    *(add(file(**{name: "x"})) for name in ("nope", "x.y", "backing", "file")),
    *(add(file(name)) for name in ("", "#f", "a b", "é", "x" * 32)),
    *looks(file("x" * 31), file("f_-.1")),
    add({"driver": "file", "node-name": 1, "filename": "img"}),
    add({}),
    add({"node-name": "x"}),
    add({"driver": 1}),
    *(node("host_device", "h", filename=name) for name in ("img", "nope", ".", "", "/dev/loop9999")),
    node("host_device", "h"),
    node("host_device", "h", filename="/dev/null"),
    NODES,
    STATISTICS,
    GRAPH,
]

_GIVEN: dict[str, Any] = {
    "aio": "native",
    "cache": {"direct": True},
    "locking": "on",
    "aio_max_batch": 3,
    "drop_cache": True,
    "x_check_cache_dropped": True,
}


def _without(*names: str) -> dict[str, Any]:
    return reopen(file(**{name: value for name, value in _GIVEN.items() if name not in names}))


_FILE_REOPENED: Steps = [
    NEGOTIATE,
    add(file()),
    *(reopen(file(filename=name)) for name in ("./img", "file:img", "key64")),
    *(reopen(file(aio=value)) for value in ("threads", "native", "io_uring")),
    reopen(file(aio="native", cache={"direct": True})),
    *(reopen(file(locking=value)) for value in ("auto", "off", "on")),
    *(reopen(file(aio_max_batch=value)) for value in (0, 5)),
    *(reopen(file(x_check_cache_dropped=value)) for value in (True, False)),
    reopen(file(pr_manager="x")),
    *(reopen(file(detect_zeroes=value)) for value in ("unmap", "on")),
    NODES,
    reopen(file(detect_zeroes="unmap", discard="unmap")),
    NODES,
    reopen(file(cache={"direct": True})),
    NODES,
    reopen(file(cache={"no-flush": True})),
    NODES,
    unlike(CACHE, reopen(file(cache={}))),
    reopen(file(read_only=True)),
    NODES,
    *(reopen(file(force_share=True, **more)) for more in ({}, {"read_only": True})),
    reopen(file(auto_read_only=True)),
    NODES,
    reopen({"driver": "file", "node-name": "f"}),
    reopen({"driver": "file", "filename": "img"}),
    reopen({"node-name": "f"}),
    reopen(options("host_device", "f", filename="img")),
    reopen(options("raw", "f", file="f")),
    reopen(file("nope")),
    reopen(file(read_only=True), file(read_only=False)),
    NODES,
    reopen(file(read_only=True), file("nope")),
    NODES,
    reopen(file(nope=1)),
    *(call("blockdev-reopen"), reopen(1), reopen("f")),
    reopen(file(drop_cache=True)),
    reopen(file(drop_cache=False)),
    reopen(file()),
    delete("f"),
    # What was given has to be given again.
    add(file(**_GIVEN)),
    *(_without(first, second) for first, second in combinations(sorted(set(_GIVEN) - {"cache"}), 2)),
    unlike(BATCH, reopen(file(**_GIVEN))),
    reopen(file(**{**_GIVEN, "locking": "off"})),
    reopen(options("raw", "f", file="f")),
    reopen(options("null-co", "f")),
    delete("f"),
    add(file(read_only=True, force_share=True)),
    reopen(file()),
    reopen(file(read_only=True)),
    reopen(file(read_only=True, force_share=False)),
    reopen(file(read_only=True, force_share=True)),
    delete("f"),
    add(file()),
    *(reopen(file(force_share=value)) for value in (False, True)),
    add(raw("r", file=file("g", read_only=True, force_share=True))),
    reopen(raw("r", file="g", force_share=False)),
    reopen(raw("r", file=file("g", read_only=True, force_share=True))),
    reopen(raw("r", file=file("g", read_only=True))),
]

# -- null -------------------------------------------------------------------------------------------------------

_SET: dict[str, Any] = {"size": 4096, "latency_ns": 5, "read_zeroes": True}
_OTHER: dict[str, Any] = {"size": 7, "latency_ns": 7, "read_zeroes": False}


def _null(driver: str) -> Steps:
    def null(**more: Any) -> dict[str, Any]:
        return options(driver, "n", **more)

    def kept(names: tuple[str, ...]) -> dict[str, Any]:
        return reopen(null(**{name: value for name, value in _SET.items() if name not in names}))

    groups = [(), *((name,) for name in _SET), *(tuple(set(_SET) - {name}) for name in sorted(_SET)), tuple(_SET)]
    return [
        NEGOTIATE,
        *looks(null(), *(null(size=size) for size in (0, 1, 513, (1 << 63) - (1 << 30)))),
        *(add(null(size=size)) for size in ((1 << 63) - 512, 1 << 63, "1", 1.5)),
        *(add(null(latency_ns=value)) for value in (-1, 1 << 64, (1 << 64) - 1, 1 << 63)),
        *looks(null(latency_ns=0), null(read_zeroes=True), null(read_zeroes=False)),
        add(null(read_zeroes="on")),
        *looks(
            null(size=4096, read_zeroes=True, read_only=True, force_share=True),
            null(cache={"direct": True, "no-flush": True}),
            null(discard="unmap", detect_zeroes="unmap"),
            null(active=False),
            null(auto_read_only=True),
        ),
        add(null(filename="x")),
        add(null()),
        *(resize("n", size) for size in (1 << 30, 1 << 20, -1)),
        delete("n"),
        add(null(**_SET)),
        *(kept(names) for names in groups),
        *(reopen(null(**{**_SET, **{name: _OTHER[name] for name in names}})) for names in groups),
        reopen(null(**_SET, read_only=True)),
        NODES,
        reopen(options("file", "n", filename="img")),
        reopen({**null(**_SET), "driver": "null-aio" if driver == "null-co" else "null-co"}),
        GRAPH,
        STATISTICS,
    ]


# -- raw, alone and above others --------------------------------------------------------------------------------

_INSIDE = {"driver": "file", "filename": "img"}

_RAW: Steps = [
    NEGOTIATE,
    add(file()),
    add(raw()),
    *(NODES, FLAT, GRAPH, STATISTICS, delete("f"), delete("r")),
    *looks(*(raw(offset=offset) for offset in (0, 512, 1, 1 << 20))),
    *(add(raw(offset=offset)) for offset in ((1 << 20) + 1, -1, "1", 1 << 62, 1 << 63)),
    *looks(raw(size=0), raw(size=1 << 20), raw(offset=512, size=(1 << 20) - 512)),
    *(add(raw(size=size)) for size in (1, -512, (1 << 20) + 512, 1 << 62, "0")),
    *(add(raw(offset=offset, size=size)) for offset, size in ((512, 1 << 20), ((1 << 63) - 1, 512))),
    # Resizing: a window ends where it ends, an offset holds on to the size below.
    add(raw(size=512)),
    *(GRAPH, resize("r", 1024), resize("r", 512), resize("f", 1024), delete("r")),
    add(raw(offset=512)),
    *(resize("r", 2048), NODES, resize("f", 100), NODES, delete("r"), resize("f", 1 << 20)),
    # Children.
    *(add(raw(file=value)) for value in (None, 1, [], {}, {"driver": "file"}, {"driver": "nope"}, "r", "nope")),
    *(add(raw(**{name: "img"})) for name in ("nope", "filename", "backing")),
    add({"driver": "raw", "node-name": "r"}),
    *(
        add(raw(file={**_INSIDE, **more}))
        for more in (
            {"filename": "nope"},
            {"node-name": "f"},
            {"node-name": "r"},
            {"x": 1},
            {"cache": {"direct": 1}},
        )
    ),
    NODES,
    add(raw(file=_INSIDE)),
    *(NODES, FLAT, GRAPH, delete("r"), NODES),
    add(raw(file={**_INSIDE, "node-name": "p"})),
    *(delete("p"), delete("r"), NODES),
    # What an inline child takes over.
    *looks(
        *(
            raw(file={**_INSIDE, "node-name": "p", **below}, **more)
            for below, more in (
                ({}, {"read_only": True, "cache": {"direct": True}, "discard": "unmap", "detect_zeroes": "unmap"}),
                ({}, {"read_only": True, "force_share": True}),
                ({}, {"auto_read_only": True, "cache": {"no-flush": True}}),
                ({"read-only": True}, {}),
                ({"read-only": False}, {"read_only": True}),
                ({"discard": "ignore"}, {"discard": "unmap"}),
                ({"cache": {"direct": False}}, {"cache": {"direct": True}}),
            )
        )
    ),
    add(raw(force_share=True)),
    add(raw(read_only=True, force_share=True)),
    *(GRAPH, delete("r")),
    # Names of what stands above a format.
    add(raw("a", file={"driver": "null-co", "size": 4096})),
    add(raw("b", file={"driver": "null-co"})),
    add(raw("c", file={"driver": "null-co"}, size=512)),
    add(raw("d", file={"driver": "raw", "size": 4096, "file": "f"}, offset=512)),
    *(NODES, FLAT, GRAPH),
]

_TALL = {"driver": "raw", "node-name": "q", "file": {"driver": "file", "node-name": "s", "filename": "img"}}

_RAW_REOPENED: Steps = [
    NEGOTIATE,
    add(raw(file={"driver": "raw", "node-name": "p", "offset": 512, "file": _TALL})),
    *(NODES, FLAT),
    GRAPH,
    reopen(raw(file="p")),
    NODES,
    reopen(raw(file={"driver": "raw", "offset": 1024, "file": "q"})),
    NODES,
    reopen(raw(file={"driver": "raw", "node-name": "zz", "offset": 1024, "file": "q"})),
    reopen(raw(file={"driver": "file", "filename": "img"})),
    reopen(raw("q", file="s", size=512)),
    reopen(raw("q", file={"driver": "file", "filename": "img"}, size=2048)),
    unlike(SHORTER, NODES),
    *(delete(name) for name in "spqr"),
    add(file()),
    add(raw()),
    *(add(raw(name, file="r")) for name in ("r2", "r3")),
    *(GRAPH, NODES, delete("r"), delete("r3")),
    *(reopen(raw(file=name)) for name in ("r2", "r", None, "nope", _INSIDE, {**_INSIDE, "node-name": "f"})),
    reopen({"driver": "raw", "node-name": "r"}),
    reopen(raw("r2")),
    *(NODES, GRAPH),
    reopen(raw("r2", file="r"), raw("r", file="r2")),
    *(NODES, GRAPH),
    reopen(raw(offset=512, size=512)),
    NODES,
    *(reopen(raw(**more)) for more in ({"offset": 512, "size": 1 << 20}, {"size": 5}, {"offset": 1 << 30})),
    NODES,
    reopen(raw()),
    NODES,
    *(reopen(raw(read_only=value)) for value in (1, True)),
    # All or none.
    reopen(raw(read_only=True), file(read_only=True), raw("r2", read_only=True)),
    NODES,
    reopen(raw("r2")),
    reopen(raw("r2"), file(read_only=True)),
    *(NODES, GRAPH),
    reopen(raw(), file(), raw("r2")),
    NODES,
    reopen(file(cache={"direct": True}), *(raw(name, cache={"direct": True}) for name in ("r", "r2"))),
    unlike(EARLY, NODES),
    *(reopen(options(driver, "r")) for driver in ("null-co", "nope")),
    reopen(options("file", "r", filename="img")),
    *(delete(name) for name in ("r2", "r", "f")),
    # A child is exchanged for a node of the user's.
    add(raw(file=_INSIDE)),
    add(file()),
    reopen(raw()),
    *(NODES, GRAPH, delete("f")),
]

# -- permissions, activity, sizes -------------------------------------------------------------------------------


def _end(name: str, **more: Any) -> Steps:
    return [call("block-export-del", id=name, **more), "event BLOCK_EXPORT_DELETED"]


_PERMISSIONS: Steps = [
    NEGOTIATE,
    add(file()),
    call("nbd-server-start", addr=unix("n")),
    export("e", node_name="f", writable=True),
    *(GRAPH, add(raw()), add(raw("w", offset=512)), GRAPH),
    export("x", node_name="w", writable=True),
    export("y", node_name="r", writable=True),
    *(GRAPH, call("query-block-exports")),
    *(resize(name, 2 << 20) for name in "frw"),
    reopen(file(read_only=True)),
    reopen(raw(read_only=True)),
    reopen(raw("w", read_only=True, offset=512)),
    reopen(raw("w", offset=1024)),
    NODES,
    # Another node of the same file.
    add(file("g")),
    export("z", node_name="g", writable=True),
    export("z", node_name="g"),
    *(GRAPH, add(raw("g1", file="g", size=512)), GRAPH, delete("g1")),
    *_end("z"),
    delete("g"),
    add(file("g", read_only=True)),
    export("z", node_name="g"),
    *_end("z"),
    delete("g"),
    add(file("g", read_only=True, force_share=True)),
    export("z", node_name="g"),
    export("z2", node_name="g", writable=True),
    *(NODES, GRAPH),
    *(active(False, name) for name in "fgrw"),
    active(False),
    NODES,
    active(True),
    *_end("e"),
    *(GRAPH, delete("f"), delete("w")),
    *_end("x", mode="hard"),
    *(delete(name) for name in "wrf"),
    *_end("y"),
    *(delete(name) for name in "rf"),
    call("nbd-server-stop"),
    "event BLOCK_EXPORT_DELETED",
    *(delete("g"), NODES, GRAPH),
]

_ACTIVITY: Steps = [
    NEGOTIATE,
    add(file()),
    add(raw()),
    active(False, "f"),
    *(active(False, "r"), NODES, GRAPH, active(True, "f"), NODES),
    *(add(raw("r2")), add(raw("r3", active=False)), add(raw("r4", active=True)), NODES),
    *(active(True, "r"), NODES, active(False), active(False), NODES),
    call("nbd-server-start", addr=unix("n")),
    export("e", node_name="r", allow_inactive=True),
    *(NODES, GRAPH, call("query-block-exports")),
    export("e2", node_name="r", name="e2", writable=True, allow_inactive=True),
    *(NODES, GRAPH),
    resize("r", 4096),
    reopen(raw()),
    reopen(raw(), file()),
    reopen(raw(read_only=True)),
    reopen(raw()),
    export("e3", node_name="r", name="e3"),
    *(NODES, GRAPH, active(False, "r"), NODES),
    export("e4", node_name="r", name="e4", writable=True),
    *(active(False, "r"), active(False), NODES, GRAPH),
    *(call("blockdev-set-active"), active("x"), active(True, ""), active(True, "nope")),
    call("nbd-server-stop"),
    *["event BLOCK_EXPORT_DELETED"] * 4,
    *(active(False), NODES, active(True, "r"), NODES, active(True), NODES),
]

_SIZES: Steps = [
    NEGOTIATE,
    add(file()),
    call("block-set-write-threshold"),
    call("block-set-write-threshold", node_name="f"),
    *(threshold(value) for value in (-1, 1 << 64, "1")),
    *(step for value in (1 << 63, (1 << 64) - 1, 0, 1) for step in (threshold(value), NODES)),
    call("block_resize"),
    call("block_resize", node_name="f"),
    *(resize("f", size) for size in (-1, 1 << 62, (1 << 63) - 1, 1 << 63, "1")),
    *(step for size in (1 << 20, 4097, 1 << 16) for step in (resize("f", size), NODES)),
    call("block_resize", device="f", size=1),
    call("block_resize", device="g", node_name="f", size=1 << 20),
    call("block_resize", device="f", node_name="g", size=1 << 20),
    call("query-block", x=1),
    *(call("query-blockstats", query_nodes=value) for value in (1, False, True)),
    *(call("query-named-block-nodes", flat=value) for value in (1, False)),
    call("x-debug-query-block-graph", x=1),
    delete(1),  # type: ignore[arg-type]  # what is refused
    active(False, "f"),
    *(resize("f", 1 << 20), threshold(1), NODES),
]

# -- block devices ----------------------------------------------------------------------------------------------


def _device(name: str = "h", /, **more: Any) -> dict[str, Any]:
    return options("host_device", name, **{"filename": "LOOP", **more})


_DEVICE: Steps = [
    NEGOTIATE,
    *looks(
        _device(),
        _device(read_only=True, force_share=True),
        _device(locking="on"),
        _device(aio="native", cache={"direct": True}, discard="unmap", detect_zeroes="unmap"),
    ),
    add(file(filename="LOOP")),
    add(_device(cache={"direct": True})),
    add(raw(file="h")),
    *(NODES, GRAPH, STATISTICS),
    *looks(raw("w", file="h", offset=512, size=4096), raw("w", file="h", offset=100)),
    *(resize(name, size) for name in "hr" for size in (512, 1 << 20, 2 << 20)),
    NODES,
    reopen(_device(cache={"direct": True}, aio="native")),
    reopen(_device(read_only=True)),
    reopen(raw(file="h", read_only=True), _device(read_only=True, cache={"direct": True})),
    *(NODES, delete("r"), delete("h")),
    *(add(_device(name)) for name in ("h", "h2")),
    call("nbd-server-start", addr=unix("n")),
    export("e", node_name="h", writable=True),
    export("e2", node_name="h2", name="e2", writable=True),
    export("e3", node_name="h2", name="e3"),
    *(GRAPH, NODES, active(False), active(True), NODES),
]

SCRIPTS: dict[str, Script] = {
    "file": Script(_FILE),
    "file reopened": Script(_FILE_REOPENED),
    "null-co": Script(_null("null-co")),
    "null-aio": Script(_null("null-aio")),
    "raw": Script(_RAW),
    "raw reopened": Script(_RAW_REOPENED),
    "permissions": Script(_PERMISSIONS),
    "activity": Script(_ACTIVITY),
    "sizes and thresholds": Script(_SIZES),
    "device of 512-byte sectors": Script(_DEVICE, sector=512),
    "device of 4096-byte sectors": Script(_DEVICE, sector=4096),
}
