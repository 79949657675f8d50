"""How often clusters are used against how often they are counted, and how often they should be.

Pure. What looks leaked stays counted where something leads nowhere: it may be what that should lead to.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import attrs

from qsd.drivers.qcow2.counts import BLOCK, BLOCK_BITS, Counts, last_used


@attrs.define(eq=False)
class Comparison:
    """``highest``: what a count can be at most. ``end``: the cluster behind the file, and behind what begins in it.

    ``is_lossy``: something leads nowhere.
    """

    used: Counts
    counted: Counts
    highest: int
    end: int
    is_lossy: bool = False

    def differences(self) -> Iterator[tuple[int, int, int]]:
        """Cluster, counted, used, where they differ.

        What is counted beyond the end is nobody's space, and what is used there counts as not counted.
        """
        nothing = array("H", bytes(2 * BLOCK))
        for index in sorted(set(self.counted.blocks) | set(self.used.blocks)):
            counted = self.counted.blocks.get(index, nothing)
            used = self.used.blocks.get(index, nothing)
            inside = max(0, min(BLOCK, self.end - (index << BLOCK_BITS)))
            if counted[:inside] != used[:inside]:
                for position in range(inside):
                    if counted[position] != used[position]:
                        yield (index << BLOCK_BITS) + position, counted[position], used[position]
            for position in range(inside, last_used(used, BLOCK) + 1):
                if used[position]:
                    yield (index << BLOCK_BITS) + position, 0, used[position]

    def changes(self) -> Iterator[tuple[int, int, int]]:
        """Cluster, counted, and what should be counted, where they differ."""
        for cluster, counted, used in self.differences():
            wanted = self._wanted(cluster, counted, used)
            if wanted != counted:
                yield cluster, counted, wanted

    def wanted(self, cluster: int) -> int:
        """How often a cluster should be counted."""
        return self._wanted(cluster, self.counted.get(cluster), self.used.get(cluster))

    def _wanted(self, cluster: int, counted: int, used: int) -> int:
        if self.is_lossy:
            # The file does not become longer by what leads there: more of what leads nowhere would look sound.
            used = counted if cluster >= self.end else max(counted, used)
        return min(used, self.highest)

    def end_of_use(self) -> int:
        """The cluster behind the last that is counted or used before the end."""
        blocks = self.counted.blocks, self.used.blocks
        # Only where there are any: a file may be exabytes long, and holes.
        for index in sorted(set().union(*blocks), reverse=True):
            inside = max(0, min(BLOCK, self.end - (index << BLOCK_BITS)))
            last = max(last_used(kind.get(index), inside) for kind in blocks)
            if last >= 0:
                return (index << BLOCK_BITS) + last + 1
        return 0
