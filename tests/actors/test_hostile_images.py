"""Hostile images and a whole daemon: what they cost it, and which files they have it open."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from qcow2_fakes import new_image
from test_qcow2_hostile import EFFORT, VICTIMS, hostile
from whole_daemon import Whole, whole_daemon

from qsd.actors.edges import RootEdge, RootOptions
from qsd.block.permissions import Perm
from qsd.drivers.qcow2 import layout
from qsd.drivers.qcow2.driver import Qcow2Driver
from qsd.drivers.qcow2.layout import EXT_BACKING_FORMAT, Header
from qsd.errors import QmpError
from qsd.messages import Flag

# Seconds of processor time that anything done with a small image may take here. A hundred times what it takes.
MOST_TIME: Final = 20.0

_opened: set[str] | None = None


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(args[0], (str, bytes)):
        name = os.fsdecode(args[0])
        # Not what Python loads, nor what the kernel tells of itself.
        if not name.startswith(("/proc/", "/sys/")) and Path(name).suffix not in (".py", ".pyc", ".so"):
            _opened.add(name)


sys.addaudithook(_watch)


@contextlib.contextmanager
def watched() -> Iterator[set[str]]:
    """The names of all files that are opened meanwhile."""
    global _opened
    _opened = found = set()
    try:
        yield found
    finally:
        _opened = None


async def answer(whole: Whole, command: str, **arguments: Any) -> str:
    """Nothing, or the error."""
    try:
        await whole.run(command, **arguments)
    except QmpError as error:
        return error.desc
    return ""


async def tried(function: Any, *args: Any) -> str:
    try:
        await function(*args)
    except OSError as error:
        return str(error)
    return ""


async def use(whole: Whole, *, read_only: bool) -> None:
    """What a guest and an administrator may do with the node ``n``."""
    perm = Perm.CONSISTENT_READ | (Perm.NONE if read_only else Perm.WRITE)
    edge = await whole.daemon.services.graph.attach("n", RootOptions(perm))
    await use_data(edge, read_only=read_only)
    await edge.detach()
    await whole.run("query-named-block-nodes")
    await whole.run("query-blockstats", query_nodes=True)
    if read_only:
        return
    size = edge.node.length
    await answer(whole, "block-dirty-bitmap-add", node="n", name="new", persistent=True)
    await answer(whole, "blockdev-snapshot-internal-sync", device="n", name="new")
    await answer(whole, "blockdev-snapshot-delete-internal-sync", device="n", name="new")
    await answer(whole, "blockdev-snapshot-delete-internal-sync", device="n", id="1")
    await answer(whole, "block_resize", node_name="n", size=size // 512 * 512 + 70_144)
    await answer(whole, "block_resize", node_name="n", size=4096)
    await answer(whole, "block-dirty-bitmap-remove", node="n", name="bitmap0")


async def use_data(edge: RootEdge, *, read_only: bool) -> None:
    length = edge.node.length
    for offset in {0, length // 2 // 512 * 512, max(0, length - 70_000)}:
        some = min(length - offset, 70_000)
        if some <= 0:
            continue
        await tried(edge.read, offset, some)
        await tried(edge.block_status, offset, some, 8)
        if not read_only:
            await tried(edge.write, offset, b"w" * min(some, 3000))
            await tried(edge.write_zeroes, offset, some, Flag.MAY_UNMAP)
            await tried(edge.write, offset + some // 2, b"w" * (some // 2))
            await tried(edge.flush)
            await tried(edge.discard, offset, some)
            await tried(edge.discard, offset, min(length - offset, 64 << 20))
    await tried(edge.flush)
    await tried(edge.read, 0, min(length, 8 << 20))


def suffer(place: Path, image: bytes, *, read_only: bool, data: bytes = b"", **options: Any) -> set[str]:
    """Have a daemon do all that with an image; the files it opened."""
    path = place / "image"
    path.write_bytes(image)
    (place / "data").write_bytes(data)
    neighbour = place / "neighbour"
    neighbour.write_bytes(b"untouched")

    async def run() -> set[str]:
        async with whole_daemon(place) as whole:
            given_data = {"data_file": {"driver": "file", "filename": str(place / "data")}} if data else {}
            with watched() as opened:
                said = await answer(
                    whole,
                    "blockdev-add",
                    driver="qcow2",
                    node_name="n",
                    read_only=read_only,
                    discard="unmap",
                    backing=None,
                    file={"driver": "file", "filename": str(path), "discard": "unmap"},
                    **given_data,
                    **options,
                )
                if not said:
                    await use(whole, read_only=read_only)
                    await whole.run("blockdev-del", node_name="n")
            # Nobody has crashed, and nothing is left.
            assert await whole.run("query-named-block-nodes") == []
            return opened

    begun = time.process_time()
    opened = trio.run(run)
    assert time.process_time() - begun < MOST_TIME
    assert neighbour.read_bytes() == b"untouched"
    if read_only:
        assert path.read_bytes() == image
    return opened


@settings(
    max_examples=40 * EFFORT,
    deadline=None,
    derandomize=EFFORT == 1,
    phases=(Phase.generate,),
    suppress_health_check=(HealthCheck.function_scoped_fixture, HealthCheck.too_slow),
)
@given(hostile(), st.booleans(), st.booleans())
def test_any_change_of_an_image_that_was_not_closed_is_survived(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: tuple[str, list[tuple[int, bytes]], int | None],
    dirty: bool,
    read_only: bool,
) -> None:
    """Repaired on a thread when it is opened, where it is marked as dirty."""
    name, edits, length = change
    victim = VICTIMS[name]
    image = bytearray(victim.image)
    for offset, data in edits:
        image[offset : offset + len(data)] = data
    if dirty and image[7] == 3:
        image[layout.V2_LENGTH + 7] |= layout.DIRTY
    opened = suffer(tmp_path, bytes(image[:length]), read_only=read_only, data=victim.data)
    assert opened <= {str(tmp_path / name) for name in ("image", "data")}
    assert not [record for record in caplog.records if "crashed" in record.getMessage()]


async def test_facts_of_a_long_chain_are_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of 200 images held the monitors for six seconds: each was asked again for every image above it."""
    below = ""
    for number in range(12):
        header = Header(size=1 << 20, backing_file=below.encode() or None)
        if below:
            header = header.with_extension(EXT_BACKING_FORMAT, b"qcow2")
        below = f"{number}.qcow2"
        (tmp_path / below).write_bytes(new_image(header))
    asked: list[object] = []
    facts = Qcow2Driver.format_specific
    monkeypatch.setattr(Qcow2Driver, "format_specific", lambda self: asked.append(self) or facts(self))
    async with whole_daemon(tmp_path) as whole:
        file = {"driver": "file", "filename": str(tmp_path / below)}
        await whole.run("blockdev-add", driver="qcow2", node_name="n", file=file)
        nodes = await whole.run("query-named-block-nodes")
    assert len(asked) == len(set(asked)) == 12
    image, depth = next(node["image"] for node in nodes if node["node-name"] == "n"), 0
    while "backing-image" in image:
        image, depth = image["backing-image"], depth + 1
    assert depth == 11


@pytest.mark.parametrize("entry", [0x201, 1 << 40, 1 << 55, 1 << 62, (1 << 63) - 65536, 1 << 63, 1 << 63 | 1 << 16])
@pytest.mark.parametrize("place", ["refcount table", "L1 table", "L2 table"])
def test_entry_that_leads_anywhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str, entry: int
) -> None:
    image = bytearray(VICTIMS["64k"].image)
    tables = VICTIMS["64k"].tables
    at = {"refcount table": tables[1][0], "L1 table": tables[0][0], "L2 table": tables[5][0]}[place]
    image[at : at + 8] = entry.to_bytes(8, "big")
    suffer(tmp_path, bytes(image), read_only=False)
    assert not [record for record in caplog.records if record.exc_info or "crashed" in record.getMessage()]
    assert (tmp_path / "image").stat().st_blocks << 9 < 64 << 20


@pytest.mark.parametrize("name", ["v2", "64k"])
@pytest.mark.parametrize("entry", [1 << 62, 1 << 63, 1 << 63 | 1 << 16])
async def test_refcount_block_behind_the_longest_file_there_can_be(tmp_path: Path, name: str, entry: int) -> None:
    """The file was to become so long, the node crashed of that, and never closed."""
    victim = VICTIMS[name]
    at = victim.tables[1][0]
    path = tmp_path / "image"
    path.write_bytes(victim.image[:at] + entry.to_bytes(8, "big") + victim.image[at + 8 :])
    with trio.fail_after(30):
        async with whole_daemon(tmp_path) as whole:
            file = {"driver": "file", "filename": str(path)}
            assert not await answer(whole, "blockdev-add", driver="qcow2", node_name="n", backing=None, file=file)
            assert await answer(whole, "blockdev-snapshot-internal-sync", device="n", name="new")
            await whole.run("blockdev-del", node_name="n")
    assert path.stat().st_blocks << 9 < 64 << 20


async def added(whole: Whole, image: bytes | bytearray) -> str:
    """What blockdev-add says about an image; the node is gone again."""
    path = whole.place / "image"
    path.write_bytes(image)
    file = {"driver": "file", "filename": str(path)}
    said = await answer(
        whole, "blockdev-add", driver="qcow2", node_name="n", read_only=True, backing=None, file=file
    )
    if not said:
        await whole.run("blockdev-del", node_name="n")
    return said


# Where a victim's table is named (of ``Victim.tables``, or a place in the header), and what is said where it leads.
BEYOND: Final = [
    (64, 1 << 31, ""),
    (64, 1 << 62, ""),
    (64, 1 << 63, "Snapshot table offset invalid"),
    (40, 1 << 62, ""),
    (48, 1 << 62, ""),
    ("directory", 1 << 62, "Bitmap '' doesn't satisfy the constraints"),
    ("directory", 1 << 63, "Failed to read bitmap directory: Input/output error"),
    ("bitmap", 1 << 62, ""),
    (
        "bitmap",
        1 << 63,
        "Could not read bitmap_table table from image for bitmap 'bitmap0': Input/output error",
    ),
]


@pytest.mark.parametrize(("place", "offset", "text"), BEYOND)
async def test_tables_beyond_the_end_are_zeroes_or_refused(
    tmp_path: Path, place: int | str, offset: int, text: str
) -> None:
    """As the reference has it; a snapshot table there was an error."""
    image = bytearray(VICTIMS["64k"].image)
    extension = image.index(layout.EXT_BITMAPS.to_bytes(4, "big")) + 8
    directory = int.from_bytes(image[extension + 16 : extension + 24], "big")
    at = place if isinstance(place, int) else {"directory": extension + 16, "bitmap": directory}[place]
    image[at : at + 8] = offset.to_bytes(8, "big")
    async with whole_daemon(tmp_path) as whole:
        assert await added(whole, image) == text
