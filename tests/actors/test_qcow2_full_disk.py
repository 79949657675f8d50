"""A disk that gets full: the write that finds no room fails, and nothing that was written before it is lost."""

from __future__ import annotations

import errno
import random

import attrs
import pytest
from qcow2_fakes import MemoryFile, SlowFile, check, new_image, opened_on, read, write

from qsd.drivers.calls import call
from qsd.drivers.qcow2.layout import EXTENDED_L2, Header
from qsd.drivers.runs import Cold
from qsd.messages import Op, Request

PAGE = 4096


class ThinFile(MemoryFile):
    """A file with holes on a disk with ``left`` pages: the first write to a page takes one."""

    def __init__(self, data: bytes, left: int) -> None:
        super().__init__(data)
        self.left = left
        self._taken = set(range(len(data) // PAGE))

    def submit(self, batch: list[Request]) -> None:
        for request in batch:
            if request.op in (Op.WRITE, Op.WRITE_ZEROES):
                pages = range(request.offset // PAGE, (request.offset + request.length - 1) // PAGE + 1)
                wanted = set(pages) - self._taken
                if len(wanted) > self.left:
                    request.complete(errno.ENOSPC)
                    continue
                self.left -= len(wanted)
                self._taken |= wanted
            super().submit([request])


HEADERS = {
    "plain": Header(size=64 << 30),
    "old": Header(size=64 << 30, version=2),
    "small": Header(size=64 << 20, cluster_bits=9),
    "extended": Header(size=64 << 30, cluster_bits=14, incompatible=EXTENDED_L2),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", HEADERS)
async def test_full_disk_fails_writes_and_no_flush(name: str, seed: int) -> None:
    header, rng = HEADERS[name], random.Random(seed)
    file = ThinFile(new_image(attrs.evolve(header)), left=rng.randrange(40, 400))
    kept: dict[int, bytes] = {}
    async with opened_on(file) as driver:
        refused: list[int | None] = []
        while len(refused) < 3:
            offset = rng.randrange(header.size // PAGE) * PAGE
            data = bytes([rng.randrange(1, 256)]) * PAGE
            try:
                if rng.random() < 0.2:
                    await call(driver, Op.WRITE_ZEROES, offset, PAGE)
                    data = bytes(PAGE)
                else:
                    await write(driver, offset, data)
            except OSError as error:
                refused.append(error.errno)
            else:
                kept[offset] = data
        assert refused == [errno.ENOSPC] * 3
        await call(driver, Op.FLUSH, 0, 0)
        for offset, data in kept.items():
            assert await read(driver, offset, PAGE) == data
        await driver.close()
    assert check(file)[0] == 0
    async with opened_on(MemoryFile(file.data)) as driver:
        for offset, data in kept.items():
            assert await read(driver, offset, PAGE) == data
        await driver.close()


async def test_room_made_for_a_refcount_block_is_not_taken_before_it_is_there() -> None:
    file = SlowFile(new_image(Header(size=1 << 20, cluster_bits=9, refcount_order=6)))
    async with opened_on(file) as driver:
        refs = driver.image.refs
        await driver.settled(refs.get, 0)
        while refs.first_free < refs.entries:
            refs.allocate(1)
        with pytest.raises(Cold) as first:
            refs.allocate(1)
        assert isinstance(first.value.key, tuple)
        kind, cluster = first.value.key
        assert kind == "room"
        file.slow = frozenset({Op.WRITE})
        driver.wait_for(first.value, lambda error: None)
        assert [request.offset for request in file.waiting] == [cluster * 512]
        with pytest.raises(Cold) as second:
            refs.allocate_contiguous(8)
        assert second.value.key == first.value.key
        await file.end_all()
        row = refs.allocate_contiguous(8)
        assert row <= cluster < row + 8 or refs.block_offset(cluster >> refs.block_bits) == cluster * 512
