"""Refcount blocks of every width against the specification's own arithmetic."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsd.drivers.qcow2 import refcount_codec as codec

ORDERS = range(7)


def entry_by_specification(block: bytes, order: int, index: int) -> int:
    """Entry ``index``, read bit by bit as the specification says."""
    bits = 1 << order
    if bits >= 8:
        size = bits // 8
        return int.from_bytes(block[index * size : (index + 1) * size], "big")
    return block[index * bits // 8] >> (index * bits % 8) & ((1 << bits) - 1)


@settings(deadline=None)
@given(order=st.sampled_from(ORDERS), words=st.lists(st.binary(min_size=8, max_size=8), max_size=16))
def test_decode_any_block_agrees_with_the_specification(order: int, words: list[bytes]) -> None:
    block = b"".join(words)
    counts = codec.decode(block, order)
    assert list(counts) == [entry_by_specification(block, order, i) for i in range(len(block) * 8 >> order)]
    assert codec.encode(counts, order) == block


@pytest.mark.parametrize("order", ORDERS)
def test_decode_whole_block_has_an_entry_per_cluster(order: int) -> None:
    counts = codec.decode(memoryview(bytes(65536)), order)
    assert len(counts) == codec.block_entries(16, order)
    assert counts == codec.zeroes(len(counts), order)
    assert counts.typecode == codec.typecode(order)


@pytest.mark.parametrize("order", ORDERS)
def test_encode_largest_count_survives_and_one_more_is_refused(order: int) -> None:
    largest = codec.max_refcount(order)
    counts = codec.from_counts([0, largest] * 4, order)
    assert list(codec.decode(codec.encode(counts, order), order)) == [0, largest] * 4
    with pytest.raises(OverflowError):
        codec.from_counts([largest + 1], order)
    if order < 3:
        with pytest.raises(OverflowError):
            codec.encode(array("B", [largest + 1] * 8), order)


def test_encode_array_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="refcounts of 16 bits"):
        codec.encode(array("Q", [1]), 4)


@settings(deadline=None)
@given(order=st.sampled_from(ORDERS), data=st.data())
def test_encode_range_patches_a_block(order: int, data: st.DataObject) -> None:
    entries = 64
    counts = codec.zeroes(entries, order)
    block = bytearray(codec.encode(counts, order))
    first = data.draw(st.integers(0, entries - 1))
    last = data.draw(st.integers(first + 1, entries))
    for index in range(first, last):
        counts[index] = codec.max_refcount(order)
    offset, piece = codec.encode_range(counts, order, first, last)
    block[offset : offset + len(piece)] = piece
    assert codec.decode(block, order) == counts
    assert len(piece) <= -(-((last - first) << order) // 8) + 1
