"""Where reads are found on the spot: one image, and a chain of them, against the rule written down plainly."""

from __future__ import annotations

from array import array
from typing import Any

import attrs
from hypothesis import given
from hypothesis import strategies as st

from qsd.drivers.qcow2.geometry import COMPRESSED, COPIED, ODD, OFFSET_MASK, ZERO_FLAG, Geometry
from qsd.drivers.qcow2.spotting import spot_of
from qsd.drivers.qcow2.tables import SliceCache
from qsd.drivers.spot import Spot

BITS = 9
CLUSTER = 1 << BITS
SLICE = 4  # entries
SLICES = 3
LENGTH = SLICES * SLICE * CLUSTER
FILE = 10 * CLUSTER + 100

ENTRIES = st.one_of(
    st.just(0),
    st.integers(1, 11).map(lambda cluster: cluster << BITS),
    st.integers(1, 11).map(lambda cluster: cluster << BITS | COPIED),
    st.sampled_from((ZERO_FLAG, ZERO_FLAG | COPIED | 2 * CLUSTER, COMPRESSED | 5, COPIED, 2 * CLUSTER | 1 << 60)),
)
# A table in memory, one that is not, or none in the image.
TABLES = st.one_of(st.lists(ENTRIES, min_size=SLICE, max_size=SLICE), st.sampled_from(("elsewhere", "none")))


@attrs.frozen(eq=False)
class File:
    """A child whose bytes are those of a file."""

    fd: int
    length: int = FILE

    def spot(self) -> Spot:
        """The file itself."""
        return Spot(lambda offset, length: (self.fd, offset, 0), self.fd, 0)


class Image:
    """A child that is a qcow2 image, and the mapping of one."""

    def __init__(self, number: int, tables: list[Any], length: int, backing: Any, used: set[int]) -> None:
        self.number, self.tables, self.length, self.backing = number, tables, length, backing
        self.geometry = Geometry(BITS, 1, 8 * SLICE, False, 3)
        self.data = File(number)
        self.cache = SliceCache(8 * SLICE, 1 << 20, lambda _: False)
        for at, table in enumerate(tables):
            if isinstance(table, list):
                (self.cache.young if at in used else self.cache.old)[at] = array("Q", table)

    def has_table(self, number: int) -> bool:
        """Whether the image holds the table."""
        return self.tables[number] != "none"

    def spot(self) -> Spot | None:
        """What is tested."""
        mapping: Any = self
        return spot_of(mapping, self.length, self.backing)

    def place(self, offset: int, length: int) -> tuple[int, int, int] | None:
        """The rule: the topmost image that has the cluster says where, if it is an ordinary one."""
        cluster, within = divmod(offset, CLUSTER)
        if within + length > CLUSTER or offset + length > self.length:
            return None
        table = self.tables[cluster // SLICE]
        if table == "elsewhere":
            return None
        entry = table[cluster % SLICE] if isinstance(table, list) else 0
        if entry & (ODD | CLUSTER - 1):
            return None
        if entry:
            where = (entry & OFFSET_MASK) + within
            return (self.number, where, 0) if where + length <= FILE else None
        if self.backing is None or offset + length > self.backing.length:
            return None
        if isinstance(self.backing, File):
            return self.backing.fd, offset, 0
        found: tuple[int, int, int] | None = self.backing.place(offset, length)
        return found


@given(
    layers=st.lists(
        st.tuples(
            st.lists(TABLES, min_size=SLICES, max_size=SLICES),
            st.integers(1, LENGTH // 512),
            st.sets(st.integers(0, 2)),
        ),
        min_size=1,
        max_size=4,
    ),
    is_raw_below=st.booleans(),
    reads=st.lists(st.tuples(st.integers(0, LENGTH - 1), st.integers(1, CLUSTER)), min_size=1, max_size=30),
)
def test_place_of_a_read_is_that_of_the_topmost_image_that_has_it(
    layers: list[tuple[list[Any], int, set[int]]], is_raw_below: bool, reads: list[tuple[int, int]]
) -> None:
    top: Any = File(99, LENGTH) if is_raw_below else None
    least = LENGTH
    for number, (tables, sectors, used) in enumerate(layers):
        top = Image(number, tables, sectors * 512, top, used)
        least = min(least, top.length)
    spot = top.spot()
    assert spot is not None
    for offset, length in reads:
        if offset + length > top.length:
            continue
        found = spot.find(offset, length)
        if offset + length <= least:
            assert found == top.place(offset, length)
        else:
            # Beyond the shortest image nothing has to be known, and nothing wrong may be said.
            assert found in (None, top.place(offset, length))
