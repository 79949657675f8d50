"""The cache of tables, and how much of them it may hold."""

from __future__ import annotations

from array import array

import attrs
import pytest

from qsd.drivers.qcow2.layout import Header
from qsd.drivers.qcow2.settings import settings_of
from qsd.drivers.qcow2.tables import SliceCache
from qsd.qapi.schema.qcow2 import BlockdevOptionsQcow2


def test_slices_that_must_stay_are_not_all_looked_at_for_each_that_comes() -> None:
    """Two thousand changed refcount blocks beside room for four: a snapshot took half a minute to delete."""
    looks = 0
    pinned = set(range(2000))

    def is_pinned(number: int) -> bool:
        nonlocal looks
        looks += 1
        return number in pinned

    cache = SliceCache(512, 4 * 512, is_pinned)
    for number in range(2000):
        cache.insert(number, array("Q"))
    assert cache.size == 2000 * 512
    assert looks < 2000 * 20
    pinned.clear()
    for number in range(2000, 2200):
        cache.insert(number, array("Q"))
    assert cache.size == 4 * 512


def test_one_slice_that_may_go_is_found_among_many_that_must_stay() -> None:
    pinned = set(range(100))
    cache = SliceCache(512, 4 * 512, pinned.__contains__)
    for number in range(100):
        cache.insert(number, array("Q"))
    for number in range(100, 1000):
        cache.insert(number, array("Q"))
    assert cache.size < 120 * 512


@pytest.mark.parametrize(
    ("given", "cluster_bits", "expected"),
    [(None, 9, 1 << 20), (None, 16, 1 << 20), (None, 21, 8 << 20), (1, 9, 2048), (4096, 9, 4096)],
)
def test_room_for_refcounts(given: int | None, cluster_bits: int, expected: int) -> None:
    """Four blocks of small clusters count next to nothing: 2 KiB for 512 KiB of an image of 512-byte clusters."""
    options = attrs.evolve(_options(), refcount_cache_size=given)
    header = Header(size=1 << 30, cluster_bits=cluster_bits)
    assert settings_of(options, header, discard_unmap=False).refcount_cache == expected


def _options() -> BlockdevOptionsQcow2:
    return BlockdevOptionsQcow2(driver="qcow2", file="f")  # type: ignore[arg-type]  # as from JSON
