"""The snapshot table: what an image says about each of its internal snapshots, as bytes and as values.

Pure. Follows the qcow2 specification ("Snapshots"). What a later version may add to an entry survives.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

import attrs

from qsd.drivers.snapshots import NANOSECONDS, InternalSnapshot
from qsd.errors import QmpError

# L1 offset, L1 entries, bytes of id, of name, date (s, ns), guest's clock (ns), VM state bytes, bytes of extra.
ENTRY: Final = struct.Struct(">QIHHIIQII")
# VM state bytes, disk size, instruction count (all ones: none).
_EXTRA: Final = struct.Struct(">QQQ")
# Bytes of extra data that every entry of a version 3 image has.
MIN_EXTRA_V3: Final = 16
MAX_EXTRA: Final = 1024
# Bytes: of one entry with everything, and of the table.
MAX_ENTRY: Final = ENTRY.size + MAX_EXTRA + 2 * 0xFFFF + 8
MAX_TABLE: Final = 64 << 20
# A name that is longer is cut.
MAX_NAME: Final = 255
_NO_ICOUNT: Final = (1 << 64) - 1


@attrs.frozen(kw_only=True)
class StoredSnapshot:
    """An entry. ``disk_size`` and ``icount`` are None where the image does not say it; ``later``: unknown data."""

    l1_offset: int
    l1_size: int
    id: bytes
    name: bytes
    date_ns: int
    vm_clock_ns: int
    vm_state_size: int = 0
    disk_size: int | None = None
    icount: int | None = None
    later: bytes = b""

    @property
    def shown(self) -> InternalSnapshot:
        """As QMP tells it."""
        return InternalSnapshot(
            _text(self.id), _text(self.name), self.date_ns, self.vm_clock_ns, self.vm_state_size, self.icount
        )


def _text(stored: bytes) -> str:
    return stored.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def find(snapshots: Iterable[StoredSnapshot], snapshot_id: str | None, name: str | None) -> StoredSnapshot | None:
    """The first with that id and that name, each None for any, as they are told.

    They are compared as they are stored: for 65535 that takes 10 ms, and to tell them all takes 100.
    """
    wanted_id, wanted_name = _stored(snapshot_id), _stored(name)
    for each in snapshots:
        if (wanted_id is None or _is_text(each.id, wanted_id)) and (
            wanted_name is None or _is_text(each.name, wanted_name)
        ):
            return each
    return None


def _stored(text: str | None) -> bytes | None:
    return None if text is None else text.encode("utf-8", "surrogateescape")


def _is_text(stored: bytes, wanted: bytes) -> bool:
    return stored == wanted if b"\0" not in stored else stored.split(b"\0", 1)[0] == wanted


def parse_entry(data: bytes, number: int) -> tuple[StoredSnapshot, int]:
    """The entry at the start of ``data``, which is the table's entry ``number``; and its bytes with the padding.

    Raises QmpError.
    """
    l1_offset, l1_size, id_size, name_size, date, date_rest, clock, state, extra_size = ENTRY.unpack_from(data)
    if extra_size > MAX_EXTRA:
        raise QmpError(f"Too much extra metadata in snapshot table entry {number}")
    extra = data[ENTRY.size : ENTRY.size + extra_size]
    if len(extra) >= 8:
        state = int.from_bytes(extra[:8], "big")
    icount = int.from_bytes(extra[16:24], "big") if len(extra) >= _EXTRA.size else _NO_ICOUNT
    at = ENTRY.size + extra_size
    end = at + id_size + name_size
    snapshot = StoredSnapshot(
        l1_offset=l1_offset,
        l1_size=l1_size,
        id=data[at : at + id_size],
        name=data[at + id_size : end],
        date_ns=date * NANOSECONDS + date_rest,
        vm_clock_ns=clock,
        vm_state_size=state,
        disk_size=int.from_bytes(extra[8:16], "big") if len(extra) >= MIN_EXTRA_V3 else None,
        icount=None if icount == _NO_ICOUNT else icount,
        later=extra[_EXTRA.size :],
    )
    return snapshot, -(-end // 8) * 8


def pack(snapshots: Iterable[StoredSnapshot], disk_size: int) -> bytes:
    """The table. ``disk_size`` stands in where an entry does not say its own."""
    return b"".join(_pack_entry(snapshot, disk_size) for snapshot in snapshots)


def _pack_entry(snapshot: StoredSnapshot, disk_size: int) -> bytes:
    date, date_rest = divmod(snapshot.date_ns, NANOSECONDS)
    state = snapshot.vm_state_size
    fields = ENTRY.pack(
        snapshot.l1_offset,
        snapshot.l1_size,
        len(snapshot.id),
        len(snapshot.name),
        date,
        date_rest,
        snapshot.vm_clock_ns,
        state if state < 1 << 32 else 0,
        _EXTRA.size + len(snapshot.later),
    )
    size = disk_size if snapshot.disk_size is None else snapshot.disk_size
    extra = _EXTRA.pack(state, size, _NO_ICOUNT if snapshot.icount is None else snapshot.icount)
    whole = fields + extra + snapshot.later + snapshot.id + snapshot.name
    return whole.ljust(-(-len(whole) // 8) * 8, b"\0")


def next_id(snapshots: Iterable[StoredSnapshot]) -> bytes:
    """A number larger than all there are; ids that do not begin with digits count as 0."""
    return b"%d" % (1 + max((_number(snapshot.id) for snapshot in snapshots), default=0))


def _number(stored: bytes) -> int:
    digits = stored[: len(stored) - len(stored.lstrip(b"0123456789"))]
    return min(int(digits or b"0"), _NO_ICOUNT - 1)
