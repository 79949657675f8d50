"""Which host clusters hold metadata, to refuse writes that would destroy it (the option overlap-check).

Pure. An entry per metadata cluster that is in use, so an image that describes much and holds little stays small in
memory. Names and levels are the reference's.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any, Final

from qsd.drivers.qcow2.cluster_table import ClusterTable
from qsd.drivers.qcow2.geometry import OFFSET_MASK

# From so many tables on they are kept in few bytes each, where a look-up takes longer (0.4 to 2 us).
MANY: Final = 1 << 16

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
        self.clusters: dict[int, str] | ClusterTable = {}

    def expect(self, clusters: int, *, ascending: int = 0) -> None:
        """So many clusters are going to be added, and so many by ``add_ascending``. Call before anything is."""
        if clusters + ascending > MANY:
            self.clusters = ClusterTable(max(clusters, MANY))

    def add_ascending(self, kind: str, clusters: array[int]) -> bool:
        """Take in clusters that ascend, which stay as they are; False when they have to be put in one by one."""
        is_kept = isinstance(self.clusters, ClusterTable)
        if isinstance(self.clusters, ClusterTable) and kind in self.checked:
            self.clusters.add_ascending(clusters, kind)
        return is_kept

    def put(self, kind: str, clusters: Iterable[int], *, replaces: bool = True) -> None:
        """Clusters are of that kind; ``replaces``: whatever they were before."""
        if kind in self.checked:
            known = self.clusters
            self._put(clusters if replaces else [each for each in clusters if each not in known], kind)

    def _put(self, clusters: Iterable[int], kind: str) -> None:
        if isinstance(self.clusters, ClusterTable):
            self.clusters.put(clusters, kind)
        else:
            self.clusters.update(dict.fromkeys(clusters, kind))

    def _covered(self, offset: int, length: int) -> range:
        """The clusters of a range of bytes."""
        return range(offset >> self._bits, (offset + length - 1 >> self._bits) + 1 if length else 0)

    def add(self, kind: str, offset: int, length: int, *, replaces: bool = True) -> None:
        """A structure of ``length`` bytes stands at ``offset``; ``replaces``: whatever stood there before."""
        self.put(kind, self._covered(offset, length), replaces=replaces)

    def add_tables(self, kind: str, entries: array[int], mask: int = OFFSET_MASK, *, replaces: bool = True) -> None:
        """Every entry that is not 0 leads to one cluster of that kind; ``replaces``: whatever it was before."""
        if kind in self.checked:
            bits = self._bits
            self.put(kind, [(entry & mask) >> bits for entry in entries if entry & mask], replaces=replaces)

    def remove(self, offset: int, length: int) -> None:
        """What stood there is gone."""
        for cluster in self._covered(offset, length):
            self.clusters.pop(cluster, None)

    def forget(self, kind: str, offset: int) -> None:
        """The cluster at ``offset`` is no longer of that kind, if it was."""
        if self.clusters.get(offset >> self._bits) == kind:
            self.clusters.pop(offset >> self._bits)

    def kind_at(self, offset: int, length: int) -> str | None:
        """The kind of the first cluster of a range of bytes that holds metadata."""
        return self.find(self._covered(offset, length))

    def end(self) -> int:
        """A cluster behind all that hold metadata; there may be others in between."""
        known = self.clusters
        last = known.highest() if isinstance(known, ClusterTable) else max(known, default=-1)
        return last + 1

    def find(self, clusters: Iterable[int]) -> str | None:
        """The kind of the first of ``clusters`` that holds metadata."""
        known = self.clusters
        return next((known[cluster] for cluster in clusters if cluster in known), None)
