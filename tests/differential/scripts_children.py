"""Children of an image, named, given in place or found by itself: circles, reopening, what probing found."""

from __future__ import annotations

import json
import struct
from typing import Any

from script import NEGOTIATE, Script
from scripts_corners import header, qcow2
from scripts_luks import ARGUMENTS
from scripts_luks import UNSEEN as _UNSEEN
from scripts_nodes import FLAT, Steps, add, delete, file, options, reopen
from scripts_qcow2 import image, made

UNSEEN = _UNSEEN | {"virtual-size"}
_NO_FORMAT = struct.pack(">II5s3x", 0xE2792ACA, 5, b"qcow2")


def over(name: str, kind: str = "") -> bytes:
    """An image above ``name``, whose format it may tell."""
    told = struct.pack(">II8s", 0xE2792ACA, len(kind), kind.encode()) if kind else bytes(len(_NO_FORMAT))
    return header(name.encode()).replace(_NO_FORMAT, told, 1)


def over_json(kind: str = "", /, **tree: Any) -> bytes:
    return over(f"json:{json.dumps(tree)}", kind)


def at(path: str, name: str | None = None, /, **more: Any) -> dict[str, Any]:
    """A file's options inside those of another node."""
    return {"driver": "file", "filename": path, **({"node-name": name} if name else {}), **more}


def format_at(driver: str, below: Any, name: str | None = None, /, **more: Any) -> dict[str, Any]:
    return {"driver": driver, "file": below, **({"node-name": name} if name else {}), **more}


def seen(*steps: Any) -> Steps:
    """Each step, and the nodes there are then."""
    return [step for each in steps for step in (each, FLAT)]


_NAMED = {
    "probed": over("img"),
    "probed-odd": over("odd"),
    "odd": bytes(1000),
    "told": over("img", "raw"),
    "probed-json": over_json(file=at("img")),
    "probed-part": over_json(file=at("img"), offset=512),
    "told-json": over_json(driver="raw", file=at("img")),
}
_RAW = {"driver": "raw", "file": at("img")}
_WRITABLE = {"driver": "raw", "read-only": False, "file": {**at("img"), "read-only": False}}
# Requests to an image that was found to be raw are whole sectors, however it is opened again.
_PROBED: Steps = [
    NEGOTIATE,
    *(
        step
        for name in _NAMED
        for step in (
            *seen(add(qcow2("q", name))),
            *seen(reopen(qcow2("q", name, backing=_RAW))),
            *seen(reopen(qcow2("q", name, backing=_WRITABLE))),
            *seen(reopen(qcow2("q", name, backing=_RAW, cache={"direct": True}))),
            *seen(reopen(qcow2("q", name, backing=_RAW)), delete("q")),
        )
    ),
]

_FILE = {"driver": "file", "filename": "img"}
_QCOW2 = {"driver": "qcow2", "file": {"driver": "file", "filename": "base"}}
_NULLED: dict[str, bytes] = {
    "no-backing": over_json(driver="raw", backing=None, file=_FILE),
    "no-backing-told": over_json("raw", backing=None, file=_FILE),
    "no-backing-probed": over_json(backing=None, file=_FILE),
    "no-backing-text": over_json(driver="raw", backing="", file=_FILE),
    "no-backing-of-file": over_json(driver="raw", file={**_FILE, "backing": None}),
    "no-backing-of-raw": over_json(driver="raw", file={"driver": "raw", "backing": "", "file": _FILE}),
    "no-backing-of-null": over_json(driver="raw", file={"driver": "null-co", "backing": None}),
    "no-backing-of-image": over_json(**_QCOW2, backing=None),
    "a-backing": over_json(driver="raw", backing=1, file=_FILE),
    "no-data-file": over_json(**_QCOW2, **{"data-file": None}),
    "nothing-of-data-file": over_json(**_QCOW2, **{"data-file": {}}),
    "raw-data-file": over_json(driver="raw", file=_FILE, **{"data-file": None}),
    "raw-header": over_json(driver="raw", file=_FILE, header=None),
    "no-file": over_json(driver="raw", file=None),
    "no-filename": over_json(driver="raw", file={"driver": "file", "filename": None}),
    "no-size": over_json(driver="qcow2", file=_QCOW2["file"], **{"l2-cache-size": None}),
    "no-flag": over_json(driver="qcow2", file=_QCOW2["file"], **{"lazy-refcounts": None}),
    "no-cache": over_json(driver="raw", file=_FILE, **{"cache.direct": None}),
    "nothing": over_json(driver="raw", file=_FILE, nope=None),
}
_NULLS: Steps = [
    NEGOTIATE,
    *(step for name in _NULLED for step in (*seen(add(qcow2("q", name))), delete("q"))),
]

# An image ``p``, one above it, and one with its data in the file ``d``.
_IMAGES: Steps = [
    NEGOTIATE,
    *made("file", filename="d", size=0),
    add(file("d", filename="d")),
    *image("p"),
    *image("e", data_file="d"),
    *image("top", backing_file="p", backing_fmt="qcow2"),
]


def q(name: str = "f-p", /, **more: Any) -> dict[str, Any]:
    return options("qcow2", "q", file=name, **more)


_CIRCLES: Steps = [
    *_IMAGES,
    add(q(backing="q")),
    add(q("q")),
    add(q(backing=format_at("qcow2", at("base"), backing="q"))),
    *(add(q(backing=format_at("raw", "q", name))) for name in (None, "x")),
    add(q(backing=format_at("raw", format_at("raw", "q", "y")))),
    add(q(data_file="q")),
    *(add(q(data_file="f-p", **more)) for more in ({}, {"backing": "nope"}, {"read_only": True})),
    add(q("f-e", data_file="q")),
    *(
        step
        for data in ("f-e", at("e"))
        for more in ({}, {"read_only": True})
        for step in (add(q("f-e", data_file=data, **more)), FLAT, delete("q"))
    ),
    *(add(options("luks", "q", file="f-p", header=name, key_secret="s")) for name in ("q", "f-p", "nope")),
    add(options("luks", "q", file="q", header="f-p", key_secret="s")),
    *(add(options(driver, "q", file=name)) for driver in ("raw", "compress") for name in ("q", "nope")),
    add(q("f-e", data_file="d")),
    *seen(*(reopen(q("f-e", data_file="d", backing=name)) for name in ("q", "f-e", "d"))),
    *seen(*(reopen(q("f-e", data_file=name, backing=None)) for name in ("q", "f-e"))),
    reopen(q("q", data_file="d", backing=None)),
]

_INLINE = at("d", "x")
# What is not mentioned again, of children that are there for the image alone.
_UNMENTIONED: Steps = [
    *_IMAGES,
    delete("d"),
    *(
        step
        for more in ({}, {"read_only": True})
        for step in (
            add(q("f-e", **more)),
            *seen(reopen(q("f-e")), reopen(q("f-e", read_only=True)), reopen(q("f-e", backing=None))),
            reopen(q("nope")),
            *(reopen(q("f-e", data_file=value)) for value in (None, "nope", "f-e", at("e"), at("d", "x"))),
            *seen(reopen(q("f-e", data_file=at("d"))), delete("q")),
        )
    ),
    add(q("f-e", data_file=_INLINE)),
    *seen(reopen(q("f-e")), reopen(q("f-e", data_file="x")), reopen(q("f-e"))),
    *seen(*(reopen(q("f-e", data_file=at("d", cache={"direct": direct}))) for direct in (True, False))),
    *seen(reopen(q("f-e", data_file="x", read_only=True)), delete("q")),
    add(file("d", filename="d")),
    add(q("f-e", data_file="d")),
    *seen(reopen(q("f-e")), reopen(q("f-e", data_file="d")), reopen(q("f-e", data_file=at("d")))),
    *(delete(name) for name in ("d", "q", "d")),
]

# A child that was given in place belongs to whom it ends up below.
_UPPER, _LOWER = at("top", "t"), at("p", "l")
_HEIRS: Steps = [
    *_IMAGES,
    *(delete(f"f-{name}") for name in ("p", "top")),
    add(q(_UPPER, backing=format_at("qcow2", _LOWER, "b"))),
    *seen(
        reopen(q("t", backing="b")),
        reopen(q("t", backing="l")),
        reopen(q("t", backing=at("p", "l", cache={"direct": True}))),
        reopen(q("t", backing=None)),
        reopen(q("t", backing=at("p", "l"))),
        delete("q"),
    ),
    add(file("d", filename="d")),
    add(q(_UPPER, backing=format_at("qcow2", _LOWER, "b"))),
    add(options("raw", "holder", file="b", read_only=True)),
    *seen(
        reopen(q("t", backing="d")),
        reopen(q("t", backing="b")),
        reopen(q("t", backing="b", cache={"direct": True})),
    ),
]

SCRIPTS: dict[str, Script] = {
    "raw by probing": Script(_PROBED, files=_NAMED, unseen=UNSEEN),
    "nulls in names": Script(_NULLS, files={**_NULLED, "base": header(b"")}, unseen=UNSEEN),
    "circles": Script(_CIRCLES, ARGUMENTS, files={"base": header(b"")}, unseen=UNSEEN),
    "children not mentioned again": Script(_UNMENTIONED, unseen=UNSEEN),
    "children inherited": Script(_HEIRS, unseen=UNSEEN),
}
