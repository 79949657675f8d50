"""What the nodes of an image need of one another: data files and backing files, shared, exported and inactive."""

from __future__ import annotations

from typing import Any

from script import NEGOTIATE, Script, call
from scripts_block import export, unix
from scripts_nodes import FLAT, GRAPH, Steps, active, add, options, reopen, resize
from scripts_qcow2 import MIB, image, made

SERVER = call("nbd-server-start", addr=unix("n"))


def file(name: str, path: str, /, **more: Any) -> dict[str, Any]:
    return options("file", name, filename=path, **more)


def qcow2(name: str, /, **more: Any) -> dict[str, Any]:
    return options("qcow2", name, **more)


def opened(name: str, path: str, /, **more: Any) -> dict[str, Any]:
    """A command that opens an image with a file of its own."""
    return add(qcow2(name, **{"file": file(f"{name}-file", path), **more}))


def exported(name: str, *, writable: bool) -> Steps:
    """Export, look, and stop exporting."""
    gone = [call("block-export-del", id="e"), "event BLOCK_EXPORT_DELETED"]
    return [export(id="e", type="nbd", node_name=name, writable=writable), GRAPH, *gone]


def keeps(name: str, node: str, *, writable: bool) -> dict[str, Any]:
    return export(id=name, type="nbd", node_name=node, name=name, writable=writable)


# An image with its data in the file ``d``, and one that has it as its backing file.
_IMAGES: Steps = [
    NEGOTIATE,
    SERVER,
    *made("file", filename="d", size=0),
    add(file("f-d", "d")),
    *image("p", data_file="f-d"),
    *image("top", backing_file="p", backing_fmt="qcow2"),
    *image("plain"),
    *(call("blockdev-del", node_name=f"f-{name}") for name in ("d", "p", "top", "plain")),
]


def _shared(**given: Any) -> Steps:
    """All kinds of users of a data file, beside an image opened with ``given``."""
    shares = {"read_only": True, "force_share": True}
    both = {"file": "n-file", "data_file": "d", "backing": None}
    return [
        *_IMAGES,
        opened("n", "p", data_file=file("d", "d"), **given),
        GRAPH,
        *exported("n", writable=False),
        resize("n", 2 * MIB),
        *exported("n", writable=not given.get("read_only")),
        keeps("e1", "d", writable=True),
        keeps("e2", "d", writable=False),
        GRAPH,
        add(options("raw", "r", file="d")),
        add(options("raw", "r2", file="d", read_only=True)),
        opened("q2", "p", data_file="d", backing=None, **shares),
        add(qcow2("q3", file=file("q3-file", "p", read_only=True), data_file="d", read_only=True, backing=None)),
        add(qcow2("q4", **both, read_only=True)),
        add(qcow2("q5", **both)),
        GRAPH,
        resize("d", 4 * MIB),
        keeps("e3", "n", writable=True),
    ]


_ABOVE: Steps = [
    *_IMAGES,
    opened("t", "top", backing=qcow2("m", file=file("m-file", "p"), data_file=file("d", "d"))),
    GRAPH,
    *exported("t", writable=True),
    resize("d", MIB),
    keeps("e1", "d", writable=True),
    keeps("e2", "m", writable=True),
    active(False),
    FLAT,
    GRAPH,
]

# Whose conflict is told, of several.
_CONFLICTS: Steps = [
    *_IMAGES,
    add(file("f", "plain")),
    add(options("raw", "r", file="f")),
    add(qcow2("n", file="f")),
    add(options("raw", "r2", file="f")),
    add(qcow2("n2", file="f")),
    keeps("e", "f", writable=True),
    keeps("e", "f", writable=False),
    keeps("e", "r", writable=True),
    keeps("e", "r2", writable=True),
    call("blockdev-del", node_name="n"),
    keeps("e", "r", writable=True),
    add(qcow2("n", file="f")),
    keeps("e2", "f", writable=True),
    add(qcow2("n", file="f")),
    add(qcow2("n", file="f", read_only=True)),
    resize("f", 0),
]


def _inactive(*steps: Any) -> Steps:
    return [step for each in steps for step in (each, FLAT)]


_ACTIVITY: Steps = [
    *_IMAGES,
    *_inactive(
        opened("n", "top", active=False), active(True, "n"), active(False, "n"), active(True), active(False)
    ),
    GRAPH,
    call("blockdev-del", node_name="n"),
    *_inactive(opened("n", "top", active=False, read_only=True), active(True, "n")),
    call("blockdev-del", node_name="n"),
    *_inactive(
        opened("n", "top", active=False, backing=qcow2("m", file=file("m-file", "p"), active=True)),
        active(False, "m"),
        active(True, "n"),
        active(False, "m"),
    ),
    call("blockdev-del", node_name="n"),
    opened("n", "top", file=file("f", "top", active=False)),
    *_inactive(opened("n", "top", file=file("f", "top", active=False), active=False), active(True, "n")),
    call("blockdev-del", node_name="n"),
    opened("m", "p", read_only=True, active=False),
    opened("n", "top", backing="m"),
    *_inactive(
        opened("n", "top", backing="m", active=False), active(True, "n"), active(False, "n"), active(True, "m")
    ),
    call("blockdev-del", node_name="n"),
    call("blockdev-del", node_name="m"),
    add(file("d", "d")),
    *_inactive(opened("n", "p", data_file="d", active=False), active(True, "n"), active(False, "n")),
    call("blockdev-del", node_name="n"),
    *_inactive(add(options("raw", "r", active=False, file=qcow2("n", file=file("f", "top")))), active(True, "r")),
    call("blockdev-del", node_name="r"),
    *_inactive(
        add(options("compress", "c", active=False, file=qcow2("n", file=file("f", "plain")))), active(True, "c")
    ),
]


def _reopened(**given: Any) -> Steps:
    """A child whose options stood inside its parent's, and is only named when that is reopened."""
    inline = file("f", "img", **given)
    direct, uncached = {"cache": {"direct": True}}, {"cache": {"direct": True, "no-flush": True}}
    steps: Steps = []
    for first in ({}, {"read_only": True}, direct):
        steps.append(add(options("raw", "r", file=inline, **first)))
        steps.append(FLAT)
        for then in ({}, {"read_only": True}, {}, direct, uncached, {}, {"file": inline}):
            steps += [reopen(options("raw", "r", **{"file": "f", **then})), FLAT]
        steps.append(call("blockdev-del", node_name="r"))
    return steps


# What depends on who has made the images.
_MADE = frozenset({"image"})

SCRIPTS: dict[str, Script] = {
    "data file shared": Script(_shared()),
    "data file shared, read-only": Script(_shared(read_only=True)),
    "data file shared, by force": Script(_shared(read_only=True, force_share=True)),
    "data file shared, inactive": Script(_shared(active=False)),
    "data file below": Script(_ABOVE, unseen=_MADE),
    "conflicts": Script(_CONFLICTS),
    "activity of a chain": Script(_ACTIVITY, unseen=_MADE),
    "child named when its parent is reopened": Script([NEGOTIATE, *_reopened(), *_reopened(read_only=False)]),
}
