"""Random operations on a mounted file against a bytearray, as fsx does: whole calls, direct ones, mappings."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fuse_mounts import (
    KEEP_SIZE,
    KIB,
    PUNCH_HOLE,
    ZERO_RANGE,
    MakeMounted,
    Mounted,
    Start,
    fallocate,
    mounted_files,
    needs_fuse,
)

pytestmark = needs_fuse

LARGEST = 1600 * KIB
STEPS = 250


@pytest.fixture
def mounted(daemon: Start, tmp_path: Path) -> Iterator[MakeMounted]:
    yield from mounted_files(daemon, tmp_path)


class Model:
    """The file, and the bytes it must have."""

    def __init__(self, export: Mounted, data: bytes, seed: int) -> None:
        self.export = export
        self.data = bytearray(data)
        self.chance = random.Random(seed)
        self.fd = export.open()
        self.direct = export.open(os.O_RDWR | os.O_DIRECT)
        self.aligned = mmap.mmap(-1, 256 * KIB)

    def place(self, longest: int = 100_000) -> tuple[int, int]:
        """Somewhere in the file: offset, length."""
        return self.chance.randrange(len(self.data)), self.chance.randrange(1, longest)

    def inside(self, longest: int = 100_000) -> tuple[int, int]:
        offset, length = self.place(longest)
        return offset, min(length, len(self.data) - offset)

    def put(self, offset: int, data: bytes) -> None:
        """A write; the node's length is a multiple of 512."""
        end = -(-(offset + len(data)) // 512) * 512
        self.data.extend(bytes(max(0, end - len(self.data))))
        self.data[offset : offset + len(data)] = data

    # -- operations -------------------------------------------------------------------------------------------

    def read(self) -> None:
        offset, length = self.place(LARGEST)
        assert os.pread(self.fd, length, offset) == self.data[offset : offset + length]

    def write(self) -> None:
        offset, length = self.place()
        data = self.chance.randbytes(length)
        assert os.pwrite(self.fd, data, offset) == length
        self.put(offset, data)

    def append(self) -> None:
        fd = os.open(self.export.path, os.O_WRONLY | os.O_APPEND)
        data = self.chance.randbytes(self.chance.randrange(1, 5000))
        assert os.write(fd, data) == len(data)
        os.close(fd)
        self.put(len(self.data), data)

    def read_direct(self) -> None:
        start = self.chance.randrange(len(self.data)) // 4096 * 4096
        count = os.preadv(self.direct, [self.aligned], start)
        assert self.aligned[:count] == self.data[start : start + len(self.aligned)]

    def write_direct(self) -> None:
        start = self.chance.randrange(len(self.data)) // 4096 * 4096
        self.aligned[:] = self.chance.randbytes(len(self.aligned))
        assert os.pwritev(self.direct, [self.aligned], start) == len(self.aligned)
        self.put(start, self.aligned[:])

    def punch(self) -> None:
        offset, length = self.inside()
        fallocate(self.fd, PUNCH_HOLE | KEEP_SIZE, offset, length)
        self.data[offset : offset + length] = bytes(length)

    def zero(self) -> None:
        offset, length = self.place()
        fallocate(self.fd, ZERO_RANGE, offset, length)
        self.put(offset, bytes(length))

    def allocate(self) -> None:
        length = self.chance.randrange(1, 20_000)
        fallocate(self.fd, 0, len(self.data), length)
        self.put(len(self.data) + length, b"")

    def truncate(self) -> None:
        size = self.chance.randrange(1, LARGEST // 512) * 512
        os.ftruncate(self.fd, size)
        self.data = self.data[:size] + bytes(max(0, size - len(self.data)))

    def copy(self) -> None:
        source, length = self.inside(50_000)
        target = self.chance.randrange(len(self.data))
        if abs(source - target) < length:
            return
        copied = os.copy_file_range(self.fd, self.fd, length, source, target)
        assert copied == length
        self.put(target, bytes(self.data[source : source + length]))

    def map(self) -> None:
        offset, length = self.inside()
        with mmap.mmap(self.fd, len(self.data), prot=mmap.PROT_READ) as view:
            assert view[offset : offset + length] == self.data[offset : offset + length]

    def write_mapped(self) -> None:
        offset, length = self.inside(20_000)
        data = self.chance.randbytes(length)
        with mmap.mmap(self.fd, len(self.data)) as view:
            view[offset : offset + length] = data
            view.flush()
        self.put(offset, data)

    def seek(self) -> None:
        """Every hole the file admits to reads as zeroes, and holes and data take turns."""
        offset = hole = os.lseek(self.fd, self.chance.randrange(len(self.data)), os.SEEK_HOLE)
        assert offset <= len(self.data)
        if hole < len(self.data):
            try:
                data = os.lseek(self.fd, hole, os.SEEK_DATA)
            except OSError:
                data = len(self.data)
            assert not any(self.data[hole:data])

    def sync(self) -> None:
        os.fsync(self.fd)
        # A file that ends within a sector shows zeroes up to the sector's end.
        assert self.export.image.read_bytes().ljust(len(self.data), b"\0") == self.data


OPERATIONS: tuple[Callable[[Model], None], ...] = (
    *(Model.read, Model.write, Model.append, Model.read_direct, Model.write_direct, Model.punch, Model.zero),
    *(Model.allocate, Model.truncate, Model.copy, Model.map, Model.write_mapped, Model.seek, Model.sync),
)


@pytest.mark.parametrize(("seed", "node"), [(1, "discard=unmap"), (2, "cache.direct=on,aio=native")])
def test_random_operations_against_a_model(mounted: MakeMounted, seed: int, node: str) -> None:
    data = random.Random(seed).randbytes(300 * KIB)
    model = Model(mounted(data, "writable=on,growable=on", node), data, seed)
    for _ in range(STEPS):
        model.chance.choice(OPERATIONS)(model)
        assert os.fstat(model.fd).st_size == len(model.data)
        if len(model.data) > LARGEST:
            model.truncate()
    model.sync()
    assert os.pread(model.fd, len(model.data), 0) == model.data
