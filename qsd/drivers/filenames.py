"""How nodes are reported: the options that name a node's disk, as a tree."""

from __future__ import annotations

import json
from typing import Any, Final

# Drivers whose name is a path, whatever it looks like.
PATHS: Final = ("file", "host_device")


def tree_of(driver: Any, name: str | None = None) -> dict[str, Any]:
    """The options that name the disk of the node of ``driver``; ``name``: what its ``filename`` has answered."""
    if name is None:
        name = driver.filename()
    if name == f"{driver.name}://":
        return {"driver": driver.name}
    if name.startswith("json:") and driver.name not in PATHS:
        tree: dict[str, Any] = json.loads(name.removeprefix("json:"))
        return tree
    if driver.is_format:
        return {"driver": driver.name, **_children_of(driver)}
    return {"driver": driver.name, "filename": name}


def _children_of(driver: Any) -> dict[str, Any]:
    """What a format's children are; the backing file is named where it is not the image's own, by ``own``."""
    return {name: tree_of(child.node.driver) for name, child in driver.children.items() if name != "backing"}


def name_above_file(driver: Any, own: dict[str, Any]) -> str:
    """The name of a format's node: its file's, when that says it all.

    It does not when the node has options of its ``own`` that make it another disk, or when the file is itself what
    a format makes of something: opened by that name alone it would be that something.
    """
    file = driver.children["file"].node.driver
    name: str = file.filename()
    if not own and not file.is_format and (file.name in PATHS or not name.startswith("json:")):
        return name
    return "json:" + json.dumps({"driver": driver.name, **own, **_children_of(driver)})
