"""Which host clusters hold metadata, to refuse writes that would destroy it (the option overlap-check).

Pure. An entry per metadata cluster that is in use, so an image that describes much and holds little stays small in
memory. Names and levels are the reference's.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any, Final

from qsd.drivers.qcow2.geometry import OFFSET_MASK

MAIN_HEADER: Final = "qcow2_header"
ACTIVE_L1: Final = "active L1 table"
ACTIVE_L2: Final = "active L2 table"
REFCOUNT_TABLE: Final = "refcount table"
REFCOUNT_BLOCK: Final = "refcount block"
SNAPSHOT_TABLE: Final = "snapshot table"
INACTIVE_L1: Final = "inactive L1 table"
INACTIVE_L2: Final = "inactive L2 table"
BITMAP_DIRECTORY: Final = "bitmap directory"
# Not the reference's: checked when the main header is. Without it all that is encrypted is lost.
ENCRYPTION_HEADER: Final = "encryption header"

# Option member -> kind, and from which mode on it is checked.
_CHECKS: Final = {
    "main_header": (MAIN_HEADER, "constant"),
    "active_l1": (ACTIVE_L1, "constant"),
    "active_l2": (ACTIVE_L2, "cached"),
    "refcount_table": (REFCOUNT_TABLE, "constant"),
    "refcount_block": (REFCOUNT_BLOCK, "cached"),
    "snapshot_table": (SNAPSHOT_TABLE, "constant"),
    "inactive_l1": (INACTIVE_L1, "cached"),
    "inactive_l2": (INACTIVE_L2, "all"),
    "bitmap_directory": (BITMAP_DIRECTORY, "constant"),
}
_MODES: Final = ("none", "constant", "cached", "all")


def checks_of(option: Any) -> frozenset[str]:
    """The kinds that ``overlap-check`` (a mode, or flags on top of one) says are checked; None: the default."""
    flags = None
    mode = "cached"
    if option is not None:
        flags = option if hasattr(option, "template") else None
        chosen = option.template if flags is not None else option
        mode = "cached" if chosen is None else chosen.value
    level = _MODES.index(mode)
    checked = set()
    for member, (kind, since) in _CHECKS.items():
        given = None if flags is None else getattr(flags, member)
        if _MODES.index(since) <= level if given is None else given:
            checked.add(kind)
    if MAIN_HEADER in checked:
        checked.add(ENCRYPTION_HEADER)
    return frozenset(checked)


class MetadataMap:
    """Host cluster -> what kind of metadata it holds. ``clusters`` is what the hot path looks into."""

    def __init__(self, cluster_bits: int, checked: frozenset[str]) -> None:
        self._bits = cluster_bits
        self.checked = checked
        self.clusters: dict[int, str] = {}

    def add(self, kind: str, offset: int, length: int) -> None:
        """A structure of ``length`` bytes stands at ``offset``."""
        if kind in self.checked and length:
            for cluster in range(offset >> self._bits, (offset + length - 1 >> self._bits) + 1):
                self.clusters[cluster] = kind

    def add_tables(self, kind: str, entries: array[int], mask: int = OFFSET_MASK, *, replaces: bool = True) -> None:
        """Every entry that is not 0 leads to one cluster of that kind; ``replaces``: whatever it was before."""
        if kind in self.checked:
            bits = self._bits
            found = {(entry & mask) >> bits: kind for entry in entries if entry & mask}
            self.clusters.update(found if replaces else {each: kind for each in found if each not in self.clusters})

    def remove(self, offset: int, length: int) -> None:
        """What stood there is gone."""
        if length:
            for cluster in range(offset >> self._bits, (offset + length - 1 >> self._bits) + 1):
                self.clusters.pop(cluster, None)

    def forget(self, kind: str, offset: int) -> None:
        """The cluster at ``offset`` is no longer of that kind, if it was."""
        if self.clusters.get(offset >> self._bits) == kind:
            del self.clusters[offset >> self._bits]

    def find(self, clusters: Iterable[int]) -> str | None:
        """The kind of the first of ``clusters`` that holds metadata."""
        known = self.clusters
        return next((known[cluster] for cluster in clusters if cluster in known), None)
