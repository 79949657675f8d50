"""What of the mapping tables the image file does not have yet.

L2 slices and L1 sectors that were changed are noted here until they are written. When a write-back begins, what is
dirty is frozen: it is written as it was at that moment, because only what it refers to then has been brought to the
disk before. A frozen slice that is changed meanwhile leaves a copy behind.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import partial
from typing import Final

import attrs

from qsd.drivers.qcow2.geometry import big_endian
from qsd.drivers.qcow2.tables import Pins

# Words of the L1 table that are written at once (512 bytes).
L1_SECTOR: Final = 64


@attrs.define
class Frozen:
    """A slice as it is to be written: words ``first`` to ``last`` (excluded) differ from the image's."""

    table: array[int]
    first: int
    last: int

    def words(self, first: int, last: int) -> bytes:
        """Words ``first`` to ``last`` (excluded) as they stand in the image."""
        return big_endian(self.table[first:last])


class DirtyTables:
    """See the module. ``number`` counts slices of L2 tables; ``resume`` is the driver's."""

    def __init__(self, resume: Callable[[Callable[[], None]], None]) -> None:
        self.slices: dict[int, tuple[int, int]] = {}
        self.l1: set[int] = set()
        self.frozen: dict[int, Frozen] = {}
        self.frozen_l1: dict[int, bytes] = {}
        # Slices that are going to be changed, and who waits for one of them to have been.
        self._pins = Pins()
        self._waiting: list[Callable[[int], None]] = []
        self._resume = resume

    def __bool__(self) -> bool:
        return bool(self.slices or self.l1)

    def is_pinned(self, number: int) -> bool:
        """Whether a slice must stay in memory."""
        return number in self.slices or number in self.frozen or number in self._pins

    @property
    def pinned(self) -> int:
        """How many slices must stay in memory, at most."""
        return len(self.slices) + len(self.frozen) + len(self._pins)

    def pin(self, number: int) -> None:
        """Keep a slice that is going to be changed."""
        self._pins.add(number)

    def unpin(self, number: int) -> None:
        """End one ``pin``. Whoever calls this sees to ``send``."""
        self._pins.remove(number)
        waiting, self._waiting = self._waiting, []
        for done in waiting:
            self._resume(partial(done, 0))

    def when_unpinned(self, done: Callable[[int], None]) -> None:
        """Call ``done(0)`` after the next ``unpin``."""
        self._waiting.append(done)

    def touch(self, number: int, table: array[int], first: int, last: int) -> None:
        """Words ``first`` to ``last`` (excluded) of a slice are about to change. Call before changing them."""
        frozen = self.frozen.get(number)
        if frozen is not None and frozen.table is table:
            frozen.table = table[:]
        known = self.slices.get(number)
        self.slices[number] = (first, last) if known is None else (min(first, known[0]), max(last, known[1]))

    def touch_l1(self, index: int) -> None:
        """An entry of the L1 table has changed."""
        self.l1.add(index // L1_SECTOR)

    def drop(self, number: int) -> None:
        """A slice is no longer part of the image. It is not frozen."""
        assert number not in self.frozen, "others rely on it being written"
        self.slices.pop(number, None)

    def freeze(self, l1: array[int], find: Callable[[int], array[int] | None]) -> None:
        """Take what is dirty out to be written."""
        assert not self.frozen, "one write-back at a time"
        for number, (first, last) in self.slices.items():
            table = find(number)
            assert table is not None, "a dirty slice is pinned"
            self.frozen[number] = Frozen(table, first, last)
        self.slices.clear()
        for sector in self.l1:
            self.frozen_l1[sector] = big_endian(l1[sector * L1_SECTOR : (sector + 1) * L1_SECTOR])
        self.l1.clear()

    def thaw(self) -> None:
        """What was frozen could not be written: it is dirty as before."""
        for number, frozen in self.frozen.items():
            known = self.slices.get(number, (frozen.first, frozen.last))
            self.slices[number] = (min(frozen.first, known[0]), max(frozen.last, known[1]))
        self.frozen.clear()
        self.l1.update(self.frozen_l1)
        self.frozen_l1.clear()
