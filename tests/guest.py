"""What a guest may read: the requests whose effect each part of a disk may show, now or after a power cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import attrs

from qsd.messages import Op

SECTOR: Final = 512
NEVER: Final = 1 << 60


@attrs.define(eq=False)
class GuestOp:
    """A request of the guest, in whole units. ``number`` 0 is what was there in the beginning."""

    number: int
    kind: Op
    first: int
    count: int
    flags: int = 0
    issued: int = 0
    done: int = NEVER
    # Of a flush: the requests that had ended when it was issued.
    covers: list[GuestOp] = attrs.field(factory=list)
    # Of a read: what each unit may be, as a list of requests.
    seen: list[list[GuestOp]] = attrs.field(factory=list)
    has_failed: bool = False


class Allowed:
    """The requests whose effect each unit may show."""

    def __init__(self, units: int, origin: GuestOp) -> None:
        self.units = [[origin] for _ in range(units)]

    def add(self, op: GuestOp) -> None:
        """It may show from now on."""
        for unit in range(op.first, op.first + op.count):
            self.units[unit].append(op)

    def settle(self, op: GuestOp) -> None:
        """It shows for certain: what had ended before it began does not show any more."""
        if op.kind == Op.DISCARD:
            return
        for unit in range(op.first, op.first + op.count):
            self.units[unit] = [other for other in self.units[unit] if other.done >= op.issued]


def assert_shown(
    data: bytes, first: int, allowed: list[list[GuestOp]], size: int, value: Callable[[GuestOp, int], bytes]
) -> None:
    """Assert that every unit from ``first`` on shows what it may; of units larger than a sector, every sector.

    ``value(op, unit)`` is what a unit of ``size`` bytes holds after a request.
    """
    for index, ops in enumerate(allowed):
        unit = first + index
        found = data[index * size : (index + 1) * size]
        values = [value(op, unit) for op in ops]
        if found in values:
            continue
        for at in range(0, size, SECTOR):
            piece = found[at : at + SECTOR]
            pieces = [each[at : at + SECTOR] for each in values]
            assert piece in pieces, f"unit {unit} byte {at}: {piece[:48]!r} is none of {pieces} of {ops}"
