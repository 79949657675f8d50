"""The declaration language of the QMP contract: decorators that turn attrs classes and enums into QAPI types.

::

    @enum("OnOffAuto")
    class OnOffAuto(str, Enum): ...

    @struct("BlockdevCacheOptions")
    class BlockdevCacheOptions:
        direct: bool | None = None              # optional member; None means absent
        no_flush: bool | None = None            # ``no-flush`` on the wire

    @union("BlockdevOptions", tag="driver")
    class BlockdevOptions: ...                  # the base members, the tag among them

    @branch(BlockdevOptions, BlockdevDriver.RAW, name="BlockdevOptionsRaw")
    class BlockdevOptionsRaw(BlockdevOptions):  # one value has base and branch members together
        file: BlockdevRef

    BlockdevRef = Annotated[str | BlockdevOptions, Alternate("BlockdevRef")]

    SCHEMA.declare(Command("blockdev-add", args=BlockdevOptions))

Rules: members are keyword-only and immutable; lists are ``tuple[T, ...]``; a plain ``int`` is an int64, other
widths are the aliases below; a JSON null is only a value (``NULL``) where an alternate lists ``NullType``.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Annotated, Any, Final, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

import attrs

from qsd.qapi.types import (
    ANY,
    BOOL,
    NULL_TYPE,
    NUMBER,
    STR,
    AlternateType,
    ArrayType,
    Branch,
    Builtin,
    EnumType,
    Integer,
    Member,
    StructType,
    Type,
    UnionType,
)

T = TypeVar("T")
E = TypeVar("E", bound=Enum)


class NullType:
    """The type of ``NULL``: a JSON null that is a value, not an absence."""

    def __repr__(self) -> str:
        return "NULL"

    def __bool__(self) -> bool:
        return False


NULL: Final = NullType()

_INT64 = Integer("int64_t", 64, signed=True)
Int8 = Annotated[int, Integer("int8_t", 8, signed=True)]
Int16 = Annotated[int, Integer("int16_t", 16, signed=True)]
Int32 = Annotated[int, Integer("int32_t", 32, signed=True)]
Int64 = Annotated[int, _INT64]
Uint8 = Annotated[int, Integer("uint8_t", 8, signed=False)]
Uint16 = Annotated[int, Integer("uint16_t", 16, signed=False)]
Uint32 = Annotated[int, Integer("uint32_t", 32, signed=False)]
Uint64 = Annotated[int, Integer("uint64_t", 64, signed=False)]
Size = Annotated[int, Integer("uint64_t", 64, signed=False, is_size=True)]


@attrs.frozen
class Alternate:
    """Marks ``Annotated[A | B, Alternate(name)]`` as the alternate ``name``."""

    name: str


@attrs.frozen
class _MemberInfo:
    name: str | None
    features: tuple[str, ...]


def member(*, default: Any = attrs.NOTHING, name: str | None = None, features: Sequence[str] = ()) -> Any:
    """Declare a member that needs more than its annotation: another wire name, or features."""
    return attrs.field(default=default, metadata={"qapi": _MemberInfo(name, tuple(features))})


@attrs.define(eq=False)
class _Declared:
    """What a decorator noted about a class; resolved into a type on first use, when all names exist."""

    name: str
    cls: type[Any]
    features: tuple[str, ...]
    dashed: frozenset[str] | None = None
    tag: str | None = None
    default_tag: Enum | None = None
    data: Mapping[Any, Any] | None = None
    branches: dict[str, _Declared] = attrs.field(factory=dict)
    resolved: Type | None = None


_classes: dict[type[Any], _Declared] = {}
_branch_classes: set[type[Any]] = set()
_enums: dict[type[Enum], EnumType] = {}
_scalars: dict[Any, Type] = {str: STR, bool: BOOL, int: _INT64, float: NUMBER, Any: ANY, NullType: NULL_TYPE}
_cache: dict[Any, Type] = {}


def _frozen(cls: type[T]) -> type[T]:
    # One comparison and one repr for all: attrs would compile them for each of the many classes, a third of the
    # time it takes the daemon to start.
    for name, method in (("__eq__", _is_equal), ("__hash__", _hash), ("__repr__", _repr)):
        setattr(cls, name, method)
    # No slots: a branch may inherit from its union's base and from a struct at once (two slotted bases cannot).
    return attrs.frozen(cls, kw_only=True, slots=False, eq=False, repr=False)  # type: ignore[return-value, call-overload, no-any-return, unused-ignore] # attrs' stubs want literals


def _is_equal(self: object, other: object) -> bool:
    return vars(self) == vars(other) if other.__class__ is self.__class__ else NotImplemented


def _hash(self: object) -> int:
    return hash((self.__class__, *vars(self).values()))


def _repr(self: object) -> str:
    return f"{self.__class__.__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(member,))
def struct(
    name: str, *, features: Sequence[str] = (), dashed: Sequence[str] | None = None
) -> Callable[[type[T]], type[T]]:
    """Declare a struct. Attribute ``a_b`` is member ``a-b``; with ``dashed`` only the members named there are
    written with dashes, the others keep their underscores (some old types mix both)."""

    def decorate(cls: type[T]) -> type[T]:
        made = _frozen(cls)
        _classes[made] = _Declared(name, made, tuple(features), None if dashed is None else frozenset(dashed))
        return made

    return decorate


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(member,))
def union(
    name: str, *, tag: str, default: Enum | None = None, features: Sequence[str] = ()
) -> Callable[[type[T]], type[T]]:
    """Declare a flat union by its base members; ``tag`` is the attribute of the discriminator.

    ``default`` is what an absent optional tag stands for. Branches are added with ``branch``.
    """

    def decorate(cls: type[T]) -> type[T]:
        made = _frozen(cls)
        _classes[made] = _Declared(name, made, tuple(features), tag=tag, default_tag=default)
        return made

    return decorate


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(member,))
def branch(base: type[Any], *tags: Enum, name: str, features: Sequence[str] = ()) -> Callable[[type[T]], type[T]]:
    """Declare what a union's value is for ``tags``: a subclass of the union's ``base`` class."""

    def decorate(cls: type[T]) -> type[T]:
        made = _frozen(cls)
        assert issubclass(made, base), f"{made.__name__} must inherit from {base.__name__}"
        owner = _classes[base]
        declared = _Declared(name, made, tuple(features))
        for tag in tags:
            assert tag.value not in owner.branches, f"{owner.name} has two branches for {tag.value}"
            owner.branches[tag.value] = declared
        _branch_classes.add(made)
        return made

    return decorate


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(member,))
def legacy_union(
    name: str, data: Mapping[Any, type[Any]], *, tag: str = "type", features: Sequence[str] = ()
) -> Callable[[type[T]], type[T]]:
    """Declare a union of the old ``{"type": TAG, "data": {...}}`` form: ``data`` maps tags to the type of ``data``.

    The class declares both members; its ``data`` annotation is the union of those types.
    """

    def decorate(cls: type[T]) -> type[T]:
        made = _frozen(cls)
        _classes[made] = _Declared(name, made, tuple(features), tag=tag, data=data)
        return made

    return decorate


def enum(name: str, *, features: Mapping[str, Sequence[str]] | None = None) -> Callable[[type[E]], type[E]]:
    """Declare a ``(str, Enum)`` class as a QAPI enum; ``features`` maps values to their features."""

    def decorate(cls: type[E]) -> type[E]:
        noted = {value: tuple(given) for value, given in (features or {}).items()}
        _enums[cls] = EnumType(name, cls, {item.value: item for item in cls}, noted)
        return cls

    return decorate


def resolve(annotation: Any) -> Type:
    """Turn what stands in an annotation into a type. Raises TypeError for what is not part of the language."""
    found = _cache.get(annotation)
    if found is None:
        found = _cache[annotation] = _resolve(annotation)
    return found


def is_declared(cls: type[Any]) -> bool:
    """Whether instances of ``cls`` are QAPI objects."""
    return cls in _classes or cls in _branch_classes


def wire_members(cls: type[Any]) -> tuple[Member, ...]:
    """All members of a declared class, the base's first."""
    found = _members.get(cls)
    if found is None:
        found = _members[cls] = _collect_members(cls)
    return found


_members: dict[type[Any], tuple[Member, ...]] = {}


def _resolve(annotation: Any) -> Type:
    if annotation in _scalars:
        return _scalars[annotation]
    origin = get_origin(annotation)
    if origin is Annotated:
        plain, marker = get_args(annotation)
        if isinstance(marker, Integer):
            return marker
        if isinstance(marker, Alternate):
            return AlternateType(marker.name, {_kind(resolve(arg)): resolve(arg) for arg in get_args(plain)})
    elif origin is tuple:
        element, ellipsis = get_args(annotation)
        if ellipsis is Ellipsis:
            return ArrayType(resolve(element))
    elif isinstance(annotation, type):
        if annotation in _enums:
            return _enums[annotation]
        if annotation in _classes:
            return _resolve_class(_classes[annotation])
    raise TypeError(f"{annotation!r} is not a QAPI type")


def _kind(resolved: Type) -> str:
    if isinstance(resolved, Builtin):
        return resolved.json_type
    if isinstance(resolved, EnumType):
        return "string"
    if isinstance(resolved, Integer):
        return "number"
    return "array" if isinstance(resolved, ArrayType) else "object"


def _resolve_class(declared: _Declared) -> Type:
    if declared.resolved is not None:
        return declared.resolved
    # A type may contain itself (an image has a backing image): note the shell before looking at its members.
    if declared.tag is None:
        shell = StructType(declared.name, declared.cls, (), declared.features)
        declared.resolved = shell
        shell.members = wire_members(declared.cls)
        return shell
    union_type = UnionType(
        declared.name,
        declared.cls,
        (),
        Member("", "", STR, optional=False, features=()),
        {},
        declared.features,
        None if declared.default_tag is None else declared.default_tag.value,
    )
    declared.resolved = union_type
    members = wire_members(declared.cls)
    union_type.tag = next(item for item in members if item.attribute == declared.tag)
    if declared.data is not None:
        union_type.members = tuple(item for item in members if item.attribute != "data")
        union_type.branches = {
            tag.value: Branch(f"{declared.name}-{tag.value}-wrapper", declared.cls, (_data(payload),), ())
            for tag, payload in declared.data.items()
        }
        return union_type
    union_type.members = members
    union_type.branches = {tag: _resolve_branch(item, members) for tag, item in declared.branches.items()}
    return union_type


def _data(payload: type[Any]) -> Member:
    return Member("data", "data", resolve(payload), optional=False, features=())


def _resolve_branch(declared: _Declared, base: tuple[Member, ...]) -> Branch:
    inherited = {item.attribute for item in base}
    own = tuple(item for item in wire_members(declared.cls) if item.attribute not in inherited)
    return Branch(declared.name, declared.cls, own, declared.features)


def _dashes(cls: type[Any]) -> frozenset[str] | None:
    declared = _classes.get(cls)
    return declared.dashed if declared else None


def _collect_members(cls: type[Any]) -> tuple[Member, ...]:
    hints = get_type_hints(cls, include_extras=True)
    legacy = cls in _classes and _classes[cls].data is not None
    dashed = _dashes(cls)
    members = []
    for field in attrs.fields(cls):
        info: _MemberInfo = field.metadata.get("qapi", _MemberInfo(None, ()))
        annotation, optional = _without_none(hints[field.name])
        wire = info.name or _wire_name(field.name, dashed)
        # The payload of a legacy union is resolved by its tag; its annotation is only for readers of the value.
        resolved: Type = ANY if legacy and field.name == "data" else resolve(annotation)
        assert optional == (field.default is None), f"{cls.__name__}.{field.name}: optional members default to None"
        members.append(Member(wire, field.name, resolved, optional, info.features))
    return tuple(members)


def _wire_name(attribute: str, dashed: frozenset[str] | None) -> str:
    plain = attribute.rstrip("_")
    with_dashes = plain.replace("_", "-")
    return with_dashes if dashed is None or with_dashes in dashed else plain


def _without_none(annotation: Any) -> tuple[Any, bool]:
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [arg for arg in get_args(annotation) if arg is not type(None)]
        if len(rest) == 1 and len(get_args(annotation)) == 2:
            return rest[0], True
    return annotation, False


@attrs.frozen
class Command:
    """A command of the contract. ``args`` is a struct or union class, or None when it takes no arguments;
    ``returns`` an annotation, or None when it answers ``{}``."""

    name: str
    args: Any = None
    returns: Any = None
    features: tuple[str, ...] = ()


@attrs.frozen
class Event:
    """An event of the contract; ``data`` is a struct class or None."""

    name: str
    data: Any = None
    features: tuple[str, ...] = ()


@attrs.define(eq=False)
class Schema:
    """What the daemon can do, in the order it was declared."""

    commands: dict[str, Command] = attrs.field(factory=dict)
    events: dict[str, Event] = attrs.field(factory=dict)

    def declare(self, *items: Command | Event) -> None:
        for item in items:
            assert item.name not in (self.commands | self.events), f"{item.name} is declared twice"
            if isinstance(item, Command):
                self.commands[item.name] = item
            else:
                self.events[item.name] = item


SCHEMA = Schema()
