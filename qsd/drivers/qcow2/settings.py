"""The options a qcow2 node is opened with, checked against its image and with their defaults filled in.

Pure. Rules and error texts are the reference's, with two differences on purpose, unless told otherwise: L2 tables
of large clusters are cached in slices of 64 KiB, so that a cold read does not fetch 2 MiB, and there is 1 MiB for
refcounts, where the reference has four clusters: of 512 bytes each they count 512 KiB of the image.
"""

from __future__ import annotations

from typing import Any, Final

import attrs

from qsd.drivers.qcow2.layout import LAZY_REFCOUNTS, Header
from qsd.errors import QmpError

DEFAULT_L2_CACHE: Final = 32 << 20
MIN_L2_ENTRIES: Final = 2
MIN_REFCOUNT_BLOCKS: Final = 4
DEFAULT_REFCOUNT_CACHE: Final = 1 << 20
DEFAULT_SLICE: Final = 64 << 10
DEFAULT_CLEAN_INTERVAL: Final = 600
MAX_INT: Final = (1 << 31) - 1
MAX_INTERVAL: Final = (1 << 32) - 1


@attrs.frozen(kw_only=True)
class Settings:
    """Cache sizes in bytes, ``clean_interval`` in seconds (0: never)."""

    l2_cache: int
    slice_bytes: int
    refcount_cache: int
    clean_interval: int
    lazy_refcounts: bool
    discard_request: bool
    discard_snapshot: bool
    discard_other: bool
    discard_no_unref: bool


def settings_of(options: Any, header: Header, *, discard_unmap: bool) -> Settings:
    """What ``BlockdevOptionsQcow2`` ask for on that image. Raises QmpError."""
    _check_sizes(options)
    slice_bytes = _slice_bytes(options.l2_cache_entry_size, header)
    l2_cache, refcount_cache = _cache_sizes(options, header, slice_bytes)
    interval = _given(options.cache_clean_interval, DEFAULT_CLEAN_INTERVAL)
    if not 0 <= interval <= MAX_INTERVAL:
        raise QmpError("Cache clean interval too big")
    lazy = bool(header.compatible & LAZY_REFCOUNTS) if options.lazy_refcounts is None else options.lazy_refcounts
    if lazy and header.content_version < 3:
        raise QmpError("Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level")
    if options.discard_no_unref and header.content_version < 3:
        raise QmpError("discard-no-unref is only supported since qcow2 version 3")
    return Settings(
        l2_cache=l2_cache,
        slice_bytes=slice_bytes,
        refcount_cache=refcount_cache,
        clean_interval=interval,
        lazy_refcounts=lazy,
        discard_request=_given(options.pass_discard_request, discard_unmap),
        discard_snapshot=_given(options.pass_discard_snapshot, True),
        discard_other=_given(options.pass_discard_other, False),
        discard_no_unref=bool(options.discard_no_unref),
    )


def _check_sizes(options: Any) -> None:
    """Whether the sizes go together, whatever the image."""
    combined, l2_cache, refcounts = options.cache_size, options.l2_cache_size, options.refcount_cache_size
    for name, value in (
        ("refcount-cache-size", refcounts),
        ("cache-size", combined),
        ("l2-cache-size", l2_cache),
        ("l2-cache-entry-size", options.l2_cache_entry_size),
    ):
        if value is not None and value < 0:
            raise QmpError(f"Value '{value}' is out of range for parameter '{name}'")
    if combined is None:
        return
    if l2_cache is not None and refcounts is not None:
        raise QmpError("cache-size, l2-cache-size and refcount-cache-size may not be set at the same time")
    if l2_cache is not None and l2_cache > combined:
        raise QmpError("l2-cache-size may not exceed cache-size")
    if refcounts is not None and refcounts > combined:
        raise QmpError("refcount-cache-size may not exceed cache-size")


def _slice_bytes(wanted: int | None, header: Header) -> int:
    if wanted is None:
        return min(header.cluster_size, DEFAULT_SLICE)
    if not 512 <= wanted <= header.cluster_size or wanted & (wanted - 1):
        raise QmpError(
            f"L2 cache entry size must be a power of two between 512 and the cluster size ({header.cluster_size})"
        )
    return wanted


def _cache_sizes(options: Any, header: Header, slice_bytes: int) -> tuple[int, int]:
    combined, l2_cache, refcounts = options.cache_size, options.l2_cache_size, options.refcount_cache_size
    least_l2, least_refcounts = MIN_L2_ENTRIES * slice_bytes, MIN_REFCOUNT_BLOCKS * header.cluster_size
    # All L2 tables of the disk.
    most_l2 = -(-header.size // header.cluster_size) * header.l2_entry_size
    most_l2 = -(-most_l2 // slice_bytes) * slice_bytes
    if combined is not None:
        if l2_cache is not None:
            refcounts = combined - l2_cache
        elif refcounts is not None:
            l2_cache = combined - refcounts
        elif combined >= most_l2 + least_refcounts:
            l2_cache = most_l2
            refcounts = combined - l2_cache
        else:
            refcounts = min(combined, least_refcounts)
            l2_cache = combined - refcounts
    l2_cache = min(_given(l2_cache, DEFAULT_L2_CACHE), most_l2)
    refcounts = _given(refcounts, DEFAULT_REFCOUNT_CACHE)
    if refcounts > MAX_INT * header.cluster_size:
        raise QmpError("Refcount cache size too big")
    return max(l2_cache, least_l2), max(refcounts, least_refcounts)


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
