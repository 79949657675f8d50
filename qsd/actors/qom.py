"""The object model behind the ``qom-*`` commands: typed properties on objects that hang in one tree.

Rules: a type is a row of ``TYPES``, listed only when objects of it can exist here; an object's class names its row;
paths are absolute (``/objects/io0``) or partial (``io0``), a partial one must match exactly one object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import attrs

from qsd.errors import ErrorClass, QmpError
from qsd.qapi.visit import from_json

Children = Mapping[str, "QomObject"]


@attrs.frozen
class Property:
    """One property: ``kind`` is the type as listed, ``wanted`` the annotation a new value is visited as.

    ``write`` is None for what cannot be set. It gets a visited value and raises QmpError to refuse it.
    """

    name: str
    kind: str
    read: Callable[[Any], Any]
    wanted: Any = None
    write: Callable[[Any, Any], None] | None = None


@attrs.frozen
class QomType:
    """A row of the type table."""

    name: str
    parent: str | None
    abstract: bool = False
    interfaces: tuple[str, ...] = ()
    properties: tuple[Property, ...] = ()


TYPES: dict[str, QomType] = {}
INTERFACES = {"user-creatable"}


def declare_type(
    name: str,
    parent: str | None,
    *properties: Property,
    abstract: bool = False,
    user_creatable: bool = False,
) -> QomType:
    """Add a row to the type table; ``properties`` are those the type adds to its parent's."""
    assert parent is None or parent in TYPES, f"{name}: parent {parent} must be declared first"
    inherited = TYPES[parent].properties if parent is not None else ()
    interfaces = ("user-creatable",) if user_creatable else ()
    row = QomType(name, parent, abstract, interfaces, (*inherited, *properties))
    TYPES[name] = row
    return row


_TYPE_PROPERTY = Property("type", "string", lambda item: item.typename)

declare_type("object", None, _TYPE_PROPERTY, abstract=True)
declare_type("container", "object")


class QomObject:
    """Base of what can hang in the tree. ``typename`` names the row of the type table."""

    typename: ClassVar[str] = "object"

    def children(self) -> Children:
        """Objects below this one, by name."""
        return {}

    @property
    def properties(self) -> tuple[Property, ...]:
        return TYPES[self.typename].properties


class Container(QomObject):
    """A named place in the tree. ``view`` makes it show objects that are kept elsewhere."""

    typename = "container"

    def __init__(self, view: Callable[[], Children] | None = None) -> None:
        self.items: dict[str, QomObject] = {}
        self._view = view

    def children(self) -> Children:
        return self.items if self._view is None else {**self._view(), **self.items}


def is_a(row: QomType, name: str) -> bool:
    """Whether the type is ``name``, inherits from it, or implements it as an interface."""
    current: QomType | None = row
    while current is not None:
        if current.name == name or name in current.interfaces:
            return True
        current = TYPES[current.parent] if current.parent is not None else None
    return False


def list_types(implements: str | None = None, *, include_abstract: bool = False) -> list[QomType]:
    """The rows that are, or inherit from, ``implements`` (everything when it is None)."""
    return [
        row
        for row in TYPES.values()
        if (include_abstract or not row.abstract) and (implements is None or is_a(row, implements))
    ]


def type_properties(name: str) -> tuple[Property, ...]:
    """The properties objects of type ``name`` have. Raises QmpError."""
    if name in INTERFACES:
        raise QmpError("Parameter 'typename' expects a QOM type")
    row = TYPES.get(name)
    if row is None:
        raise QmpError(f"Class '{name}' not found", error_class=ErrorClass.DEVICE_NOT_FOUND)
    return row.properties


def resolve(root: QomObject, path: str, *, tells_ambiguity: bool = True) -> QomObject:
    """Find the one object ``path`` means. Raises QmpError: DeviceNotFound, or an ambiguous partial path, which
    only some commands tell from one that does not exist."""
    parts = [part for part in path.split("/") if part]
    if path.startswith("/"):
        found = _descend(root, parts)
        matches = [] if found is None else [found]
    else:
        matches = list(_search(root, parts))
    if not matches or (len(matches) > 1 and not tells_ambiguity):
        raise QmpError(f"Device '{path}' not found", error_class=ErrorClass.DEVICE_NOT_FOUND)
    if len(matches) > 1:
        raise QmpError(f"Path '{path}' is ambiguous")
    return matches[0]


def _descend(start: QomObject, parts: list[str]) -> QomObject | None:
    current: QomObject | None = start
    for part in parts:
        if current is None:
            return None
        current = current.children().get(part)
    return current


def _search(start: QomObject, parts: list[str]) -> Iterator[QomObject]:
    found = _descend(start, parts)
    if found is not None:
        yield found
    for child in start.children().values():
        yield from _search(child, parts)


def canonical_path(root: QomObject, wanted: QomObject) -> str:
    """The absolute path of an object in the tree (``/`` for the root itself)."""
    return "/" + "/".join(_path(root, wanted) or ())


def _path(start: QomObject, wanted: QomObject) -> tuple[str, ...] | None:
    if start is wanted:
        return ()
    for name, child in start.children().items():
        rest = _path(child, wanted)
        if rest is not None:
            return (name, *rest)
    return None


def list_properties(item: QomObject) -> list[tuple[str, str]]:
    """Names and types of an object's properties, its children last (``child<TYPE>``)."""
    own = [(row.name, row.kind) for row in item.properties]
    return own + [(name, f"child<{child.typename}>") for name, child in item.children().items()]


def get_property(root: QomObject, item: QomObject, name: str) -> Any:
    """The JSON value of a property; a child's value is its path. Raises QmpError."""
    row = _row(item, name)
    if row is not None:
        return row.read(item)
    return canonical_path(root, item.children()[name])


def set_property(item: QomObject, name: str, value: Any) -> None:
    """Visit a JSON value as the property's type and set it. Raises QmpError; then nothing has changed."""
    row = _row(item, name)
    if row is None or row.write is None:
        raise QmpError(f"Property '{item.typename}.{name}' is not writable")
    row.write(item, from_json(row.wanted, value, name))


def _row(item: QomObject, name: str) -> Property | None:
    """The property's row, None when ``name`` is a child."""
    for row in item.properties:
        if row.name == name:
            return row
    if name not in item.children():
        raise QmpError(f"Property '{item.typename}.{name}' not found")
    return None
