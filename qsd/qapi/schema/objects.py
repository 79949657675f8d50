"""User-creatable objects and the QOM tree."""

from __future__ import annotations

from enum import Enum
from typing import Any

from qsd.qapi.core import SCHEMA, Command, branch, enum, struct, union
from qsd.qapi.schema.block import OnOffAuto


@enum("ObjectType")
class ObjectType(str, Enum):
    IOTHREAD = "iothread"
    QSD_VIEW = "qsd-view"
    SECRET = "secret"


@enum("QCryptoSecretFormat")
class QCryptoSecretFormat(str, Enum):
    RAW = "raw"
    BASE64 = "base64"


@union("ObjectOptions", tag="qom_type")
class ObjectOptions:
    qom_type: ObjectType
    id: str


@branch(ObjectOptions, ObjectType.IOTHREAD, name="IothreadProperties")
class IothreadProperties(ObjectOptions):
    aio_max_batch: int | None = None
    thread_pool_min: int | None = None
    thread_pool_max: int | None = None
    poll_max_ns: int | None = None
    poll_grow: int | None = None
    poll_shrink: int | None = None
    poll_weight: int | None = None


@branch(ObjectOptions, ObjectType.SECRET, name="SecretProperties")
class SecretProperties(ObjectOptions):
    format: QCryptoSecretFormat | None = None
    keyid: str | None = None
    iv: str | None = None
    data: str | None = None
    file: str | None = None


@branch(ObjectOptions, ObjectType.QSD_VIEW, name="QsdViewProperties")
class QsdViewProperties(ObjectOptions):
    """Beyond the reference: the daemon as a directory, mounted on ``mountpoint``."""

    mountpoint: str
    allow_other: OnOffAuto | None = None


@struct("object-del-arg")
class ObjectDelArgs:
    id: str


@struct("qom-list-arg")
class QomListArgs:
    path: str


@struct("qom-get-arg")
class QomGetArgs:
    path: str
    property: str


@struct("qom-set-arg")
class QomSetArgs:
    path: str
    property: str
    value: Any


@struct("qom-list-get-arg")
class QomListGetArgs:
    paths: tuple[str, ...]


@struct("qom-list-types-arg")
class QomListTypesArgs:
    implements: str | None = None
    abstract: bool | None = None


@struct("qom-list-properties-arg")
class QomListPropertiesArgs:
    typename: str


@struct("ObjectPropertyInfo")
class ObjectPropertyInfo:
    name: str
    type: str
    description: str | None = None
    default_value: Any | None = None


@struct("ObjectPropertyValue")
class ObjectPropertyValue:
    name: str
    type: str
    value: Any | None = None


@struct("ObjectPropertiesValues")
class ObjectPropertiesValues:
    properties: tuple[ObjectPropertyValue, ...]


@struct("ObjectTypeInfo")
class ObjectTypeInfo:
    name: str
    abstract: bool | None = None
    parent: str | None = None


SCHEMA.declare(
    Command("object-add", args=ObjectOptions),
    Command("object-del", args=ObjectDelArgs),
    Command("qom-list", args=QomListArgs, returns=tuple[ObjectPropertyInfo, ...]),
    Command("qom-get", args=QomGetArgs, returns=Any),
    Command("qom-set", args=QomSetArgs),
    Command("qom-list-get", args=QomListGetArgs, returns=tuple[ObjectPropertiesValues, ...]),
    Command("qom-list-types", args=QomListTypesArgs, returns=tuple[ObjectTypeInfo, ...]),
    Command("qom-list-properties", args=QomListPropertiesArgs, returns=tuple[ObjectPropertyInfo, ...]),
)
