"""A packed bitmap of what has been written: one bit for every ``granularity`` bytes of a disk.

Bit n is bit n % 8 of byte n // 8, which is also how qcow2 stores it. The bytes are padded with zeroes to whole
64-bit words, at least one: the digest is taken of those. Bits beyond the end of the disk are always 0.

Nothing here goes bit by bit, or through what is clean. Equal stretches are skipped by comparing blocks, bits are
joined as long integers, and what changes within a byte comes from a table.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from itertools import cycle, islice
from operator import sub

from qsd.block.bitmap_blocks import BLOCK, BLOCK_BITS, BLOCK_MASK, UNIFORM, Blocks
from qsd.block.bitmap_scale import coarser, finer
from qsd.messages import Op, Request

WRITE = Op.WRITE.value

MIN_GRANULARITY = 512
MAX_GRANULARITY = 1 << 31
WORD = 8
# Bitmaps whose granularities are further apart than this power of two are merged bit by bit: the coarser has few.
MAX_STEPS = BLOCK_BITS
# Extents looked for at a time when all of them are wanted.
STRETCH = 4096

# Bytes that are hashed at a time.
PIECE = 1 << 20

MIDDLE = 512
SMALL = 32
_MIDDLE = tuple(uniform[:MIDDLE] for uniform in UNIFORM)
_SMALL = tuple(uniform[:SMALL] for uniform in UNIFORM)
_OTHER = (re.compile(rb"[^\x00]"), re.compile(rb"[^\xff]"))


def _changes(before: int, byte: int) -> tuple[int, ...]:
    """The bits of ``byte`` that differ from the bit before them, which is ``before`` for bit 0."""
    bits = [before, *(byte >> position & 1 for position in range(8))]
    return tuple(position for position in range(8) if bits[position] != bits[position + 1])


_CHANGES = tuple(tuple(_changes(before, byte) for byte in range(256)) for before in (0, 1))


class DirtyBitmap:
    """See the module. ``size`` is the disk's in bytes, ``granularity`` a power of two of at least 512."""

    __slots__ = ("_blocks", "_count", "_end", "shift", "size")

    def __init__(self, size: int, granularity: int) -> None:
        assert granularity >= MIN_GRANULARITY
        assert not granularity & (granularity - 1)
        self.size = size
        self.shift = granularity.bit_length() - 1
        self._end = -(-size // granularity)
        self._blocks = Blocks()
        self._count = 0

    # -- facts ------------------------------------------------------------------------------------------------

    @property
    def granularity(self) -> int:
        """Bytes of the disk that a bit stands for."""
        return 1 << self.shift

    @property
    def dirty_bytes(self) -> int:
        """Set bits times the granularity; more than the disk has when its last bit reaches beyond the end."""
        return self._count << self.shift

    def digest(self) -> str:
        """SHA-256 of the padded bytes, in hexadecimal digits."""
        digest = hashlib.sha256()
        for start in range(0, self._padded, PIECE):
            digest.update(self.read(start, start + PIECE))
        return digest.hexdigest()

    def is_dirty(self, offset: int) -> bool:
        """Whether the byte at ``offset`` counts as written."""
        bit = offset >> self.shift
        return bit < self._end and bool(self._byte(bit >> 3) >> (bit & 7) & 1)

    @property
    def _padded(self) -> int:
        return max(1, -(-self._end // (WORD * 8))) * WORD

    def _byte(self, index: int) -> int:
        return self._blocks.at(index >> BLOCK_BITS)[index & BLOCK_MASK]

    # -- marking ----------------------------------------------------------------------------------------------

    def mark(self, batch: Iterable[Request]) -> None:
        """Set what the WRITE requests of a batch touch; they lie inside the disk."""
        blocks = self._blocks.own
        shift = self.shift
        for request in batch:
            length = request.length
            if request.op == WRITE and length:
                offset = request.offset
                first = offset >> shift
                end = (offset + length - 1 >> shift) + 1
                block = blocks.get(first >> BLOCK_BITS + 3) if end - first == 1 else None
                if block is not None:
                    index = first >> 3 & BLOCK_MASK
                    old = block[index]
                    new = old | 1 << (first & 7)
                    if new != old:
                        block[index] = new
                        self._count += 1
                else:
                    self._put(first, end, 1)

    def set(self, offset: int, length: int) -> None:
        """Set every bit that the range touches, as far as it lies inside the disk; length 0 touches nothing."""
        self._put_range(offset, length, 1)

    def reset(self, offset: int, length: int) -> None:
        """Clear every bit that the range touches."""
        self._put_range(offset, length, 0)

    def _put_range(self, offset: int, length: int, value: int) -> None:
        end = min(offset + length, self.size)
        if offset < end:
            self._put(offset >> self.shift, (end - 1 >> self.shift) + 1, value)

    def _put(self, first: int, end: int, value: int) -> None:
        """Give the bits [first, end), at least one of them, a value."""
        low, high = first >> 3, end + 7 >> 3
        head = 0xFF << (first & 7) & 0xFF
        tail = 0xFF >> (-end & 7)
        if high - low == 1:
            self._put_byte(low, head & tail, value)
            return
        self._put_byte(low, head, value)
        self._put_byte(high - 1, tail, value)
        self._fill(low + 1, high - 1, value)

    def _put_byte(self, index: int, mask: int, value: int) -> None:
        old = self._byte(index)
        new = old | mask if value else old & ~mask
        if new != old:
            self._blocks.writable(index >> BLOCK_BITS)[index & BLOCK_MASK] = new
            self._count += new.bit_count() - old.bit_count()

    def _fill(self, start: int, stop: int, value: int) -> None:
        """Give all bits in the bytes [start, stop) a value."""
        blocks, uniform = self._blocks, UNIFORM[value]
        while start < stop:
            number, at = start >> BLOCK_BITS, start & BLOCK_MASK
            end = min(BLOCK, at + stop - start)
            start += end - at
            block, wanted = blocks.at(number), uniform[at:end]
            if block is not uniform and not block.startswith(wanted, at):
                self._count += (end - at) * 8 * value - _ones(block[at:end])
                if wanted is uniform:
                    blocks.put(number, uniform)
                else:
                    blocks.writable(number)[at:end] = wanted

    def clear(self) -> DirtyBitmap:
        """Clear everything; what was there before, as a bitmap of its own. Costs no copy."""
        before = self._like(self._blocks)
        self._blocks = Blocks()
        self._count = 0
        return before

    def copy(self) -> DirtyBitmap:
        """The same content, independent from now on. Costs nothing until one of them is changed."""
        return self._like(self._blocks.copy())

    def take_over(self, other: DirtyBitmap) -> None:
        """Become what ``other``, of the same shape and not used any more, is."""
        assert (self.size, self.shift) == (other.size, other.shift)
        self._blocks, self._count = other._blocks, other._count

    def _like(self, blocks: Blocks) -> DirtyBitmap:
        made = DirtyBitmap.__new__(DirtyBitmap)
        made.size, made.shift, made._end, made._count = self.size, self.shift, self._end, self._count
        made._blocks = blocks
        return made

    def resize(self, size: int) -> None:
        """The disk has another size: what is cut off is forgotten, what is new is clean."""
        end = -(-size // self.granularity)
        if end < self._end:
            self._put(end, self._end, 0)
        self.size, self._end = size, end

    # -- merging ----------------------------------------------------------------------------------------------

    def merge(self, other: DirtyBitmap) -> Iterator[None]:
        """Set what is set in ``other``, a bitmap of a disk of the same size at any granularity.

        A step, of less than a millisecond, whenever the next item is asked for: it is done when there is none left.
        What becomes of ``other`` after the first makes no difference.
        """
        assert self.size == other.size
        other = other.copy()
        steps = self.shift - other.shift
        if steps > MAX_STEPS:
            offset = other.first_dirty(0)
            while offset is not None:
                self.set(offset, 1)
                yield
                offset = other.first_dirty((offset | self.granularity - 1) + 1)
        elif steps < -MAX_STEPS:
            for offset, length in other.dirty_areas():
                for start in range(offset, offset + length, other.granularity):
                    self.set(start, min(other.granularity, offset + length - start))
                    yield
        else:
            yield from self._join(other._blocks, steps)
            self._trim()

    def _join(self, blocks: Blocks, steps: int) -> Iterator[None]:
        size = BLOCK >> -steps if steps < 0 else BLOCK
        zeroes = UNIFORM[0][:size]
        for number in blocks.stored():
            block, index = blocks.at(number), number << BLOCK_BITS
            if not steps:
                self._or(index, block)
                yield
                continue
            for at in range(0, BLOCK, size):
                if block.startswith(zeroes, at):
                    continue
                data = bytes(block[at : at + size])
                if steps > 0:
                    self._or(index >> steps, coarser(data, steps))
                else:
                    self._or(index + at << -steps, finer(data, -steps))
                yield

    def _or(self, index: int, data: bytes | bytearray) -> None:
        """Set what is set in ``data``, which nobody changes any more, from byte ``index`` on."""
        first, stop = index, min(index + len(data), self._padded)
        while index < stop:
            end = min((index | BLOCK_MASK) + 1, stop)
            # What is whole is not copied: several bitmaps may keep it.
            self._or_block(index, data if end - index == len(data) else data[index - first : end - first])
            index = end

    def _or_block(self, index: int, data: bytes | bytearray) -> None:
        blocks, number, at = self._blocks, index >> BLOCK_BITS, index & BLOCK_MASK
        old = blocks.at(number)
        if old.startswith(data, at) or UNIFORM[0].startswith(data):
            return
        if old is UNIFORM[0]:
            self._count += _ones(data)
        else:
            before = int.from_bytes(old[at : at + len(data)], "little")
            after = before | int.from_bytes(data, "little")
            self._count += after.bit_count() - before.bit_count()
            data = after.to_bytes(len(data), "little")
        if len(data) < BLOCK:
            blocks.writable(number)[at : at + len(data)] = data
        else:
            blocks.put(number, UNIFORM[1] if data == UNIFORM[1] else data)

    def _trim(self) -> None:
        """Clear what lies beyond the end of the disk."""
        end = self._padded * 8
        if self._end < end:
            self._put(self._end, end, 0)

    # -- looking ----------------------------------------------------------------------------------------------

    def extents(self, offset: int, length: int, limit: int) -> list[tuple[int, bool]]:
        """What a range of at least one byte is made of: lengths in bytes, and whether they are dirty.

        Neighbours differ. They begin at ``offset`` and end with the range, or earlier: at most ``limit`` are told.
        Beyond the end of the disk everything is clean.
        """
        end = offset + length
        stop = min(end, self.size)
        shift = self.shift
        if offset >= stop:
            return [(length, False)]
        edges = self._edges(offset >> shift, (stop - 1 >> shift) + 1, limit)
        is_dirty = self.is_dirty(offset)
        marks = [offset, *(edge << shift for edge in edges)]
        if len(edges) < limit:
            # The last run is whole. Where it is dirty and ends with the disk, a clean one follows.
            if stop < end and is_dirty ^ len(edges) & 1:
                marks.append(stop)
            marks.append(end)
        lengths = map(sub, marks[1:], marks)
        return list(zip(islice(lengths, limit), cycle((is_dirty, not is_dirty)), strict=False))

    def first_dirty(self, offset: int) -> int | None:
        """The first dirty byte from ``offset`` on; None when all is clean."""
        if offset >= self.size:
            return None
        if self.is_dirty(offset):
            return offset
        edges = self._edges(offset >> self.shift, self._end, 0)
        return edges[0] << self.shift if edges else None

    def next_dirty(self, offset: int, end: int | None = None) -> tuple[int, int] | None:
        """Offset and length of the first dirty bytes from ``offset`` on, before ``end``; None if all is clean."""
        stop = self.size if end is None else min(end, self.size)
        if offset >= stop:
            return None
        for length, is_dirty in self.extents(offset, stop - offset, 2):
            if is_dirty:
                return offset, length
            offset += length
        return None

    def dirty_areas(self) -> Iterator[tuple[int, int]]:
        """Offset and length in bytes of every dirty area, as they are when it is their turn."""
        offset = 0
        while offset < self.size:
            for length, is_dirty in self.extents(offset, self.size - offset, STRETCH):
                if is_dirty:
                    yield offset, length
                offset += length

    def _edges(self, first: int, end: int, limit: int) -> list[int]:
        """The bits in (first, end) that differ from the one before them; when there are more, above ``limit``."""
        blocks = self._blocks
        index = first >> 3
        stop = end + 7 >> 3
        byte = self._byte(index)
        state = byte >> (first & 7) & 1
        # Within the first byte, what is below the first bit is taken to be like it.
        below = (1 << (first & 7)) - 1
        byte = byte | below if state else byte & ~below
        block = blocks.at(index >> BLOCK_BITS)
        edges: list[int] = []
        while True:
            changes = _CHANGES[state][byte]
            edges.extend([index * 8 + change for change in changes])
            state ^= len(changes) & 1
            index += 1
            if len(edges) > limit or index >= stop:
                break
            if not index & BLOCK_MASK:
                block = blocks.at(index >> BLOCK_BITS)
            if not _CHANGES[state][block[index & BLOCK_MASK]]:
                index = self._skip(index, stop, state)
                if index >= stop:
                    break
                block = blocks.at(index >> BLOCK_BITS)
            byte = block[index & BLOCK_MASK]
        while edges and edges[-1] >= end:
            edges.pop()
        return edges

    def _skip(self, index: int, stop: int, state: int) -> int:
        """The first byte from ``index`` on whose bits are not all ``state``; ``stop`` or more if there is none."""
        blocks = self._blocks
        last = (stop - 1 >> BLOCK_BITS) + 1
        middle, small = _MIDDLE[state], _SMALL[state]
        while index < stop:
            index = max(index, blocks.skip(index >> BLOCK_BITS, last, state) << BLOCK_BITS)
            block, start = blocks.at(index >> BLOCK_BITS), index & BLOCK_MASK
            index -= start
            while block.startswith(middle, start):
                start += MIDDLE
            while block.startswith(small, start):
                start += SMALL
            end = min(start + SMALL, BLOCK)
            found = _OTHER[state].search(block, start, min(end, stop - index))
            if found is not None:
                return index + found.start()
            index += end
        return stop

    # -- storing ----------------------------------------------------------------------------------------------

    @staticmethod
    def data_length_of(size: int, granularity: int) -> int:
        """Bytes that hold the bits of a disk of ``size`` bytes."""
        return (size + granularity * 8 - 1) // (granularity * 8)

    @property
    def data_length(self) -> int:
        """Bytes that hold bits of the disk."""
        return self._end + 7 >> 3

    def uniform(self, start: int, stop: int) -> int | None:
        """0 or 1 when all bits of the disk in the bytes [start, stop) are that, else None."""
        edges = self._edges(start * 8, min(stop * 8, self._end), 0)
        return None if edges else self._byte(start) & 1

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of the bitmap."""
        stop = min(stop, self._padded)
        first = start >> BLOCK_BITS
        blocks = [self._blocks.at(number) for number in range(first, (stop - 1 >> BLOCK_BITS) + 1)]
        return b"".join(blocks)[start - (first << BLOCK_BITS) : stop - (first << BLOCK_BITS)]

    def fill(self, start: int, stop: int) -> None:
        """Set all bits of the disk in the bytes [start, stop), at least one."""
        self._put(start * 8, min(stop * 8, self._end), 1)

    def load(self, start: int, data: bytes) -> None:
        """Set what is set in ``data``, bytes of a bitmap of this shape from byte ``start`` on."""
        self._or(start, data)
        self._trim()


def _ones(data: bytes | bytearray) -> int:
    return int.from_bytes(data, "little").bit_count()
