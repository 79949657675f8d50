"""Character devices over QMP."""

from __future__ import annotations

from typing import Any

from script import NEGOTIATE, Differs, Script, Step, call


def add(kind: str, name: Any = "c", **data: Any) -> dict[str, Any]:
    body = {key.rstrip("_").replace("_", "-"): value for key, value in data.items()}
    return call("chardev-add", id=name, backend={"type": kind, "data": body})


def unix(path: Any, **more: Any) -> dict[str, Any]:
    return {"type": "unix", "data": {"path": path, **more}}


def inet(host: str, port: Any, **more: Any) -> dict[str, Any]:
    return {"type": "inet", "data": {"host": host, "port": port, **more}}


def sock(addr: Any, **more: Any) -> dict[str, Any]:
    return add("socket", addr=addr, **more)


QUERY = call("query-chardev")
REMOVE = call("chardev-remove", id="c")
NAMED = (QUERY, REMOVE)  # how it is called, then gone again
_LATER = "chardev backends of later"

_TABLE: list[Step | Differs] = [
    NEGOTIATE,
    QUERY,
    call("query-chardev", x=1),
    Differs(call("query-chardev-backends"), _LATER),
    call("chardev-add", id="a"),
    call("chardev-add", backend={"type": "null", "data": {}}),
    *(
        call("chardev-add", id="a", backend=backend)
        for backend in (
            {"type": "null"},
            {"data": {}},
            {"type": "x", "data": {}},
            {"type": "null", "data": {}, "x": 1},
            {"type": "null", "data": {"x": 1}},
            {"type": "null", "data": []},
            [],
            "null",
            None,
        )
    ),
    add("null", 1),
    add("null", "n"),
    add("null", "n"),
    add("null", ""),
    add("null", "a b/é"),
    QUERY,
    call("chardev-remove"),
    call("chardev-remove", id=1),
    *(call("chardev-remove", id=name) for name in ("", "nope", "qmp", "n", "n", "a b/é")),
    add("null", logfile="/nonexistent/x"),
    add("null", logfile="log", logappend=1),
    add("null", logfile="log", logappend=True, logtimestamp=True),
    *NAMED,
    add("file"),
    add("file", out="/nonexistent/x"),
    add("file", out="out", in_="nope"),
    add("file", out="", in_="img"),
    add("file", out=".", append=True),
    add("file", out="out"),
    *NAMED,
    add("file", out="out", in_="img", append=True),
    *NAMED,
    add("pipe"),
    add("pipe", device="nope"),
    add("pipe", device="img"),
    *NAMED,
    add("stdio", signal=1),
    add("stdio", signal=False),
    add("stdio", "second"),
    *NAMED,
    add("pty", path="/nonexistent/x"),
    add("pty", path="img"),
    add("pty", path=""),
    add("pty", path=1),
]

_RING: list[Step | Differs] = [
    NEGOTIATE,
    add("ringbuf", "r", size=3),
    add("ringbuf", "r", size=-4),
    add("ringbuf", "r", size="4"),
    add("ringbuf", "r", size=0),
    call("chardev-remove", id="r"),
    add("memory", "r", size=4),
    QUERY,
    call("ringbuf-write", device="r", data="abcdefgh"),
    call("ringbuf-read", device="r", size=10),
    call("chardev-remove", id="r"),
    add("ringbuf", "r"),
    QUERY,
    call("ringbuf-write", device="r", data="hello"),
    *(call("ringbuf-read", device="r", size=size) for size in (2, 0, -1, 100, 100, 1 << 62)),
    call("ringbuf-read", device="r"),
    call("ringbuf-read", size=1),
    call("ringbuf-read", device="nope", size=1),
    call("ringbuf-read", device="nope", size=0),
    call("ringbuf-read", device="qmp", size=1),
    call("ringbuf-read", device="r", size=1, format="x"),
    call("ringbuf-write", device="nope", data="x"),
    call("ringbuf-write", device="nope", data="!!", format="base64"),
    call("ringbuf-write", device="qmp", data="x"),
    call("ringbuf-write", device="r"),
    call("ringbuf-write", device="r", data=1),
    call("ringbuf-write", device="r", data="x", format="zz"),
    *(
        step
        for data in ("!!", "YWI=", "YWI", "", "/4BB", "8J+YgO2gvUI=", "wIBB4IBB", "YQBi", "Y\nQ==", "4oKs")
        for step in (
            call("ringbuf-write", device="r", data=data, format="base64"),
            call("ringbuf-read", device="r", size=100),
        )
    ),
    call("ringbuf-write", device="r", data="a\0bé€😀"),
    call("ringbuf-read", device="r", size=100, format="base64"),
    call("ringbuf-write", device="r", data="€€"),
    call("ringbuf-read", device="r", size=4),
    call("ringbuf-read", device="r", size=4),
]

_BEYOND = "the reference takes a path that fills its field to the last byte; Python does not"
_ABSTRACT = "the reference shows no abstract name while somebody is connected"

_UNIX: list[Step | Differs] = [
    NEGOTIATE,
    add("socket"),
    sock({}),
    sock({"type": "unix"}),
    sock({"type": "x", "data": {}}),
    sock({"type": "unix", "data": {"path": "s", "x": 1}}),
    sock(unix(1)),
    sock(unix("s"), reconnect=1),
    sock(unix("s"), server="on"),
    sock(unix("s")),
    *NAMED,
    sock(unix("s"), server=True, wait=False, nodelay=True),
    *NAMED,
    sock(unix("s"), server=False),
    sock(unix("s"), server=False, wait=True),
    sock(unix("s"), server=False, reconnect_ms=-1),
    sock(unix("s"), server=False, reconnect_ms=0),
    # Under another name: the reference forgets a client that is still trying a little later.
    add("socket", "late", addr=unix("s"), server=False, reconnect_ms=60000),
    QUERY,
    call("chardev-remove", id="late"),
    sock(unix("s"), reconnect_ms=5),
    sock(unix("s"), reconnect_ms=0),
    sock(unix("s"), tls_authz="x"),
    sock(unix("s"), tls_creds="x"),
    sock(unix("s"), telnet=True),
    *NAMED,
    sock(unix("s"), tn3270=True),
    *NAMED,
    sock(unix("s"), websocket=True),
    *NAMED,
    sock(unix("s"), telnet=True, server=False),
    sock(unix("s"), tn3270=True, server=False),
    sock(unix("s"), websocket=True, server=False),
    sock(unix("s"), websocket=True, server=False, wait=True),
    sock(unix("qsd-differential", abstract=True)),
    QUERY,
    add("socket", "again", addr=unix("qsd-differential", abstract=True)),
    add("socket", "client", addr=unix("qsd-differential", abstract=True), server=False),
    Differs(QUERY, _ABSTRACT),
    call("chardev-remove", id="client"),
    REMOVE,
    sock(unix("qsd-differential", abstract=True, tight=False)),
    *NAMED,
    sock(unix("s", abstract=False, tight=False)),
    *NAMED,
    sock(unix("")),
    *NAMED,
    sock(unix(""), server=False),
    sock(unix("x" * 107)),
    *NAMED,
    Differs(sock(unix("x" * 108)), _BEYOND),
    Differs(REMOVE, _BEYOND),
    sock(unix("x" * 109)),
    sock(unix("x" * 120), server=False),
    sock(unix("x" * 107, abstract=True)),
    REMOVE,
    sock(unix("x" * 108, abstract=True)),
    sock(unix("", abstract=True)),
    REMOVE,
    sock(unix("/nonexistent/x")),
    sock(unix("/")),
]

_OTHER: list[Step | Differs] = [
    NEGOTIATE,
    sock(inet("127.0.0.1", "0")),
    *NAMED,
    sock(inet("127.0.0.1", "")),
    *NAMED,
    sock(inet("", "0", ipv4=True)),
    *NAMED,
    sock(inet("localhost", "0", ipv4=True)),
    *NAMED,
    sock(inet("localhost", "0", ipv6=False)),
    *NAMED,
    sock(inet("127.0.0.1", "70000")),
    *NAMED,
    sock(inet("localhost", "1", ipv4=False, ipv6=False)),
    sock(inet("::1", "1", ipv4=True)),
    sock(inet("127.0.0.1", "foo")),
    sock(inet("127.0.0.1", "-1")),
    sock(inet("127.0.0.1", 1)),
    sock(inet("127.0.0.1", "1"), server=False),
    sock(inet("127.0.0.1", "1"), server=False, reconnect_ms=-5),
    sock(inet("127.0.0.1", "9", to=70000)),
    sock(inet("127.0.0.1", "9", to=-1)),
    sock(inet("127.0.0.1", "0", numeric=True)),
    REMOVE,
    sock(inet("localhost", "0", numeric=True)),
    sock(inet("127.0.0.1", "0", **{"keep-alive": True})),
    REMOVE,
    sock(inet("127.0.0.1", "0", keep_alive=True)),
    sock({"type": "inet", "data": {"host": "127.0.0.1"}}),
    sock(inet("127.0.0.1", "0"), telnet=True),
    *NAMED,
    sock(inet("127.0.0.1", "0"), tn3270=True),
    *NAMED,
    sock(inet("127.0.0.1", "0"), websocket=True),
    *NAMED,
    sock(inet("127.0.0.1", "0"), websocket=True, telnet=True),
    *NAMED,
    sock(inet("127.0.0.1", "0"), tls_creds="x"),
    sock({"type": "fd", "data": {"str": "5"}}),
    sock({"type": "fd", "data": {"str": "x"}}),
    sock({"type": "fd", "data": {"str": "5"}}, server=False),
    sock({"type": "fd", "data": {}}),
    sock({"type": "vsock", "data": {"cid": "x", "port": "1"}}),
    sock({"type": "vsock", "data": {"cid": "1", "port": "x"}}),
]

SCRIPTS: dict[str, Script] = {
    "chardev table": Script(_TABLE),
    "ring buffer": Script(_RING),
    "unix socket": Script(_UNIX),
    "other sockets": Script(_OTHER),
}
