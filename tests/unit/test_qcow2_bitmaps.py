"""Dirty bitmaps in qcow2 images: both ways between this store and qemu-img, crashes, and hostile images."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from qcow2_memory_image import MemoryImage
from watching import Turns

from qsd.block.bitmap import DirtyBitmap
from qsd.block.dirty import NamedBitmap
from qsd.drivers.qcow2 import bitmap_layout as layout
from qsd.drivers.qcow2 import bitmaps as store_module
from qsd.drivers.qcow2 import examining
from qsd.drivers.qcow2.bitmap_layout import DirectoryEntry, Run
from qsd.drivers.qcow2.bitmaps import Qcow2Bitmaps
from qsd.drivers.qcow2.extensions import BitmapsExtension
from qsd.drivers.qcow2.layout import BITMAPS, EXT_BITMAPS, Header, serialise_header
from qsd.errors import QmpError

CLUSTER = 4096
SIZE = 64 << 20
G = 512


def img(*arguments: str | Path) -> str:
    tool = shutil.which("/opt/qsd-reference/bin/qemu-img") or shutil.which("qemu-img")
    if tool is None:
        pytest.skip("qemu-img is not installed")
    done = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def empty_image(size: int = SIZE, cluster_bits: int = 12) -> MemoryImage:
    """An image without data: header, refcount table and block; its L1 table is left out."""
    cluster = 1 << cluster_bits
    header = Header(
        cluster_bits=cluster_bits,
        size=size,
        refcount_table_offset=cluster,
        refcount_table_clusters=1,
        l1_offset=3 * cluster,
        l1_size=-(-size // (cluster * (cluster // 8))),
    )
    data = serialise_header(header).ljust(cluster, b"\0") + struct.pack(">Q", 2 * cluster).ljust(cluster, b"\0")
    data += struct.pack(">3H", 1, 1, 1).ljust(cluster, b"\0")
    return MemoryImage(data)


class Store:
    """A store on an image, with what it printed."""

    def __init__(self, image: MemoryImage) -> None:
        self.image = image
        self.warnings: list[str] = []
        self.bitmaps = Qcow2Bitmaps(image, self.warnings.append)

    async def load(self, size: int | None = None) -> dict[str | None, NamedBitmap]:
        found = await self.bitmaps.load(self.image.header.size if size is None else size)
        return {bitmap.name: bitmap for bitmap in found}


def named(name: str, touched: Sequence[tuple[int, int]] = (), size: int = SIZE, **more: Any) -> NamedBitmap:
    bits = DirtyBitmap(size, more.pop("granularity", G))
    for offset, length in touched:
        bits.set(offset, length)
    return NamedBitmap(name, bits, is_persistent=True, **more)


def same(one: NamedBitmap, other: NamedBitmap) -> bool:
    return (one.name, one.bits.digest(), one.bits.shift, one.is_recording) == (
        other.name,
        other.bits.digest(),
        other.bits.shift,
        other.is_recording,
    )


# -- with qemu-img --------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """An image of qemu-img's with two bitmaps, of which ``merged`` got its content from us."""
    path = tmp_path / "a.qcow2"
    img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, str(SIZE))
    img("bitmap", "--add", path, "on", "-g", "512")
    img("bitmap", "--add", "--disable", path, "off", "-g", "65536")
    return path


def stored(path: Path) -> list[dict[str, Any]]:
    """What qemu-img says is stored."""
    found: list[dict[str, Any]] = json.loads(img("info", "--output=json", path))["format-specific"]["data"].get(
        "bitmaps", []
    )
    return found


async def test_bitmaps_of_qemu_img_are_read(made: Path) -> None:
    found = await Store(MemoryImage.load(made)).load()
    assert same(found["on"], named("on"))
    assert same(found["off"], named("off", granularity=65536, is_recording=False))
    assert not any(bitmap.is_inconsistent or bitmap.is_busy for bitmap in found.values())


async def test_bitmaps_of_ours_are_read_by_qemu_img(made: Path, tmp_path: Path) -> None:
    """qemu-img merges ours into one of its own, which we read back."""
    store = Store(MemoryImage.load(made))
    found = await store.load()
    await store.bitmaps.mark_in_use()
    ours = named("ours", [(5000, 100_000), (3 << 20, 1 << 20), (SIZE - 1, 1)])
    full = named("full", [(0, SIZE)], granularity=4096, is_recording=False)
    await store.bitmaps.store([*found.values(), ours, full])
    path = tmp_path / "b.qcow2"
    store.image.save(path)
    img("check", "-q", path)
    assert stored(path) == [
        {"flags": ["auto"], "name": "on", "granularity": 512},
        {"flags": [], "name": "off", "granularity": 65536},
        {"flags": [], "name": "full", "granularity": 4096},
        {"flags": ["auto"], "name": "ours", "granularity": 512},
    ]
    img("bitmap", "--merge", "ours", path, "on")
    img("bitmap", "--merge", "full", path, "off")
    again = await Store(MemoryImage.load(path)).load()
    assert same(again["on"], named("on", [(5000, 100_000), (3 << 20, 1 << 20), (SIZE - 1, 1)]))
    assert again["off"].bits.dirty_bytes == SIZE
    assert same(again["ours"], ours)
    assert same(again["full"], full)


async def test_removed_bitmaps_leave_nothing_behind(made: Path, tmp_path: Path) -> None:
    store = Store(MemoryImage.load(made))
    await store.load()
    path = tmp_path / "b.qcow2"
    for name, left in (("on", ["off"]), ("nothing", ["off"]), ("off", [])):
        await store.bitmaps.remove(name)
        store.image.save(path)
        img("check", "-q", path)
        assert [bitmap["name"] for bitmap in stored(path)] == left == [f["name"] for f in store.bitmaps.facts()]
    assert not store.image.header.autoclear & BITMAPS
    assert store.image.header.extension(EXT_BITMAPS) is None


async def test_bitmaps_in_use_are_inconsistent_and_kept(made: Path, tmp_path: Path) -> None:
    store = Store(MemoryImage.load(made))
    await store.load()
    await store.bitmaps.mark_in_use()
    assert [fact["flags"] for fact in store.bitmaps.facts()] == [["in-use", "auto"], ["in-use"]]
    path = tmp_path / "b.qcow2"
    store.image.save(path)
    assert [bitmap["flags"] for bitmap in stored(path)] == [["in-use", "auto"], ["in-use"]]
    after = Store(MemoryImage.load(path))
    found = await after.load()
    assert all(bitmap.is_inconsistent and not bitmap.is_recording for bitmap in found.values())
    await after.bitmaps.store([found["on"], named("new", [(0, 1)])])
    after.image.save(path)
    img("check", "-q", path)
    assert [(bitmap["name"], bitmap["flags"]) for bitmap in stored(path)] == [
        ("on", ["in-use", "auto"]),
        ("new", ["auto"]),
    ]


# -- round trips ----------------------------------------------------------------------------------------------

names = st.text(min_size=1, max_size=40).filter(lambda name: "\0" not in name)
touched = st.lists(st.tuples(st.integers(0, SIZE), st.integers(1, SIZE)), max_size=5)


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(names, touched, st.integers(9, 31), st.booleans()), max_size=5, unique_by=lambda one: one[0]
    ),
    st.integers(1, SIZE),
)
async def test_what_is_stored_is_loaded(given: list[tuple[str, Any, int, bool]], size: int) -> None:
    image = empty_image(size)
    store = Store(image)
    await store.load()
    bitmaps = [
        named(name, ranges, size=size, granularity=1 << bits, is_recording=on) for name, ranges, bits, on in given
    ]
    await store.bitmaps.store(bitmaps)
    again = Store(image)
    found = await again.load()
    assert list(found) == [bitmap.name for bitmap in reversed(bitmaps)]
    assert all(same(found[bitmap.name], bitmap) for bitmap in bitmaps)
    # Storing again gives everything back: what is used stays the same.
    used = sum(image.refcount(number) for number in range(len(image.data) // CLUSTER))
    await again.bitmaps.mark_in_use()
    await again.bitmaps.store(found.values())
    assert sum(image.refcount(number) for number in range(len(image.data) // CLUSTER)) - used in (0, 1, 2)
    await again.bitmaps.store([])
    blocks = sum(image._has_block(number) for number in range(0, len(image.data) // CLUSTER, CLUSTER // 2))
    assert sum(image.refcount(number) for number in range(len(image.data) // CLUSTER)) == 2 + blocks


async def test_storing_before_loading_changes_nothing() -> None:
    image = empty_image()
    before = bytes(image.data)
    await Store(image).bitmaps.store([named("a")])
    assert image.data == before


async def test_bitmap_of_an_empty_disk_cannot_be_stored() -> None:
    """The reference would not open the image any more."""
    store = Store(empty_image(0))
    await store.load()
    with pytest.raises(QmpError, match="Failed to write bitmap 'a' to file: Cannot allocate memory"):
        await store.bitmaps.store([named("a", size=0)])
    assert store.image.header.extension(EXT_BITMAPS) is None


# -- failures and crashes -------------------------------------------------------------------------------------


async def prepared() -> tuple[Store, list[NamedBitmap]]:
    """An image with two bitmaps stored and marked in use; what is to be stored next."""
    store = Store(empty_image())
    await store.load()
    await store.bitmaps.store([named("a", [(0, 1 << 20)]), named("b")])
    await store.bitmaps.mark_in_use()
    return store, [named("a", [(5 << 20, 1 << 19)]), named("c", [(0, 9), (SIZE - 5, 5)]), named("d", [(0, SIZE)])]


@pytest.mark.parametrize("step", range(1, 16))
async def test_failed_store_leaves_bitmaps_in_use(step: int) -> None:
    store, wanted = await prepared()
    image = store.image
    before = {n: image.refcount(n) for n in range(len(image.data) // CLUSTER)}
    image.fail = step
    with pytest.raises(QmpError, match="No space left on device"):
        await store.bitmaps.store(wanted)
    found = await Store(image).load()
    assert sorted(map(str, found)) == ["a", "b"]
    assert all(bitmap.is_inconsistent for bitmap in found.values())
    assert list(store.bitmaps.facts()) == [
        {"name": "b", "granularity": 512, "flags": ["in-use", "auto"]},
        {"name": "a", "granularity": 512, "flags": ["in-use", "auto"]},
    ]
    is_in_header = error_was_in_header(image)
    if not is_in_header:
        after = {n: image.refcount(n) for n in before}
        assert after == before
    # And again, with room.
    image.fail = 0
    await store.bitmaps.store(wanted)
    found = await Store(image).load()
    assert all(same(found[bitmap.name], bitmap) for bitmap in wanted)


def error_was_in_header(image: MemoryImage) -> bool:
    """The last thing before the failure was the flush before the header."""
    return image.log[-1][0] == "flush"


async def test_every_prefix_of_a_store_opens() -> None:
    """Cut at any write: either what was there is in use, or everything new is there."""
    store, wanted = await prepared()
    image = store.image
    start = bytes(image.data)
    image.log.clear()
    await store.bitmaps.store(wanted)
    data = bytearray(start)
    seen = set()
    for _kind, offset, written in image.log:
        data.extend(bytes(max(0, offset + len(written) - len(data))))
        data[offset : offset + len(written)] = written
        found = await Store(MemoryImage(bytes(data))).load()
        if "c" in found:
            assert all(same(found[bitmap.name], bitmap) for bitmap in wanted)
            assert "b" not in found
            seen.add("new")
        else:
            assert sorted(map(str, found)) == ["a", "b"]
            assert all(bitmap.is_inconsistent for bitmap in found.values())
            seen.add("old")
    assert seen == {"old", "new"}


async def test_header_is_written_between_flushes() -> None:
    """Nothing is freed, and no directory is led to, before it is sure to be in the file."""
    store, wanted = await prepared()
    image = store.image
    image.log.clear()
    image.released.clear()
    await store.bitmaps.store(wanted)
    kinds = [(kind, offset) for kind, offset, _data in image.log]
    header = kinds.index(("write", 0))
    # Changing the header brings it to the disk.
    assert kinds[header - 1] == ("flush", 0)
    (table_offset,) = struct.unpack_from(">Q", image.log[0][2]) if not image.log[0][1] else (0,)
    assert image.released
    assert table_offset == 0


# -- what may be added ----------------------------------------------------------------------------------------

# So many of the longest names fit into a directory.
FITTING = 65535 * 1024 // 1048


@pytest.mark.parametrize(
    ("changes", "new", "others", "text"),
    [
        ({"version": 2}, named("x" * 1024), 0, "Cannot store dirty bitmaps in qcow2 v2 files"),
        ({}, named("x" * 1024), 0, "Name length exceeds maximum (1023 characters)"),
        (
            {},
            named("a", size=(1 << 20) * 8 * G + 1),
            0,
            "Too much space will be occupied by the bitmap. Use larger granularity",
        ),
        ({}, named("a"), 65535, "Maximum number of persistent bitmaps is already reached"),
        ({}, named("a" * 1023), FITTING, "Not enough space in the bitmap directory"),
    ],
)
async def test_check_texts(
    changes: dict[str, Any], new: NamedBitmap, others: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "MAX_DATA", 1 << 20)
    image = empty_image()
    image.header = Header(**{"size": SIZE, **changes})
    with pytest.raises(QmpError) as caught:
        Qcow2Bitmaps(image, print).check(str(new.name), new.bits.data_length, [named("b" * 1023, size=0)] * others)
    assert caught.value.desc == text


async def test_largest_bitmap_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MAX_DATA", 1 << 20)
    store = Qcow2Bitmaps(empty_image(), print)
    store.check("a", 1 << 20, [named("b")] * 65534)
    store.check("a" * 1023, 1 << 20, [named("b" * 1023)] * (FITTING - 1))


# -- hostile images -------------------------------------------------------------------------------------------


async def victim() -> MemoryImage:
    """Bitmap ``s1`` (16 KiB of bits: 4 clusters), then ``s2``."""
    store = Store(empty_image())
    await store.load()
    await store.bitmaps.store(
        [named("s2", granularity=65536, is_recording=False), named("s1", [(1 << 20, 3 << 20), (7 << 20, 1)])]
    )
    return store.image


def extension_at(image: MemoryImage) -> int:
    return bytes(image.data[:CLUSTER]).index(struct.pack(">I", EXT_BITMAPS)) + 8


def directory_at(image: MemoryImage) -> int:
    data = image.header.extension(EXT_BITMAPS)
    assert data is not None
    return layout.parse_extension(data, CLUSTER).offset


CONSTRAINTS = "Bitmap 's1' doesn't satisfy the constraints"
TABLE = "Could not read bitmap_table table from image for bitmap 's1': Invalid argument"
# Where, offset, format, value; the reference's text.
HOSTILE: list[tuple[str, int, str, int, str]] = [
    ("extension", 0, ">I", 0, "found bitmaps extension with zero bitmaps"),
    ("extension", 0, ">I", 1, "More bitmaps found than specified in header extension"),
    ("extension", 0, ">I", 3, "Less bitmaps found than specified in header extension"),
    (
        "extension",
        0,
        ">I",
        65536,
        "bitmaps_ext: Image has 65536 bitmaps, exceeding the QEMU supported maximum of 65535",
    ),
    ("extension", 4, ">I", 1, "bitmaps_ext: Reserved field is not zero"),
    ("extension", -4, ">I", 16, "bitmaps_ext: Invalid extension length"),
    ("extension", 8, ">Q", 0, "Requested bitmap directory size is zero"),
    ("extension", 8, ">Q", 56, "Broken bitmap directory"),
    ("extension", 8, ">Q", 72, "Broken bitmap directory"),
    (
        "extension",
        8,
        ">Q",
        1 << 40,
        "bitmaps_ext: bitmap directory size (1099511627776) exceeds the maximum supported size (67107840)",
    ),
    ("extension", 16, ">Q", 1000, "bitmaps_ext: invalid bitmap directory offset"),
    ("extension", 16, ">Q", 1 << 40, "Bitmap '' doesn't satisfy the constraints"),
    ("directory", 0, ">Q", 1000, CONSTRAINTS),
    ("directory", 0, ">Q", 0, CONSTRAINTS),
    ("directory", 8, ">I", 0, CONSTRAINTS),
    ("directory", 8, ">I", 5, "Could not read bitmap 's1' from image: Invalid argument"),
    ("directory", 8, ">I", 0x8000000, CONSTRAINTS),
    ("directory", 12, ">I", 8 | 2, CONSTRAINTS),
    ("directory", 12, ">I", 4, CONSTRAINTS),
    ("directory", 16, ">B", 0, CONSTRAINTS),
    ("directory", 16, ">B", 2, CONSTRAINTS),
    ("directory", 17, ">B", 8, CONSTRAINTS),
    ("directory", 17, ">B", 32, CONSTRAINTS),
    ("directory", 18, ">H", 0, "Bitmap '' doesn't satisfy the constraints"),
    ("directory", 18, ">H", 1024, "Broken bitmap directory"),
    ("directory", 20, ">I", 8, "Bitmap extra data is not supported"),
    ("directory", 20, ">I", 72, "Broken bitmap directory"),
    ("directory", 20, ">I", 0xFFFFFFFF, "Broken bitmap directory"),
    ("directory", 24, ">B", 0, "Bitmap '' doesn't satisfy the constraints"),
    ("table", 0, ">Q", 1 << 20 | 1, TABLE),
    ("table", 0, ">Q", 1 << 20 | 2, TABLE),
    ("table", 0, ">Q", 1 << 56, TABLE),
    ("table", 0, ">Q", 1 << 8, TABLE),
]


@pytest.mark.parametrize(("where", "offset", "format_", "value", "text"), HOSTILE)
async def test_hostile_image_is_refused_in_the_reference_s_words(
    where: str, offset: int, format_: str, value: int, text: str
) -> None:
    image = await victim()
    base = extension_at(image) if where == "extension" else directory_at(image)
    if where == "table":
        (base,) = struct.unpack_from(">Q", image.data, base)
    struct.pack_into(format_, image.data, base + offset, value)
    with pytest.raises(QmpError) as caught:
        await Store(MemoryImage(bytes(image.data))).load()
    assert caught.value.desc == text


async def test_padded_name_ends_at_its_nul() -> None:
    image = await victim()
    struct.pack_into(">H", image.data, directory_at(image) + 18, 7)
    assert list(await Store(MemoryImage(bytes(image.data))).load()) == ["s1", "s2"]


async def test_bits_beyond_the_end_and_the_file_are_clean() -> None:
    image = await victim()
    (table,) = struct.unpack_from(">Q", image.data, directory_at(image))
    struct.pack_into(">Q", image.data, table, 1 << 40)
    (last,) = struct.unpack_from(">Q", image.data, table + 3 * 8)
    struct.pack_into(">Q", image.data, table + 3 * 8, 1)
    found = await Store(MemoryImage(bytes(image.data))).load()
    assert last == 0
    assert found["s1"].bits.extents(0, SIZE, 9) == [(48 << 20, False), (16 << 20, True)]


async def test_program_without_bitmaps_has_changed_the_image(tmp_path: Path) -> None:
    image = await victim()
    await image.change_header(autoclear=0)
    store = Store(MemoryImage(bytes(image.data)))
    assert await store.load() == {}
    assert store.warnings[0].startswith("warning: a program lacking bitmap support modified this file")
    await store.bitmaps.mark_in_use()
    assert store.image.header.extension(EXT_BITMAPS) is None
    assert list(store.bitmaps.facts()) == []


@pytest.mark.parametrize(("value", "share"), [(5 * CLUSTER, 1), (layout.ALL_ONES, store_module.ONES_SHARE)])
async def test_memory_an_image_can_ask_for_is_bounded(
    value: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every bitmap has the same table, all entries of which are the same; a megabyte of bits each."""
    monkeypatch.setattr(store_module, "MAX_TOTAL", (4 << 20) // share)
    image = empty_image()
    table = await image.allocate(1)
    assert await image.allocate(2) == table + CLUSTER == 4 * CLUSTER
    await image.write([(table, struct.pack(">Q", value) * 256), (5 * CLUSTER, b"\x55" * CLUSTER)])
    entries = [DirectoryEntry(b"%d" % n, table, 256, 9) for n in range(6)]
    data = layout.pack_directory(entries)
    offset = await image.allocate(-(-len(data) // CLUSTER))
    await image.write([(offset, data)])
    header = image.header.with_extension(EXT_BITMAPS, BitmapsExtension(6, len(data), offset).serialise())
    await image.change_header(extensions=header.extensions, autoclear=BITMAPS)
    size = (1 << 20) * 8 * G
    tracemalloc.start()
    with pytest.raises(QmpError, match="Could not read bitmap '4' from image: Cannot allocate memory"):
        await Store(MemoryImage(bytes(image.data))).load(size)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (6 << 20) // share + (1 << 20)
    # What is in the file may be in memory as well.
    image.data.extend(bytes(6 << 20))
    assert len(await Store(MemoryImage(bytes(image.data))).load(size)) == 6


async def test_many_clean_bitmaps_of_a_large_disk_take_no_memory() -> None:
    """The image had been made without complaint, and could not be opened again."""
    size = 64 << 40
    store = Store(empty_image(size, 16))
    await store.load()
    await store.bitmaps.store([named(f"b{n}", [(n << 30, 1 << 20)], size, granularity=65536) for n in range(20)])
    tracemalloc.start()
    found = await Store(MemoryImage(bytes(store.image.data))).load()
    held = tracemalloc.get_traced_memory()[0] - len(store.image.data)
    tracemalloc.stop()
    assert [bitmap.bits.dirty_bytes for bitmap in found.values()] == [1 << 20] * 20
    assert held < 4 << 20


async def test_clusters_of_others_are_not_given_back() -> None:
    """A table that leads to clusters nobody counts, or beyond the file: they stay as they are."""
    image = await victim()
    (table,) = struct.unpack_from(">Q", image.data, directory_at(image))
    struct.pack_into(">Q", image.data, table + 8, len(image.data) + CLUSTER)
    store = Store(MemoryImage(bytes(image.data)))
    await store.load()
    await store.bitmaps.remove("s1")
    assert [fact["name"] for fact in store.bitmaps.facts()] == ["s2"]


# -- the layouts ----------------------------------------------------------------------------------------------

entries = st.builds(
    DirectoryEntry,
    name=st.binary(min_size=1, max_size=1023).filter(lambda name: b"\0" not in name),
    table_offset=st.integers(1, 1 << 40).map(lambda number: number << 9),
    table_entries=st.integers(1, 1 << 20),
    granularity_bits=st.integers(9, 31),
    flags=st.integers(0, 3),
)


@given(st.lists(entries, max_size=5))
def test_directory_round_trip(given: list[DirectoryEntry]) -> None:
    data = layout.pack_directory(given)
    assert len(data) == sum(layout.entry_size(len(entry.name)) for entry in given)
    assert list(layout.parse_directory(data, len(given), 512)) == given


@given(st.binary(max_size=300), st.integers(0, 5))
def test_junk_directory_raises_the_one_right_error(data: bytes, count: int) -> None:
    try:
        found = list(layout.parse_directory(data, count, 512))
    except QmpError:
        return
    assert len(found) == count


@given(st.binary(min_size=24, max_size=24))
def test_junk_extension_raises_the_one_right_error(data: bytes) -> None:
    try:
        found = layout.parse_extension(data, 65536)
    except QmpError:
        return
    assert found.serialise() == data


@given(st.lists(st.sampled_from([0, 1, 512, 1024, 1536, 2048, 4096]), max_size=20), st.integers(1, 4))
def test_runs_cover_the_table(table: list[int], longest: int) -> None:
    runs = layout.runs_of(table, 512, longest)
    spread: list[int] = []
    for run in runs:
        step = 512 if run.offset > 1 else 0
        assert run.first == len(spread)
        assert not step or run.count <= longest
        spread += [run.offset + n * step for n in range(run.count)]
    assert spread == table
    assert layout.runs_of([0, 0, 1, 512, 1024, 4096], 512, 9) == [
        Run(0, 2, 0),
        Run(2, 1, 1),
        Run(3, 2, 512),
        Run(5, 1, 4096),
    ]


async def test_many_and_large_bitmaps_let_others_run() -> None:
    """65535 bitmaps, or half a gigabyte of ones that takes no space: seconds on the loop."""
    turns = Turns()

    image = empty_image()
    store = Store(image)
    await store.load()
    await store.bitmaps.store([named(f"b{number}", granularity=1 << 20) for number in range(3000)])
    many = Store(image)
    image = empty_image(1 << 36)
    store = Store(image)
    await store.load()
    await store.bitmaps.store([named("all", [(0, 1 << 36)], size=1 << 36)])
    large = Store(image)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.run)
        assert len(await many.load()) == 3000
        seen, turns.count = turns.count, 0
        # One for each bitmap, and for the directory; who comes first in the first and last round is chance.
        assert seen >= 3000 + 3000 // store_module.ENTRIES - 2
        await many.bitmaps.mark_in_use()
        seen, turns.count = turns.count, 0
        assert seen >= 3000 // store_module.ENTRIES - 2
        assert (await large.load())["all"].bits.dirty_bytes == 1 << 36
        assert turns.count >= (1 << 24) // store_module.PIECE
        nursery.cancel_scope.cancel()


async def test_large_bitmaps_are_stored_and_loaded_bit_by_bit() -> None:
    """Of 64 TiB in clusters of 2 MiB: few entries of a table, which are much to look through."""
    size = 64 << 40
    store = Store(empty_image(size, 21))
    await store.load()
    clean, dirty = (named(name, size=size, granularity=65536) for name in ("clean", "dirty"))
    dirty.bits.load(16 << 20, b"\x55" * (8 << 20))
    turns = Turns()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.run)
        for bitmaps in ([clean, dirty], []):
            await store.bitmaps.store(bitmaps)
            seen, turns.count = turns.count, 0
            # Looking at both, and writing four clusters.
            assert seen >= 2 * clean.bits.data_length // store_module.LOOKED_AT + 4 - 2 if bitmaps else 1
            if bitmaps:
                found = await Store(store.image).load()
                seen, turns.count = turns.count, 0
                assert seen >= 4
                assert found["dirty"].bits.dirty_bytes == dirty.bits.dirty_bytes
        nursery.cancel_scope.cancel()


def test_check_reads_no_more_bitmap_tables_than_the_file_has_room_for() -> None:
    """65535 bitmaps with one table of 8 MiB: an hour. No image can be opened with them."""
    entries = [DirectoryEntry(b"%d" % number, 8 << 12, 1000, 16) for number in range(1000)]
    data = layout.pack_directory(entries)
    extension = BitmapsExtension(len(entries), len(data), 1 << 12)
    header = Header(cluster_bits=12, size=1000 << 12 + 3 + 16, autoclear=BITMAPS).with_extension(
        EXT_BITMAPS, extension.serialise()
    )
    reads = []

    def read(offset: int, length: int) -> bytes:
        reads.append(length)
        return data if offset == 1 << 12 else bytes(length)

    image: Any = SimpleNamespace(read=read, length=1 << 20)
    with pytest.raises(QmpError, match="Could not read bitmap_table table"):
        examining._check_bitmaps(header, image)
    assert sum(reads) < (1 << 20) + len(data) + (1 << 13)
