"""Power cuts and failing requests while an image gets another backing file, by name or because it is streamed."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import Enum
from typing import ClassVar, Final

import attrs
import pytest
from cow_fakes import CowOptions, House, running_house, settle
from qcow2_fakes import KIB, Bench, MemoryFile, cut, examine, new_image, opened_on, read, write
from test_stream import WRITE

from qsd.actors.jobs.stream import StreamJob
from qsd.drivers.base import Driver, Mode
from qsd.drivers.qcow2.driver import Qcow2Driver
from qsd.drivers.qcow2.layout import DIRTY, EXT_BACKING_FORMAT, LAZY_REFCOUNTS, Header, marking, parse_header
from qsd.messages import Request
from qsd.qapi.core import NULL
from qsd.qapi.schema.block import BlockdevDriver
from qsd.qapi.schema.qcow2 import BlockdevOptionsQcow2

# -- names ------------------------------------------------------------------------------------------------------

# One behind the other: each is cut off.
NAMES: Final = [
    *(("/a" * 200, "raw"), ("/b" * 200, "raw"), ("/c" * 500, "qcow2"), ("/d", "qcow2"), ("/e" * 500, "raw")),
    *(("", ""), ("/f" * 511, "qcow2"), ("/g" * 300, ""), ("/h" * 20, "")),
]


@pytest.mark.parametrize("version", [2, 3])
async def test_name_is_the_old_or_the_new(version: int) -> None:
    """A header of more than a sector does not arrive as a whole: the name was half of each."""
    bench = Bench(Header(size=256 * KIB, cluster_bits=12, version=version), random.Random(1), MemoryFile(b""))
    known: tuple[bytes | None, bytes | None] = (None, None)
    async with bench.open() as driver:
        for name, kind in NAMES:
            before = bytes(bench.file.data)
            bench.file.log.clear()
            await driver.change_backing_file(name, kind)
            wanted = (name.encode() or None, kind.encode() or None)
            assert backing_of(bytes(bench.file.data)) == wanted
            assert {backing_of(data) for data in cut(before, bench.file.log)} == {known, wanted}
            known = wanted
            # Other things in the header change.
            before = bytes(bench.file.data)
            bench.file.log.clear()
            await driver.image.change_header(**marking(driver.image.header))
            await driver.image.change_header(incompatible=driver.image.header.incompatible & ~DIRTY)
            assert {backing_of(data) for data in cut(before, bench.file.log)} == {known}
        await driver.close()
    assert (examine(bench.file.data).corruptions, examine(bench.file.data).leaks) == (0, 0)


def backing_of(data: bytes) -> tuple[bytes | None, bytes | None]:
    header = parse_header(data[: 1 << 16])
    return header.backing_file, header.extension(EXT_BACKING_FORMAT)


# -- streams ----------------------------------------------------------------------------------------------------


class Kind(str, Enum):
    RECORDED = "recorded"


class RecordedDriver(Driver):
    """A file in memory that notes what is changed."""

    name = "recorded"
    can_truncate = True
    files: ClassVar[dict[str, MemoryFile]]

    @property
    def file(self) -> MemoryFile:
        return self.files[self.options.image]

    async def open(self) -> None:
        self.refresh_length()

    def refresh_length(self) -> None:
        self.length = self.file.length

    def submit(self, batch: list[Request]) -> None:
        self.file.submit(batch)

    def grow(self, size: int) -> bool:
        self.file.grow(size)
        self.refresh_length()
        return True

    async def truncate(self, size: int, *, exact: bool = True) -> None:
        await self.file.truncate(size, exact=exact)
        self.refresh_length()

    def filename(self) -> str:
        return str(self.options.image)

    def allocated_size(self) -> int:
        return self.file.length


# Long enough that the header has more than a sector.
TOP, MID, BASE = "top", "/mid" * 100, "/base" * 100
HEADERS: Final = {
    "plain": Header(size=192 * KIB, cluster_bits=12),
    "lazy": Header(size=192 * KIB, cluster_bits=12, compatible=LAZY_REFCOUNTS),
    "v2": Header(size=192 * KIB, cluster_bits=12, version=2),
    "small": Header(size=192 * KIB, cluster_bits=11),
}


async def made(
    name: str, below: str, below_file: MemoryFile | None, rng: random.Random, header: Header
) -> MemoryFile:
    """An image over another, some of which it holds itself."""
    if below:
        header = attrs.evolve(header, backing_file=below.encode()).with_extension(EXT_BACKING_FORMAT, b"qcow2")
    file = MemoryFile(new_image(header))
    async with opened_on(file, backing=below_file) as driver:
        for _ in range(10 if name == TOP else 25):
            await write(driver, rng.randrange(180 * KIB) // 512 * 512, rng.randbytes(rng.choice((512, 4096, 9000))))
        await driver.close()
    file.log.clear()
    return file


@asynccontextmanager
async def chain(kind: str, rng: random.Random) -> AsyncIterator[tuple[House, dict[str, MemoryFile]]]:
    files: dict[str, MemoryFile] = {}
    for name, below in ((BASE, ""), (MID, BASE), (TOP, MID)):
        lower = Content(files, below) if below else None
        below_file = None if lower is None else MemoryFile(await lower.read())
        files[name] = await made(name, below, below_file, rng, HEADERS[kind])
    recorded = type("RecordedDriver", (RecordedDriver,), {"files": files})
    async with running_house(Qcow2Driver, recorded) as house:
        for name, below in ((BASE, NULL), (MID, "base"), (TOP, "mid")):
            short = name.strip("/")[:4].rstrip("/")
            options = BlockdevOptionsQcow2(
                driver=BlockdevDriver.QCOW2,
                node_name=short,
                file=CowOptions(driver=Kind.RECORDED, node_name=f"f-{short}", image=name),
                backing=below,
                read_only=name != TOP,
                cache_clean_interval=0,
            )
            await house.graph.add(options)
        yield house, files


@attrs.frozen
class Content:
    """What a guest sees who opens one of the images, and what lies below it by its name."""

    files: dict[str, MemoryFile]
    name: str

    async def read(self, data: bytes | bytearray | None = None) -> bytes:
        data = self.files[self.name].data if data is None else data
        name = parse_header(bytes(data[: 1 << 16])).backing_file
        below = MemoryFile(await Content(self.files, name.decode()).read()) if name else None
        async with opened_on(MemoryFile(data), backing=below, mode=Mode(read_only=True)) as driver:
            return await read(driver, 0, driver.length)


@pytest.mark.parametrize("base", ["", "base"])
@pytest.mark.parametrize("kind", HEADERS)
async def test_stream_that_is_cut_off(kind: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the image says lies below it, its guest sees the same."""
    monkeypatch.setattr(StreamJob, "largest_step", 16 * KIB)
    async with chain(kind, random.Random(kind)) as (house, files):
        top = Content(files, TOP)
        wanted, before = await top.read(), bytes(files[TOP].data)
        user = await house.graph.attach("top", WRITE)
        await house.execute("block-stream", job_id="j", device="top", **({"base_node": "base"} if base else {}))
        await settle()
        assert "BLOCK_JOB_COMPLETED" in house.told
        assert not house.of("BLOCK_JOB_COMPLETED")[0].get("error")
        await user.detach()
        log = [*files[TOP].log]
        assert not files[MID].log
        assert not files[BASE].log
        seen = set()
        states = list(dict.fromkeys(cut(before, log)))
        for number, data in enumerate(states):
            found = examine(data)
            header = parse_header(data[: 1 << 16])
            assert not found.corruptions or header.incompatible & DIRTY, found.problems
            name = backing_of(data)[0]
            if name not in seen or number % 7 == 0:
                assert await top.read(data) == wanted
            seen.add(name)
        assert seen == {MID.encode(), BASE.encode() if base else None}


@pytest.mark.parametrize("base", ["", "base"])
@pytest.mark.parametrize("kind", ["plain", "small"])
async def test_stream_without_room(kind: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails ends it; the image has the backing file it had, and its guest sees the same."""
    monkeypatch.setattr(StreamJob, "largest_step", 16 * KIB)
    for room in range(1, 1000, 3):
        async with chain(kind, random.Random(kind)) as (house, files):
            top = Content(files, TOP)
            wanted = await top.read()
            user = await house.graph.attach("top", WRITE)
            files[TOP].room = room
            await house.execute("block-stream", job_id="j", device="top", **({"base_node": "base"} if base else {}))
            await settle()
            (told,) = house.of("BLOCK_JOB_COMPLETED")
            assert await user.read(0, len(wanted)) == wanted
            has_failed = files[TOP].room <= 0
            files[TOP].room = -1
            await user.flush()
            assert await top.read() == wanted
            child = house.graph.find("top").driver.children.get("backing")
            if not has_failed:
                assert "error" not in told
                break
            if "error" in told:
                assert told["error"] == "No space left on device"
                assert child is not None
                assert (child.node_name, backing_of(bytes(files[TOP].data))[0]) == ("mid", MID.encode())
            await user.detach()
        found = examine(files[TOP].data)
        assert not found.corruptions, found.problems
    assert room > 10
