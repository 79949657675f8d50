"""Cluster numbers in few bytes: what a dictionary would say, whatever the numbers, within the room and beyond."""

from __future__ import annotations

import tracemalloc
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsd.drivers.qcow2.cluster_table import ClusterTable
from qsd.drivers.qcow2.geometry import OFFSET_MASK, empty_table
from qsd.drivers.qcow2.metadata_map import ACTIVE_L1, ACTIVE_L2, MANY, REFCOUNT_BLOCK, MetadataMap

CLUSTERS = st.one_of(st.integers(0, 40), st.integers(0, 1 << 55))


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.sampled_from(("one", "two", "three", "")), CLUSTERS)),
    st.integers(0, 30),
    st.lists(st.sets(CLUSTERS), max_size=3),
)
def test_table_says_what_a_dictionary_says(steps: list[tuple[str, int]], room: int, runs: list[set[int]]) -> None:
    table, model = ClusterTable(room), dict[int, str]()
    for number, clusters in enumerate(runs):
        table.add_ascending(array("Q", sorted(clusters)), f"run {number}")
        model.update(dict.fromkeys(clusters, f"run {number}"))
    assert table.highest() == max(model, default=-1)
    for word, cluster in steps:
        if word:
            table.put((cluster,), word)
            model[cluster] = word
        else:
            assert table.pop(cluster, "none") == model.pop(cluster, "none")
        for known in {cluster, *model}:
            assert (known in table) is (known in model)
            assert table.get(known, "none") == model.get(known, "none")
        assert all(table[known] == word for known, word in model.items())
    with pytest.raises(KeyError):
        table[1 << 56]


def test_many_tables_take_little_memory_and_are_all_known() -> None:
    count = 4 * MANY
    entries = empty_table(count * 8)
    for index in range(count):
        entries[index] = (index * 977 + 5) << 9 | 1 << 63
    tracemalloc.start()
    known = MetadataMap(9, frozenset((ACTIVE_L1, ACTIVE_L2)))
    known.expect(count)
    for start in range(0, count, 4096):
        known.add_tables(ACTIVE_L2, entries[start : start + 4096])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 * count
    assert all((entry & OFFSET_MASK) >> 9 in known.clusters for entry in entries[::977])
    assert known.find(range(6, 5 + 977)) is None
    known.add(ACTIVE_L1, 5 << 9, 512)
    known.add(REFCOUNT_BLOCK, 6 << 9, 512)
    assert known.find((6, 5)) == ACTIVE_L1
    known.forget(ACTIVE_L2, 5 << 9)
    assert known.find((5,)) == ACTIVE_L1
    known.remove(5 << 9, 512)
    assert known.find((5, 6)) is None
