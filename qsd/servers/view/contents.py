"""What the view shows, out of what the QMP commands answer and the actors say of themselves. Secrets stay out."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import attrs

from qsd.actors.edges import info_of
from qsd.actors.graph import Graph
from qsd.actors.supervisor import Supervisor
from qsd.block.drawing import Arrow, Box, to_dot, to_svg
from qsd.servers.exports import Exports
from qsd.servers.view.tree import Data, Directory, Entry, Text, fixed

# Runs a QMP command with JSON arguments; its JSON answer. Raises QmpError.
Ask = Callable[[str, dict[str, Any]], Awaitable[Any]]

# Properties of objects whose value must not be seen.
_HIDDEN = {"secret": {"data"}}


@attrs.frozen
class Sources:
    """What is looked at."""

    ask: Ask
    graph: Graph
    exports: Exports
    supervisor: Supervisor


def make_tree(sources: Sources) -> Directory:
    """The root of the tree."""
    return fixed(
        {
            "nodes": Directory(partial(_nodes, sources)),
            "exports": Directory(partial(_exports, sources)),
            "jobs": Directory(partial(_jobs, sources)),
            "chardevs": Directory(partial(_chardevs, sources)),
            "objects": Directory(partial(_objects, sources)),
            "actors": Text(partial(_actors, sources)),
            "graph.dot": Text(partial(_drawing, sources, to_dot)),
            "graph.svg": Text(partial(_drawing, sources, to_svg)),
        }
    )


def _as_json(value: Any) -> bytes:
    return json.dumps(value, indent=2, default=list).encode() + b"\n"


def _json(value: Any) -> Text:
    async def render() -> bytes:
        return _as_json(value)

    return Text(render)


def _line(text: str) -> Text:
    async def render() -> bytes:
        return text.encode() + b"\n"

    return Text(render)


async def _nodes(sources: Sources) -> Mapping[str, Entry]:
    return {node.name: _node(sources, node.name, node.length) for node in sources.graph.nodes}


def _node(sources: Sources, name: str, length: int) -> Directory:
    return fixed(
        {
            "data": Data(name, length),
            "info.json": Text(partial(_of_node, sources, "query-named-block-nodes", {}, name)),
            "stats.json": Text(partial(_of_node, sources, "query-blockstats", {"query-nodes": True}, name)),
        }
    )


async def _of_node(sources: Sources, command: str, arguments: dict[str, Any], name: str) -> bytes:
    answers: list[dict[str, Any]] = await sources.ask(command, arguments)
    return _as_json(next((each for each in answers if each["node-name"] == name), None))


async def _exports(sources: Sources) -> Mapping[str, Entry]:
    return {
        export["id"]: fixed({"info.json": _json(export), "clients": Text(partial(_clients, sources, export["id"]))})
        for export in await sources.ask("query-block-exports", {})
    }


async def _clients(sources: Sources, name: str) -> bytes:
    entry = sources.exports.find(name)
    clients = entry.export.clients() if entry is not None else []
    return b"".join(
        (client.name + "".join(f" {key}={value}" for key, value in client.statistics().items()) + "\n").encode()
        for client in clients
    )


async def _jobs(sources: Sources) -> Mapping[str, Entry]:
    return {
        job["id"]: fixed(
            {
                "status": _line(job["status"]),
                "progress": _line(f"{job['current-progress']} {job['total-progress']}"),
                "info.json": _json(job),
            }
        )
        for job in await sources.ask("query-jobs", {})
    }


async def _chardevs(sources: Sources) -> Mapping[str, Entry]:
    return {
        chardev["label"]: fixed({"info.json": _json(chardev)}) for chardev in await sources.ask("query-chardev", {})
    }


async def _objects(sources: Sources) -> Mapping[str, Entry]:
    found = await sources.ask("qom-list", {"path": "/objects"})
    return {
        each["name"]: fixed({"info.json": Text(partial(_object, sources, each["name"]))})
        for each in found
        if each["type"].startswith("child<")
    }


async def _object(sources: Sources, name: str) -> bytes:
    (answer,) = await sources.ask("qom-list-get", {"paths": [f"/objects/{name}"]})
    facts = {each["name"]: each.get("value") for each in answer["properties"]}
    hidden = _HIDDEN.get(facts["type"], set())
    return _as_json({key: value for key, value in facts.items() if key not in hidden})


async def _actors(sources: Sources) -> bytes:
    return sources.supervisor.tree().encode()


async def _drawing(sources: Sources, draw: Callable[[list[Box], list[Arrow]], str]) -> bytes:
    graph = sources.graph
    boxes, arrows = [], []
    exports = {entry.edge: (f"export {entry.id}", entry.export.type_name) for entry in sources.exports.entries()}
    for number, root in enumerate(graph.roots):
        key = f"user {number}"
        boxes.append(Box(key, exports.get(root, (root.parent_text,)), is_user=True))
        arrows.append(Arrow(key, root.node.name, root.name))
    for node in graph.nodes:
        boxes.append(Box(node.name, (node.name, node.driver.name)))
        arrows += [Arrow(node.name, edge.node.name, name) for name, edge in info_of(node).children.items()]
    return draw(boxes, arrows).encode()
