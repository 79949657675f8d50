"""Header extensions of a qcow2 image: the area behind the header, and what the known kinds hold.

Pure. Follows the qcow2 specification ("Header extensions" and the sections of each kind); bounds beyond it and the
error texts are the reference's. What an extension must look like is checked where it is met, in file order.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Final

import attrs

from qsd.errors import QmpError

EXT_END: Final = 0
EXT_BACKING_FORMAT: Final = 0xE2792ACA
EXT_FEATURE_NAMES: Final = 0x6803F857
EXT_BITMAPS: Final = 0x23852875
EXT_CRYPTO: Final = 0x0537BE77
EXT_DATA_FILE: Final = 0x44415441

INCOMPATIBLE, COMPATIBLE, AUTOCLEAR = 0, 1, 2
# The feature name table of v3 images: kind, bit, name.
FEATURE_NAMES: Final = (
    (INCOMPATIBLE, 0, "dirty bit"),
    (INCOMPATIBLE, 1, "corrupt bit"),
    (INCOMPATIBLE, 2, "external data file"),
    (INCOMPATIBLE, 3, "compression type"),
    (INCOMPATIBLE, 4, "extended L2 entries"),
    (COMPATIBLE, 0, "lazy refcounts"),
    (AUTOCLEAR, 0, "bitmaps"),
    (AUTOCLEAR, 1, "raw external data"),
)
MAX_BACKING_FORMAT: Final = 15
MAX_BITMAPS: Final = 65535
# More would take seconds to look at; there are six kinds.
MAX_EXTENSIONS: Final = 4096
# Bytes: as many bitmaps with names of 1023 bytes.
MAX_BITMAP_DIRECTORY: Final = MAX_BITMAPS * 1024

_EXTENSION = struct.Struct(">II")
_FEATURE = struct.Struct(">BB46s")
_BITMAPS = struct.Struct(">IIQQ")
_CRYPTO = struct.Struct(">QQ")


@attrs.frozen
class Extension:
    """One header extension: type and data, without the padding to 8 bytes."""

    type: int
    data: bytes


@attrs.frozen
class BitmapsExtension:
    """Where the bitmap directory is: ``count`` entries in ``size`` bytes at host ``offset``."""

    count: int
    size: int
    offset: int

    def serialise(self) -> bytes:
        """The extension's data."""
        return _BITMAPS.pack(self.count, 0, self.size, self.offset)


@attrs.frozen
class CryptoExtension:
    """Where the encryption header is: host offset and length in bytes; it owns the whole clusters."""

    offset: int
    length: int

    def serialise(self) -> bytes:
        """The extension's data."""
        return _CRYPTO.pack(self.offset, self.length)


def parse_extensions(
    cluster: bytes, start: int, end: int, check: Callable[[int, bytes], object] | None = None
) -> list[Extension]:
    """The extensions between two offsets of the header cluster, without the end mark.

    Raises QmpError for one that reaches beyond ``end`` or that no image may have, for far too many of them, and
    what ``check`` of type and data raises.
    """
    found: list[Extension] = []
    position = start
    while position < end:
        if position + _EXTENSION.size > end:
            raise QmpError("Header extension too large")
        kind, length = _EXTENSION.unpack_from(cluster, position)
        position += _EXTENSION.size
        if length > end - position:
            raise QmpError("Header extension too large")
        if kind == EXT_END:
            break
        extension = Extension(kind, bytes(cluster[position : position + length]))
        if kind in _CHECKS:
            _CHECKS[kind](extension.data)
        if check is not None:
            check(kind, extension.data)
        if len(found) == MAX_EXTENSIONS:
            raise QmpError("Too many header extensions")
        found.append(extension)
        position += -(-length // 8) * 8
    return found


def serialise_extensions(extensions: Iterable[Extension]) -> bytes:
    """The bytes of the area, with its end mark."""
    return b"".join(map(_packed, extensions)) + _EXTENSION.pack(EXT_END, 0)


def _packed(extension: Extension) -> bytes:
    length = len(extension.data)
    return _EXTENSION.pack(extension.type, length) + extension.data.ljust(-(-length // 8) * 8, b"\0")


def feature_table() -> Extension:
    """The feature name table of new images."""
    return Extension(
        EXT_FEATURE_NAMES, b"".join(_FEATURE.pack(kind, bit, name.encode()) for kind, bit, name in FEATURE_NAMES)
    )


def parse_feature_names(data: bytes) -> dict[tuple[int, int], str]:
    """Names of features by kind and bit; an incomplete last entry is ignored."""
    names: dict[tuple[int, int], str] = {}
    for position in range(0, len(data) - _FEATURE.size + 1, _FEATURE.size):
        kind, bit, name = _FEATURE.unpack_from(data, position)
        names[kind, bit] = name.split(b"\0", 1)[0].decode("utf-8", "replace")
    return names


def parse_bitmaps_extension(data: bytes, cluster_size: int) -> BitmapsExtension:
    """The bitmaps extension of an image whose autoclear bit says it is valid. Raises QmpError."""
    _check_bitmaps_length(data)
    count, reserved, size, offset = _BITMAPS.unpack(data)
    if reserved:
        raise QmpError("bitmaps_ext: Reserved field is not zero")
    if count > MAX_BITMAPS:
        raise QmpError(
            f"bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of {MAX_BITMAPS}"
        )
    if not count:
        raise QmpError("found bitmaps extension with zero bitmaps")
    if offset % cluster_size:
        raise QmpError("bitmaps_ext: invalid bitmap directory offset")
    if size > MAX_BITMAP_DIRECTORY:
        limit = MAX_BITMAP_DIRECTORY
        raise QmpError(f"bitmaps_ext: bitmap directory size ({size}) exceeds the maximum supported size ({limit})")
    return BitmapsExtension(count, size, offset)


def parse_crypto_extension(data: bytes, cluster_size: int) -> CryptoExtension:
    """The full disk encryption header pointer. Raises QmpError."""
    if len(data) != _CRYPTO.size:
        raise QmpError(f"CRYPTO header extension size {len(data)}, but expected size {_CRYPTO.size}")
    offset, length = _CRYPTO.unpack(data)
    if offset % cluster_size:
        raise QmpError(f"Encryption header offset '{offset}' is not a multiple of cluster size '{cluster_size}'")
    return CryptoExtension(offset, length)


def _check_bitmaps_length(data: bytes) -> None:
    if len(data) != _BITMAPS.size:
        raise QmpError("bitmaps_ext: Invalid extension length")


def _check_backing_format(data: bytes) -> None:
    if len(data) > MAX_BACKING_FORMAT:
        raise QmpError(f"ERROR: ext_backing_format: len={len(data)} too large (>={MAX_BACKING_FORMAT + 1})")


_CHECKS: Final[dict[int, Callable[[bytes], object]]] = {
    EXT_BACKING_FORMAT: _check_backing_format,
    EXT_BITMAPS: _check_bitmaps_length,
}
