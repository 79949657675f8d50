"""Zeroes, discards and writes leave the L2 entries, and the block status, that they leave in the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from qcow2_entries import entries
from qcow2_fakes import MemoryFile, check, new_image, opened_on, read

from qsd.drivers.base import Mode
from qsd.drivers.calls import call
from qsd.drivers.qcow2.driver import Qcow2Driver
from qsd.drivers.qcow2.layout import DATA_FILE, DATA_FILE_RAW, EXTENDED_L2, Header
from qsd.messages import BlockState, Flag, Op

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent / "data" / "zeroing_reference.json").read_text(encoding="utf-8")
)
KIB = 1 << 10
BLOCK = 4 * KIB
NO_HOLE, FAST = 2, 16
OPS = {"w": Op.WRITE, "z": Op.WRITE_ZEROES, "d": Op.DISCARD}
ROWS = [(f"{name} {number}", given, rows) for number, (name, given, rows) in enumerate(RECORDED["rows"])]


def files_of(given: dict[str, Any]) -> dict[str, MemoryFile | None]:
    """The image, what is below it, its data file."""
    create = given.get("create", {})
    extended, has_data_file = "extended_l2" in create, "data_file" in create
    bits = 14 if extended else 12
    header = Header(
        size=RECORDED["clusters"] * (1 << bits) - given.get("lacks", 0),
        cluster_bits=bits,
        version=2 if "compat" in create else 3,
        incompatible=(EXTENDED_L2 if extended else 0) | (DATA_FILE if has_data_file else 0),
        autoclear=DATA_FILE_RAW if "data_file_raw" in create else 0,
    )
    below = b"".join((b"b" if letter == "d" else b"\0") * BLOCK for letter in RECORDED["below"])
    return {
        "file": MemoryFile(new_image(header, allocates=header.is_data_file_raw)),
        "backing": MemoryFile(below[: given["below"] * BLOCK]) if "below" in given else None,
        "data_file": MemoryFile(bytes(header.size)) if has_data_file else None,
    }


async def do(driver: Qcow2Driver, step: list[Any], *, unmaps: bool) -> int:
    """Do a step as a client wants it done; the error."""
    kind, offset, length, more = step
    if kind == "s":
        await driver.create_snapshot("s", 0)
        return 0
    flags = Flag.NONE
    if kind == "z":
        flags |= Flag.MAY_UNMAP if unmaps and not more & NO_HOLE else Flag.NONE
        flags |= Flag.NO_FALLBACK if more & FAST else Flag.NONE
    data = memoryview(bytes([more]) * length) if kind == "w" else None
    try:
        await call(driver, OPS[kind], offset, length, data, flags)
    except OSError as error:
        return error.errno or -1
    return 0


async def status(driver: Qcow2Driver) -> list[list[int]]:
    """Length, flags of base:allocation, depth."""
    found = (await call(driver, Op.BLOCK_STATUS, 0, driver.length, extents=1000)).result
    rows: list[list[int]] = []
    for extent in found:
        hole = 0 if extent.state & BlockState.DATA else 1
        flags = [hole | (2 if extent.state & BlockState.ZERO else 0), extent.depth]
        if rows and rows[-1][1:] == flags:
            rows[-1][0] += extent.length
        else:
            rows.append([extent.length, *flags])
    return rows


@pytest.mark.parametrize(("given", "rows"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
async def test_entries_and_status_are_those_of_the_reference(given: dict[str, Any], rows: list[Any]) -> None:
    files: Any = files_of(given)
    options = {name.replace("-", "_"): value for name, value in given.get("node", {}).items() if name != "discard"}
    unmaps = given.get("node", {}).get("discard") != "ignore"
    is_raw = "data_file_raw" in given.get("create", {})
    disk = bytearray(files["backing"].data if files["backing"] else b"")
    async with opened_on(**files, mode=Mode(discard_unmap=unmaps), **options) as driver:
        disk = bytearray(disk[: driver.length].ljust(driver.length, b"\0"))
        for number, (step, error, words, runs) in enumerate(rows):
            kind, offset, length, more = step
            if kind == "d" and not unmaps:
                continue
            assert await do(driver, step, unmaps=unmaps) == error, (number, step)
            await call(driver, Op.FLUSH, 0, 0)
            found = entries(bytes(files["file"].data))
            if is_raw:
                # Whether a cluster that reads as zeroes has its place in the data file or not makes no difference.
                found, words = found.replace("H+z", "z"), words.replace("H+z", "z")
            assert found == words, (number, step)
            assert await status(driver) == runs, (number, step)
            if kind in "wz" and not error:
                disk[offset : offset + length] = (bytes([more]) if kind == "w" else b"\0") * length
            elif kind == "d":
                disk[offset : offset + length] = await read(driver, offset, length)
            assert await read(driver, 0, driver.length) == disk, (number, step)
            if is_raw:
                assert files["data_file"].data == disk


async def test_zeroes_hide_a_backing_file_that_was_left_out_when_they_were_written() -> None:
    """A mirror writes its target before anybody attaches what lies below it."""
    file = MemoryFile(new_image(Header(size=64 * KIB, cluster_bits=12)))
    async with opened_on(file) as driver:
        await call(driver, Op.WRITE_ZEROES, 0, 3 * BLOCK)
        await call(driver, Op.WRITE_ZEROES, 4 * BLOCK, BLOCK, flags=Flag.MAY_UNMAP)
        await call(driver, Op.WRITE_ZEROES, 6 * BLOCK + 512, 512)
        await driver.close()
    async with opened_on(file, backing=MemoryFile(b"b" * 64 * KIB)) as driver:
        found = await read(driver, 0, 64 * KIB)
    seen = "".join("z" if found[at : at + BLOCK] == bytes(BLOCK) else "b" for at in range(0, 64 * KIB, BLOCK))
    assert seen == "zzzbzbzbbbbbbbbb"


@pytest.mark.parametrize("op", [Op.DISCARD, Op.WRITE_ZEROES])
async def test_clusters_of_a_snapshot_keep_their_place_and_their_data(op: Op) -> None:
    file = MemoryFile(new_image(Header(size=64 * KIB, cluster_bits=12)))
    async with opened_on(file, discard_no_unref=True) as driver:
        await call(driver, Op.WRITE, 0, BLOCK, memoryview(b"s" * BLOCK))
        await driver.create_snapshot("s", 0)
        before = bytes(file.data)
        flags = Flag.MAY_UNMAP if op == Op.WRITE_ZEROES else 0
        await call(driver, op, 0, BLOCK, flags=flags)
        await call(driver, Op.FLUSH, 0, 0)
        assert entries(bytes(file.data)).split()[0] == "Hz"
        assert await read(driver, 0, BLOCK) == bytes(BLOCK)
        held = before.index(b"s" * BLOCK)
        assert file.data[held : held + BLOCK] == b"s" * BLOCK
        await call(driver, Op.WRITE, 512, 512, memoryview(b"n" * 512))
        assert await read(driver, 0, 1536) == bytes(512) + b"n" * 512 + bytes(512)
        await driver.delete_snapshot(driver.snapshots()[0].id)
        await driver.close()
    assert check(file) == (0, 0)


async def test_zeroes_over_many_tables_hide_such_a_backing_file_too() -> None:
    size = 8 << 20
    file = MemoryFile(new_image(Header(size=size, cluster_bits=12)))
    async with opened_on(file, l2_cache_entry_size=512) as driver:
        await call(driver, Op.WRITE_ZEROES, BLOCK, size - 2 * BLOCK)
        await driver.close()
    assert check(file) == (0, 0)
    async with opened_on(file, backing=MemoryFile(b"b" * size)) as driver:
        assert await read(driver, 0, size) == b"b" * BLOCK + bytes(size - 2 * BLOCK) + b"b" * BLOCK


@pytest.mark.parametrize("length", [4 * BLOCK, 600 * BLOCK])
@pytest.mark.parametrize(
    ("flags", "options", "gives_up"),
    [
        (Flag.MAY_UNMAP, {}, True),
        (Flag.MAY_UNMAP, {"discard_no_unref": True}, True),
        (Flag.MAY_UNMAP, {"pass_discard_request": False}, False),
        (Flag.NONE, {}, False),
    ],
)
async def test_zeroes_give_up_space_of_a_data_file_where_they_may(
    flags: Flag, options: dict[str, bool], gives_up: bool, length: int
) -> None:
    header = Header(size=1024 * BLOCK, cluster_bits=12, incompatible=DATA_FILE)
    file, data = MemoryFile(new_image(header)), MemoryFile(b"")
    async with opened_on(file, data_file=data, mode=Mode(discard_unmap=True), **options) as driver:
        await call(driver, Op.WRITE, 0, header.size, memoryview(b"d" * header.size))
        await call(driver, Op.WRITE_ZEROES, BLOCK + 512, length, flags=flags)
        assert await read(driver, 0, length + 3 * BLOCK) == (
            b"d" * (BLOCK + 512) + bytes(length) + b"d" * (2 * BLOCK - 512)
        )
        whole = slice(2 * BLOCK, BLOCK + length)
        assert data.data[whole] == (b"\0" if gives_up else b"d") * (length - BLOCK)
        await driver.close()
    assert check(file) == (0, 0)
