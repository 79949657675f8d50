"""Steps with dirty bitmaps, for this daemon and for the reference: QMP commands, and what NBD clients do.

A step is ``{"execute": name, "arguments": {...}}``. Besides commands there are ``nbd-write`` (export, kind, offset,
length), ``nbd-contexts`` (export, listed, selected), ``nbd-status`` (export, extended, selected, requests), and
what happens to images: ``qemu-img`` (words), ``qemu-io`` (image, commands), ``stored`` (image) which tells what
bitmaps it holds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness import Qmp
from nbd_contexts import ContextClient
from nbd_reader import TRIM, WRITE, WRITE_ZEROES, NbdReader
from qcow2_images import img, io

# Sizes of the files the steps use.
FILES = {"a": 10 << 20, "b": 1000000, "c": 5 << 20, "big": 10 << 30, "bigger": 20 << 30}
KINDS = {"write": WRITE, "zero": WRITE_ZEROES, "trim": TRIM}
# What one request writes at most.
PIECE = 1 << 20


def make_files(place: Path) -> None:
    for name, size in FILES.items():
        with (place / name).open("wb") as file:
            file.truncate(size)


def _write(place: Path, export: str, kind: str, offset: int, length: int) -> str:
    with NbdReader(place / "nbd.sock", export) as client:
        if kind != "write":
            client.request(KINDS[kind], offset, length)
        for start in range(offset, offset + length, PIECE) if kind == "write" else ():
            client.write(start, b"x" * min(PIECE, offset + length - start))
    return "done"


def _contexts(place: Path, export: str, listed: list[str], selected: list[str]) -> list[Any]:
    with ContextClient(place / "nbd.sock", export) as client:
        return [client.listed(*listed), client.select(*selected)]


def _status(place: Path, export: str, extended: bool, selected: list[str], requests: list[Any]) -> list[Any]:
    with ContextClient(place / "nbd.sock", export, extended=extended) as client:
        found: list[Any] = [client.select(*selected)]
        client.go()
        return found + [client.status(*request) for request in requests]


def _img(place: Path, words: list[str]) -> str:
    img(*[word.replace("@", f"{place}/") for word in words])
    return "done"


def _io(place: Path, image: str, commands: list[str]) -> str:
    io(place / image, *commands)
    return "done"


def _stored(place: Path, image: str) -> Any:
    shown = json.loads(img("info", "-U", "--output=json", place / image))
    return shown["format-specific"]["data"].get("bitmaps")


CLIENTS = {
    "nbd-write": _write,
    "nbd-contexts": _contexts,
    "nbd-status": _status,
    "qemu-img": _img,
    "qemu-io": _io,
    "stored": _stored,
}


def carry_out(qmp: Qmp, place: Path, step: dict[str, Any]) -> Any:
    """Do a step; what is answered. Exports are gone when their deletion has been answered."""
    name, arguments = step["execute"], step["arguments"]
    if name in CLIENTS:
        return CLIENTS[name](place, **arguments)
    reply = qmp.command(name, arguments)
    if name == "block-export-del" and "return" in reply:
        qmp.wait_event("BLOCK_EXPORT_DELETED", lambda data: data["id"] == arguments["id"])
    if name == "query-named-block-nodes":
        return [_node(node) for node in reply["return"]]
    return reply.get("return", reply.get("error"))


def _node(node: dict[str, Any]) -> list[Any]:
    shown = [node["node-name"], node.get("dirty-bitmaps")]
    specific = node["image"].get("format-specific", {}).get("data", {})
    return [*shown, specific["bitmaps"]] if "bitmaps" in specific else shown


def recorded(path: Path) -> list[dict[str, Any]]:
    """Steps with the reference's answers."""
    steps: list[dict[str, Any]] = json.loads(path.read_text())
    return steps
