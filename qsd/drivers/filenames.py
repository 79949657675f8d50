"""How nodes are reported: the options that name a node's disk, as a tree.

A name may hold those of all nodes below, so trees are put together from texts, and every node is asked once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from qsd.wire.qmp_json_writer import dumps

# Drivers whose name is a path, whatever it looks like.
PATHS: Final = ("file", "host_device")

# The order in which the reference names options: who compares names as texts finds the same.
_ORDER: Final = (
    *("offset", "read-zeroes", "data-file", "backing", "encrypt.key-secret", "header"),
    *("driver", "size", "file", "filename", "key-secret"),
)

# What drivers have answered in this ``names_kept``.
_kept: dict[Any, str] | None = None


@contextmanager
def names_kept() -> Iterator[None]:
    """Ask no node for its name twice. For a stretch in which nothing changes: without awaits."""
    global _kept
    before = _kept
    _kept = {} if before is None else before
    try:
        yield
    finally:
        _kept = before


def name_of(driver: Any) -> str:
    """What the node of ``driver`` is reported by.

    Those below it are asked first: no chain is too long for the stack.
    """
    with names_kept():
        assert _kept is not None
        if driver not in _kept:
            for each in reversed(_not_asked(driver)):
                if each not in _kept:
                    _kept[each] = each.filename()
        return _kept[driver]


def place_of(driver: Any) -> str:
    """What a relative name in the image of ``driver`` is relative to: the name of the file that holds it all.

    A window of a file, or a volume in it, is where the file is, though its own name is no path.
    """
    while (below := driver.children.get("file")) is not None:
        driver = below.node.driver
    return name_of(driver)


def _not_asked(driver: Any) -> list[Any]:
    assert _kept is not None
    found = {driver: None}
    waiting = [driver]
    while waiting:
        children = waiting.pop().children.values()
        new = [below for child in children if (below := child.node.driver) not in found and below not in _kept]
        found.update(dict.fromkeys(new))
        waiting.extend(new)
    return list(found)


def tree_text(driver: Any) -> str:
    """The options that name the disk of the node of ``driver``, as JSON."""
    name = name_of(driver)
    if name == f"{driver.name}://":
        return object_text(driver.name, {})
    if name.startswith("json:") and driver.name not in PATHS:
        return name.removeprefix("json:")
    if driver.is_format:
        return object_text(driver.name, _children_of(driver))
    return object_text(driver.name, {"filename": dumps(name)})


def object_text(driver_name: str, options: Mapping[str, str]) -> str:
    """Options of a driver, whose values are JSON, as JSON."""
    members = {"driver": dumps(driver_name), **options}
    return "{" + ", ".join(f'"{key}": {members[key]}' for key in sorted(members, key=_ORDER.index)) + "}"


def _children_of(driver: Any) -> dict[str, str]:
    """What a format's children are; the backing file is named where it is not the image's own, by ``own``."""
    return {name: tree_text(child.node.driver) for name, child in driver.children.items() if name != "backing"}


def name_above_file(driver: Any, own: Mapping[str, str]) -> str:
    """The name of a format's node: its file's, when that says it all.

    It does not when the node has options of its ``own`` (as JSON) that make it another disk, or when the file is
    itself what a format makes of something: opened by that name alone it would be that something.
    """
    file = driver.children["file"].node.driver
    name = name_of(file)
    if not own and not file.is_format and (file.name in PATHS or not name.startswith("json:")):
        return name
    return "json:" + object_text(driver.name, {**own, **_children_of(driver)})
