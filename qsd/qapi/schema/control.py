"""The monitor itself: negotiation, version, introspection; and the ``--monitor`` option."""

from __future__ import annotations

from enum import Enum
from typing import Any

from qsd.qapi.core import SCHEMA, Command, branch, enum, member, struct, union


@enum("QMPCapability")
class QMPCapability(str, Enum):
    OOB = "oob"


@struct("qmp_capabilities-arg")
class QmpCapabilitiesArgs:
    enable: tuple[QMPCapability, ...] | None = None


@struct("VersionTriple")
class VersionTriple:
    major: int
    minor: int
    micro: int


@struct("VersionInfo")
class VersionInfo:
    qemu: VersionTriple
    package: str


@struct("CommandInfo")
class CommandInfo:
    name: str


@enum("MonitorMode")
class MonitorMode(str, Enum):
    READLINE = "readline"
    CONTROL = "control"


@struct("MonitorOptions")
class MonitorOptions:
    """The argument of ``--monitor``; not reachable through QMP."""

    id: str | None = None
    mode: MonitorMode | None = None
    pretty: bool | None = None
    chardev: str


@enum("JSONType")
class JSONType(str, Enum):
    STRING = "string"
    NUMBER = "number"
    INT = "int"
    BOOLEAN = "boolean"
    NULL = "null"
    OBJECT = "object"
    ARRAY = "array"
    VALUE = "value"


@enum("SchemaMetaType")
class SchemaMetaType(str, Enum):
    BUILTIN = "builtin"
    ENUM = "enum"
    ARRAY = "array"
    OBJECT = "object"
    ALTERNATE = "alternate"
    COMMAND = "command"
    EVENT = "event"


@struct("SchemaInfoEnumMember")
class SchemaInfoEnumMember:
    name: str
    features: tuple[str, ...] | None = None


@struct("SchemaInfoObjectMember")
class SchemaInfoObjectMember:
    name: str
    type: str
    default: Any | None = None
    features: tuple[str, ...] | None = None


@struct("SchemaInfoObjectVariant")
class SchemaInfoObjectVariant:
    case: str
    type: str


@struct("SchemaInfoAlternateMember")
class SchemaInfoAlternateMember:
    type: str


@union("SchemaInfo", tag="meta_type")
class SchemaInfo:
    name: str
    meta_type: SchemaMetaType
    features: tuple[str, ...] | None = None


@branch(SchemaInfo, SchemaMetaType.BUILTIN, name="SchemaInfoBuiltin")
class SchemaInfoBuiltin(SchemaInfo):
    json_type: JSONType


@branch(SchemaInfo, SchemaMetaType.ENUM, name="SchemaInfoEnum")
class SchemaInfoEnum(SchemaInfo):
    members: tuple[SchemaInfoEnumMember, ...]
    values: tuple[str, ...] = member(features=("deprecated",))


@branch(SchemaInfo, SchemaMetaType.ARRAY, name="SchemaInfoArray")
class SchemaInfoArray(SchemaInfo):
    element_type: str


@branch(SchemaInfo, SchemaMetaType.OBJECT, name="SchemaInfoObject")
class SchemaInfoObject(SchemaInfo):
    members: tuple[SchemaInfoObjectMember, ...]
    tag: str | None = None
    variants: tuple[SchemaInfoObjectVariant, ...] | None = None


@branch(SchemaInfo, SchemaMetaType.ALTERNATE, name="SchemaInfoAlternate")
class SchemaInfoAlternate(SchemaInfo):
    members: tuple[SchemaInfoAlternateMember, ...]


@branch(SchemaInfo, SchemaMetaType.COMMAND, name="SchemaInfoCommand")
class SchemaInfoCommand(SchemaInfo):
    arg_type: str
    ret_type: str
    allow_oob: bool | None = None


@branch(SchemaInfo, SchemaMetaType.EVENT, name="SchemaInfoEvent")
class SchemaInfoEvent(SchemaInfo):
    arg_type: str


SCHEMA.declare(
    Command("qmp_capabilities", args=QmpCapabilitiesArgs),
    Command("quit"),
    Command("query-version", returns=VersionInfo),
    Command("query-commands", returns=tuple[CommandInfo, ...]),
    Command("query-qmp-schema", returns=tuple[SchemaInfo, ...]),
)
