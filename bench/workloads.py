"""What is measured: one row per workload, with the ratio it must reach and the one it aims at."""

from __future__ import annotations

from enum import Enum

import attrs

KIB = 1024
MIB = 1024 * KIB
BUFFERED_MODES = ("io_uring", "threads")
# The reference accepts aio=native only together with cache.direct=on.
DIRECT_MODES = ("io_uring", "native", "threads")


class Tool(Enum):
    """The program that makes the load."""

    FIO = "fio"
    NBDCOPY = "nbdcopy"


class Unit(Enum):
    """What a workload is counted in. A megabyte is 10**6 bytes."""

    IOPS = "IOPS"
    MBPS = "MB/s"


@attrs.frozen
class Workload:
    """One kind of load. ``block`` is in bytes; ``must`` and ``aim`` are ratios ours / reference."""

    name: str
    must: float
    aim: float
    rw: str = "randread"
    block: int = 4 * KIB
    depth: int = 1
    clients: int = 1
    direct: bool = False
    tool: Tool = Tool.FIO
    unit: Unit = Unit.IOPS

    @property
    def is_writing(self) -> bool:
        """Whether the image is dirty afterwards."""
        return "write" in self.rw

    @property
    def modes(self) -> tuple[str, ...]:
        """The aio modes in which the reference can serve this."""
        return DIRECT_MODES if self.direct else BUFFERED_MODES

    @property
    def title(self) -> str:
        """The row's heading, unit included."""
        return f"{self.name}, {self.unit.value}"


WORKLOADS = (
    Workload("randread 4k QD32", 1.8, 2.5, depth=32),
    Workload("randread 4k QD1", 1.0, 2.0),
    Workload("randwrite 4k QD32", 1.5, 3.0, rw="randwrite", depth=32),
    Workload("randwrite 4k QD1", 1.0, 2.0, rw="randwrite"),
    Workload("read 1M QD8", 1.2, 1.5, rw="read", block=MIB, depth=8, unit=Unit.MBPS),
    Workload("write 1M QD8", 1.2, 1.5, rw="write", block=MIB, depth=8, unit=Unit.MBPS),
    Workload("O_DIRECT randread 4k QD32", 1.0, 1.3, depth=32, direct=True),
    Workload("O_DIRECT randread 4k QD1", 0.9, 1.0, direct=True),
    Workload("4 x randread 4k QD8", 1.5, 2.5, depth=8, clients=4),
    Workload("nbdcopy to null:", 1.2, 1.5, rw="read", tool=Tool.NBDCOPY, unit=Unit.MBPS),
)


def find_workloads(wanted: str | None) -> tuple[Workload, ...]:
    """Return the workloads whose name contains ``wanted`` in any case; an exact name means that one alone.

    Raises ValueError, naming all there are, if none does.
    """
    if not wanted:
        return WORKLOADS
    word = wanted.lower()
    exact = tuple(each for each in WORKLOADS if each.name.lower() == word)
    found = exact or tuple(each for each in WORKLOADS if word in each.name.lower())
    if not found:
        raise ValueError(
            f"no workload is called {wanted!r}; there are: {', '.join(each.name for each in WORKLOADS)}"
        )
    return found
