"""``blockdev-create`` and ``x-blockdev-amend``: the options of new images, and of changes to existing ones.

A format adds its branches here, and its creator to ``qsd.drivers.registry.CREATORS``.
"""

from __future__ import annotations

from enum import Enum

from qsd.qapi.core import SCHEMA, Command, Size, branch, enum, struct, union
from qsd.qapi.schema.block import BlockdevDriver, BlockdevRef


@enum("PreallocMode")
class PreallocMode(str, Enum):
    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


@union("BlockdevCreateOptions", tag="driver")
class BlockdevCreateOptions:
    """What a new image is made from; a value is one of the subclasses below, chosen by ``driver``."""

    driver: BlockdevDriver


@branch(BlockdevCreateOptions, BlockdevDriver.FILE, name="BlockdevCreateOptionsFile")
class BlockdevCreateOptionsFile(BlockdevCreateOptions):
    """``size`` and ``extent_size_hint`` in bytes."""

    filename: str
    size: Size
    preallocation: PreallocMode | None = None
    nocow: bool | None = None
    extent_size_hint: Size | None = None


@enum("BlockdevQcow2Version")
class BlockdevQcow2Version(str, Enum):
    V2 = "v2"
    V3 = "v3"


@enum("Qcow2CompressionType")
class Qcow2CompressionType(str, Enum):
    ZLIB = "zlib"
    ZSTD = "zstd"


@enum("QCryptoBlockFormat")
class QCryptoBlockFormat(str, Enum):
    QCOW = "qcow"
    LUKS = "luks"


@union("QCryptoBlockCreateOptions", tag="format")
class QCryptoBlockCreateOptions:
    """How a new image is to be encrypted; a format of encryption adds its branch."""

    format: QCryptoBlockFormat


@branch(BlockdevCreateOptions, BlockdevDriver.QCOW2, name="BlockdevCreateOptionsQcow2")
class BlockdevCreateOptionsQcow2(BlockdevCreateOptions):
    """``size`` and ``cluster_size`` in bytes."""

    file: BlockdevRef
    data_file: BlockdevRef | None = None
    data_file_raw: bool | None = None
    extended_l2: bool | None = None
    size: Size
    version: BlockdevQcow2Version | None = None
    backing_file: str | None = None
    backing_fmt: BlockdevDriver | None = None
    encrypt: QCryptoBlockCreateOptions | None = None
    cluster_size: Size | None = None
    preallocation: PreallocMode | None = None
    lazy_refcounts: bool | None = None
    refcount_bits: int | None = None
    compression_type: Qcow2CompressionType | None = None


@struct("blockdev-create-arg")
class BlockdevCreateArgs:
    job_id: str
    options: BlockdevCreateOptions


@union("BlockdevAmendOptions", tag="driver")
class BlockdevAmendOptions:
    """What is to change in an image; a format adds its branch."""

    driver: BlockdevDriver


@union("QCryptoBlockAmendOptions", tag="format")
class QCryptoBlockAmendOptions:
    """What is to change in how an image is encrypted; a format of encryption adds its branch."""

    format: QCryptoBlockFormat


@branch(BlockdevAmendOptions, BlockdevDriver.QCOW2, name="BlockdevAmendOptionsQcow2")
class BlockdevAmendOptionsQcow2(BlockdevAmendOptions):
    encrypt: QCryptoBlockAmendOptions | None = None


@struct("x-blockdev-amend-arg")
class BlockdevAmendArgs:
    job_id: str
    node_name: str
    options: BlockdevAmendOptions
    force: bool | None = None


SCHEMA.declare(
    Command("blockdev-create", args=BlockdevCreateArgs),
    Command("x-blockdev-amend", args=BlockdevAmendArgs, features=("unstable",)),
)
