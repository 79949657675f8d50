"""Repairs of what the header, the snapshot table and bitmaps say, as ``qemu-img check -r`` makes them."""

from __future__ import annotations

import attrs
import pytest
from qcow2_check_image import SIZE, Image

from qsd.drivers.qcow2 import layout, refcount_codec
from qsd.drivers.qcow2.bitmap_layout import ALL_ONES
from qsd.drivers.qcow2.check import Checker
from qsd.drivers.qcow2.examining import CannotCheck, Examined, Repairs
from qsd.drivers.qcow2.snapshot_table import MAX_EXTRA
from qsd.drivers.qcow2.table_mending import mend_snapshots
from qsd.errors import QmpError

# -- snapshot table -----------------------------------------------------------------------------------------------

FULL = bytes(7) + b"\x05" + (SIZE).to_bytes(8, "big") + b"\xff" * 8


def assert_clean(examined: Examined) -> None:
    found = examined.found
    assert (found.corruptions, found.leaks) == (0, 0), found.problems


@pytest.mark.parametrize("extra", [b"", FULL[:8], FULL[:15]])
def test_incomplete_snapshot_is_completed(extra: bytes) -> None:
    """As the reference does: the disk's size is the image's; other entries stay as they are."""
    image = Image()
    image.add_snapshots(FULL + b"later", extra)
    old = image.header.snapshots_offset
    before = bytes(image.data)
    assert image.examine(Repairs.LEAKS).found.corruptions == 1
    assert image.data == before
    examined = image.examine(Repairs.ALL)
    assert_clean(examined)
    assert (examined.fixed.corruptions, examined.fixed.leaks) == (1, 0)
    first, second = image.snapshots()
    assert (first.disk_size, first.vm_state_size, first.later) == (SIZE, 5, b"later")
    assert (second.disk_size, second.name, second.icount) == (image.header.size, b"name", None)
    assert second.vm_state_size == (5 if extra else 77)
    assert examined.found.used.get(old // SIZE) == 0
    assert image.examine(Repairs.ALL).fixed.corruptions == 0


def test_version_2_needs_no_extra_data() -> None:
    image = Image()
    image.put_header(attrs.evolve(image.header, version=2, header_length=layout.V2_LENGTH))
    image.add_snapshots(b"")
    assert_clean(image.examine(Repairs.NONE))


@pytest.mark.parametrize("repairs", [Repairs.NONE, Repairs.LEAKS])
def test_snapshots_that_keep_the_image_from_opening_are_told(repairs: Repairs) -> None:
    image = Image()
    image.add_snapshots(FULL, bytes(MAX_EXTRA + 1))
    with pytest.raises(CannotCheck, match="Too much extra metadata in snapshot table entry 1"):
        image.examine(repairs)
    image.put_header(attrs.evolve(image.header, snapshot_count=layout.MAX_SNAPSHOTS + 3))
    with pytest.raises(CannotCheck, match="snapshot table too large") as caught:
        image.examine(repairs)
    assert "all 3 overhanging snapshots" in caught.value.hint
    image.put_header(attrs.evolve(image.header, snapshot_count=1, snapshots_offset=8))
    with pytest.raises(CannotCheck, match="snapshot table offset invalid"):
        image.examine(repairs)


def test_extra_data_that_is_too_much_is_cut() -> None:
    image = Image()
    image.add_snapshots(FULL + b"x" * MAX_EXTRA, FULL)
    examined = image.examine(Repairs.ALL)
    assert_clean(examined)
    assert examined.fixed.corruptions == 1
    first, second = image.snapshots()
    assert (first.name, first.later, second.id) == (b"name", b"x" * (MAX_EXTRA - 24), b"1")


def test_snapshots_behind_one_of_gigabytes_are_dropped() -> None:
    """As the reference does: nobody can tell where they stand, nor open the image."""
    image = Image()
    image.add_snapshots(FULL, 1 << 31, FULL)
    examined = image.examine(Repairs.ALL)
    assert_clean(examined)
    # The two, and that the first of them has too much.
    assert examined.fixed.corruptions == 3
    assert [each.id for each in image.snapshots()] == [b"0"]


def test_snapshot_beside_a_data_file_is_a_corruption() -> None:
    """As with the reference: the image was called clean. Nothing mends it."""
    image = Image(incompatible=layout.DATA_FILE)
    image.add_snapshots(FULL, FULL)
    examined = image.examine(Repairs.ALL)
    assert examined.found.problems == ["ERROR 2 snapshots in image with data file"]
    assert (examined.found.corruptions, examined.fixed.corruptions) == (1, 0)


def test_the_last_snapshot_is_dropped() -> None:
    image = Image()
    image.add_snapshots(1 << 31)
    assert_clean(image.examine(Repairs.ALL))
    header = layout.parse_header(image.data[:SIZE])
    assert (header.snapshot_count, header.snapshots_offset) == (0, 0)


def test_no_table_can_be_larger_than_an_image_that_opens_has() -> None:
    """As many are kept as fit in."""
    image = Image()
    image.add_snapshots(bytes(MAX_EXTRA))
    entry = image.read(image.header.snapshots_offset, 1072)
    count = layout.MAX_SNAPSHOTS
    offset = -(-len(image.data) // SIZE) * SIZE
    image.write(offset, entry * count)
    image.put_header(attrs.evolve(image.header, snapshot_count=count, snapshots_offset=offset))
    with pytest.raises(CannotCheck, match="Snapshot table is too big"):
        image.examine(Repairs.NONE)
    examined = image.examine(Repairs.ALL)
    assert_clean(examined)
    assert examined.found.kept_snapshots == (64 << 20) // 1072


def test_table_is_written_where_something_was_given_back() -> None:
    """The file does not become longer for it, as with the reference."""
    image = Image()
    image.add_snapshots(b"")
    image.set_word(image.l2 + 8 * 5, 0)
    length = len(image.data)
    assert_clean(image.examine(Repairs.ALL))
    assert len(image.data) == length


@pytest.mark.parametrize("order", [4, 6])
def test_table_for_which_there_are_no_refcounts_gets_new_ones(order: int) -> None:
    image = Image(order=order)
    per_block = refcount_codec.block_entries(16, order)
    image.add_snapshots(b"")
    image.write(per_block * SIZE - 1, b"x")
    image.header = layout.parse_header(image.data[:SIZE])
    # All that the block counts is in use.
    image.write(
        image.block, bytes(refcount_codec.encode(refcount_codec.from_counts([1] * per_block, order), order))
    )
    found = image.check()
    for cluster in range(per_block):
        found.used.add(cluster, 1 - found.used.get(cluster))
    assert mend_snapshots(image.header, image.read, image.write, found, len(image.data), image.flush)
    header = layout.parse_header(image.data[:SIZE])
    assert image.word(header.refcount_table_offset + 8) >= per_block * SIZE
    assert header.snapshots_offset == per_block * SIZE
    after = Checker(header, image.read, len(image.data)).run()
    assert not after.bad_snapshots
    # What was said to be in use looks leaked.
    assert after.corruptions == 0


# -- bitmaps ------------------------------------------------------------------------------------------------------


def test_bits_that_are_nowhere_are_all_set() -> None:
    """Nobody knows what has changed there. The reference takes it for unchanged: backups would leave it out."""
    image = Image()
    _directory, table = image.add_bitmap()
    assert_clean(image.examine(Repairs.NONE))
    image.set_word(table, len(image.data) + 5 * SIZE)
    examined = image.examine(Repairs.LEAKS)
    assert (examined.fixed.leaks, examined.found.corruptions, examined.found.leaks) == (1, 1, 0)
    examined = image.examine(Repairs.ALL)
    assert_clean(examined)
    assert examined.fixed.corruptions == 1
    assert image.word(table) == ALL_ONES


def test_bitmap_whose_table_is_nowhere_is_all_set() -> None:
    image = Image()
    directory, _table = image.add_bitmap()
    image.set_word(directory, len(image.data) + 5 * SIZE)
    examined = image.examine(Repairs.ALL)
    assert_clean(examined)
    # The table that is lost, and its bits.
    assert (examined.fixed.corruptions, examined.fixed.leaks) == (1, 2)
    assert image.word(image.word(directory)) == ALL_ONES


def test_bitmap_table_at_no_possible_place_keeps_the_image_from_opening() -> None:
    image = Image()
    directory, _table = image.add_bitmap()
    image.set_word(directory, 1 << 63)
    with pytest.raises(QmpError, match="bitmap_table table from image for bitmap 'b': Input/output error"):
        image.examine(Repairs.ALL)


# -- the header ---------------------------------------------------------------------------------------------------


def test_image_without_refcount_table_gets_one() -> None:
    """It could not even be looked at; the reference repairs it."""
    image = Image()
    before = image.examine(Repairs.NONE).found
    image.put_header(attrs.evolve(image.header, refcount_table_clusters=0))
    examined = image.examine(Repairs.ALL)
    # Every cluster that was counted but those of the old refcounts, and no flag is right.
    assert examined.before.corruptions == before.image_end // SIZE - 2 + examined.before.flags
    assert_clean(examined)
    assert layout.parse_header(image.data[:SIZE]).refcount_table_clusters == 1


def test_refcount_table_that_reaches_beyond_the_file_is_read() -> None:
    """All clusters were called uncounted for it."""
    image = Image()
    image.put_header(attrs.evolve(image.header, refcount_table_clusters=40))
    examined = image.examine(Repairs.ALL)
    assert not [each for each in examined.before.problems if each.startswith("ERROR cluster 0 ")]
    assert_clean(examined)


@pytest.mark.parametrize("repairs", Repairs)
def test_features_nobody_knows_do_not_hold_after_a_repair(repairs: Repairs) -> None:
    image = Image()
    image.add_bitmap()
    unknown = 1 << 40 | layout.WAS_V2
    image.put_header(attrs.evolve(image.header, autoclear=layout.BITMAPS | unknown))
    image.examine(repairs)
    kept = layout.BITMAPS | (unknown if repairs is Repairs.NONE else 0)
    assert layout.parse_header(image.data[:SIZE]).autoclear == kept


def test_part_of_a_sector_is_no_cluster() -> None:
    image = Image(size=SIZE + 100)
    assert image.check().total_clusters == 1
