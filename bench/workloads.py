"""What is measured: one row per workload, with the ratio it must reach and the one it aims at."""

from __future__ import annotations

from enum import Enum

import attrs

KIB = 1024
MIB = 1024 * KIB
BUFFERED_MODES = ("io_uring", "threads")
# The reference accepts aio=native only together with cache.direct=on.
DIRECT_MODES = ("io_uring", "native", "threads")
# Behind an aio mode: the export is served by an iothread of its own.
IOTHREAD = "+iothread"


class Export(Enum):
    """How the disk gets to the client."""

    NBD = "nbd"
    FUSE = "fuse"


class Tool(Enum):
    """The program that makes the load."""

    FIO = "fio"
    NBDCOPY = "nbdcopy"
    NBDINFO = "nbdinfo --map"


class Unit(Enum):
    """What a workload is counted in. A megabyte is 10**6 bytes, an extent a line of a disk's map."""

    IOPS = "IOPS"
    MBPS = "MB/s"
    EXTENTS = "extents/s"


@attrs.frozen
class Side:
    """Load that is not measured: requests of ``block`` bytes, so many of each kind a second."""

    rw: str
    rate: int
    depth: int
    block: int = 64 * KIB


@attrs.frozen
class Workload:
    """One kind of load. ``block`` is in bytes; ``must`` and ``aim`` are ratios ours / reference.

    ``direct`` is about the image: how the daemon reads it. ``image`` is its kind (``bench.images.KINDS``). A
    workload that ``allocates`` ends after half as many requests as the image has clusters, so that most of them
    meet a new one. After every ``fsync`` writes comes a flush; ``beside`` is what other clients do meanwhile.
    """

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
    export: Export = Export.NBD
    image: str = "raw"
    allocates: bool = False
    fsync: int = 0
    beside: tuple[Side, ...] = ()

    @property
    def is_writing(self) -> bool:
        """Whether the image is dirty afterwards."""
        return "write" in self.rw

    @property
    def modes(self) -> tuple[str, ...]:
        """The ways in which the reference can serve this."""
        modes = DIRECT_MODES if self.direct else BUFFERED_MODES
        if self.export is Export.NBD:
            return modes
        return (*modes, *(mode + IOTHREAD for mode in modes))

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

# fio with libaio and O_DIRECT on the mounted file.
FUSE_WORKLOADS = (
    Workload("FUSE randread 4k QD1", 1.3, 2.5, export=Export.FUSE),
    Workload("FUSE randread 4k QD16", 2.0, 3.0, depth=16, export=Export.FUSE),
    Workload("FUSE randwrite 4k QD1", 1.3, 2.5, rw="randwrite", export=Export.FUSE),
    Workload("FUSE randwrite 4k QD16", 2.0, 3.0, rw="randwrite", depth=16, export=Export.FUSE),
    Workload("FUSE read 1M QD4", 2.0, 4.0, rw="read", block=MIB, depth=4, unit=Unit.MBPS, export=Export.FUSE),
    Workload("FUSE write 1M QD4", 1.5, 3.0, rw="write", block=MIB, depth=4, unit=Unit.MBPS, export=Export.FUSE),
    Workload("FUSE qcow2 randread 4k QD16", 1.8, 3.0, depth=16, export=Export.FUSE, image="qcow2"),
)

# All over NBD. What is fresh is made anew before every repetition. A second of writing does not fill it; the
# overlay is written a counted number of times.
QCOW2_WORKLOADS = (
    Workload("qcow2 randread 4k QD32", 1.8, 2.5, depth=32, image="qcow2"),
    Workload("qcow2 randread 4k QD1", 1.0, 2.0, image="qcow2"),
    Workload("qcow2 randwrite 4k QD32", 1.5, 2.5, rw="randwrite", depth=32, image="qcow2"),
    Workload("fresh qcow2 randwrite 4k QD32", 1.2, 2.0, rw="randwrite", depth=32, image="fresh"),
    Workload("fresh qcow2 write 1M QD8", 1.0, 1.5, rw="write", block=MIB, depth=8, unit=Unit.MBPS, image="fresh"),
    Workload(
        "fresh overlay randwrite 4k QD32", 1.2, 2.0, rw="randwrite", depth=32, image="overlay", allocates=True
    ),
    Workload("zlib qcow2 read 1M QD8", 2.0, 3.0, rw="read", block=MIB, depth=8, unit=Unit.MBPS, image="zlib"),
    Workload("zlib qcow2 randread 64k QD8", 2.0, 3.0, block=64 * KIB, depth=8, image="zlib"),
    Workload("8 overlays randread 4k QD32", 1.5, 2.5, depth=32, image="chain"),
    # How fast what is small and flushed gets on where others read, write and trim at a rate both daemons keep up.
    Workload(
        "flushed randwrite 4k beside others",
        must=1.0,
        aim=1.5,
        rw="randwrite",
        depth=8,
        fsync=16,
        image="trimmed",
        beside=(Side("randrw", 1500, 16), Side("randtrim", 1500, 4)),
    ),
    Workload("nbdinfo --map of 1 TiB", 1.0, 2.0, tool=Tool.NBDINFO, unit=Unit.EXTENTS, image="fragmented"),
)

# aes-256-xts, the cipher both choose unasked.
LUKS_WORKLOADS = (
    Workload("LUKS read 1M QD8", 1.0, 2.0, rw="read", block=MIB, depth=8, unit=Unit.MBPS, image="luks"),
    Workload("LUKS write 1M QD8", 1.0, 2.0, rw="write", block=MIB, depth=8, unit=Unit.MBPS, image="luks"),
)
GROUPS = {"nbd": WORKLOADS, "fuse": FUSE_WORKLOADS, "qcow2": QCOW2_WORKLOADS, "luks": LUKS_WORKLOADS}


def find_workloads(wanted: str | None, among: tuple[Workload, ...] = WORKLOADS) -> tuple[Workload, ...]:
    """Return the workloads whose name contains ``wanted`` in any case; an exact name means that one alone.

    Raises ValueError, naming all there are, if none does.
    """
    if not wanted:
        return among
    word = wanted.lower()
    exact = tuple(each for each in among if each.name.lower() == word)
    found = exact or tuple(each for each in among if word in each.name.lower())
    if not found:
        raise ValueError(f"no workload is called {wanted!r}; there are: {', '.join(each.name for each in among)}")
    return found
