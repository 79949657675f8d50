"""Objects and the object tree."""

from __future__ import annotations

from typing import Any

from script import NEGOTIATE, Differs, Script, Step, call


def add(kind: str, name: Any, **more: Any) -> dict[str, Any]:
    return call("object-add", qom_type=kind, id=name, **more)


def listed(path: str) -> dict[str, Any]:
    return call("qom-list", path=path)


def get(path: str, name: str) -> dict[str, Any]:
    return call("qom-get", path=path, property=name)


def put(path: str, name: str, value: Any) -> dict[str, Any]:
    return call("qom-set", path=path, property=name, value=value)


MONITOR = "/objects/compat_monitor0"
_STORED = "the reference stores any name and goes on using the chardev it has"
_CLOSE = "close-action cannot be changed here"

_TREE: list[Step | Differs] = [
    NEGOTIATE,
    *map(
        listed, ("/", "", "objects", "/objects", "/objects/", "//objects", "/nope", "nope", "/chardevs", "q", ".")
    ),
    *map(listed, ("/chardevs/qmp", "qmp", "compat_monitor0", MONITOR, "/backend", "objects/compat_monitor0", "/.")),
    *(get("/", name) for name in ("type", "objects", "nope")),
    *(get("/objects", name) for name in ("type", "compat_monitor0")),
    *(get(MONITOR, name) for name in ("type", "chardev", "pretty", "close-action", "nope")),
    *(get("/chardevs/qmp", name) for name in ("type", "addr", "connected", "nope")),
    get("/nope", "type"),
    get("", "type"),
    put("", "type", 1),
    put("/", "type", "x"),
    put("/", "objects", "x"),
    put("/chardevs/qmp", "connected", True),
    put("/chardevs/qmp", "addr", True),
    put(MONITOR, "type", "x"),
    put(MONITOR, "pretty", True),
    get(MONITOR, "pretty"),
    put(MONITOR, "pretty", False),
    put(MONITOR, "pretty", "x"),
    Differs(put(MONITOR, "chardev", "qmp"), _STORED),
    Differs(put(MONITOR, "close-action", "none"), _CLOSE),
    add("iothread", "qmp"),
    listed("qmp"),  # ambiguous now
    get("qmp", "type"),
    put("qmp", "type", 1),
    get("objects/qmp", "type"),
    call("qom-list-get", paths=["qmp"]),
    call("qom-list-get", paths=["nope", "qmp"]),
    call("qom-list-get", paths=["/objects/qmp", "/"]),
    call("qom-list-get", paths=[]),
    call("qom-list-get", paths=["/nope"]),
    call("qom-list-get", paths=["/objects/qmp", "nope"]),
    call("qom-list-get", paths="x"),
    call("qom-list-get", paths=[1]),
    call("qom-list-get"),
    call("qom-list-get", paths=[""]),
    call("qom-list-get", paths=[MONITOR, "/chardevs/qmp", "/objects"]),
]

_TYPES: list[Step | Differs] = [
    NEGOTIATE,
    *(
        call("qom-list-properties", typename=name)
        for name in (
            *("iothread", "secret", "monitor-qmp", "object", "container", "chardev", "chardev-socket", "nope", ""),
            *("user-creatable", "chardev-null", "event-loop-base", "chardev-fd", "chardev-file", "chardev-pty"),
            *("chardev-pipe", "chardev-stdio", "chardev-ringbuf", "chardev-memory", "secret_common"),
        )
    ),
    call("qom-list-properties"),
    call("qom-list-properties", typename=1),
    call("qom-list-types", implements="nope"),
    call("qom-list-types", implements="iothread"),
    call("qom-list-types", implements="iothread", abstract=True),
    call("qom-list-types", implements="secret"),
    call("qom-list-types", implements="object", abstract=1),
    call("qom-list-types", implements="container"),
    call("qom-list-types", implements="monitor-qmp"),
    call("qom-list-types", x=1),
]

_IOTHREAD: list[Step | Differs] = [
    NEGOTIATE,
    *(add("iothread", name) for name in ("", "1", "a b", "é", "t", "t", 1, None)),
    add("iothread", "a", zz=1),
    *(add("iothread", "a", poll_max_ns=value) for value in ("x", -1, 1.5, None, [1], 1 << 63, (1 << 64) - 1)),
    add("iothread", "a", poll_weight=64),
    add("iothread", "a", thread_pool_min=65),
    add("iothread", "a", thread_pool_max=0),
    add("iothread", "a", thread_pool_max=1 << 40),
    add("iothread", "a", aio_max_batch=-1),
    add("nope", "a"),
    add(1, "a"),  # type: ignore[arg-type]  # the wrong type is the point
    call("object-add", qom_type="iothread"),
    call("object-add", id="a"),
    call("object-add"),
    *(
        get("t", name)
        for name in (
            *("poll-max-ns", "poll-grow", "poll-shrink", "poll-weight", "aio-max-batch"),
            *("thread-pool-min", "thread-pool-max", "type", "nope"),
        )
    ),
    *(put("t", "poll-max-ns", value) for value in (1, -1, "1", 1.5, 1.0, None, [1], 1 << 63, (1 << 64) - 1)),
    get("t", "poll-max-ns"),
    *(put("t", "poll-weight", value) for value in (64, -1, 63)),
    put("t", "poll-grow", -1),
    put("t", "poll-shrink", 1 << 63),
    put("t", "aio-max-batch", -1),
    put("t", "aio-max-batch", 5),
    put("t", "thread-pool-min", 3),
    put("t", "thread-pool-max", 2),
    put("t", "thread-pool-max", 5),
    put("t", "type", "x"),
    put("t", "nope", "x"),
    call("qom-set", path="t", property="poll-max-ns"),
    listed("/objects"),
    call("object-del", id="nope"),
    call("object-del", id=""),
    call("object-del", id=1),
    call("object-del"),
    call("object-del", id="compat_monitor0"),
    call("object-del", id="t"),
    call("object-del", id="t"),
    listed("/objects"),
]

_KEY = "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
_IV = "AAAAAAAAAAAAAAAAAAAAAA=="

_SECRET: list[Step | Differs] = [
    NEGOTIATE,
    add("secret", "s"),
    add("secret", "s", data="x", file="y"),
    add("secret", "s", data=1),
    add("secret", "s", data="pw"),
    *(get("s", name) for name in ("data", "file", "format", "keyid", "iv", "loaded")),
    listed("s"),
    put("s", "data", "y"),
    get("s", "data"),
    put("s", "format", "base64"),
    get("s", "format"),
    put("s", "format", "zz"),
    put("s", "file", "img"),
    get("s", "file"),
    put("s", "keyid", "img"),
    put("s", "iv", "img"),
    put("s", "data", None),
    put("s", "data", 1),
    add("secret", "b1", data="YWJj", format="base64"),
    get("b1", "data"),
    *(
        add("secret", f"c{number}", data=data, format="base64")
        for number, data in enumerate(("YWJj=", " YWJj", "YWJj\n", "YW\nJj", "/w==", "!", ""))
    ),
    get("c4", "data"),
    add("secret", "f", file="key64"),
    get("f", "data"),
    add("secret", "g", file="nope"),
    add("secret", "g", file="/"),
    add("secret", "g", file=""),
    add("secret", "g", data="x", loaded=True),
    add("secret", "g", data="x", keyid="nope"),
    add("secret", "g", data="x", keyid="compat_monitor0", iv="AAAA"),
    add("secret", "g", data="x", keyid="s", iv="AAAA"),
    add("secret", "key", data=_KEY, format="base64"),
    add("secret", "g", data="x", keyid="key"),
    add("secret", "g", data="x", keyid="key", iv="!"),
    add("secret", "g", data="x", keyid="key", iv="AAAA"),
    add("secret", "g", data="x", keyid="key", iv=_IV),
    add("secret", "g", data="0123456789012345", keyid="key", iv=_IV),
    add("secret", "g", data="0123456789012345", keyid="key", iv=_IV, format="base64"),
    # openssl enc -aes-256-cbc of "hello" with that key and iv
    add("secret", "g", data="0KV99uNYruGR2PcDDfDCfw==", keyid="key", iv=_IV, format="base64"),
    add("secret", "h", data="x", iv="!!"),
    add("secret", "i", data="é\0x"),
    get("i", "data"),
    call("object-del", id="key"),
    call("object-del", id="s"),
    listed("/objects"),
]

SCRIPTS: dict[str, Script] = {
    "object tree": Script(_TREE),
    "object types": Script(_TYPES),
    "iothread": Script(_IOTHREAD),
    "secret": Script(_SECRET),
}
