"""The NBD server's addresses and limits, and every option of its exports."""

from __future__ import annotations

from typing import Any

from script import NEGOTIATE, Differs, Script, Step, call
from scripts_block import EXPORTS, export, node, unix

STOP = call("nbd-server-stop")
GRAPH = call("x-debug-query-block-graph")
DELETED = "event BLOCK_EXPORT_DELETED"

Steps = list[Step | Differs]


def start(address: Any = unix("n"), **more: Any) -> dict[str, Any]:  # noqa: B008  # never changed
    return call("nbd-server-start", addr=address, **more)


def inet(host: str = "127.0.0.1", port: str = "0", **more: Any) -> dict[str, Any]:
    named = {key.replace("_", "-"): value for key, value in more.items()}
    return {"type": "inet", "data": {"host": host, "port": port, **named}}


def started(*servers: dict[str, Any]) -> Steps:
    """Each server is started and stopped."""
    return [step for server in servers for step in (server, STOP)]


_ADDRESSES: Steps = [
    NEGOTIATE,
    *started(
        *(start(inet(**more)) for more in ({}, {"ipv6": False}, {"keep_alive": True}, {"numeric": True})),
        *(start(inet(host, **more)) for host, more in (("::1", {}), ("", {"ipv4": True}))),
    ),
    start(inet("::1", ipv4=True, ipv6=False)),
    start(inet("0.0.0.0", ipv4=False)),
    start(inet("nosuchhost.invalid")),
    start(inet(port="x")),
    start({"type": "inet", "data": {"host": "127.0.0.1", "port": "0", "keep_alive": True}}),
    start({"type": "inet", "data": {"host": "127.0.0.1"}}),
    *started(
        start(unix("")),
        start(unix("img")),  # what is there is replaced
        *(
            start({"type": "unix", "data": {"path": "n", **more}})
            for more in ({"abstract": True}, {"tight": False})
        ),
        *(start(max_connections=number) for number in (0, 1, (1 << 32) - 1)),
        start(handshake_max_seconds=0),
        start(tls_authz="x"),
    ),
    *(start(unix(path)) for path in ("x" * 200, "nope/n")),
    *(
        start({"type": "vsock", "data": {"cid": cid, "port": port}})
        for cid, port in (("1", "1"), ("x", "1"), ("1", "x"))
    ),
    *(
        start(value)
        for value in ({"type": "unix", "data": {}}, {"type": "unix"}, {"type": "fd", "data": {"str": "x"}})
    ),
    *(start(value) for value in ("x", None, [])),
    *(start(max_connections=number) for number in (1 << 32, "1")),
    start(handshake_max_seconds=-1),
    start(tls_creds=""),
    call("nbd-server-start"),
    call("nbd-server-stop", x=1),
    STOP,
]


def bitmap(name: str, **more: Any) -> dict[str, Any]:
    return call(f"block-dirty-bitmap-{name}", node="n", name="bm", **more)


def delete(**more: Any) -> dict[str, Any]:
    return call("block-export-del", **more)


def old(**more: Any) -> dict[str, Any]:
    return call("nbd-server-add", **more)


_EXPORTS: Steps = [
    NEGOTIATE,
    node("null-co", "n", size=1 << 20),
    start(),
    call("block-export-add"),
    call("block-export-add", type="nbd"),
    call("block-export-add", type="nbd", id="a"),
    call("block-export-add", type="nbd", node_name="n"),
    call("block-export-add", id="a", node_name="n"),
    *(export("a", name=name) for name in ("", "", None, 1)),
    *(export("b") for _ in range(2)),
    EXPORTS,
    *(export("c", name="c", writethrough=value) for value in ("x", True)),
    *(export("d", name="d", fixed_iothread=value) for value in ("x", True)),
    *(export("e", name="e", description=value) for value in (1, "")),
    *(export("f", name="f", allow_inactive=value) for value in (1, True)),
    *(export("g", name="g", allocation_depth=value) for value in (1, True)),
    export("h", name="h", nope=1),
    export("h", name="x" * 4096, description="y" * 4096),
    *(
        export("i", name="i", bitmaps=bitmaps)
        for bitmaps in (
            None,
            [1],
            [{"name": "x"}],
            [{"node": "n", "name": "x"}],
            [{"node": "nope", "name": "x"}],
            ["x", "y"],
        )
    ),
    *(EXPORTS, GRAPH),
    bitmap("add"),
    *(export("i", name="i", bitmaps=bitmaps) for bitmaps in (["bm"], ["bm", "bm"])),
    export("i", name="i", bitmaps=[{"node": "n", "name": "bm"}]),
    *(bitmap(name) for name in ("remove", "clear", "disable", "enable")),
    old(device="n", name="z", bitmap="bm"),
    delete(id="i", mode="hard"),
    DELETED,
    bitmap("disable"),
    *(export(name, name=name, bitmaps=["bm", "bm"]) for name in ("i", "j")),
    *(bitmap(name) for name in ("remove", "enable")),
    old(device="n", name="z", bitmap="bm"),
    *(EXPORTS, call("query-named-block-nodes")),
    *(delete(), delete(id=1), delete(id=""), delete(id="i", mode="x"), delete(id="i", mode="safe")),
    DELETED,
    delete(id="i"),
    *(old(), old(device="n", name="a"), old(device="nope", name="y"), old(device="", name="y")),
    *(old(device="n", name=name) for name in ("", "1x", "n y")),
    old(device="n", name="y", bitmap="nope"),
    old(device="n", name="y", export_name="other"),
    old(device="n", name="y", writable=True, description="d"),
    *(EXPORTS, GRAPH),
    *(call("nbd-server-remove"), call("nbd-server-remove", name="y", mode="safe")),
    DELETED,
    call("nbd-server-remove", name="e"),
    DELETED,
    call("nbd-server-remove", name="zz", mode="q"),
    STOP,
    EXPORTS,  # they have gone when the server has stopped
    call("blockdev-del", node_name="n"),
]

_ONE_LOOP = "every node is on the one loop: there is no thread it could not be moved to"

_IOTHREADS: Steps = [
    NEGOTIATE,
    *(call("object-add", qom_type="iothread", id=name) for name in "tu"),
    node("null-co", "n"),
    start(),
    export("a", iothread="t"),
    export("b", name="b", iothread="u"),
    export("c", name="c", iothread="u", fixed_iothread=True),
    Differs(export("d", name="d", iothread="t", fixed_iothread=True), _ONE_LOOP),
    *(export("e", name="e", iothread=value) for value in (["t"], ["t", "u"], "nope", "", [], 1)),
    export("e", name="e", iothread=["t"], fixed_iothread=True),
    export("e", name="e", iothread="nope", fixed_iothread=True),
    *(call("object-del", id=name) for name in "tt"),
    STOP,
    EXPORTS,
]

SCRIPTS: dict[str, Script] = {
    "nbd addresses": Script(_ADDRESSES),
    "nbd exports": Script(_EXPORTS),
    "nbd exports and iothreads": Script(_IOTHREADS),
}
