"""The header cluster of a qcow2 image: fields, feature bits, header extensions, backing file name.

Pure. Follows the qcow2 specification (interop/qcow2, "Header" and "Header extensions"); the bounds beyond the
specification (table sizes, cluster sizes) and the error texts are the reference's. All numbers are big endian.

To open: read ``PROBE_LENGTH`` bytes, ``probe_cluster_size`` of them, read that many bytes, ``parse_header``. To
change: ``attrs.evolve`` the header, write ``serialise_header`` of it over the start of the file (``header_change``
where the image is in use). Header extensions nobody here knows and header fields of later versions survive that.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import attrs

from qsd.drivers.qcow2.extensions import EXT_BACKING_FORMAT as EXT_BACKING_FORMAT
from qsd.drivers.qcow2.extensions import EXT_BITMAPS as EXT_BITMAPS
from qsd.drivers.qcow2.extensions import EXT_CRYPTO as EXT_CRYPTO
from qsd.drivers.qcow2.extensions import EXT_DATA_FILE as EXT_DATA_FILE
from qsd.drivers.qcow2.extensions import (
    EXT_FEATURE_NAMES,
    INCOMPATIBLE,
    BitmapsExtension,
    CryptoExtension,
    Extension,
    feature_table,
    parse_bitmaps_extension,
    parse_crypto_extension,
    parse_extensions,
    parse_feature_names,
    serialise_extensions,
)
from qsd.errors import QmpError

MAGIC: Final = b"QFI\xfb"
PROBE_LENGTH: Final = 112
V2_LENGTH: Final = 72
V3_LENGTH: Final = 104
# With the compression type and its padding; what is written for every new image.
FULL_LENGTH: Final = 112
V2_REFCOUNT_ORDER: Final = 4

MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 21
# Bytes. Header clusters up to this size go without the feature name table, to keep room for a backing file name.
MAX_CLUSTER_WITHOUT_NAMES: Final = 4096
MIN_EXTENDED_CLUSTER_BITS: Final = 14
MAX_BACKING_NAME: Final = 1023
# Bytes. Enough for 2 EiB at 2 MiB clusters; a bound on memory an image can ask for (CVE-2014-0143 and kin).
MAX_L1_BYTES: Final = 32 << 20
MAX_REFCOUNT_TABLE_BYTES: Final = 8 << 20
MAX_SNAPSHOTS: Final = 65536
MAX_REFCOUNT_ORDER: Final = 6
MAX_SIZE: Final = (1 << 63) - 1
# Entries. What is beyond is called too big, what is below but more than the table has makes the table too small.
MAX_L1_NEEDED: Final = (1 << 31) - 1

# Incompatible feature bits.
DIRTY: Final = 1 << 0
CORRUPT: Final = 1 << 1
DATA_FILE: Final = 1 << 2
COMPRESSION: Final = 1 << 3
EXTENDED_L2: Final = 1 << 4
KNOWN_INCOMPATIBLE: Final = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2
# Compatible.
LAZY_REFCOUNTS: Final = 1 << 0
# Autoclear.
BITMAPS: Final = 1 << 0
DATA_FILE_RAW: Final = 1 << 1
KNOWN_AUTOCLEAR: Final = BITMAPS | DATA_FILE_RAW
# Our own, of a version 2 image while it is marked: see ``marking``. Whoever else writes to it takes it away.
WAS_V2: Final = 1 << 63

CRYPT_NONE: Final = 0
CRYPT_AES: Final = 1
CRYPT_LUKS: Final = 2
COMPRESSION_ZLIB: Final = 0
COMPRESSION_ZSTD: Final = 1
COMPRESSION_NAMES: Final = {COMPRESSION_ZLIB: "zlib", COMPRESSION_ZSTD: "zstd"}

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
# Of a disk: arrives as a whole, or not at all.
SECTOR: Final = 512
_NOT_QCOW2 = "Image is not in qcow2 format"


@attrs.frozen(kw_only=True)
class Header:
    """The header cluster. Offsets and sizes: bytes; ``l1_size``: entries; ``refcount_table_clusters``: clusters.

    ``extensions`` are in file order, without the end mark and the feature name table (which is written anew).
    ``later_fields`` are the bytes of a longer header than ``FULL_LENGTH``. ``backing_offset`` and
    ``backing_file`` are where the name is and what it is; for who makes a header, ``place_name`` finds a place.
    """

    version: int = 3
    cluster_bits: int = 16
    size: int = 0
    crypt_method: int = CRYPT_NONE
    l1_size: int = 0
    l1_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    snapshot_count: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = V2_REFCOUNT_ORDER
    header_length: int = FULL_LENGTH
    compression_type: int = COMPRESSION_ZLIB
    later_fields: bytes = b""
    backing_file: bytes | None = None
    backing_offset: int = attrs.field(default=0, eq=False)
    extensions: tuple[Extension, ...] = ()
    feature_names: dict[tuple[int, int], str] = attrs.field(factory=dict, eq=False)
    # Whether the table is written where there is room for it.
    names_features: bool = attrs.field(default=True, eq=False)

    # -- derived ----------------------------------------------------------------------------------------------

    @property
    def content_version(self) -> int:
        """The version whose features the image has: 2 of one that is version 3 only to be marked."""
        is_marked = self.incompatible | CORRUPT == DIRTY | CORRUPT and self.autoclear == WAS_V2
        # With anything else that only version 3 has, the mark is not ours.
        is_plain = not self.compatible and self.refcount_order == V2_REFCOUNT_ORDER and not self.later_fields
        return 2 if is_marked and is_plain else self.version

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def disk_size(self) -> int:
        """Bytes of the disk. As the reference has it: whole sectors, what others made may end in part of one."""
        return self.size // SECTOR * SECTOR

    @property
    def has_extended_l2(self) -> bool:
        """True when L2 entries have 16 bytes and a cluster 32 subclusters."""
        return bool(self.incompatible & EXTENDED_L2)

    @property
    def has_data_file(self) -> bool:
        """True when guest data lies in another file."""
        return bool(self.incompatible & DATA_FILE)

    @property
    def is_data_file_raw(self) -> bool:
        """True when the external data file must always be a valid raw image."""
        return bool(self.autoclear & DATA_FILE_RAW)

    @property
    def l2_entry_size(self) -> int:
        """Bytes of an L2 entry."""
        return 16 if self.has_extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        """Entries of an L2 table, which takes one cluster."""
        return self.cluster_size // self.l2_entry_size

    @property
    def refcount_bits(self) -> int:
        """Bits of a reference count."""
        return 1 << self.refcount_order

    @property
    def subcluster_size(self) -> int:
        """Bytes of what is allocated at once: a cluster, or a 32nd of one with extended L2 entries."""
        return self.cluster_size // 32 if self.has_extended_l2 else self.cluster_size

    @property
    def l1_needed(self) -> int:
        """L1 entries that ``size`` needs."""
        span = self.cluster_size * self.l2_entries
        return -(-self.size // span)

    @property
    def has_snapshots_in_place(self) -> bool:
        """Whether the snapshot table begins where one can."""
        return not self.snapshots_offset % self.cluster_size and self.snapshots_offset <= MAX_SIZE

    def extension(self, kind: int) -> bytes | None:
        """The data of the first header extension of a type."""
        return next((extension.data for extension in self.extensions if extension.type == kind), None)

    def bitmaps_extension(self) -> BitmapsExtension | None:
        """Where the bitmap directory is, when the image says that it is valid. Raises QmpError."""
        data = self.extension(EXT_BITMAPS) if self.autoclear & BITMAPS else None
        return None if data is None else parse_bitmaps_extension(data, self.cluster_size)

    def crypto_extension(self) -> CryptoExtension | None:
        """Where the LUKS header is; of several pointers the last counts, as in the reference. Raises QmpError."""
        found = [extension.data for extension in self.extensions if extension.type == EXT_CRYPTO]
        data = found[-1] if found else None
        return None if data is None else parse_crypto_extension(data, self.cluster_size)

    def with_extension(self, kind: int, data: bytes | None) -> Header:
        """The header with that extension set (in place, else at the end) or taken away (None)."""
        rest = [extension for extension in self.extensions if extension.type != kind]
        if data is None:
            return attrs.evolve(self, extensions=tuple(rest))
        index = next((i for i, extension in enumerate(self.extensions) if extension.type == kind), len(rest))
        rest.insert(index, Extension(kind, data))
        return attrs.evolve(self, extensions=tuple(rest))


def probe_cluster_size(start: bytes) -> int:
    """The bytes of the header cluster, from the first ``PROBE_LENGTH`` bytes of the file. Raises QmpError."""
    start = start.ljust(PROBE_LENGTH, b"\0")
    if start[:4] != MAGIC:
        raise QmpError(_NOT_QCOW2)
    version, bits = struct.unpack_from(">I", start, 4)[0], struct.unpack_from(">I", start, 20)[0]
    if not 2 <= version <= 3:
        raise QmpError(f"Unsupported qcow2 version {version}")
    if not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
        raise QmpError(f"Unsupported cluster size: 2^{bits}")
    return 1 << int(bits)


def parse_header(cluster: bytes, *, is_for_check: bool = False) -> Header:
    """Read the header cluster; raises QmpError for what cannot be opened.

    ``cluster`` holds as much of the first cluster as the file has; what lacks is zeroes. Unknown incompatible
    features are refused here (with the names the image gives them); what else the bits mean is the driver's affair.
    ``is_for_check``: what a repair can put right is no error.
    """
    cluster_size = probe_cluster_size(cluster)
    cluster = cluster.ljust(cluster_size, b"\0")
    fields = _V2.unpack_from(cluster)
    version, backing_offset, backing_size = fields[1], fields[2], fields[3]
    header = Header(
        version=version,
        cluster_bits=fields[4],
        size=fields[5],
        crypt_method=fields[6],
        l1_size=fields[7],
        l1_offset=fields[8],
        refcount_table_offset=fields[9],
        refcount_table_clusters=fields[10],
        snapshot_count=fields[11],
        snapshots_offset=fields[12],
        header_length=V2_LENGTH,
    )
    if version >= 3:
        header = _with_v3_fields(header, cluster, cluster_size)
    if backing_offset > cluster_size:
        raise QmpError("Invalid backing file offset")
    _check_compression(header)
    extensions_end = backing_offset or cluster_size
    _check_features(header, cluster, extensions_end)
    _check_bounds(header, is_for_check=is_for_check)
    header = _with_extensions(header, cluster, extensions_end)
    _check_extensions(header)
    if backing_offset:
        name = _backing_name(cluster, backing_offset, backing_size)
        header = attrs.evolve(header, backing_file=name, backing_offset=backing_offset)
    if header.size > MAX_SIZE:
        raise QmpError("Could not refresh total sector count: File too large")
    return header


def parse_start(start: bytes, *, is_for_check: bool = False) -> Header | None:
    """The header where nothing but the start of its cluster can be read; None if it matters what the rest holds."""
    size = probe_cluster_size(start)
    try:
        header, other = (
            parse_header(start.ljust(size, fill), is_for_check=is_for_check) for fill in (b"\0", b"\xff")
        )
    except QmpError:
        return None
    return header if header == other else None


def _with_v3_fields(header: Header, cluster: bytes, cluster_size: int) -> Header:
    incompatible, compatible, autoclear, order, length = _V3.unpack_from(cluster, V2_LENGTH)
    if length < V3_LENGTH:
        raise QmpError("qcow2 header too short")
    if length > cluster_size:
        raise QmpError("qcow2 header exceeds cluster size")
    return attrs.evolve(
        header,
        incompatible=incompatible,
        compatible=compatible,
        autoclear=autoclear,
        refcount_order=order,
        header_length=length,
        compression_type=cluster[V3_LENGTH] if length > V3_LENGTH else COMPRESSION_ZLIB,
        later_fields=bytes(cluster[FULL_LENGTH:length]),
    )


def _with_extensions(header: Header, cluster: bytes, end: int) -> Header:
    def check(kind: int, data: bytes) -> None:
        if kind == EXT_CRYPTO:
            if header.crypt_method != CRYPT_LUKS:
                raise QmpError("CRYPTO header extension only expected with LUKS encryption method")
            parse_crypto_extension(data, header.cluster_size)
        elif kind == EXT_BITMAPS and header.autoclear & BITMAPS:
            parse_bitmaps_extension(data, header.cluster_size)

    found = parse_extensions(cluster, header.header_length, end, check)
    names = [extension.data for extension in found if extension.type == EXT_FEATURE_NAMES]
    return attrs.evolve(
        header,
        extensions=tuple(extension for extension in found if extension.type != EXT_FEATURE_NAMES),
        feature_names=parse_feature_names(names[-1]) if names else {},
    )


def _check_compression(header: Header) -> None:
    if header.compression_type not in COMPRESSION_NAMES:
        raise QmpError(f"qcow2: unknown compression type: {header.compression_type}")
    is_marked = bool(header.incompatible & COMPRESSION)
    if is_marked != (header.compression_type != COMPRESSION_ZLIB):
        verb = "must not be set" if is_marked else "must be set"
        raise QmpError(f"qcow2: Compression type incompatible feature bit {verb}")


def _check_features(header: Header, cluster: bytes, extensions_end: int) -> None:
    unknown = header.incompatible & ~KNOWN_INCOMPATIBLE
    if not unknown:
        return
    try:
        extensions = parse_extensions(cluster, header.header_length, extensions_end)
    except QmpError:  # the features are the more important news
        extensions = []
    tables = [
        parse_feature_names(extension.data) for extension in extensions if extension.type == EXT_FEATURE_NAMES
    ]
    feature_names = tables[-1] if tables else {}
    named = [name for (kind, bit), name in feature_names.items() if kind == INCOMPATIBLE and unknown >> bit & 1]
    for kind, bit in feature_names:
        if kind == INCOMPATIBLE:
            unknown &= ~(1 << bit)
    if unknown:
        named.append(f"Unknown incompatible feature: {unknown:x}")
    raise QmpError(f"Unsupported qcow2 feature(s): {', '.join(named)}")


def _check_extensions(header: Header) -> None:
    if header.is_data_file_raw and not header.has_data_file:
        raise QmpError("data-file-raw requires a data file")
    if header.crypt_method == CRYPT_LUKS and header.extension(EXT_CRYPTO) is None:
        raise QmpError(f"Missing CRYPTO header for crypt method {header.crypt_method}")


def _backing_name(cluster: bytes, offset: int, size: int) -> bytes:
    if size > MAX_BACKING_NAME or offset + size > len(cluster):
        raise QmpError("Backing file name too long")
    return bytes(cluster[offset : offset + size])


def _check_bounds(header: Header, *, is_for_check: bool) -> None:
    cluster_mask = header.cluster_size - 1
    if header.refcount_order > MAX_REFCOUNT_ORDER:
        raise QmpError("Reference count entry width too large; may not exceed 64 bits")
    if header.has_extended_l2 and header.cluster_bits < MIN_EXTENDED_CLUSTER_BITS:
        raise QmpError(f"Unsupported subcluster size: {header.subcluster_size}")
    if header.refcount_table_clusters << header.cluster_bits > MAX_REFCOUNT_TABLE_BYTES:
        raise QmpError("Reference count table too large")
    if not header.refcount_table_clusters and not is_for_check:
        raise QmpError("Image does not contain a reference count table")
    table_end = header.refcount_table_offset + (header.refcount_table_clusters << header.cluster_bits)
    if header.refcount_table_offset & cluster_mask or table_end > MAX_SIZE:
        raise QmpError("Reference count table offset invalid")
    if header.snapshot_count > MAX_SNAPSHOTS and not is_for_check:
        raise QmpError("Snapshot table too large")
    if not header.has_snapshots_in_place and not is_for_check:
        raise QmpError("Snapshot table offset invalid")
    if header.l1_size * 8 > MAX_L1_BYTES:
        raise QmpError("Active L1 table too large")
    if header.l1_offset & cluster_mask or header.l1_offset + header.l1_size * 8 > MAX_SIZE:
        raise QmpError("Active L1 table offset invalid")
    # In the reference's 64-bit arithmetic; it only decides about words, for no size over MAX_SIZE passes.
    span = header.cluster_size * header.l2_entries
    needed = ((header.size + span - 1) & ((1 << 64) - 1)) // span
    if needed > MAX_L1_NEEDED:
        raise QmpError("Image is too big")
    if header.l1_size < needed:
        raise QmpError("L1 table is too small")
    if header.crypt_method not in (CRYPT_NONE, CRYPT_AES, CRYPT_LUKS):
        signed = (header.crypt_method ^ 1 << 31) - (1 << 31)
        raise QmpError(f"Unsupported encryption method {signed}")


def marking(header: Header) -> dict[str, Any]:
    """What changes in the header to say: counts and flags may not agree, who writes to the image is to repair it.

    Version 2 has no such mark. Its image is one of version 3 meanwhile, if the header then fits into a sector,
    which arrives as a whole; otherwise nothing changes.
    """
    if header.version >= 3:
        return {"incompatible": header.incompatible | DIRTY}
    changes: dict[str, Any] = {"version": 3, "header_length": FULL_LENGTH}
    changes |= {"incompatible": DIRTY, "autoclear": WAS_V2}
    try:
        length = len(serialise_header(attrs.evolve(header, **changes)))
    except QmpError:
        # Clusters may be no longer than that.
        return {}
    return changes if length <= SECTOR else {}


def unmarking(header: Header) -> dict[str, Any]:
    """What changes in the header to say that they agree."""
    if header.content_version < 3:
        return {"version": 2, "header_length": V2_LENGTH, "incompatible": 0, "autoclear": 0, "later_fields": b""}
    return {"incompatible": header.incompatible & ~DIRTY}


def serialise_header(header: Header) -> bytes:
    """The header cluster's bytes up to the end of the backing file name, padded to 8.

    Raises QmpError when they do not fit into a cluster.
    """
    front, name = header_parts(header)
    whole = front.ljust(place_name(header, len(front)), b"\0") + name
    return whole.ljust(-(-len(whole) // 8) * 8, b"\0")


def place_name(header: Header, front: int) -> int:
    """Offset of the backing file name behind ``front`` bytes of other things; 0 for none.

    It follows them where all fits into a sector. Otherwise it stays where it is, if it can: a header that changes
    and a name that moves do not arrive at the same time.
    """
    if header.backing_file is None:
        return 0
    length, at = len(header.backing_file), header.backing_offset
    stays = front + length > SECTOR and front <= at <= header.cluster_size - length
    return at if stays else front


def header_parts(header: Header) -> tuple[bytes, bytes]:
    """The fields and extensions, and the backing file name. Raises QmpError as ``serialise_header`` does."""
    length = V2_LENGTH if header.version < 3 else max(header.header_length, FULL_LENGTH)
    has_room = header.content_version >= 3 and header.cluster_size > MAX_CLUSTER_WITHOUT_NAMES
    has_names = has_room and header.names_features
    extensions = serialise_extensions((*header.extensions, *([feature_table()] if has_names else [])))
    name = header.backing_file or b""
    end = length + len(extensions)
    if end + len(name) > header.cluster_size:
        raise QmpError("No space left on device")
    fields = _V2.pack(
        MAGIC,
        header.version,
        place_name(header, end),
        len(name),
        header.cluster_bits,
        header.size,
        header.crypt_method,
        header.l1_size,
        header.l1_offset,
        header.refcount_table_offset,
        header.refcount_table_clusters,
        header.snapshot_count,
        header.snapshots_offset,
    )
    if header.version >= 3:
        fields += _V3.pack(header.incompatible, header.compatible, header.autoclear, header.refcount_order, length)
        fields += bytes((header.compression_type,)) + bytes(7)
        fields += header.later_fields.ljust(length - FULL_LENGTH, b"\0")
    return fields + extensions, name
