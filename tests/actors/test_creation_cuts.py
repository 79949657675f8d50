"""Power cuts while an image is made: what is there afterwards is no image, or a whole one, old or new."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
import trio
from qcow2_builder import build
from qcow2_fakes import KIB, MemoryFile, cut, examine, file_node, opened_on, read
from watching import Turns

from qsd.drivers.base import Mode
from qsd.drivers.luks import keys
from qsd.drivers.luks.volume import ChildArea, open_volume
from qsd.drivers.qcow2.layout import Header, parse_header
from qsd.drivers.registry import CREATORS
from qsd.errors import QmpError
from qsd.qapi.schema.create import BlockdevCreateOptions
from qsd.qapi.visit import from_json

SIZE: Final = 96 * KIB
LONG: Final = "/very/long/" + "name/" * 120
OLD: Final = build(Header(size=SIZE, cluster_bits=12), random.Random(1)).image


class Host:
    """A ``CreateHost`` whose nodes are files in memory, by their names."""

    def __init__(self, **files: MemoryFile) -> None:
        self._files = files
        for name, file in files.items():
            file.node_name = name
            file.node = file_node(name)

    @asynccontextmanager
    async def node(self, ref: Any) -> AsyncIterator[Any]:
        yield self._files[ref]

    def secret(self, name: str) -> bytes:
        return name.encode()

    def progress(self, done: int, total: int) -> None:
        """Nobody looks."""


async def create(host: Host, **options: Any) -> None:
    creator: Any = CREATORS[options["driver"]]
    await creator(host, from_json(BlockdevCreateOptions, options))


def parsed(data: bytes) -> Header | None:
    """The header, if it is an image."""
    try:
        return parse_header(data[: 2 << 20])
    except QmpError:
        return None


IMAGES: Final[dict[str, dict[str, Any]]] = {
    "plain": {},
    "v2": {"version": "v2"},
    "small": {"cluster-size": 512},
    "metadata": {"cluster-size": 4096, "preallocation": "metadata"},
    "falloc": {"cluster-size": 4096, "preallocation": "falloc"},
    "full": {"cluster-size": 512, "preallocation": "full"},
    "extended": {"extended-l2": True, "cluster-size": 16384, "preallocation": "metadata"},
    "refcount-64": {"cluster-size": 512, "refcount-bits": 64},
    # The header is longer than a sector.
    "backing": {"backing-file": LONG, "backing-fmt": "raw"},
    "v2-backing": {"version": "v2", "backing-file": LONG, "backing-fmt": "raw"},
    "data-file": {"data-file": "d", "data-file-raw": True, "preallocation": "full", "cluster-size": 4096},
}


@pytest.mark.parametrize("before", [b"", OLD, b"\xff" * len(OLD)], ids=["empty", "image", "junk"])
@pytest.mark.parametrize("name", IMAGES)
async def test_cut_off_image(name: str, before: bytes) -> None:
    options = {"driver": "qcow2", "file": "f", "size": SIZE, **IMAGES[name]}
    file, data_file = MemoryFile(before), MemoryFile(b"old" * 10)
    await create(Host(f=file, d=data_file), **options)
    wanted = parsed(bytes(file.data))
    assert wanted is not None
    seen = set()
    for data in cut(before, file.log):
        header = parsed(data)
        if header is None:
            seen.add("nothing")
            continue
        found = examine(data)
        assert (found.corruptions, found.leaks) == (0, 0), found.problems
        if before == OLD and header == parsed(OLD):
            assert data[: len(OLD)] == OLD
            seen.add("old")
            continue
        assert header == wanted
        seen.add("new")
        if "backing-file" not in options:
            place = {"data_file": data_file} if "data-file" in options else {}
            async with opened_on(MemoryFile(data), mode=Mode(read_only=True), **place) as driver:
                assert await read(driver, 0, SIZE) == (b"old" * 10 if place else b"").ljust(SIZE, b"\0")
    assert seen == {"nothing", "new"} | ({"old"} if before == OLD else set())


@pytest.mark.parametrize("fails", ["write", "flush"])
@pytest.mark.parametrize("name", ["plain", "full", "backing", "data-file"])
async def test_creation_that_fails_over_another_image(name: str, fails: str) -> None:
    """What is left is the old image, none, or all of the new; and it can be tried again."""
    options = {"driver": "qcow2", "file": "f", "size": SIZE, **IMAGES[name]}
    for room in range(1, 200):
        file, data_file = MemoryFile(OLD), MemoryFile(b"")
        if fails == "write":
            file.room = room
        else:
            file.fails = True
        with contextlib.suppress(OSError, QmpError):
            await create(Host(f=file, d=data_file), **options)
            assert fails == "write"
            assert file.room > 0
            break
        header = parsed(bytes(file.data))
        if header is not None:
            found = examine(file.data)
            assert (found.corruptions, found.leaks) == (0, 0), found.problems
            assert header != parsed(OLD) or file.data[: len(OLD)] == OLD
        file.room, file.fails = -1, False
        await create(Host(f=file, d=data_file), **options)
        assert parsed(bytes(file.data)) is not None
        if fails == "flush":
            break
    assert (room > 2) == (fails == "write")


async def test_data_file_is_there_before_its_image() -> None:
    """Each file is flushed by itself."""
    order: list[str] = []

    class Flushed(MemoryFile):
        async def flush(self) -> None:
            order.append(self.node_name)
            await super().flush()

    host = Host(f=Flushed(b""), d=Flushed(b""))
    await create(host, driver="qcow2", file="f", size=SIZE, **IMAGES["data-file"])
    assert order.index("d") < len(order) - 2, order


ENCRYPTED: Final[dict[str, dict[str, Any]]] = {
    "qcow2": {"driver": "qcow2", "cluster-size": 4096, "encrypt": {"format": "luks"}},
    "luks": {"driver": "luks"},
    "luks-full": {"driver": "luks", "preallocation": "full"},
}


@pytest.mark.parametrize("name", ENCRYPTED)
async def test_cut_off_volume(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numpy")
    pytest.importorskip("cryptography")
    monkeypatch.setattr(keys, "_measure", lambda _name, _length: 1000)
    options: dict[str, Any] = {"file": "f", "size": SIZE, **ENCRYPTED[name]}
    crypto = options.setdefault("encrypt", {}) if options["driver"] == "qcow2" else options
    # Small keys: their material is, too.
    crypto |= {"key-secret": "old", "cipher-alg": "aes-128", "cipher-mode": "cbc", "iter-time": 1}
    file = MemoryFile(b"")
    host = Host(f=file)
    await create(host, **options)
    before = bytes(file.data)
    file.log.clear()
    crypto["key-secret"] = "new"
    await create(host, **options)
    seen = {await opens(data) for data in cut(before, file.log)}
    assert seen == {"", "old", "new"}


async def opens(data: bytes) -> str:
    """The password that opens the volume; it may be none, but then nothing says that there is one."""
    start = 0
    if data[:4] == b"QFI\xfb":
        header = parse_header(data[: 2 << 20])
        found = examine(data)
        assert (found.corruptions, found.leaks) == (0, 0), found.problems
        extension = header.crypto_extension()
        assert extension is not None
        start = extension.offset
    elif data[:4] != b"LUKS":
        return ""
    for password in ("old", "new"):
        try:
            await open_volume(ChildArea(MemoryFile(data), start), password.encode())
        except QmpError as error:
            if not error.desc.startswith("Invalid password"):
                raise
        else:
            return password
    raise AssertionError("nothing opens it")


async def test_others_run_while_all_tables_of_an_image_are_written() -> None:
    """For a disk of 1 TiB that held the loop for 1.3 s."""
    file, turns = MemoryFile(b""), Turns()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.run)
        options = {"cluster-size": 512, "size": 4 << 20, "preallocation": "metadata"}
        await create(Host(f=file), driver="qcow2", file="f", **options)
        nursery.cancel_scope.cancel()
    # An L2 table of 512 bytes is for 32 KiB.
    assert turns.count > 128
    assert examine(file.data).corruptions == 0
