"""Finding free clusters in a row, and room for compressed ones: bytes in shared clusters, counted for each."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsd.drivers.qcow2.refcounts import Refcounts

BITS = 12
CLUSTER = 1 << BITS


class Host:
    """Lets everything happen."""

    def __init__(self) -> None:
        self.claimed: list[int] = []

    def block_made(self, cluster: int, index: int) -> None:
        pass

    def secure(self, cluster: int) -> None:
        pass

    def claim(self, first: int, count: int) -> None:
        self.claimed += range(first, first + count)

    def corrupt(self, text: str) -> OSError:
        raise AssertionError(text)


def make(order: int = 4) -> tuple[Refcounts, Host]:
    host: Any = Host()
    file: Any = None
    return Refcounts(file, BITS, order, array("Q", bytes(8 * 64)), 1 << 20, host), host


def reached(offset: int, size: int) -> range:
    return range(offset >> BITS, (offset + size - 1 >> BITS) + 1)


@pytest.mark.parametrize("order", range(7))
def test_bytes_never_overlap_and_clusters_are_counted_for_each(order: int) -> None:
    refs, host = make(order)
    rng = random.Random(order)
    places: list[tuple[int, int]] = []
    for _ in range(300):
        size = rng.choice((1, 100, 1000, CLUSTER - 1, rng.randrange(1, CLUSTER)))
        places.append((refs.allocate_bytes(size), size))
    places.sort()
    assert all(offset + size <= following for (offset, size), (following, _) in pairwise(places))
    counts = [0] * (64 << refs.block_bits)
    for offset, size in places:
        for cluster in reached(offset, size):
            counts[cluster] += 1
    used = [cluster for cluster, count in enumerate(counts) if count]
    assert all(refs.get(cluster) == counts[cluster] <= refs.highest for cluster in used)
    assert set(used) <= set(host.claimed)
    if order == 4:
        total = sum(size for _, size in places)
        assert len(used) <= -(-total // CLUSTER) + 2, "packed without gaps"


def test_rest_of_a_cluster_that_was_freed_is_not_used_again() -> None:
    refs, _ = make()
    first = refs.allocate_bytes(100)
    assert refs.add(first >> BITS, 1, -1) == [(first >> BITS, 1)]
    owner, _count = refs.allocate(1)
    assert owner == first >> BITS, "somebody else has it now"
    assert refs.allocate_bytes(100) >> BITS != owner


def test_cluster_that_loses_one_of_two_is_still_packed() -> None:
    refs, _ = make()
    first = refs.allocate_bytes(100)
    assert refs.allocate_bytes(100) == first + 100
    assert not refs.add(first >> BITS, 1, -1)
    assert refs.allocate_bytes(100) == first + 200


def test_following_cluster_that_is_taken_is_not_reached_into() -> None:
    refs, _ = make()
    first = refs.allocate_bytes(CLUSTER - 10)
    other, _count = refs.allocate(1)
    assert other == (first >> BITS) + 1
    assert refs.allocate_bytes(20) == (other + 1) << BITS


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, CLUSTER)), max_size=40), st.integers(0, 6))
def test_counts_follow_what_is_held(steps: list[tuple[bool, int]], order: int) -> None:
    refs, _ = make(order)
    held: list[tuple[int, int]] = []
    counts: Counter[int] = Counter()
    for gives_back, size in steps:
        if gives_back and held:
            offset, length = held.pop(size % len(held))
            counts.subtract(reached(offset, length))
            for cluster in reached(offset, length):
                refs.add(cluster, 1, -1)
        else:
            held.append((refs.allocate_bytes(size), size))
            counts.update(reached(*held[-1]))
        assert all(refs.get(cluster) == count for cluster, count in counts.items())
        ends = sorted((offset, offset + length) for offset, length in held)
        assert all(one[1] <= other[0] for one, other in pairwise(ends))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("arrf"), st.integers(1, 5)), max_size=60), st.integers(0, 6))
def test_rows_are_the_first_there_are(steps: list[tuple[str, int]], order: int) -> None:
    refs, _ = make(order)
    refs.allocate(1)
    held: list[int] = [1]
    for kind, count in steps:
        if kind == "f":
            cluster = held.pop(count * 7 % len(held)) if len(held) > 1 else None
            if cluster:
                refs.add(cluster, 1, -1)
            continue
        free = [not refs.get(cluster) for cluster in range(max(held) + 10)]
        if kind == "a":
            first, count = refs.allocate(1)
            assert first == free.index(True)
        else:
            first = refs.allocate_contiguous(count)
            assert first == next(at for at in range(len(free)) if all(free[at : at + count]))
        held += range(first, first + count)
    assert all(refs.get(cluster) for cluster in range(refs.first_free) if cluster < max(held))


def test_clusters_in_use_are_looked_at_once() -> None:
    """Bitmaps take thousands of clusters one by one."""
    refs, _ = make()
    for _ in range(1000):
        first = refs.allocate_contiguous(1)
    assert refs.first_free == first == 1000
