"""Nodes, exports and the NBD server, as far as their commands meet."""

from __future__ import annotations

from typing import Any

from script import NEGOTIATE, Differs, Script, Step, call


def node(driver: str, name: str | None = None, /, **options: Any) -> dict[str, Any]:
    named = {} if name is None else {"node_name": name}
    return call("blockdev-add", driver=driver, **named, **options)


def export(name: Any = "e", /, **options: Any) -> dict[str, Any]:
    return call("block-export-add", **{"type": "nbd", "id": name, "node_name": "n", **options})


def unix(path: str) -> dict[str, Any]:
    return {"type": "unix", "data": {"path": path}}


EXPORTS = call("query-block-exports")

_SERVER: list[Step | Differs] = [
    NEGOTIATE,
    call("nbd-server-stop"),
    call("nbd-server-start"),
    call("nbd-server-start", addr={}),
    call("nbd-server-start", addr={"type": "x"}),
    call("nbd-server-start", addr={"type": "unix", "path": "n"}),
    call("nbd-server-start", addr=unix("/nonexistent/x")),
    call("nbd-server-start", addr={"type": "fd", "data": {"str": "5"}}),
    call("nbd-server-start", addr=unix("n"), tls_creds="x"),
    call("nbd-server-start", addr=unix("n"), max_connections=-1),
    call("nbd-server-start", addr=unix("n"), handshake_max_seconds=1 << 32),
    call("nbd-server-start", addr=unix("n"), x=1),
    export(),
    node("null-co", "n", size=1 << 20),
    export(),
    call("nbd-server-start", addr=unix("n")),
    call("nbd-server-start", addr=unix("n")),
    *(export(name) for name in ("", "1", "a b", "é", 1, "e", "e")),
    export("f"),
    export("f", name="other"),
    export("g", node_name="nope"),
    export("g", name="x" * 4097),
    export("g", name="g", description="x" * 4097),
    export("g", name="g", writable="on"),
    export("g", name="g", iothread="nope"),
    export("g", name="g", iothread=[]),
    export("g", name="g", iothread=1),
    export("g", name="g", iothread=["nope"]),
    export("g", name="g", bitmaps=["nope"]),
    export("g", name="g", bitmaps=[1]),
    export("g", type="nope"),
    EXPORTS,
    call("blockdev-del", node_name="n"),
    call("block-export-del", id="nope"),
    call("block-export-del", id="f", mode="nope"),
    call("block-export-del", id="f"),
    "event BLOCK_EXPORT_DELETED",
    call("block-export-del", id="f"),
    call("nbd-server-add", device="n"),
    call("nbd-server-add", device="nope"),
    call("nbd-server-add", device="n", name="old", writable=True),
    call("nbd-server-add", device="n", name="a b"),
    EXPORTS,
    call("nbd-server-remove", name="nope"),
    call("nbd-server-remove", name="old", mode="hard"),
    "event BLOCK_EXPORT_DELETED",
    node("null-co", "r", size=1 << 20, read_only=True),
    export("w", node_name="r", writable=True),
    export("w", node_name="r"),
    call("nbd-server-add", device="r", name="rw", writable=True),
    EXPORTS,
    call("nbd-server-stop"),
    "event BLOCK_EXPORT_DELETED",
    "event BLOCK_EXPORT_DELETED",
    "event BLOCK_EXPORT_DELETED",
    EXPORTS,
    call("nbd-server-stop"),
    call("blockdev-del", node_name="n"),
    call("blockdev-del", node_name="r"),
]

_NODES: list[Step | Differs] = [
    NEGOTIATE,
    call("query-named-block-nodes"),
    call("query-block"),
    call("query-blockstats"),
    call("query-blockstats", query_nodes=True),
    node("null-co"),
    node("null-co", "1"),
    node("nope", "n"),
    node("file", "f", filename="img"),
    node("file", "f", filename="img"),
    node("file", "g", filename="nope"),
    node("raw", "r", file="f"),
    node("raw", "r2", file="nope"),
    call("blockdev-del", node_name="f"),
    call("blockdev-del", node_name="nope"),
    call("blockdev-del"),
    call("block_resize", node_name="r", size=2 << 20),
    call("block_resize", node_name="nope", size=1),
    call("block_resize", size=1),
    call("block_resize", node_name="r", size=-1),
    call("block-set-write-threshold", node_name="r", write_threshold=4096),
    call("block-set-write-threshold", node_name="nope", write_threshold=1),
    call("blockdev-set-active", node_name="r", active=False),
    call("blockdev-set-active", node_name="r", active=True),
    call("blockdev-set-active", node_name="nope", active=True),
    call("blockdev-reopen", options=[{"driver": "raw", "node-name": "r", "file": "f", "read-only": True}]),
    call("blockdev-reopen", options=[{"driver": "file", "node-name": "r", "filename": "img"}]),
    call("blockdev-reopen", options=[{"driver": "raw", "node-name": "nope", "file": "f"}]),
    call("blockdev-reopen", options=1),
    call("x-debug-query-block-graph"),
    call("blockdev-del", node_name="r"),
    call("blockdev-del", node_name="f"),
    call("query-named-block-nodes", flat=1),
]

SCRIPTS: dict[str, Script] = {"nbd server and exports": Script(_SERVER), "nodes": Script(_NODES)}
