"""The consistency check: images of our own are clean, damage is found for what it is, repairs repair."""

from __future__ import annotations

import errno
import random

import attrs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from qcow2_check_image import SIZE, Image

from qsd.drivers.qcow2 import layout, refcount_codec
from qsd.drivers.qcow2.bitmap_layout import ENTRY as ENTRY_OF_BITMAP
from qsd.drivers.qcow2.check import Checker
from qsd.drivers.qcow2.counts import Counts
from qsd.drivers.qcow2.examining import Repairs
from qsd.drivers.qcow2.extensions import BitmapsExtension
from qsd.drivers.qcow2.layout import Header
from qsd.drivers.qcow2.new_image import COPIED, header_cluster
from qsd.drivers.qcow2.room import Room
from qsd.drivers.qcow2.snapshot_table import ENTRY as ENTRY_OF_SNAPSHOT


@pytest.mark.parametrize("order", range(7))
@pytest.mark.parametrize("incompatible", [0, layout.EXTENDED_L2, layout.DATA_FILE])
def test_new_images_are_clean(incompatible: int, order: int) -> None:
    image = Image(incompatible=incompatible, order=order)
    found = image.check()
    assert (found.corruptions, found.leaks, found.problems) == (0, 0, [])
    assert (found.total_clusters, found.allocated_clusters, found.fragmented_clusters) == (20, 20, 0)
    assert found.image_end == len(image.data)


def test_leak_is_found_and_given_back() -> None:
    image = Image()
    image.set_word(image.l2 + 8 * 5, 0)
    found = image.check()
    assert (found.corruptions, found.leaks, found.allocated_clusters, found.fragmented_clusters) == (0, 1, 19, 1)
    found = image.repair(leaks_only=True)
    assert (found.corruptions, found.leaks) == (0, 0)


def test_giving_leaks_back_sets_the_flags_of_what_is_alone_then() -> None:
    """The reference does; else every such entry was a corruption in an image that had leaks only."""
    image = Image()
    for entry in (image.l2, image.l2 + 8):
        data = image.word(entry) & ~COPIED
        image.count(data // SIZE, 2)
        image.set_word(entry, data)
    # A flag that is wrong for another reason, too.
    image.set_word(image.l2 + 8 * 5, image.word(image.l2 + 8 * 5) & ~COPIED)
    found = image.check()
    assert (found.corruptions, found.flags, found.leaks) == (1, 1, 2)
    found = image.repair(leaks_only=True)
    assert (found.corruptions, found.leaks) == (0, 0)


def test_count_that_is_too_low_is_a_corruption() -> None:
    image = Image()
    image.count(8, 0)
    assert image.check().corruptions == 2, "the count, and the flag that says one"
    assert image.repair(leaks_only=True).corruptions == 2
    assert image.repair().corruptions == 0


def test_shared_cluster_loses_its_flag() -> None:
    image = Image()
    image.set_word(image.l2, image.word(image.l2 + 8))
    found = image.check()
    assert found.leaks == 1
    assert found.corruptions == 1
    assert image.repair().corruptions == 0
    assert not image.word(image.l2) & COPIED
    assert not image.word(image.l2 + 8) & COPIED


@pytest.mark.parametrize(
    ("place", "value", "text"),
    [
        ("l1", 1 << 50 | COPIED, "L2 table at 0x4000000000000 lies beyond the end of the file"),
        ("l1", 0x4400 | COPIED, "Table is not cluster aligned"),
        ("l1", 3 * SIZE | 1, "L1 entry with reserved bits set"),
        ("l2", 1 << 50 | COPIED, "data cluster at 0x4000000000000 lies beyond the end of the file"),
        ("l2", 5 * SIZE + 512 | COPIED, "Data cluster is not properly aligned"),
        ("l2", 5 * SIZE | 2 | COPIED, "l2 entry with reserved bits set"),
        ("table", SIZE + 512, "refcount block 0 is not cluster aligned"),
        ("table", 1 << 50, "refcount block 0 at 0x4000000000000 lies beyond the end of the file"),
    ],
)
def test_damage_is_named(place: str, value: int, text: str) -> None:
    image = Image()
    offset = {"l1": image.header.l1_offset, "l2": image.l2, "table": image.header.refcount_table_offset}[place]
    image.set_word(offset, value)
    found = image.check()
    assert found.corruptions
    assert any(text in problem for problem in found.problems), found.problems


def test_repair_leaves_leaks_alone_where_something_leads_nowhere() -> None:
    image = Image()
    image.set_word(image.header.l1_offset, 1 << 50 | COPIED)
    before = image.check()
    assert before.leaks == 21
    assert image.repair().leaks == 21


def test_tables_that_lead_to_each_other_end() -> None:
    image = Image()
    image.set_word(image.l2, image.l2 | COPIED)
    image.set_word(image.header.refcount_table_offset + 8, image.word(image.header.refcount_table_offset))
    assert image.check().corruptions


@settings(deadline=None, max_examples=150)
@example(298, 3)  # a refcount block that was an L2 table too: setting counts broke the table
@example(1292, 2)  # new refcounts were written where a broken entry led to, and were an L2 table then
@example(723, 4)  # clusters counted far beyond the end of the file were to be kept
@given(st.integers(0, 2**32), st.integers(1, 6))
def test_any_damage_is_survived_and_repairs_never_make_it_worse(seed: int, bits: int) -> None:
    chance = random.Random(seed)
    image = Image(size=6 * SIZE)
    places = [image.header.l1_offset, image.l2, image.block, image.header.refcount_table_offset]
    for _ in range(bits):
        at = chance.choice(places) + chance.randrange(128)
        image.data[at] ^= 1 << chance.randrange(8)
    before = image.check()
    after = image.repair()
    assert after.corruptions <= before.corruptions
    if not before.is_lossy and not before.corruptions:
        assert (after.leaks, after.corruptions) == (0, 0)


@pytest.mark.parametrize("order", range(7))
@pytest.mark.parametrize("damage", ["no block", "block that is data too", "block off its place", "no table"])
def test_refcount_structure_is_rebuilt(damage: str, order: int) -> None:
    image = Image(order=order)
    table = image.header.refcount_table_offset
    if damage == "no block":
        image.set_word(table, 0)
    elif damage == "block that is data too":
        image.set_word(image.l2, image.block | COPIED)
    elif damage == "block off its place":
        image.set_word(table, image.block + 512)
    else:
        image.set_word(48, 1 << 50)
        image.header = layout.parse_header(image.data[:SIZE])
    before = bytes(image.data)
    assert bool(image.check().broken_structures) is (damage != "no block")
    assert image.repair(leaks_only=True).corruptions, "giving leaks back does not mend it"
    assert image.data == before
    found = image.repair()
    assert (found.corruptions, found.leaks) == (0, 0), found.problems
    # Whatever else it was before, what the guest sees is where it was; one cluster was nobody's any more.
    first = image.l2 + (2 * SIZE if damage == "block that is data too" else SIZE)
    assert image.data[first : len(before)] == before[first:]
    assert len(image.data) == len(before), "what is made anew stands where nothing else is"


@pytest.mark.parametrize(("entry", "left"), [(1 << 50, 0), (SIZE + 512, 1), (1, 1)])
def test_leaks_are_given_back_beside_a_block_beyond_the_file(entry: int, left: int) -> None:
    """As the reference does; where blocks may be something else, too, it gives up."""
    image = Image()
    image.set_word(image.l2 + 8 * 5, 0)
    image.set_word(image.header.refcount_table_offset + 8, entry)
    found = image.repair(leaks_only=True)
    assert (found.corruptions, found.leaks) == (1, left)


def test_rebuild_mends_the_broken_table_and_every_count() -> None:
    """The broken table or block was not among what was told as repaired; the reference tells it."""
    image = Image()
    image.set_word(48, 1 << 50)
    examined = image.examine(Repairs.ALL)
    lows = [each for each in examined.before.problems if each.startswith("ERROR cluster")]
    assert examined.before.broken_structures == 1
    assert examined.fixed.corruptions == 1 + len(lows)


@pytest.mark.parametrize("is_table_lost", [True, False])
def test_rebuild_cut_off_leaves_the_old_structure(*, is_table_lost: bool) -> None:
    image = Image()
    table = image.header.refcount_table_offset
    image.set_word(48 if is_table_lost else table, image.block + (1 << 50 if is_table_lost else 512))
    image.header = layout.parse_header(image.data[:SIZE])
    used = image.check().used
    written: list[int] = []
    write = image.write

    def note(offset: int, data: bytes) -> None:
        written.append(offset // SIZE)
        write(offset, data)

    image.write = note  # type: ignore[method-assign]
    image.repair()
    leads = [position for position, cluster in enumerate(written) if used.get(cluster)]
    assert written[leads[0]] == (0 if is_table_lost else table // SIZE)
    new = {image.header.refcount_table_offset // SIZE, image.word(image.header.refcount_table_offset) // SIZE}
    assert new - {written[leads[0]]} <= set(written[: leads[0]]), "it is there before anything leads to it"


def test_rebuild_takes_no_cluster_that_what_leads_nowhere_may_have_led_to() -> None:
    """An L2 table is lost, and so are the counts: what looks leaked is that table, and what it leads to."""
    image = Image()
    image.set_word(image.header.l1_offset, 1 << 50 | COPIED)
    image.set_word(image.header.refcount_table_offset, 0)
    before = bytes(image.data)
    image.repair()
    lost = image.l2
    assert image.data[lost : len(before)] == before[lost:]
    # Beside it is what the image itself counts as free.
    image = Image()
    image.set_word(image.header.l1_offset, 1 << 50 | COPIED)
    image.set_word(image.header.refcount_table_offset + 8 * 2, 1 << 50)
    image.write(len(image.data), bytes(SIZE))
    room = Room(image.header, image.write, image.check(), len(image.data))
    assert room.take(1) == len(image.data) // SIZE - 1


@pytest.mark.parametrize("length", [1, 2])
def test_room_is_where_writes_succeed(length: int) -> None:
    """Some clusters that nobody has are holes of the file, and the disk is full."""
    image = Image()
    for index in range(8):
        image.set_word(image.l2 + 8 * index, 0)
    first = image.l2 // SIZE + 1
    holes = {first, first + 1, first + 3, first + 6}
    number = errno.ENOSPC

    def write(offset: int, data: bytes) -> None:
        clusters = range(offset // SIZE, (offset + len(data)) // SIZE)
        if holes.intersection(clusters) or offset + len(data) > len(image.data):
            raise OSError(number, "no room")
        image.write(offset, data)

    room = Room(image.header, write, image.check(), len(image.data))
    places = {1: [2, 4, 5, 7], 2: [4]}[length]
    assert [room.take(length) - first for _ in places] == places
    with pytest.raises(OSError, match="no room"):
        room.take(length)
    number = errno.EIO
    with pytest.raises(OSError, match="no room"):
        Room(image.header, write, image.check(), len(image.data)).take(length)
    assert not image.data[image.l2 + SIZE : image.l2 + 2 * SIZE].strip(b"\0")


def test_what_reaches_beyond_the_end_begins_where_no_room_is() -> None:
    """The refcount table does: new blocks were to be written over its beginning."""
    image = Image()
    image.put_header(attrs.evolve(image.header, refcount_table_clusters=100))
    found = image.check()
    assert not found.has_refcount_table
    first = image.header.refcount_table_offset // SIZE
    assert found.claimed == {(first, first + 100)}
    before = bytes(image.data)
    room = Room(image.header, image.write, found, len(image.data))
    assert room.take(1) == first + 100
    image.data[:] = before
    assert image.repair().corruptions == 0


@pytest.mark.parametrize("is_counted", [True, False])
def test_count_without_room_is_the_highest_there_is(*, is_counted: bool) -> None:
    """It was left as it was: at 0, for the next writer to take what is in use."""
    image = Image(order=0)
    image.set_word(image.l2, image.word(image.l2 + 8))
    cluster = (image.word(image.l2) & ~COPIED) // SIZE
    block = image.block
    if is_counted:
        image.write(block + cluster // 8, bytes([image.data[block + cluster // 8] & ~(1 << cluster % 8)]))
    else:
        image.set_word(image.header.refcount_table_offset, 0)
    found = image.repair()
    assert (found.corruptions, found.flags, found.leaks) == (1, 0, 0), found.problems
    assert found.counted.get(cluster) == 1
    # Again it stays as it is.
    before = bytes(image.data)
    assert image.repair().corruptions == 1
    assert image.data == before


@pytest.mark.parametrize("incompatible", [0, layout.DATA_FILE, layout.EXTENDED_L2])
def test_zeroes_between_clusters_need_no_place(incompatible: int) -> None:
    """As the reference repairs them: they can be read then, and what was counted for them is given back."""
    image = Image(incompatible=incompatible)
    step = 2 if incompatible == layout.EXTENDED_L2 else 1
    entry = image.l2 + 8 * step * 4
    image.set_word(entry, (image.word(entry) & ~COPIED) + 512 | (step == 1))
    if step == 2:
        image.set_word(entry + 8, 0xFFFF_FFFF << 32)
    before = image.check()
    assert [each for each in before.problems if "Preallocated cluster is not properly aligned" in each]
    assert image.examine(Repairs.LEAKS).found.corruptions == before.corruptions
    examined = image.examine(Repairs.ALL)
    assert (examined.found.corruptions, examined.found.leaks) == (0, 0), examined.found.problems
    assert image.word(entry) == (1 if step == 1 else 0)
    assert examined.found.allocated_clusters == 19


def test_zeroes_between_clusters_in_version_2_stay() -> None:
    """It knows none: the entry may have led to data. The reference forgets where, and says that all is well."""
    image = Image()
    image.put_header(attrs.evolve(image.header, version=2, header_length=layout.V2_LENGTH))
    entry = image.l2 + 8 * 4
    image.set_word(entry, image.word(entry) + 512 | 1)
    wanted = image.word(entry)
    before = image.check()
    assert [each for each in before.problems if "Preallocated cluster is not properly aligned" in each]
    examined = image.examine(Repairs.ALL)
    assert (examined.found.corruptions, image.word(entry)) == (1, wanted)


def test_block_that_is_data_too_is_one_error_where_no_count_exceeds_one() -> None:
    """It was two; the reference cannot count that far. The block is moved all the same."""
    image = Image(order=0)
    image.set_word(image.l2, image.block | COPIED)
    before = image.check()
    assert (before.corruptions, before.leaks) == (1, 1)
    found = image.repair()
    assert (found.corruptions, found.leaks) == (0, 0)
    assert image.word(image.header.refcount_table_offset) != image.block


def test_data_behind_the_end_stays_there_where_the_disk_is_full() -> None:
    """The repair of everything else failed."""
    image = Image()
    length = len(image.data)
    image.set_word(image.l2, length | COPIED)
    image.set_word(image.l2 + 8, 0)
    write = image.write

    def limited(offset: int, data: bytes) -> None:
        if offset + len(data) > length:
            raise OSError(errno.ENOSPC, "no room")
        write(offset, data)

    image.write = limited  # type: ignore[method-assign]
    found = image.examine(Repairs.ALL).found
    assert (found.corruptions, found.leaks) == (1, 0)


@pytest.mark.parametrize("count", [0, 2])
def test_no_cluster_is_called_alone_where_a_table_was_not_looked_at(count: int) -> None:
    """A snapshot's L1 table is too long to be one. What it shares with the disk must not be written in place."""
    image = Image()
    table = len(image.data)
    fields = (image.header.l1_offset, 1 << 20, 1, 1, 0, 0, 0, 0, 16)
    image.write(table, (ENTRY_OF_SNAPSHOT.pack(*fields) + bytes(16) + b"ab").ljust(SIZE, b"\0"))
    image.count(table // SIZE, 1)
    image.header = attrs.evolve(image.header, snapshot_count=1, snapshots_offset=table)
    image.write(0, layout.serialise_header(image.header))
    data = image.word(image.l2) & ~COPIED
    image.set_word(image.l2, data)
    image.count(data // SIZE, count)
    assert "ERROR L1 table overlaps with others" in image.check().problems
    image.repair()
    assert image.word(image.l2) == data


def test_table_behind_the_end_keeps_what_looks_leaked() -> None:
    """The file was made longer, by a table of nothing, and all the disk's clusters were given back."""
    image = Image()
    image.set_word(image.header.l1_offset, len(image.data) | COPIED)
    before = bytes(image.data)
    found = image.repair()
    assert (found.corruptions, found.leaks) == (1, 21)
    assert len(image.data) == len(before)


def test_file_does_not_grow_while_something_leads_nowhere() -> None:
    """It made one entry more of those that led behind the end a wrong one."""
    image = Image()
    del image.data[-3 * SIZE :]
    assert image.check().corruptions == 3
    length = len(image.data)
    assert image.repair().corruptions == 3
    assert len(image.data) == length


def test_every_use_behind_the_end_is_one() -> None:
    image = Image()
    del image.data[-SIZE:]
    image.set_word(image.l2, image.word(image.l2 + 8 * 19))
    assert image.check().corruptions == 2


def test_table_that_begins_inside_the_file_is_counted() -> None:
    """All that is beyond the end is a part of a cluster that says nothing."""
    image = Image(incompatible=layout.DATA_FILE)
    assert image.l2 + SIZE == len(image.data)
    del image.data[-SIZE + 512 :]
    found = image.check()
    assert (found.corruptions, found.leaks, found.image_end) == (0, 0, image.l2 + SIZE)


def test_large_counts_are_counted() -> None:
    counts = Counts()
    for _ in range(3):
        counts.add(7, 0x7FFF)
    assert (counts.get(7), counts.last()) == (3 * 0x7FFF, 7)
    assert list(counts.slice(0, 8)) == [0] * 7 + [3 * 0x7FFF]


def test_counts_of_a_large_sparse_image_take_little_memory() -> None:
    header = Header(cluster_bits=16, size=1 << 20, refcount_table_offset=1 << 16, refcount_table_clusters=1)
    entries = refcount_codec.block_entries(16, 4)

    def read(offset: int, length: int) -> bytes:
        # One refcount block a petabyte into the file, which says that its own cluster is used.
        if offset == 1 << 16:
            return (b"\0" * 8 * 5 + (1 << 50).to_bytes(8, "big")).ljust(length, b"\0")
        return bytes(length)

    found = Checker(header, read, (1 << 50) + SIZE).run()
    assert found.corruptions
    assert entries == 32768


def test_entry_that_leads_to_just_behind_the_file_is_a_corruption() -> None:
    image = Image()
    image.set_word(image.l2, len(image.data) | COPIED)
    found = image.check()
    assert found.corruptions
    assert any(f"ERROR cluster {len(image.data) // SIZE} refcount=0 reference=1" in p for p in found.problems)
    length = len(image.data)
    assert image.repair().corruptions == 0
    assert len(image.data) == length + SIZE, "others count no cluster that is not in the file"


def test_cluster_that_was_cut_off_is_a_corruption() -> None:
    image = Image()
    del image.data[-SIZE:]
    found = image.check()
    assert (found.corruptions, found.leaks) == (1, 0)
    assert image.repair().corruptions == 0
    assert len(image.data) == found.image_end + SIZE


def test_table_that_many_entries_lead_to_is_looked_at_once_and_counted_for_each() -> None:
    """A hostile image's L1 table repeated one full L2 table four million times: days of work."""
    entries = 64
    image = Image(allocates=False, size=entries * 8192 * SIZE)
    assert image.header.l1_size == entries
    table = len(image.data)
    data = table + SIZE
    image.write(data, bytes(SIZE))
    for index in range(8192):
        image.set_word(table + 8 * index, data | COPIED)
    for index in range(entries):
        image.set_word(image.header.l1_offset + 8 * index, table)
    reads: list[int] = []

    def read(offset: int, length: int) -> bytes:
        reads.append(offset)
        return image.read(offset, length)

    found = Checker(image.header, read, len(image.data)).run()
    assert reads.count(table) == 2, "once for what it refers to, once for its flags"
    assert found.allocated_clusters == entries * 8192
    assert found.fragmented_clusters == entries * 8191
    assert found.used.get(table // SIZE) == entries
    assert found.used.get(data // SIZE) == entries * 8192
    # Both clusters, the flag of every entry, and the uses that no count has room for.
    assert found.corruptions == 2 + entries * 8192 + entries * 8192 - 0xFFFF


def test_tables_that_cannot_all_be_parts_of_the_file_are_not_walked() -> None:
    """Thousands of snapshots could share one large L1 table, byte by byte."""
    image = Image(size=8192 * SIZE * 512, allocates=False)
    snapshots, l1 = 300, image.header.l1_offset
    table = len(image.data)
    for number in range(snapshots):
        fields = (l1, 512, 1, 1, 0, 0, 0, 0, 16)
        image.write(table + 64 * number, ENTRY_OF_SNAPSHOT.pack(*fields) + bytes(16) + b"ab")
    image.header = attrs.evolve(image.header, snapshot_count=snapshots, snapshots_offset=table)
    reads: list[int] = []

    def read(offset: int, length: int) -> bytes:
        reads.append(offset)
        return image.read(offset, length)

    found = Checker(image.header, read, len(image.data)).run()
    assert found.is_lossy
    assert reads.count(l1) * 4096 <= len(image.data) + 2 * SIZE


def test_bitmap_table_of_gigabytes_is_not_read() -> None:
    """In a sparse file of terabytes there is room for it."""
    image = Image()
    directory = len(image.data)
    image.write(directory, ENTRY_OF_BITMAP.pack(1 << 40, 1 << 24, 0, 1, 16, 1, 0) + b"b")
    where = BitmapsExtension(1, ENTRY_OF_BITMAP.size + 8, directory).serialise()
    header = attrs.evolve(image.header, autoclear=layout.BITMAPS).with_extension(layout.EXT_BITMAPS, where)
    longest = 0

    def read(offset: int, length: int) -> bytes:
        nonlocal longest
        longest = max(longest, length)
        return image.read(offset, length)

    Checker(header, read, 1 << 44).run()
    assert longest <= SIZE


def test_repair_writes_no_flags_into_what_is_data_too() -> None:
    """An L1 entry leads to a guest's cluster: its bytes look like entries, and stay what they are."""
    image = Image(size=SIZE * (SIZE // 8 + 20))
    data = image.word(image.l2 + 8 * 3) & (1 << 56) - 1
    image.write(data, image.word(image.l2 + 8 * 4).to_bytes(8, "big") * 3)
    image.set_word(image.header.l1_offset + 8, data | COPIED)
    before = image.read(data, SIZE)
    image.repair()
    assert image.read(data, SIZE) == before


def test_flags_of_an_l1_table_that_is_too_long_are_left_alone() -> None:
    """Such a table is not counted: what else stands in its clusters looked like nothing but the table."""
    image = Image()
    image.header = attrs.evolve(image.header, l1_size=len(image.data) // 8)
    places = [place for place, _entry in image.check().wrong_flags()]
    assert len(places) == len(set(places)), "those of the L2 table behind it, once"


def test_table_across_clusters_is_walked_all_the_same() -> None:
    image = Image()
    image.set_word(image.header.l1_offset, (image.l2 + 512) | COPIED)
    found = image.check()
    assert any("not cluster aligned" in each for each in found.problems)
    assert found.leaks < 20, "what the shifted table leads to is in use"


def test_entry_of_two_tables_is_told_for_both() -> None:
    """An L2 table across clusters lies over the L1 table that leads to it: it was told as the L1 table's, twice."""
    image = Image()
    image.set_word(image.header.l1_offset, image.header.l1_offset - 512)
    told = [each for each in image.check().problems if "OFLAG_COPIED" in each]
    assert len(told) == 2
    assert "L2 cluster: l1_index=0" in told[0]
    assert "data cluster: l2_entry" in told[1]


def test_compressed_entry_beside_a_data_file_counts_nothing() -> None:
    image = Image(incompatible=layout.DATA_FILE)
    image.set_word(image.l2, 1 << 62 | image.l2)
    found = image.check()
    assert [each for each in found.problems if "compressed cluster 0 with data file" in each]
    assert found.corruptions == 1


def test_block_that_two_refcount_table_entries_lead_to_is_the_first_ones() -> None:
    image = Image()
    table = image.header.refcount_table_offset
    image.set_word(table + 8, image.word(table))
    found = image.check()
    assert "ERROR refcount block 1 refcount=2" in found.problems
    assert not any("refcount block 0 " in each for each in found.problems)
    assert image.repair().corruptions == 0


@pytest.mark.parametrize(("start", "matters"), [(0, True), (512, True), (1536, False), (SIZE - 512, False)])
def test_broken_sector_beside_the_header_matters_where_it_is_needed(start: int, matters: bool) -> None:
    image = Image()
    image.write(0, header_cluster(attrs.evolve(image.header, backing_file=b"n" * 700)))

    class Broken(Image):
        def read(self, offset: int, length: int) -> bytes:
            if offset < start + 512 and start < offset + length:
                raise OSError(errno.EIO, "broken")
            return super().read(offset, length)

    image.__class__ = Broken
    if matters:
        with pytest.raises(OSError, match="broken"):
            image.examine(Repairs.NONE)
    else:
        assert image.examine(Repairs.NONE).found.corruptions == 0
