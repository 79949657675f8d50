"""qcow2: the options that open an image, and what is told about it."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from qsd.qapi.core import Alternate, branch, enum, struct, union
from qsd.qapi.schema.block import BlockdevDriver, BlockdevOptions, BlockdevRef, BlockdevRefOrNull
from qsd.qapi.schema.luks import QCryptoBlockInfoLUKS


@enum("Qcow2OverlapCheckMode")
class Qcow2OverlapCheckMode(str, Enum):
    NONE = "none"
    CONSTANT = "constant"
    CACHED = "cached"
    ALL = "all"


@struct("Qcow2OverlapCheckFlags")
class Qcow2OverlapCheckFlags:
    """The checks of a mode (default: cached), and those that differ from it."""

    template: Qcow2OverlapCheckMode | None = None
    main_header: bool | None = None
    active_l1: bool | None = None
    active_l2: bool | None = None
    refcount_table: bool | None = None
    refcount_block: bool | None = None
    snapshot_table: bool | None = None
    inactive_l1: bool | None = None
    inactive_l2: bool | None = None
    bitmap_directory: bool | None = None


Qcow2OverlapChecks = Annotated[Qcow2OverlapCheckMode | Qcow2OverlapCheckFlags, Alternate("Qcow2OverlapChecks")]


@enum("BlockdevQcow2EncryptionFormat")
class BlockdevQcow2EncryptionFormat(str, Enum):
    AES = "aes"
    LUKS = "luks"


@union("BlockdevQcow2Encryption", tag="format")
class BlockdevQcow2Encryption:
    format: BlockdevQcow2EncryptionFormat


@branch(BlockdevQcow2Encryption, BlockdevQcow2EncryptionFormat.AES, name="QCryptoBlockOptionsQCow")
class BlockdevQcow2EncryptionAes(BlockdevQcow2Encryption):
    key_secret: str | None = None


@branch(BlockdevQcow2Encryption, BlockdevQcow2EncryptionFormat.LUKS, name="QCryptoBlockOptionsLUKS")
class BlockdevQcow2EncryptionLuks(BlockdevQcow2Encryption):
    key_secret: str | None = None


@branch(BlockdevOptions, BlockdevDriver.QCOW2, name="BlockdevOptionsQcow2")
class BlockdevOptionsQcow2(BlockdevOptions):
    """Cache sizes in bytes, ``cache_clean_interval`` in seconds (0: never)."""

    file: BlockdevRef
    backing: BlockdevRefOrNull | None = None
    lazy_refcounts: bool | None = None
    pass_discard_request: bool | None = None
    pass_discard_snapshot: bool | None = None
    pass_discard_other: bool | None = None
    discard_no_unref: bool | None = None
    overlap_check: Qcow2OverlapChecks | None = None
    cache_size: int | None = None
    l2_cache_size: int | None = None
    l2_cache_entry_size: int | None = None
    refcount_cache_size: int | None = None
    cache_clean_interval: int | None = None
    encrypt: BlockdevQcow2Encryption | None = None
    data_file: BlockdevRef | None = None


@enum("Qcow2CompressionType")
class Qcow2CompressionType(str, Enum):
    ZLIB = "zlib"
    ZSTD = "zstd"


@union("ImageInfoSpecificQCow2Encryption", tag="format")
class ImageInfoSpecificQCow2Encryption:
    format: BlockdevQcow2EncryptionFormat


@branch(
    ImageInfoSpecificQCow2Encryption, BlockdevQcow2EncryptionFormat.AES, name="ImageInfoSpecificQCow2EncryptionAes"
)
class ImageInfoSpecificQCow2EncryptionAes(ImageInfoSpecificQCow2Encryption):
    """Nothing is told about it."""


@branch(ImageInfoSpecificQCow2Encryption, BlockdevQcow2EncryptionFormat.LUKS, name="QCryptoBlockInfoLUKS")
class ImageInfoSpecificQCow2EncryptionLuks(ImageInfoSpecificQCow2Encryption, QCryptoBlockInfoLUKS):
    """The LUKS header in the image."""


@enum("Qcow2BitmapInfoFlags")
class Qcow2BitmapInfoFlags(str, Enum):
    IN_USE = "in-use"
    AUTO = "auto"


@struct("Qcow2BitmapInfo")
class Qcow2BitmapInfo:
    name: str
    granularity: int
    flags: tuple[Qcow2BitmapInfoFlags, ...]


@struct("ImageInfoSpecificQCow2")
class ImageInfoSpecificQCow2:
    compat: str
    data_file: str | None = None
    data_file_raw: bool | None = None
    extended_l2: bool | None = None
    lazy_refcounts: bool | None = None
    corrupt: bool | None = None
    refcount_bits: int
    encrypt: ImageInfoSpecificQCow2Encryption | None = None
    bitmaps: tuple[Qcow2BitmapInfo, ...] | None = None
    compression_type: Qcow2CompressionType
