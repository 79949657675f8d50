"""Packed bitmaps against a set of bit numbers: marking, merging, looking, resizing, digests."""

from __future__ import annotations

import hashlib
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qsd.block.bitmap import DirtyBitmap
from qsd.block.bitmap_blocks import BLOCK
from qsd.block.bitmap_scale import coarser, finer
from qsd.messages import Op, ReplyQueue, Request

G = 512
# Small blocks would never be crossed otherwise: sizes reach over several of them at the finest granularity.
MAX_SIZE = 3 * BLOCK * 8 * G
REPLY = ReplyQueue(lambda: None)

shifts = st.integers(9, 14)
ranges = st.lists(
    st.tuples(st.integers(0, MAX_SIZE), st.one_of(st.integers(0, 5000), st.integers(0, MAX_SIZE))), max_size=8
)
sizes = st.one_of(st.integers(0, 300 * G), st.integers(0, MAX_SIZE))


def model(size: int, shift: int, touched: list[tuple[int, int]]) -> set[int]:
    bits: set[int] = set()
    for offset, length in touched:
        end = min(offset + length, size)
        if offset < end:
            bits.update(range(offset >> shift, (end - 1 >> shift) + 1))
    return bits


def made(size: int, shift: int, touched: list[tuple[int, int]]) -> DirtyBitmap:
    bitmap = DirtyBitmap(size, 1 << shift)
    for offset, length in touched:
        bitmap.set(offset, length)
    return bitmap


def merge(target: DirtyBitmap, source: DirtyBitmap) -> int:
    """Merge to the end; the number of steps that took."""
    return sum(1 for _step in target.merge(source))


def packed(size: int, shift: int, bits: set[int]) -> bytes:
    count = size + (1 << shift) - 1 >> shift
    data = bytearray(max(1, (count + 63) // 64) * 8)
    for bit in bits:
        data[bit >> 3] |= 1 << (bit & 7)
    return bytes(data)


def agree(bitmap: DirtyBitmap, bits: set[int]) -> None:
    data = packed(bitmap.size, bitmap.shift, bits)
    assert bitmap.read(0, len(data) + 1) == data
    assert bitmap.dirty_bytes == len(bits) << bitmap.shift
    assert bitmap.digest() == hashlib.sha256(data).hexdigest()


def runs(size: int, shift: int, bits: set[int], offset: int, length: int) -> list[tuple[int, bool]]:
    """The extents of a range, bit by bit."""
    found: list[tuple[int, bool]] = []
    position, end = offset, offset + length
    while position < end:
        stop = min(end, (position >> shift) + 1 << shift)
        if position < size:
            stop = min(stop, size) if stop > size else stop
        dirty = position < size and position >> shift in bits
        if found and found[-1][1] == dirty:
            found[-1] = (found[-1][0] + stop - position, dirty)
        else:
            found.append((stop - position, dirty))
        position = stop
    return found


@settings(deadline=None)
@given(sizes, shifts, ranges, ranges)
def test_set_and_reset_agree_with_a_set(
    size: int, shift: int, first: list[tuple[int, int]], second: list[tuple[int, int]]
) -> None:
    bitmap = made(size, shift, first)
    bits = model(size, shift, first)
    agree(bitmap, bits)
    for offset, length in second:
        bitmap.reset(offset, length)
    bits -= model(size, shift, second)
    agree(bitmap, bits)
    for offset in (0, size // 2, size - 1):
        assert bitmap.is_dirty(max(0, offset)) == (max(0, offset) >> shift in bits)


@given(
    shifts, st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 70000), st.sampled_from(Op)), max_size=20)
)
def test_mark_marks_the_writes_of_a_batch(shift: int, given: list[tuple[int, int, Op]]) -> None:
    bitmap = DirtyBitmap(2 << 20, 1 << shift)
    bitmap.mark(Request(op.value, offset, length, None, REPLY) for offset, length, op in given)
    agree(bitmap, model(2 << 20, shift, [(offset, length) for offset, length, op in given if op is Op.WRITE]))


@settings(max_examples=60, deadline=None)
@example(1, 9, 24, [], [(0, 1)])
@given(sizes, st.integers(9, 24), st.integers(9, 24), ranges, ranges)
def test_merge_across_granularities(
    size: int, shift: int, other_shift: int, mine: list[tuple[int, int]], theirs: list[tuple[int, int]]
) -> None:
    bitmap, other = made(size, shift, mine), made(size, other_shift, theirs)
    before = other.digest()
    touched = [(bit << other_shift, 1 << other_shift) for bit in model(size, other_shift, theirs)]
    merge(bitmap, other)
    agree(bitmap, model(size, shift, mine) | model(size, shift, touched))
    assert other.digest() == before


@pytest.mark.parametrize("steps", range(-13, 14))
@pytest.mark.parametrize("pattern", [b"\x55", b"\xff", b"\x80\x00\x00\x01\x00", b"\x00" * 300 + b"\x10"])
def test_merge_goes_every_way(steps: int, pattern: bytes) -> None:
    size = 40_000 << 9 if steps >= 0 else 100 << 23
    fine, coarse = (9, 9 + steps) if steps >= 0 else (23 + steps, 23)
    shift, other_shift = (coarse, fine) if steps >= 0 else (fine, coarse)
    other = DirtyBitmap(size, 1 << other_shift)
    length = other.data_length
    other.load(0, (pattern * length)[:length])
    bitmap = DirtyBitmap(size, 1 << shift)
    merge(bitmap, other)
    touched = list(other.dirty_areas())
    assert bitmap.digest() == made(size, shift, touched).digest()
    assert bitmap.dirty_bytes == made(size, shift, touched).dirty_bytes


@given(st.binary(min_size=64, max_size=64), st.integers(0, 6))
def test_scaling_bit_by_bit(data: bytes, steps: int) -> None:
    value = int.from_bytes(data, "little")
    joined = int.from_bytes(coarser(data, steps), "little")
    spread = int.from_bytes(finer(data, steps), "little")
    factor = 1 << steps
    for bit in range(512 // factor):
        assert joined >> bit & 1 == (value >> bit * factor & (1 << factor) - 1 != 0)
    for bit in range(0, 512 * factor, 7):
        assert spread >> bit & 1 == value >> (bit // factor) & 1


@settings(deadline=None)
@given(sizes, shifts, ranges, st.integers(0, MAX_SIZE), st.integers(1, MAX_SIZE), st.integers(1, 5))
def test_extents_agree_with_a_walk(
    size: int, shift: int, touched: list[tuple[int, int]], offset: int, length: int, limit: int
) -> None:
    # The walk goes bit by bit: only part of the range.
    length = min(length, 2000 << shift)
    bitmap = made(size, shift, touched)
    expected = runs(size, shift, model(size, shift, touched), offset, length)
    assert bitmap.extents(offset, length, len(expected) + 1) == expected
    assert bitmap.extents(offset, length, len(expected)) == expected
    assert bitmap.extents(offset, length, limit) == expected[:limit]


@given(st.integers(1, 200 * G), st.binary(max_size=64), st.integers(0, 200 * G), st.integers(1, 200 * G))
def test_dense_extents_agree_with_a_walk(size: int, data: bytes, offset: int, length: int) -> None:
    bitmap = DirtyBitmap(size, G)
    bitmap.load(0, data[: bitmap.data_length])
    bits = {bit for bit in range(-(-size // G)) if bit < len(data) * 8 and data[bit >> 3] >> (bit & 7) & 1}
    agree(bitmap, bits)
    assert bitmap.extents(offset, length, 1000) == runs(size, 9, bits, offset, length)
    areas = list(bitmap.dirty_areas())
    assert {bit for start, count in areas for bit in range(start >> 9, (start + count - 1 >> 9) + 1)} == bits
    assert all(start + count < following for (start, count), (following, _) in pairwise(areas))
    expected = next(((max(s, offset), s + n - max(s, offset)) for s, n in areas if s + n > offset), None)
    assert bitmap.next_dirty(offset) == expected
    assert bitmap.first_dirty(offset) == (expected[0] if expected else None)
    if expected is not None:
        assert bitmap.next_dirty(offset, expected[0] + 1) == (expected[0], 1)
        assert bitmap.next_dirty(offset, expected[0]) is None


@settings(deadline=None)
@given(sizes, sizes, shifts, ranges)
def test_resize_forgets_what_is_cut_off(size: int, other: int, shift: int, touched: list[tuple[int, int]]) -> None:
    bitmap = made(size, shift, touched)
    bitmap.resize(other)
    bits = {bit for bit in model(size, shift, touched) if bit < -(-other >> shift)}
    agree(bitmap, bits)
    bitmap.resize(size)
    agree(bitmap, bits)


def test_clear_gives_what_was_there_and_take_over_brings_it_back() -> None:
    bitmap = made(1 << 20, 12, [(5000, 9000)])
    digest = bitmap.digest()
    copy = bitmap.copy()
    before = bitmap.clear()
    assert bitmap.dirty_bytes == 0
    bitmap.set(0, 1)
    assert before.digest() == copy.digest() == digest
    bitmap.take_over(before)
    assert bitmap.digest() == digest
    assert bitmap.dirty_bytes == 3 << 12


@settings(deadline=None)
@given(sizes, shifts, ranges, ranges)
def test_copies_are_independent(
    size: int, shift: int, touched: list[tuple[int, int]], more: list[tuple[int, int]]
) -> None:
    bitmap = made(size, shift, touched)
    copy = bitmap.copy()
    bits = model(size, shift, touched)
    for offset, length in more:
        copy.set(offset, length)
        bitmap.reset(offset, length)
    agree(bitmap, bits - model(size, shift, more))
    agree(copy, bits | model(size, shift, more))


def test_merge_is_of_what_was_there_at_its_first_step() -> None:
    source, target = made(MAX_SIZE, 9, [(0, 512), (MAX_SIZE // 2, 512)]), DirtyBitmap(MAX_SIZE, 512)
    steps = target.merge(source)
    next(steps)
    source.set(MAX_SIZE - 1, 1)
    source.reset(MAX_SIZE // 2, 512)
    assert sum(1 for _step in steps) == 1
    assert list(target.dirty_areas()) == [(0, 512), (MAX_SIZE // 2, 512)]


@pytest.mark.parametrize("shift", [12, 16, 20])
def test_bitmap_of_a_large_disk_takes_memory_where_something_is_dirty(shift: int) -> None:
    """64 TiB at 64 KiB are 128 MiB of bits: making one held the loop for 77 ms, and every copy took as much."""
    size = 64 << 40
    tracemalloc.start()
    bitmap = DirtyBitmap(size, 65536)
    other = DirtyBitmap(size, 1 << shift)
    for place in range(10):
        other.set(place * size // 10, 1)
    other.set(size // 20, 1 << 30)
    assert merge(bitmap, other) <= 40
    before = bitmap.clear()
    bitmap.take_over(before)
    copies = [bitmap.copy() for _ in range(100)]
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bitmap.dirty_bytes == copies[-1].dirty_bytes >= (1 << 30) + 10 * 65536
    assert held < peak < 1 << 20


def test_what_is_all_dirty_takes_no_memory() -> None:
    size = 64 << 40
    tracemalloc.start()
    bitmap, other = DirtyBitmap(size, 65536), DirtyBitmap(size, 65536)
    bitmap.set(0, size)
    merge(other, bitmap)
    other.reset(size // 2, 65536)
    other.load(0, b"\xff" * (1 << 20))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert other.dirty_bytes == size - 65536
    # A reference to the one block of ones for each of 32768.
    assert held < peak < 8 << 20


def test_uniform_says_what_need_not_be_stored() -> None:
    bitmap = DirtyBitmap(20 * 8 * G, G)
    bitmap.set(0, 8 * 8 * G)
    bitmap.set(12 * 8 * G + 5, 1)
    assert bitmap.uniform(0, 8) == 1
    assert bitmap.uniform(8, 12) == 0
    assert bitmap.uniform(0, 9) is None
    assert bitmap.uniform(12, 20) is None
    bitmap.set(16 * 8 * G, 4 * 8 * G)
    assert bitmap.uniform(16, 20) == 1


def test_uniform_ignores_what_lies_beyond_the_end() -> None:
    bitmap = DirtyBitmap(3 * G, G)
    bitmap.set(0, 3 * G)
    assert bitmap.uniform(0, 1) == 1


def test_load_cuts_what_lies_beyond_the_end() -> None:
    bitmap = DirtyBitmap(3 * G, G)
    bitmap.load(0, b"\xff")
    assert bitmap.dirty_bytes == 3 * G
    assert bitmap.read(0, 8) == b"\x07" + bytes(7)


def test_digest_of_nothing_is_that_of_one_word() -> None:
    # What the reference answers for disks of 0, 512 and 1000448 bytes.
    expected = "af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc"
    assert {DirtyBitmap(size, 65536).digest() for size in (0, 512, 1000448)} == {expected}
