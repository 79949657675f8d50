"""Files that an image names: from the string in a header to the options of a node.

The words of a name are the reference's: a path (relative to the directory of the image that names it), ``file:``
or ``host_device:`` and a path, ``json:{...}``. Anything else with a protocol in front is refused, and so is a
``json:`` name that refers to nodes of the user's.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from qsd.drivers.name_texts import in_names_words
from qsd.drivers.probing import encryption_of, probe, protocol_of
from qsd.errors import QmpError
from qsd.qapi.visit import from_name
from qsd.wire.qmp_json import parse_one

if TYPE_CHECKING:
    from qsd.qapi.schema.block import BlockdevOptions

_PROTOCOLS: Final = ("file", "host_device")
_WITH_BACKING: Final = frozenset({"qcow2"})


def protocol_in(name: str) -> str | None:
    """The protocol ``name`` begins with, or None for a path."""
    protocol, colon, _rest = name.partition(":")
    return protocol if colon and "/" not in protocol else None


def full_name(name: str, image: str) -> str:
    """``name`` as the image called ``image`` means it. Raises QmpError."""
    if not name or protocol_in(name) is not None or os.path.isabs(name):
        return name
    if protocol_in(image) is not None:
        raise QmpError(f"Cannot use relative backing file names for '{image}'")
    # Up to the last slash as it is written: ``a//b`` stays so.
    return image[: image.rfind("/") + 1] + name


def protocol_options(name: str) -> dict[str, Any]:
    """The protocol node for a full name that is not ``json:``. Raises QmpError."""
    protocol = protocol_in(name)
    if protocol is None:
        return {"driver": protocol_of(name), "filename": name}
    if protocol not in _PROTOCOLS:
        raise QmpError(f"Unknown protocol '{protocol}'")
    path = name.partition(":")[2]
    if protocol_in(path) is not None:
        # So that it stays a path for whoever is told of it.
        path = f"./{path}"
    return {"driver": protocol_of(path) if protocol == "file" else protocol, "filename": path}


def format_options(name: str, image: str, format_name: str | None) -> tuple[BlockdevOptions, bool]:
    """The node for a backing file called ``name`` by ``image``, and whether its format was told by its first bytes.

    That is what happens without a format's name. Raises QmpError.
    """
    name = full_name(name, image)
    if name.startswith("json:"):
        tree = _json_tree(name)
        is_probed = False
        if format_name is not None:
            tree["driver"] = format_name
        elif not isinstance(tree.get("driver"), str):
            is_probed = True
            if "file" not in tree:
                raise QmpError("Must specify either driver or file")
            tree["driver"] = _probe_tree(tree["file"])
        tree = _without_no_backing(_completed(tree))
        try:
            return checked_options(tree), is_probed
        except QmpError as error:
            raise in_names_words(error, tree) from None
    file = protocol_options(name)
    if not file["filename"]:
        raise QmpError(f"The '{file['driver']}' block driver requires a file name")
    wanted = probe(file["filename"]) if format_name is None else format_name
    if wanted in _PROTOCOLS:
        return checked_options({**file, "driver": wanted}), False
    return checked_options({"driver": wanted, "file": file}), format_name is None


def plain_options(path: str) -> BlockdevOptions:
    """The node for a file without a format (an external data file): the name is taken as it is. Raises QmpError."""
    return checked_options({"driver": protocol_of(path), "filename": path})


def checked_options(tree: dict[str, Any]) -> BlockdevOptions:
    """Options as the contract knows them. Raises QmpError, for an unknown driver in its own words."""
    # Imported late: the schema names drivers, and drivers are imported where only they are needed.
    from qsd.qapi.schema.block import BlockdevDriver, BlockdevOptions

    driver = tree.get("driver")
    if driver not in {known.value for known in BlockdevDriver}:
        raise QmpError(f"Unknown driver '{driver}'")
    options: BlockdevOptions = from_name(BlockdevOptions, tree)
    return options


def _json_tree(name: str) -> dict[str, Any]:
    try:
        value = parse_one(name.removeprefix("json:"))
    except QmpError as error:
        raise error.prefixed("Could not parse the JSON options: ") from None
    if not isinstance(value, dict):
        raise QmpError("Invalid JSON object given")
    return _without_nodes(_unfolded(value))


def _unfolded(value: dict[str, Any]) -> dict[str, Any]:
    """The tree of an object whose members, and theirs, may be named with dots."""
    tree: dict[str, Any] = {}
    for key, item in value.items():
        _put(tree, key.split("."), _unfolded(item) if isinstance(item, dict) else item)
    return tree


def _completed(tree: dict[str, Any]) -> dict[str, Any]:
    """What the reference leaves out of the names it gives: how a file is opened, and how an image is encrypted."""
    file, encrypt = tree.get("file"), tree.get("encrypt")
    if isinstance(file, dict) and "driver" in file and isinstance(file.get("file"), dict):
        return {**tree, "file": _completed(file)}
    if not isinstance(file, dict) or not isinstance(file.get("filename"), str):
        return tree
    done = dict(tree)
    if "driver" not in file:
        # Here it is a path, whatever it looks like.
        done["file"] = {**file, "driver": protocol_of(file["filename"])}
    if tree["driver"] == "qcow2" and isinstance(encrypt, dict) and "format" not in encrypt:
        done["encrypt"] = {**encrypt, "format": encryption_of(done["file"]["filename"])}
    return done


def _without_no_backing(tree: dict[str, Any]) -> dict[str, Any]:
    """Any driver may be told that there is no backing file, also one that never has any."""
    has_backing = tree["driver"] in _WITH_BACKING
    kept = {key: item for key, item in tree.items() if has_backing or key != "backing" or item not in (None, "")}
    for child in ("file", "backing", "data-file"):
        inner = kept.get(child)
        if isinstance(inner, dict) and "driver" in inner:
            kept[child] = _without_no_backing(inner)
    return kept


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        inner = tree.setdefault(part, {})
        if not isinstance(inner, dict):
            raise QmpError(f"Cannot mix the option '{part}' and its members")
        tree = inner
    held = tree.get(path[-1])
    if isinstance(held, dict) and isinstance(value, dict):
        held.update(value)
    else:
        tree[path[-1]] = value


def _without_nodes(tree: dict[str, Any]) -> dict[str, Any]:
    """Names of nodes are the user's to give: an image cannot make use of a node, nor choose a name."""
    kept = {key: item for key, item in tree.items() if key != "node-name"}
    for child in ("file", "backing", "data-file"):
        inner = kept.get(child)
        if isinstance(inner, str) and (inner or child != "backing"):
            raise QmpError(f"An image cannot name the node '{inner}'")
        if isinstance(inner, dict):
            kept[child] = _without_nodes(inner)
    return kept


def _probe_tree(file: Any) -> str:
    filename = file.get("filename") if isinstance(file, dict) else None
    if not isinstance(filename, str):
        raise QmpError('A block device must be specified for "file"')
    return probe(filename)
