"""The shapes a QAPI type can have, as values: what declarations turn into and visitors walk over."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, Union

import attrs


@attrs.frozen
class Builtin:
    """A scalar without a range: ``str``, ``bool``, ``number``, ``any`` or ``null``."""

    name: str
    json_type: str


@attrs.frozen
class Integer:
    """An integer of ``bits`` bits. ``c_name`` is how range errors call it (``uint16_t``).

    ``is_size`` marks byte counts, which take a unit suffix on the command line (K, M, G, T, P, E).
    """

    c_name: str
    bits: int
    signed: bool
    is_size: bool = False

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1


STR = Builtin("str", "string")
BOOL = Builtin("bool", "boolean")
NUMBER = Builtin("number", "number")
ANY = Builtin("any", "value")
NULL_TYPE = Builtin("null", "null")


@attrs.define(eq=False)
class EnumType:
    name: str
    cls: type[Enum]
    members: Mapping[str, Enum]
    member_features: Mapping[str, tuple[str, ...]]


@attrs.define(eq=False)
class ArrayType:
    element: Type


@attrs.define(eq=False)
class Member:
    """One member of an object: ``name`` on the wire, ``attribute`` in Python."""

    name: str
    attribute: str
    type: Type
    optional: bool
    features: tuple[str, ...]


@attrs.define(eq=False)
class StructType:
    """An object with a fixed set of members, base members first."""

    name: str
    cls: type[Any]
    members: tuple[Member, ...]
    features: tuple[str, ...]


@attrs.define(eq=False)
class Branch:
    """What one tag value adds: the class of the whole value and the members it has beyond the base."""

    name: str
    cls: type[Any]
    members: tuple[Member, ...]
    features: tuple[str, ...]


@attrs.define(eq=False)
class UnionType:
    """An object whose further members depend on the value of one of its base members, the tag.

    A tag value without an entry in ``branches`` adds nothing; the value is then an instance of ``cls`` itself.
    With an optional tag, ``default_tag`` is the value an absent tag stands for.
    """

    name: str
    cls: type[Any]
    members: tuple[Member, ...]
    tag: Member
    branches: Mapping[str, Branch]
    features: tuple[str, ...]
    default_tag: str | None = None

    @property
    def tag_enum(self) -> EnumType:
        assert isinstance(self.tag.type, EnumType)
        return self.tag.type


@attrs.define(eq=False)
class AlternateType:
    """A value whose JSON type says which of ``choices`` it is. ``choices`` maps kinds (``string``, ``object``,
    ``array``, ``null``, ``boolean``, ``number``) to types."""

    name: str
    choices: Mapping[str, Type]


Type = Union[Builtin, Integer, EnumType, ArrayType, StructType, UnionType, AlternateType]  # noqa: UP007 - a runtime alias of forward-referring classes reads best this way
