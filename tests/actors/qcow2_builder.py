"""qcow2 images made cluster by cluster: every kind of L2 entry, and a snapshot that shares all of them."""

from __future__ import annotations

import random
import struct
from collections import Counter
from typing import Final

import attrs
from qcow2_vault import luks_area

from qsd.drivers.qcow2 import compressed, refcount_codec
from qsd.drivers.qcow2.bitmap_layout import AUTO, DirectoryEntry, pack_directory
from qsd.drivers.qcow2.extensions import BitmapsExtension, CryptoExtension
from qsd.drivers.qcow2.geometry import ALL_ALLOCATED, ALL_ZERO, COMPRESSED, COPIED, OFFSET_MASK, ZERO_FLAG
from qsd.drivers.qcow2.layout import BITMAPS, CRYPT_LUKS, EXT_BITMAPS, EXT_CRYPTO, Header, serialise_header

_SNAPSHOT: Final = struct.Struct(">QIHHIIQII")

# Kinds of guest clusters.
NOTHING, DATA, ZERO, ZERO_PLACED, PACKED, PARTS = "nothing", "data", "zero", "zero with place", "packed", "parts"
KINDS: Final = {2: (NOTHING, DATA, PACKED), 3: (NOTHING, DATA, ZERO, ZERO_PLACED, PACKED)}
EXTENDED_KINDS: Final = (NOTHING, DATA, ZERO, PACKED, PARTS)


@attrs.define
class Built:
    """The files' bytes, and what a guest sees in clusters (None: what the backing file has)."""

    image: bytes
    data: bytes
    guest: list[bytes | None]
    snapshot_l1: int = 0
    # Cluster -> which subclusters are not described by the image.
    holes: dict[int, list[int]] = attrs.field(factory=dict)


class Builder:
    """Host clusters are given out in order; refcounts are written at the end."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.size = header.cluster_size
        self.parts: dict[int, bytes] = {}
        self.counts: Counter[int] = Counter({0: 1})
        self.next = 1
        self._packed_at = 0

    def allocate(self, count: int = 1) -> int:
        """Host offset of ``count`` clusters in a row."""
        first, self.next = self.next, self.next + count
        self.counts.update(range(first, self.next))
        return first * self.size

    def put(self, content: bytes, count: int = 0) -> int:
        """New clusters with that content; their offset."""
        offset = self.allocate(count or max(1, -(-len(content) // self.size)))
        self.parts[offset] = content
        return offset

    def put_packed(self, content: bytes) -> int:
        """A compressed cluster; several share a host cluster where refcounts allow that. Returns the entry."""
        packed = compressed.deflate(content, self.header.compression_type)
        assert packed is not None, "choose content that compresses"
        at = self._packed_at
        # As far as refcounts can count it; with a snapshot a count doubles.
        has_room = at % self.size and at % self.size + len(packed) < self.size
        highest = refcount_codec.max_refcount(self.header.refcount_order)
        if has_room and (self.counts[at // self.size] + 1) * 2 <= highest:
            self.counts[at // self.size] += 1
            offset = at
        else:
            offset = self.allocate()
        self.parts[offset] = packed
        self._packed_at = offset + len(packed)
        return compressed.encode_entry(offset, len(packed), self.header.cluster_bits)

    def finish(self) -> bytes:
        """The file, with refcounts for all of it."""
        per_block = refcount_codec.block_entries(self.header.cluster_bits, self.header.refcount_order)
        blocks = 1
        while blocks * per_block < self.next + blocks + 1:
            blocks += 1
        assert blocks * 8 <= self.size
        first = self.allocate(blocks)
        table = self.allocate()
        for index in range(blocks):
            counts = [self.counts[index * per_block + entry] for entry in range(per_block)]
            block = refcount_codec.from_counts(counts, self.header.refcount_order)
            self.parts[first + index * self.size] = bytes(refcount_codec.encode(block, self.header.refcount_order))
        self.parts[table] = words([first + index * self.size for index in range(blocks)])
        self.header = attrs.evolve(self.header, refcount_table_offset=table, refcount_table_clusters=1)
        self.parts[0] = serialise_header(self.header)
        image = bytearray(self.next * self.size)
        for offset, content in self.parts.items():
            image[offset : offset + len(content)] = content
        return bytes(image)


def words(values: list[int]) -> bytes:
    """Numbers as the image has them."""
    return struct.pack(f">{len(values)}Q", *values)


def content_of(cluster: int, size: int) -> bytes:
    """What a built image has in a cluster: words that name their place, so that they compress a bit."""
    return b"".join(struct.pack(">II", 0xB111D, cluster << 16 | at) for at in range(size // 64)).ljust(
        size, b"\xee"
    )


def build(
    header: Header,
    rng: random.Random,
    *,
    kinds: tuple[str, ...] | None = None,
    has_snapshot: bool = False,
    has_bitmap: bool = False,
) -> Built:
    """An image whose guest clusters are of random ``kinds``; with a snapshot everything is shared with it."""
    builder = Builder(header)
    size, extended = header.cluster_size, header.has_extended_l2
    clusters = -(-header.size // size)
    if kinds is None:
        kinds = EXTENDED_KINDS if extended else KINDS[header.version]
    if header.has_data_file:
        kinds = tuple(kind for kind in kinds if kind != PACKED)
    built = Built(b"", b"", [])
    data = bytearray(clusters * size if header.has_data_file else 0)
    entries: list[tuple[int, int]] = []
    for cluster in range(clusters):
        kind = rng.choice(kinds)
        content = content_of(cluster, size)
        entry, bitmap = 0, 0

        def place(content: bytes, cluster: int = cluster) -> int:
            if header.has_data_file:
                data[cluster * size : (cluster + 1) * size] = content
                return cluster * size | COPIED
            return builder.put(content) | COPIED

        seen: bytes | None = bytes(size)
        if kind == NOTHING:
            seen = None
        elif kind == DATA:
            entry, bitmap, seen = place(content), ALL_ALLOCATED, content
        elif kind == ZERO:
            entry, bitmap = (0 if extended else ZERO_FLAG), ALL_ZERO
        elif kind == ZERO_PLACED:
            entry = place(b"\xdd" * size) | ZERO_FLAG
        elif kind == PACKED:
            entry, seen = builder.put_packed(content), content
        else:
            states = [rng.randrange(3) for _ in range(32)]
            entry = place(content)
            bitmap = sum(1 << at for at, state in enumerate(states) if state == 1)
            bitmap |= sum(1 << 32 + at for at, state in enumerate(states) if state == 2)
            part = size // 32
            pieces = [
                content[at * part : (at + 1) * part] if state == 1 else bytes(part)
                for at, state in enumerate(states)
            ]
            seen = b"".join(pieces)
            built.holes[cluster] = [at for at, state in enumerate(states) if state == 0]
        built.guest.append(seen)
        entries.append((entry, bitmap))
    _map(builder, entries, built, has_snapshot=has_snapshot)
    if header.crypt_method == CRYPT_LUKS:
        _add_luks(builder)
    if has_bitmap:
        _add_bitmap(builder)
    built.image, built.data = builder.finish(), bytes(data)
    return built


def _map(builder: Builder, entries: list[tuple[int, int]], built: Built, *, has_snapshot: bool) -> None:
    header, size = builder.header, builder.size
    per_table = header.l2_entries
    l1 = []
    for start in range(0, len(entries), per_table):
        table: list[int] = []
        for entry, bitmap in entries[start : start + per_table]:
            plain = not entry & COMPRESSED
            if has_snapshot:
                if entry & COMPRESSED:
                    offset, length = compressed.decode_entry(entry, header.cluster_bits)
                    builder.counts.update(range(offset // size, (offset + length - 1) // size + 1))
                elif entry & OFFSET_MASK and not header.has_data_file:
                    builder.counts[(entry & OFFSET_MASK) // size] += 1
                if plain and not header.has_data_file:
                    entry &= ~COPIED
            table += (entry, bitmap) if header.has_extended_l2 else (entry,)
        if any(table):
            offset = builder.put(words(table))
            if has_snapshot:
                builder.counts[offset // size] += 1
            l1.append(offset if has_snapshot else offset | COPIED)
        else:
            l1.append(0)
    changes: dict[str, int] = {"l1_offset": builder.put(words(l1)), "l1_size": len(l1)}
    if has_snapshot:
        built.snapshot_l1 = builder.put(words(l1))
        extra = struct.pack(">QQ", 0, header.size)
        name = _SNAPSHOT.pack(built.snapshot_l1, len(l1), 1, 4, 0, 0, 0, 0, len(extra)) + extra + b"1snap"
        changes |= {"snapshots_offset": builder.put(name.ljust(-(-len(name) // 8) * 8, b"\0")), "snapshot_count": 1}
    builder.header = attrs.evolve(header, **changes)


def _add_luks(builder: Builder) -> None:
    """The LUKS header, in clusters of its own."""
    area = luks_area()
    extension = CryptoExtension(builder.put(area), len(area))
    builder.header = builder.header.with_extension(EXT_CRYPTO, extension.serialise())


def _add_bitmap(builder: Builder) -> None:
    """A stored dirty bitmap of one cluster."""
    table = builder.put(words([builder.put(b"\xff\x0f")]))
    directory = pack_directory([DirectoryEntry(b"bitmap0", table, 1, 16, AUTO)])
    extension = BitmapsExtension(1, len(directory), builder.put(directory)).serialise()
    header = builder.header.with_extension(EXT_BITMAPS, extension)
    builder.header = attrs.evolve(header, autoclear=header.autoclear | BITMAPS)
