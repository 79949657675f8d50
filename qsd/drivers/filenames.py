"""How nodes are reported: the options that name a node's disk, as a tree."""

from __future__ import annotations

import json
from typing import Any


def tree_of(driver: Any) -> dict[str, Any]:
    """The options that name the disk of the node of ``driver``."""
    name: str = driver.filename()
    if name.startswith("json:"):
        tree: dict[str, Any] = json.loads(name.removeprefix("json:"))
        return tree
    if driver.is_format:
        return {
            "driver": driver.name,
            "file": {"driver": driver.children["file"].node.driver.name, "filename": name},
        }
    return {"driver": driver.name, "filename": name}
