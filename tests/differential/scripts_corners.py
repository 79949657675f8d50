"""Corners that an acceptance test found: odd names, options that do not go together, who is told what."""

from __future__ import annotations

import struct
from typing import Any

from script import NEGOTIATE, Script, call
from scripts_block import export, unix
from scripts_images import add as bitmap
from scripts_images import internal, rename, transaction, verb
from scripts_nodes import FLAT, NODES, Steps, add, delete, options, reopen, resize
from scripts_qcow2 import MIB, image, made, not_made

SERVER = call("nbd-server-start", addr=unix("n"))
# A NUL in a text is two bytes, and no end, wherever the text goes.
NUL = "a\0b"


def file(path: str) -> dict[str, Any]:
    return {"driver": "file", "filename": path}


def qcow2(name: str, path: str, /, **more: Any) -> dict[str, Any]:
    return options("qcow2", name, file=file(path), **more)


_NULS: Steps = [
    NEGOTIATE,
    *made("file", filename=NUL, size=MIB),
    add(options("file", "f", filename=NUL)),
    *(FLAT, delete("f")),
    add(options("file", "f", filename=f"{NUL}x")),
    add(options("file", NUL, filename="img")),
    *(call("object-add", qom_type="secret", id=name, file=NUL) for name in ("s", NUL)),
    call("nbd-server-start", addr=unix(f"{NUL}n")),
    call("chardev-add", id=NUL, backend={"type": "file", "data": {"out": f"{NUL}c"}}),
    call("query-chardev"),
    *image("p", backing_file=NUL, backing_fmt="raw"),
    add(options("qcow2", "q", file="f-p")),
    FLAT,
    *(internal(device="q", name=NUL), bitmap("q", NUL, persistent=True), bitmap("q", "ab", persistent=True)),
    *(FLAT, delete("q"), add(options("qcow2", "q", file="f-p")), NODES),
    rename("q", "q", f"./{NUL}"),
    *(verb("remove", "q", NUL), delete("q")),
    add(options("file", "f", filename=NUL)),
    export("e", node_name="f", name=NUL, description=NUL),
    *(call("nope\0"), call("query-block-exports")),
]


def header(name: bytes) -> bytes:
    """An image of 1 MiB that names a qcow2 backing file, and holds nothing."""
    cluster = 65536
    fields = (b"QFI\xfb", 3, 512, len(name), 16, MIB, 0, 1, 3 * cluster, cluster, 1, 0, 0, 0, 0, 0, 4, 104)
    start = struct.pack(">4sIQIIQIIQQIIQQQQII", *fields) + struct.pack(">II5s3x", 0xE2792ACA, 5, b"qcow2")
    tables = (struct.pack(">Q", 2 * cluster), struct.pack(">H", 1) * 4, b"")
    return b"".join(part.ljust(cluster, b"\0") for part in (start.ljust(512, b"\0") + name, *tables))


_NESTED = '{"driver": "raw", "file": {"driver": "qcow2", "file.driver": "file", "file.filename": "base"}}'


def odd(size: int) -> bytes:
    """An image whose size is not whole sectors."""
    image = header(b"")
    return image[:24] + struct.pack(">Q", size) + image[32:]


_FILES = {
    **{f"odd-{size}": odd(size) for size in (1, 1000, 65537)},
    "base": header(b""),
    "top": header(b"base"),
    "other": header(b""),
    "moved": bytes(512) + header(b"base"),
    "inside": header(f"json:{_NESTED}".encode()).replace(b"\0\0\0\5qcow2", b"\0\0\0\3raw\0\0"),
}

_CHAINS: Steps = [
    NEGOTIATE,
    *(step for path in ("top", ".//top", "inside") for step in (add(qcow2("q", path)), NODES, delete("q"))),
    # What holds the image is in the same directory, though its name is no path.
    *(
        step
        for name, window in ((".//top", {"size": 196608}), (".//top", {"offset": 0}), (".//moved", {"offset": 512}))
        for step in (
            add(options("qcow2", "q", file={"driver": "raw", "file": file(name), **window})),
            NODES,
            delete("q"),
        )
    ),
]

_BACKINGS: Steps = [
    NEGOTIATE,
    add(qcow2("b", "base")),
    add(options("file", "f", filename="top")),
    *(
        step
        for given in ({"backing": None}, {"backing": ""}, {"backing": "b"})
        for step in (
            add(options("qcow2", "q", file="f", **given)),
            reopen(options("qcow2", "q", file="f")),
            reopen(options("qcow2", "q", file="f", backing=None)),
            reopen(options("qcow2", "q", file="f")),
            reopen(options("qcow2", "q", file="f", force_share=False)),
            delete("q"),
        )
    ),
    add(options("qcow2", "q", file="f", backing="b")),
    rename("q", "q", ""),
    reopen(options("qcow2", "q", file="f")),
    reopen(options("qcow2", "q", file="f", backing=None)),
    reopen(options("qcow2", "q", file="f")),
]

# Who may not resize is told who is in the way, and then that the image is read-only.
_SHARED = {"read_only": True, "force_share": True}
_RESIZED: Steps = [
    NEGOTIATE,
    SERVER,
    add(options("file", "w", filename="img")),
    export("e", node_name="w", writable=True),
    *(
        step
        for given in ({}, {"read_only": True}, _SHARED)
        for inner in ({}, {"read_only": True}, _SHARED)
        for step in (
            add(options("raw", "r", file=options("file", "f", filename="img", **inner), **given)),
            resize("r", 2 * MIB),
            resize("f", 2 * MIB),
            delete("r"),
        )
    ),
    *image("p"),
    add(options("qcow2", "q", file="f-p")),
    bitmap("q", "b", persistent=True),
    reopen(options("qcow2", "q", file="f-p", read_only=True)),
    *(resize("q", 2 * MIB), resize("q", -1), resize("q", 1 << 63)),
    # A format needs more of its file than it refuses others.
    add(options("file", "g", filename="p")),
    add(options("raw", "v", file="g")),
    add(qcow2("q2", "p")),
]

_MADE: Steps = [
    NEGOTIATE,
    *image("p"),
    *not_made("qcow2", file="f-p", size=MIB, version="v2", extended_l2=True, cluster_size=8192),
]

# How much is allocated ahead is up to the program.
_SIZES = frozenset({"actual-size", "virtual-size", "date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec"})


def _overlay(node: str, name: str) -> tuple[str, dict[str, Any]]:
    return "blockdev-snapshot-sync", {"node-name": node, "snapshot-file": name, "snapshot-node-name": f"n-{name}"}


# Overlays of one transaction that stand on one another name one another so that the chain can be opened again.
_STACKED: Steps = [
    NEGOTIATE,
    SERVER,
    add(qcow2("a", "base")),
    add(qcow2("mine", "other", backing=None)),
    export("e", node_name="a", writable=True),
    transaction(_overlay("a", "o1"), _overlay("n-o1", "o2"), _overlay("n-o2", "o3")),
    NODES,
    transaction(("blockdev-snapshot", {"node": "n-o3", "overlay": "mine"}), _overlay("mine", "o4")),
    NODES,
    call("nbd-server-stop"),
    "event BLOCK_EXPORT_DELETED",
    *(delete(name) for name in ("mine", "a")),
    *(step for name in ("o3", "o4") for step in (add(qcow2("q", name)), NODES, delete("q"))),
]

_ODD: Steps = [
    NEGOTIATE,
    *(
        step
        for name in _FILES
        if name.startswith("odd")
        for step in (add(qcow2("q", name)), NODES, resize("q", MIB), delete("q"))
    ),
]

_FIRST = {"cache-size": 1, "l2-cache-entry-size": 3}
_LATE = {"cache-clean-interval": 1 << 32}

# Of several things that are wrong, the first is told.
_WRONG: Steps = [
    NEGOTIATE,
    *(
        add(options("file", "f", aio="native", **given))
        for given in (
            {"filename": "nope"},
            {"filename": "."},
            {"filename": ".", "read-only": True},
            {"filename": "/dev/null"},
            {"filename": "nope", "pr-manager": "x"},
        )
    ),
    add(options("host_device", "f", aio="native", filename="img")),
    *(
        add(options("raw", "r", file=file("img"), offset=offset, size=size))
        for offset, size in ((0, MIB + 1), (MIB, 1), (1, MIB), (0, 1))
    ),
    *image("p"),
    *image("v2", version="v2"),
    *(
        add(options("qcow2", "q", file="f-p", **given))
        for given in (
            {**_FIRST, "l2-cache-size": 2},
            {**_FIRST, "refcount-cache-size": 2},
            {**_FIRST, "refcount-cache-size": 1, "l2-cache-size": 1},
            {**_FIRST, **_LATE},
            {"cache-size": -1, "refcount-cache-size": -1},
            {"cache-size": -1, "l2-cache-entry-size": 3},
        )
    ),
    *(
        add(options("qcow2", "q", file="f-v2", **given))
        for given in (
            {**_LATE, "lazy-refcounts": True},
            {**_LATE, "discard-no-unref": True},
            {"lazy-refcounts": True, "discard-no-unref": True},
        )
    ),
]

# Zeroes can be unmapped where discards are passed on, which a reopen that does not speak of it leaves as it was.
_KEPT: Steps = [
    NEGOTIATE,
    *(
        step
        for name, given in (
            ("f", options("file", "f", filename="img")),
            ("r", options("raw", "r", file=file("base"))),
            ("q", options("qcow2", "q", file=file("other"))),
        )
        for step in (
            add({**given, "discard": "unmap"}),
            reopen(given),
            reopen({**given, "detect-zeroes": "unmap"}),
            reopen({**given, "discard": "ignore"}),
            reopen({**given, "detect-zeroes": "unmap"}),
            reopen({**given, "discard": "unmap", "detect-zeroes": "unmap"}),
            NODES,
            delete(name),
        )
    ),
]

# An image fits into a window, or on a device, that is longer than it needs.
_WINDOW = options("raw", "w", offset=4096, size=4 * MIB, file=file("big"))
_QUICK = {"key-secret": "s", "iter-time": 1, "cipher-alg": "aes-128", "cipher-mode": "cbc"}
_IN_WINDOWS: Steps = [
    NEGOTIATE,
    add(_WINDOW),
    *made("qcow2", file="w", size=2 * MIB),
    *made("qcow2", file="w", size=8 * MIB, **{"cluster-size": 4096}),
    add(options("qcow2", "q", file="w")),
    resize("q", 16 * MIB),
    resize("q", MIB),
    *made("luks", file="q", size=MIB // 2, **_QUICK),
    *made("qcow2", file="q", size=MIB // 2, encrypt={"format": "luks", **_QUICK}),
    resize("q", MIB),
    *made("luks", file="q", size=MIB // 2, **_QUICK),
    add(options("luks", "l", file="q", key_secret="s")),
    NODES,
    resize("l", MIB // 4),
    delete("l"),
    delete("q"),
]
_ON_A_DEVICE: Steps = [
    NEGOTIATE,
    add(options("host_device", "d", filename="LOOP")),
    *made("luks", file="d", size=MIB // 4, **_QUICK),
    add(options("luks", "l", file="d", key_secret="s")),
    NODES,
    delete("l"),
    *not_made("luks", file="d", size=MIB, **_QUICK),
]
_SECRET = ("--object", "secret,id=s,data=pw")
_MEASURED = frozenset({"iters", "master-key-iters", "uuid", "actual-size"})

# Two entries for one node are one: the later rules where both say something.
_Q = options("qcow2", "q", file="f-p", backing=None)
_TWICE: Steps = [
    NEGOTIATE,
    *image("p"),
    add(options("file", "f", filename="img")),
    add(_Q),
    *(
        step
        for one, other in (
            ({"read-only": True}, {}),
            ({}, {"read-only": True}),
            ({"read-only": True}, {"read-only": False}),
            ({"detect-zeroes": "on"}, {}),
            ({"discard": "unmap"}, {"detect-zeroes": "unmap"}),
            ({"detect-zeroes": "unmap"}, {"discard": "unmap"}),
            ({"detect-zeroes": "unmap"}, {"discard": "ignore"}),
            ({"cache": {"direct": True}}, {"cache": {"no-flush": True}}),
            ({"cache": {"direct": True}}, {"cache": {"direct": False}}),
            ({"cache-size": -1}, {"cache-size": 1}),
            ({"overlap-check": "none"}, {"overlap-check": {"template": "all"}}),
            ({"read-only": True, "force-share": True}, {}),
            ({"driver": "raw"}, {}),
        )
        for step in (
            call("blockdev-reopen", options=[{**_Q, **one}, {**_Q, **other}]),
            NODES,
            reopen({**_Q, "discard": "ignore"}),
        )
    ),
    call("blockdev-reopen", options=[{"driver": "qcow2", "node-name": "q", "backing": None}, _Q]),
    call("blockdev-reopen", options=[_Q, {"driver": "qcow2", "node-name": "q", "file": "f-p"}]),
    call(
        "blockdev-reopen",
        options=[
            {**options("file", "f", filename="img"), "read-only": True},
            _Q,
            options("file", "f", filename="img"),
        ],
    ),
    NODES,
]

SCRIPTS: dict[str, Script] = {
    "images in windows": Script(_IN_WINDOWS, _SECRET, files={"big": bytes(8 * MIB)}, unseen=_MEASURED),
    "luks on a device": Script(_ON_A_DEVICE, _SECRET, sector=512, unseen=_MEASURED),
    "listed twice in a reopen": Script(_TWICE, unseen=_SIZES),
    "discard left out of a reopen": Script(_KEPT, files=_FILES),
    "several things wrong": Script(_WRONG),
    "images of odd sizes": Script(_ODD, files=_FILES, unseen=frozenset({"actual-size"})),
    "overlays stacked at once": Script(_STACKED, files=_FILES, unseen=_SIZES),
    "names with a NUL": Script(_NULS, unseen=_SIZES),
    "chains of odd names": Script(_CHAINS, files=_FILES),
    "backing file missing in a reopen": Script(_BACKINGS, files=_FILES),
    "resized beside a writer": Script(_RESIZED),
    "made with options at odds": Script(_MADE),
}
