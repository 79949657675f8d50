"""Looking for a snapshot among many."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qsd.drivers.qcow2.snapshot_table import StoredSnapshot, find

STORED = st.sampled_from((b"", b"1", b"10", b"1\x00", b"1\x002", b"\xff", "é".encode(), b"\x00"))
WANTED = st.sampled_from((None, "", "1", "10", "1\x00", "1\x002", "\udcff", "é", "\x00"))


def stored(snapshot_id: bytes, name: bytes) -> StoredSnapshot:
    return StoredSnapshot(l1_offset=0, l1_size=1, id=snapshot_id, name=name, date_ns=0, vm_clock_ns=0)


@given(st.lists(st.builds(stored, STORED, STORED), max_size=6), WANTED, WANTED)
def test_the_first_that_is_told_with_that_id_and_name_is_found(
    snapshots: list[StoredSnapshot], snapshot_id: str | None, name: str | None
) -> None:
    wanted = [
        each for each in snapshots if snapshot_id in (None, each.shown.id) and name in (None, each.shown.name)
    ]
    found = find(snapshots, snapshot_id, name)
    assert found is (wanted[0] if wanted else None)
