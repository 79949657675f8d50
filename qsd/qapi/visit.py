"""Visitors: JSON values, keyval trees and names inside images into declared Python values, and those into JSON.

The order of checks is the reference's, because the first problem is the one reported: members in declaration
order (base before branch), each with everything below it, then members nobody asked for.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from qsd.errors import QmpError
from qsd.qapi.core import NULL, Command, NullType, is_declared, resolve, wire_members
from qsd.qapi.rows import Rows
from qsd.qapi.scalars import Flavour, JsonFlavour, KeyvalFlavour, NameFlavour, invalid_type
from qsd.qapi.types import (
    ANY,
    NULL_TYPE,
    STR,
    AlternateType,
    ArrayType,
    Builtin,
    EnumType,
    Integer,
    Member,
    StructType,
    Type,
    UnionType,
)

_JSON = JsonFlavour()
_KEYVAL = KeyvalFlavour()
_NAME = NameFlavour()
_NAMELESS = "null"  # how the reference calls a value without a name of its own, such as a list element


def from_json(wanted: Any, value: Any, path: str = "") -> Any:
    """Visit a JSON value as the declared type ``wanted`` (an annotation: a class, ``tuple[X, ...]``, an alias).

    ``path`` is put before the names in messages. Raises QmpError for the first problem, in the reference's words.
    """
    return _guarded(_JSON, resolve(wanted), value, path)


def visit_arguments(command: Command, arguments: dict[str, Any]) -> Any:
    """Visit a command's ``arguments`` (``{}`` when the message had none); None if the command takes none.

    Raises QmpError.
    """
    if command.args is not None:
        return from_json(command.args, arguments)
    for key in arguments:
        raise QmpError(f"Parameter '{key}' is unexpected")
    return None


def from_keyval(wanted: Any, tree: Any) -> Any:
    """Visit a tree of strings (``qsd.wire.keyval``) as the declared type ``wanted``. Raises QmpError."""
    return _guarded(_KEYVAL, resolve(wanted), tree, "")


def from_name(wanted: Any, tree: Any) -> Any:
    """Visit the JSON object of a name inside an image as the declared type ``wanted``. Raises QmpError."""
    return _guarded(_NAME, resolve(wanted), tree, "")


def to_json(value: Any) -> Any:
    """Turn a declared value (or lists and dicts of them) into JSON values; absent members are left out."""
    if value is None or isinstance(value, NullType):
        return None
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (list, tuple, Rows)):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    assert is_declared(type(value)), f"{type(value).__name__} is not a declared type"
    result = {}
    for item in wire_members(type(value)):
        held = getattr(value, item.attribute)
        if held is not None:
            result[item.name] = to_json(held)
    return result


def _guarded(flavour: Flavour, wanted: Type, value: Any, path: str) -> Any:
    try:
        return _visit(flavour, wanted, value, path, path or _NAMELESS)
    except RecursionError:
        # Input may nest 1024 levels deep; no sensible request does.
        raise QmpError("JSON nesting depth limit exceeded") from None


def _visit(flavour: Flavour, wanted: Type, value: Any, path: str, name: str) -> Any:
    """``path`` is the full name of the value, ``name`` the last part: some messages use only that."""
    if isinstance(wanted, Builtin):
        if wanted is ANY:
            return value
        if wanted is NULL_TYPE:
            if value is not None:
                raise invalid_type(path, "null")
            return NULL
        return flavour.scalar(wanted, value, path or _NAMELESS)
    if isinstance(wanted, Integer):
        return flavour.integer(wanted, value, path or _NAMELESS, name)
    if isinstance(wanted, EnumType):
        return _visit_enum(flavour, wanted, value, path, name)
    if isinstance(wanted, ArrayType):
        if not isinstance(value, list):
            raise invalid_type(path, "array")
        inner = wanted.element
        return tuple(
            _visit(flavour, inner, item, flavour.index(path, i), _NAMELESS) for i, item in enumerate(value)
        )
    if isinstance(wanted, AlternateType):
        return _visit_alternate(flavour, wanted, value, path, name)
    if not isinstance(value, dict):
        raise invalid_type(path or _NAMELESS, "object")
    if isinstance(wanted, StructType):
        found = _visit_members(flavour, wanted.members, value, path)
        made = wanted.cls
    else:
        found, made = _visit_union(flavour, wanted, value, path)
    if len(found) != len(value):
        _refuse_extra(found, value, path)
    return made(**{item.attribute: held for item, held in found.values()})


_Found = dict[str, tuple[Member, Any]]


def _visit_members(flavour: Flavour, members: tuple[Member, ...], value: dict[str, Any], path: str) -> _Found:
    found: _Found = {}
    for item in members:
        full = f"{path}.{item.name}" if path else item.name
        if item.name in value:
            held = value[item.name]
            is_absent = item.optional and flavour.is_absent(item.type, held)
            found[item.name] = item, None if is_absent else _visit(flavour, item.type, held, full, item.name)
        elif not item.optional:
            raise QmpError(f"Parameter '{full}' is missing")
    return found


def _visit_union(flavour: Flavour, wanted: UnionType, value: dict[str, Any], path: str) -> tuple[_Found, type[Any]]:
    found = _visit_members(flavour, wanted.members, value, path)
    tag = found[wanted.tag.name][1].value if wanted.tag.name in found else wanted.default_tag
    chosen = wanted.branches.get(tag) if tag is not None else None
    if chosen is None:
        return found, wanted.cls
    found.update(_visit_members(flavour, chosen.members, value, path))
    return found, chosen.cls


def _refuse_extra(found: _Found, value: dict[str, Any], path: str) -> None:
    for key in value:
        if key not in found:
            full = f"{path}.{key}" if path else key
            raise QmpError(f"Parameter '{full}' is unexpected")


def _visit_enum(flavour: Flavour, wanted: EnumType, value: Any, path: str, name: str) -> Enum:
    text = flavour.scalar(STR, value, path or _NAMELESS)
    found = wanted.members.get(text)
    if found is None:
        raise QmpError(f"Parameter '{name}' does not accept value '{text}'")
    return found


def _visit_alternate(flavour: Flavour, wanted: AlternateType, value: Any, path: str, name: str) -> Any:
    chosen = wanted.choices.get(_KINDS.get(type(value), ""))
    if chosen is None:
        raise invalid_type(name, wanted.name)
    return _visit(flavour, chosen, value, path, name)


_KINDS: dict[type[Any], str] = {
    str: "string",
    dict: "object",
    list: "array",
    bool: "boolean",
    int: "number",
    float: "number",
    type(None): "null",
}
