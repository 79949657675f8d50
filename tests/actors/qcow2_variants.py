"""Worlds with one image each: every variant of the format that changes how an image is written."""

from __future__ import annotations

import random
from typing import Any, Final

import attrs
from qcow2_builder import DATA, NOTHING, Built, build
from qcow2_world import Habits, World

from qsd.drivers.qcow2 import layout
from qsd.drivers.qcow2.layout import Header
from qsd.messages import Op, Request
from qsd.qapi.schema.qcow2 import Qcow2OverlapCheckMode


@attrs.frozen(kw_only=True)
class Variant:
    """Which image, what lies below it, and the options of the node."""

    clusters: int = 20
    cluster_bits: int = 16
    header: dict[str, Any] = attrs.field(factory=dict)
    has_snapshot: bool = False
    has_backing: bool = False
    is_empty: bool = False
    kinds: tuple[str, ...] | None = None
    options: dict[str, Any] = attrs.field(factory=dict)
    unit: int = 0
    is_packed: bool = False


_EXTENDED: Final = {"incompatible": layout.EXTENDED_L2}
_DATA_FILE: Final = {"incompatible": layout.DATA_FILE}
_DATA_FILE_RAW: Final = _DATA_FILE | {"autoclear": layout.DATA_FILE_RAW}
_AES: Final = {"crypt_method": layout.CRYPT_AES}
_LUKS: Final = {"crypt_method": layout.CRYPT_LUKS}
# The smallest caches there are: tables are written back all the time.
_TINY: Final = {"l2_cache_size": 1, "l2_cache_entry_size": 512, "refcount_cache_size": 1}

VARIANTS: Final[dict[str, Variant]] = {
    "new": Variant(is_empty=True),
    "empty-backing": Variant(is_empty=True, has_backing=True),
    # More clusters than a refcount block counts.
    "empty-4k": Variant(is_empty=True, cluster_bits=12, clusters=700, unit=1024, header={"refcount_order": 6}),
    "empty-4k-backing": Variant(is_empty=True, cluster_bits=12, clusters=200, has_backing=True, options=_TINY),
    "empty-512-backing": Variant(
        is_empty=True, cluster_bits=9, clusters=700, has_backing=True, header={"refcount_order": 6}
    ),
    "plain": Variant(),
    "v2": Variant(header={"version": 2}),
    "v2-backing": Variant(header={"version": 2}, has_backing=True),
    "snapshot": Variant(has_snapshot=True),
    "backing": Variant(has_backing=True),
    "backing-snapshot": Variant(has_backing=True, has_snapshot=True),
    "cluster-512": Variant(cluster_bits=9, clusters=400),
    "cluster-512-snapshot": Variant(cluster_bits=9, clusters=400, has_snapshot=True, options=_TINY),
    "cluster-512-new": Variant(cluster_bits=9, clusters=700, is_empty=True, header={"refcount_order": 6}),
    # So many clusters that the refcount table has to grow.
    "refcount-table": Variant(
        cluster_bits=9, clusters=3700, unit=2048, kinds=(DATA,), has_snapshot=True, header={"refcount_order": 6}
    ),
    "cluster-4k-backing": Variant(cluster_bits=12, clusters=100, has_backing=True, options=_TINY),
    "cluster-2M": Variant(cluster_bits=21, clusters=3),
    "refcount-1": Variant(cluster_bits=12, clusters=60, header={"refcount_order": 0}),
    "refcount-2-snapshot": Variant(cluster_bits=12, clusters=60, header={"refcount_order": 1}, has_snapshot=True),
    "refcount-8": Variant(cluster_bits=12, clusters=60, header={"refcount_order": 3}, has_snapshot=True),
    "refcount-32": Variant(cluster_bits=12, clusters=60, header={"refcount_order": 5}, has_backing=True),
    "refcount-64": Variant(cluster_bits=12, clusters=60, header={"refcount_order": 6}, has_snapshot=True),
    "extended": Variant(header=_EXTENDED, cluster_bits=14, clusters=30),
    "extended-new": Variant(header=_EXTENDED, cluster_bits=14, clusters=30, is_empty=True),
    "extended-snapshot": Variant(header=_EXTENDED, cluster_bits=14, clusters=30, has_snapshot=True),
    "extended-backing": Variant(header=_EXTENDED, cluster_bits=14, clusters=30, has_backing=True, options=_TINY),
    "extended-64k": Variant(header=_EXTENDED, has_backing=True, has_snapshot=True, clusters=12),
    "data-file": Variant(header=_DATA_FILE, cluster_bits=12, clusters=60),
    "data-file-backing": Variant(header=_DATA_FILE, cluster_bits=12, clusters=60, has_backing=True),
    "data-file-raw": Variant(header=_DATA_FILE_RAW, cluster_bits=12, clusters=60),
    "data-file-extended": Variant(
        header={"incompatible": layout.DATA_FILE | layout.EXTENDED_L2}, cluster_bits=14, clusters=20
    ),
    "data-file-new": Variant(header=_DATA_FILE, cluster_bits=12, clusters=60, is_empty=True),
    "lazy": Variant(header={"compatible": layout.LAZY_REFCOUNTS}, cluster_bits=12, clusters=60),
    "lazy-snapshot": Variant(
        header={"compatible": layout.LAZY_REFCOUNTS}, cluster_bits=12, clusters=60, has_snapshot=True
    ),
    "no-unref": Variant(options={"discard_no_unref": True}, cluster_bits=12, clusters=60, has_backing=True),
    "aes": Variant(header=_AES, cluster_bits=14, clusters=30, is_empty=True),
    "aes-backing": Variant(header=_AES, cluster_bits=16, has_backing=True, is_empty=True),
    "aes-extended": Variant(header=_AES | _EXTENDED, cluster_bits=14, clusters=30, has_backing=True, is_empty=True),
    "luks": Variant(header=_LUKS, cluster_bits=14, clusters=30, is_empty=True),
    "luks-backing": Variant(header=_LUKS, cluster_bits=16, has_backing=True, is_empty=True),
    "luks-extended": Variant(
        header=_LUKS | _EXTENDED, cluster_bits=14, clusters=30, has_backing=True, is_empty=True
    ),
    "luks-512": Variant(
        header=_LUKS | {"refcount_order": 6}, cluster_bits=9, clusters=400, is_empty=True, unit=512, options=_TINY
    ),
    "luks-v2-backing": Variant(header=_LUKS | {"version": 2}, has_backing=True, is_empty=True),
    "packed": Variant(is_packed=True),
    "packed-new": Variant(is_packed=True, is_empty=True, options=_TINY),
    "packed-512": Variant(is_packed=True, cluster_bits=9, clusters=400, is_empty=True),
    "packed-2M": Variant(is_packed=True, cluster_bits=21, clusters=3, is_empty=True),
    "packed-refcount-1": Variant(
        is_packed=True, cluster_bits=12, clusters=60, is_empty=True, header={"refcount_order": 0}
    ),
    "packed-refcount-2": Variant(
        is_packed=True, cluster_bits=12, clusters=60, is_empty=True, header={"refcount_order": 1}
    ),
    "packed-snapshot": Variant(is_packed=True, cluster_bits=12, clusters=60, has_snapshot=True),
    "packed-backing": Variant(is_packed=True, cluster_bits=12, clusters=60, has_backing=True),
    "packed-extended": Variant(is_packed=True, header=_EXTENDED, cluster_bits=14, clusters=30, has_backing=True),
    "packed-lazy": Variant(
        is_packed=True, header={"compatible": layout.LAZY_REFCOUNTS}, cluster_bits=12, clusters=60, is_empty=True
    ),
    # Several things at once.
    "v2-512-snapshot": Variant(
        header={"version": 2}, cluster_bits=9, clusters=400, has_snapshot=True, options=_TINY
    ),
    "data-file-extended-backing": Variant(
        header={"incompatible": layout.DATA_FILE | layout.EXTENDED_L2},
        cluster_bits=14,
        clusters=20,
        has_backing=True,
    ),
    "data-file-raw-extended": Variant(
        header=_DATA_FILE_RAW | {"incompatible": layout.DATA_FILE | layout.EXTENDED_L2},
        cluster_bits=14,
        clusters=20,
    ),
    "data-file-no-unref": Variant(
        header=_DATA_FILE, cluster_bits=12, clusters=60, has_backing=True, options={"discard_no_unref": True}
    ),
    "aes-no-unref": Variant(
        header=_AES,
        cluster_bits=12,
        clusters=60,
        has_backing=True,
        is_empty=True,
        options={"discard_no_unref": True},
    ),
    "lazy-extended-snapshot": Variant(
        header=_EXTENDED | {"compatible": layout.LAZY_REFCOUNTS},
        cluster_bits=14,
        clusters=30,
        has_snapshot=True,
        has_backing=True,
    ),
    "packed-no-unref-snapshot": Variant(
        is_packed=True,
        cluster_bits=12,
        clusters=60,
        has_snapshot=True,
        has_backing=True,
        options={"discard_no_unref": True},
    ),
    "packed-extended-lazy": Variant(
        is_packed=True,
        header=_EXTENDED | {"compatible": layout.LAZY_REFCOUNTS},
        cluster_bits=14,
        clusters=30,
        has_snapshot=True,
        options={"discard_no_unref": True, **_TINY},
    ),
    "no-discard": Variant(options={"pass_discard_request": False}, cluster_bits=12, clusters=60),
}


_CLUSTERS: Final = {9: 300, 10: 200, 12: 60, 14: 24, 16: 16}
_MORE: Final[tuple[dict[str, Any], ...]] = (
    {},
    _TINY,
    {"discard_no_unref": True},
    {"discard_no_unref": True, **_TINY},
    {"pass_discard_request": False},
    {"pass_discard_other": True, "pass_discard_snapshot": False},
    {"overlap_check": Qcow2OverlapCheckMode.ALL},
)


def is_no_large_write(request: Request) -> bool:
    """Whether a request of a child touches the page cache only for a moment."""
    return request.op != Op.WRITE or request.length <= 1024


def any_habits(rng: random.Random, requests: int, failing: float = 0.0) -> Habits:
    """A guest like no other, and disks that are slow in their own way."""
    quick = rng.choice((is_no_large_write, lambda request: request.op == Op.READ, lambda _request: False))
    weights = {
        kind: rng.choice((1, 3, 20)) for kind in ("writes", "zeroes", "discards", "reads", "flushes", "packed")
    }
    return Habits(
        requests=requests,
        depth=rng.choice((2, 8, 16, 40)),
        together=rng.choice(((1,), (1, 4, 12), (1, 1, 1, 4, 12))),
        longest=rng.choice((0, 0.02, 0.15, 0.5)),
        on_the_spot=rng.choice((0.0, 0.3, 0.8)),
        slow=rng.choice((0.0, 0.1, 0.4)),
        quick=quick,
        failing=failing,
        **weights,
    )


def any_variant(rng: random.Random) -> Variant:
    """Any combination of what a qcow2 image can be."""

    def happens(chance: float) -> bool:
        return rng.random() < chance

    version = 2 if happens(0.15) else 3
    bits = rng.choice(tuple(_CLUSTERS))
    header: dict[str, Any] = {"version": version}
    has_data_file = is_raw = is_encrypted = False
    if version > 2:
        has_data_file = happens(0.25)
        is_raw = has_data_file and happens(0.5)
        incompatible = layout.DATA_FILE if has_data_file else 0
        if bits >= layout.MIN_EXTENDED_CLUSTER_BITS and happens(0.6):
            incompatible |= layout.EXTENDED_L2
        header["incompatible"] = incompatible
        header["autoclear"] = layout.DATA_FILE_RAW if is_raw else 0
        header["compatible"] = layout.LAZY_REFCOUNTS if happens(0.3) else 0
        header["refcount_order"] = rng.choice((4, 4, 4, 0, 1, 2, 3, 5, 6))
    if not has_data_file and happens(0.15):
        is_encrypted = True
        header["crypt_method"] = rng.choice((layout.CRYPT_AES, layout.CRYPT_LUKS))
    can_share = not has_data_file and header.get("refcount_order", 4) > 0
    return Variant(
        clusters=_CLUSTERS[bits],
        cluster_bits=bits,
        header=header,
        has_snapshot=can_share and not is_encrypted and happens(0.4),
        has_backing=not is_raw and happens(0.5),
        is_empty=is_encrypted or happens(0.3),
        options=rng.choice(_MORE if version > 2 else (_MORE[0], _MORE[1])),
        is_packed=not has_data_file and not is_encrypted and happens(0.4),
        # Sectors are encrypted as a whole.
        unit=512 if is_encrypted and bits == layout.MIN_CLUSTER_BITS else 0,
    )


def make_world(
    variant: Variant, rng: random.Random, habits: Habits, *, kind: type[World] = World
) -> tuple[World, Built]:
    """A world with that image on its disks, not open yet."""
    size = 1 << variant.cluster_bits
    unit = variant.unit or (max(512, size // 16) if size > 512 else 128)
    unit = min(unit, 1 << 15)
    # The last cluster of the disk is not whole, if it can be: a disk is whole sectors.
    length = variant.clusters * size - max(512, unit)
    header = Header(cluster_bits=variant.cluster_bits, size=length, **variant.header)
    kinds = (NOTHING,) if variant.is_empty or header.is_data_file_raw else variant.kinds
    built = build(header, rng, kinds=kinds, has_snapshot=variant.has_snapshot)
    # A backing file that is shorter than the image.
    below = _noise_and_zeroes(rng, length * 3 // 4 // 512 * 512, unit) if variant.has_backing else b""
    seen = bytearray(below.ljust(length, b"\0"))
    for cluster, content in enumerate(built.guest):
        if content is None:
            continue
        piece = bytearray(content)
        for at in built.holes.get(cluster, ()):
            part = size // 32
            start = cluster * size + at * part
            piece[at * part : (at + 1) * part] = seen[start : start + part].ljust(part, b"\0")
        seen[cluster * size : (cluster + 1) * size] = piece
    world = kind(rng, unit, bytes(seen[:length]), habits)
    world.packing = size // unit if variant.is_packed else 0
    world.disk("file", built.image)
    if header.has_data_file:
        # As long as the disk, or not there yet.
        world.disk("data-file", b"" if variant.is_empty else built.data[:length])
    if variant.has_backing:
        world.disk("backing", below)
    return world, built


def _noise_and_zeroes(rng: random.Random, length: int, unit: int) -> bytes:
    """Runs of both, so that clusters are zero altogether, in part, and not at all."""
    parts: list[bytes] = []
    while len(parts) * unit < length:
        count = rng.choice((1, 2, 12, 40))
        parts += [rng.randbytes(unit) for _ in range(count)] if rng.randrange(2) else [bytes(unit)] * count
    return b"".join(parts)[:length]
