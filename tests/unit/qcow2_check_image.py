"""An image in memory to be damaged, checked and repaired."""

from __future__ import annotations

import attrs

from qsd.drivers.qcow2 import layout
from qsd.drivers.qcow2.bitmap_layout import DirectoryEntry, pack_directory
from qsd.drivers.qcow2.check import Checker
from qsd.drivers.qcow2.examining import Examined, Repairs, check_and_repair, examine
from qsd.drivers.qcow2.extensions import BitmapsExtension
from qsd.drivers.qcow2.layout import Header
from qsd.drivers.qcow2.ledger import Findings
from qsd.drivers.qcow2.new_image import NewImage, header_cluster, metadata, place
from qsd.drivers.qcow2.side_tables import snapshots_of
from qsd.drivers.qcow2.snapshot_table import ENTRY as ENTRY_OF_SNAPSHOT
from qsd.drivers.qcow2.snapshot_table import StoredSnapshot

SIZE = 1 << 16


class Image:
    """An image in memory."""

    def __init__(
        self, *, allocates: bool = True, size: int = 20 * SIZE, incompatible: int = 0, order: int = 4
    ) -> None:
        header = Header(cluster_bits=16, size=size, incompatible=incompatible, refcount_order=order)
        placement = place(NewImage(header=header, allocates=allocates))
        self.header = placement.header
        self.data = bytearray(placement.end * SIZE)
        for offset, part in [(0, header_cluster(placement.header)), *metadata(placement)]:
            self.data[offset : offset + len(part)] = part
        self.l2 = placement.l2_tables * SIZE
        self.block = placement.refcount_blocks * SIZE

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length]).ljust(length, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        self.data.extend(bytes(max(0, offset + len(data) - len(self.data))))
        self.data[offset : offset + len(data)] = data

    def word(self, offset: int) -> int:
        return int.from_bytes(self.data[offset : offset + 8], "big")

    def set_word(self, offset: int, value: int) -> None:
        self.write(offset, value.to_bytes(8, "big"))

    def count(self, cluster: int, value: int) -> None:
        """Set a refcount (16 bits)."""
        self.write(self.block + 2 * cluster, value.to_bytes(2, "big"))

    def check(self) -> Findings:
        return Checker(self.header, self.read, len(self.data)).run()

    @property
    def length(self) -> int:
        return len(self.data)

    def flush(self) -> None:
        """All of it is where it belongs."""

    def examine(self, repairs: Repairs) -> Examined:
        return examine(self, repairs)

    def append(self, data: bytes) -> int:
        """Put data into counted clusters behind the file; its offset."""
        offset = -(-len(self.data) // SIZE) * SIZE
        self.write(offset, data.ljust(-(-len(data) // SIZE) * SIZE, b"\0"))
        for cluster in range(offset // SIZE, len(self.data) // SIZE):
            self.count(cluster, 1)
        return offset

    def put_header(self, header: Header) -> None:
        self.header = header
        self.write(0, layout.serialise_header(header))

    def add_snapshots(self, *extras: bytes | int) -> None:
        """Snapshots of an empty disk, each with its extra data, or with what it says that there is of it."""
        table = b""
        for number, extra in enumerate(extras):
            said, extra = (extra, b"") if isinstance(extra, int) else (len(extra), extra)
            entry = ENTRY_OF_SNAPSHOT.pack(0, 0, 1, 4, 0, 0, 0, 77, said) + extra + b"%dname" % number
            table += entry.ljust(-(-len(entry) // 8) * 8, b"\0")
        changes = {"snapshot_count": len(extras), "snapshots_offset": self.append(table)}
        self.put_header(attrs.evolve(self.header, **changes))

    def snapshots(self) -> list[StoredSnapshot]:
        header = layout.parse_header(self.data[:SIZE])
        return [entry.parse(self.read) for entry in snapshots_of(header, self.read)]

    def add_bitmap(self) -> tuple[int, int]:
        """A bitmap of one cluster of bits: where its directory and its table are."""
        table = self.append(self.append(b"bits").to_bytes(8, "big"))
        packed = pack_directory([DirectoryEntry(b"b", table, 1, 16)])
        directory = self.append(packed)
        where = BitmapsExtension(1, len(packed), directory).serialise()
        header = attrs.evolve(self.header, autoclear=layout.BITMAPS)
        self.put_header(header.with_extension(layout.EXT_BITMAPS, where))
        return directory, table

    def repair(self, *, leaks_only: bool = False) -> Findings:
        check_and_repair(self, self.header, Repairs.LEAKS if leaks_only else Repairs.ALL)
        self.header = layout.parse_header(self.data[:SIZE])
        return self.check()
