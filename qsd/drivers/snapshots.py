"""Internal snapshots as values: what an image's list of them says."""

from __future__ import annotations

from typing import Any

import attrs

NANOSECONDS = 1_000_000_000


@attrs.frozen
class InternalSnapshot:
    """A snapshot inside an image. ``date_ns`` counts from the epoch, ``vm_clock_ns`` since the guest was started.

    ``icount`` is None in images whose list has no place for it.
    """

    id: str
    name: str
    date_ns: int
    vm_clock_ns: int
    vm_state_size: int = 0
    icount: int | None = None

    def as_json(self) -> dict[str, Any]:
        """``SnapshotInfo``."""
        date, date_rest = divmod(self.date_ns, NANOSECONDS)
        clock, clock_rest = divmod(self.vm_clock_ns, NANOSECONDS)
        shown = {
            "id": self.id,
            "name": self.name,
            "vm-state-size": self.vm_state_size,
            "date-sec": date,
            "date-nsec": date_rest,
            "vm-clock-sec": clock,
            "vm-clock-nsec": clock_rest,
        }
        return shown if self.icount is None else shown | {"icount": self.icount}
