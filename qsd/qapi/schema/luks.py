"""luks: the options that open a volume, and what is told about it."""

from __future__ import annotations

from enum import Enum

from qsd.qapi.core import Size, branch, enum, struct
from qsd.qapi.schema.block import BlockdevDriver, BlockdevOptions, BlockdevRef
from qsd.qapi.schema.create import (
    BlockdevAmendOptions,
    BlockdevCreateOptions,
    PreallocMode,
    QCryptoBlockAmendOptions,
    QCryptoBlockCreateOptions,
    QCryptoBlockFormat,
)


@enum("QCryptoCipherAlgo")
class QCryptoCipherAlgo(str, Enum):
    """Serpent, twofish and des exist by name only: the library lacks them. The reference's has the first two."""

    AES_128 = "aes-128"
    AES_192 = "aes-192"
    AES_256 = "aes-256"
    DES = "des"
    TRIPLE_DES = "3des"
    CAST5_128 = "cast5-128"
    SERPENT_128 = "serpent-128"
    SERPENT_192 = "serpent-192"
    SERPENT_256 = "serpent-256"
    TWOFISH_128 = "twofish-128"
    TWOFISH_192 = "twofish-192"
    TWOFISH_256 = "twofish-256"
    SM4 = "sm4"


@enum("QCryptoCipherMode")
class QCryptoCipherMode(str, Enum):
    ECB = "ecb"
    CBC = "cbc"
    XTS = "xts"
    CTR = "ctr"


@enum("QCryptoIVGenAlgo")
class QCryptoIVGenAlgo(str, Enum):
    PLAIN = "plain"
    PLAIN64 = "plain64"
    ESSIV = "essiv"


@enum("QCryptoHashAlgo")
class QCryptoHashAlgo(str, Enum):
    MD5 = "md5"
    SHA1 = "sha1"
    SHA224 = "sha224"
    SHA256 = "sha256"
    SHA384 = "sha384"
    SHA512 = "sha512"
    RIPEMD160 = "ripemd160"
    SM3 = "sm3"


@branch(BlockdevOptions, BlockdevDriver.LUKS, name="BlockdevOptionsLUKS")
class BlockdevOptionsLUKS(BlockdevOptions):
    """``key_secret``: id of the secret with the password; ``header``: where the header is, if not in ``file``."""

    file: BlockdevRef
    key_secret: str | None = None
    header: BlockdevRef | None = None


@struct("QCryptoBlockInfoLUKSSlot")
class QCryptoBlockInfoLUKSSlot:
    """``key_offset`` in bytes from the header's start."""

    active: bool
    iters: int | None = None
    stripes: int | None = None
    key_offset: int


@struct("QCryptoBlockInfoLUKS")
class QCryptoBlockInfoLUKS:
    """``payload_offset`` in bytes."""

    cipher_alg: QCryptoCipherAlgo
    cipher_mode: QCryptoCipherMode
    ivgen_alg: QCryptoIVGenAlgo
    ivgen_hash_alg: QCryptoHashAlgo | None = None
    hash_alg: QCryptoHashAlgo
    detached_header: bool
    payload_offset: int
    master_key_iters: int
    uuid: str
    slots: tuple[QCryptoBlockInfoLUKSSlot, ...]


@struct("QCryptoBlockCreateOptionsLUKS")
class QCryptoBlockCreateOptionsLUKS:
    """``iter_time`` in milliseconds."""

    key_secret: str | None = None
    cipher_alg: QCryptoCipherAlgo | None = None
    cipher_mode: QCryptoCipherMode | None = None
    ivgen_alg: QCryptoIVGenAlgo | None = None
    ivgen_hash_alg: QCryptoHashAlgo | None = None
    hash_alg: QCryptoHashAlgo | None = None
    iter_time: int | None = None


@branch(BlockdevCreateOptions, BlockdevDriver.LUKS, name="BlockdevCreateOptionsLUKS")
class BlockdevCreateOptionsLUKS(BlockdevCreateOptions, QCryptoBlockCreateOptionsLUKS):
    """``size`` in bytes."""

    file: BlockdevRef | None = None
    header: BlockdevRef | None = None
    size: Size
    preallocation: PreallocMode | None = None


@branch(QCryptoBlockCreateOptions, QCryptoBlockFormat.LUKS, name="QCryptoBlockCreateOptionsLUKS")
class QCryptoBlockCreateOptionsLUKSBranch(QCryptoBlockCreateOptions, QCryptoBlockCreateOptionsLUKS):
    """A LUKS header in the image."""


@branch(QCryptoBlockCreateOptions, QCryptoBlockFormat.QCOW, name="QCryptoBlockOptionsQCow")
class QCryptoBlockOptionsQCow(QCryptoBlockCreateOptions):
    """AES with the password itself as the key."""

    key_secret: str | None = None


@enum("QCryptoBlockLUKSKeyslotState")
class QCryptoBlockLUKSKeyslotState(str, Enum):
    ACTIVE = "active"
    INACTIVE = "inactive"


@struct("QCryptoBlockAmendOptionsLUKS")
class QCryptoBlockAmendOptionsLUKS:
    """``iter_time`` in milliseconds."""

    state: QCryptoBlockLUKSKeyslotState
    new_secret: str | None = None
    old_secret: str | None = None
    keyslot: int | None = None
    iter_time: int | None = None
    secret: str | None = None


@branch(BlockdevAmendOptions, BlockdevDriver.LUKS, name="BlockdevAmendOptionsLUKS")
class BlockdevAmendOptionsLUKS(BlockdevAmendOptions, QCryptoBlockAmendOptionsLUKS):
    """Key slots of a volume."""


@branch(QCryptoBlockAmendOptions, QCryptoBlockFormat.LUKS, name="QCryptoBlockAmendOptionsLUKS")
class QCryptoBlockAmendOptionsLUKSBranch(QCryptoBlockAmendOptions, QCryptoBlockAmendOptionsLUKS):
    """Key slots of the volume in an image."""
