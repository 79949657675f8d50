"""A qcow2 image in memory, for what needs host clusters: allocated at the end, counted in 16-bit refcounts."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs

from qsd.drivers.qcow2.layout import Header, parse_header, serialise_header


class MemoryImage:
    """What ``Qcow2Bitmaps`` needs of an image. ``fail`` counts down to the operation that fails with ENOSPC.

    ``log`` records writes, flushes and header changes in their order, for tests that cut them short.
    """

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.header: Header = parse_header(data[: 1 << 21])
        self.cluster = self.header.cluster_size
        self.fail = 0
        self.log: list[tuple[str, int, bytes]] = []
        self.released: list[tuple[int, int]] = []

    @classmethod
    def load(cls, path: Path) -> MemoryImage:
        return cls(path.read_bytes())

    def save(self, path: Path) -> None:
        path.write_bytes(self.data)

    def _step(self) -> None:
        self.fail -= 1
        if self.fail == 0:
            raise OSError(errno.ENOSPC, "no space")

    @property
    def length(self) -> int:
        return len(self.data)

    async def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length]).ljust(length, b"\0")

    async def write(self, pieces: Iterable[tuple[int, bytes]]) -> None:
        for offset, data in pieces:
            self._step()
            assert offset
            assert not offset % self.cluster
            self._put(offset, data)

    def _put(self, offset: int, data: bytes) -> None:
        self.log.append(("write", offset, bytes(data)))
        self.data.extend(bytes(max(0, offset + len(data) - len(self.data))))
        self.data[offset : offset + len(data)] = data

    def _counter(self, number: int) -> int:
        """Where the count of a cluster is; its refcount block is made when it does not exist."""
        entries = self.cluster // 2
        slot = self.header.refcount_table_offset + number // entries * 8
        (block,) = struct.unpack_from(">Q", self.data, slot)
        if not block:
            block = self._end()
            self._put(block, bytes(self.cluster))
            self._put(slot, struct.pack(">Q", block))
            self._count(block // self.cluster, 1)
        return int(block + number % entries * 2)

    def refcount(self, number: int) -> int:
        (count,) = struct.unpack_from(">H", self.data, self._counter(number))
        return int(count)

    def _count(self, number: int, change: int) -> None:
        self._put(self._counter(number), struct.pack(">H", self.refcount(number) + change))

    def _end(self) -> int:
        return -(-len(self.data) // self.cluster) * self.cluster

    async def allocate(self, count: int) -> int:
        self._step()
        first = self._end() // self.cluster
        # Blocks that count the clusters come first, so that these lie in a row.
        while any(not self._has_block(number) for number in range(first, first + count)):
            for number in range(first, first + count):
                self._counter(number)
            first = self._end() // self.cluster
        for number in range(first, first + count):
            assert self.refcount(number) == 0
            self._count(number, 1)
        self.data.extend(bytes((first + count) * self.cluster - len(self.data)))
        return first * self.cluster

    def _has_block(self, number: int) -> bool:
        slot = self.header.refcount_table_offset + number // (self.cluster // 2) * 8
        return struct.unpack_from(">Q", self.data, slot) != (0,)

    async def release(self, offset: int, count: int) -> None:
        self.released.append((offset, count))
        for number in range(offset // self.cluster, offset // self.cluster + count):
            if not self._has_block(number) or not self.refcount(number):
                raise OSError(errno.EIO, "the cluster is free")
            self._count(number, -1)

    async def change_header(self, **changes: Any) -> None:
        self._step()
        self.header = attrs.evolve(self.header, **changes)
        self._put(0, serialise_header(self.header))

    async def flush(self) -> None:
        self.log.append(("flush", 0, b""))
