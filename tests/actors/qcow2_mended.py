"""What opening a dirty image does to its bytes, without a node."""

from __future__ import annotations

from qsd.drivers.qcow2.examining import Examined, Repairs, check_and_repair
from qsd.drivers.qcow2.layout import Header, parse_header


class Bytes:
    """An image file in memory, as ``examining`` takes it."""

    def __init__(self, data: bytearray) -> None:
        self.data = data

    @property
    def length(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length]).ljust(length, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        self.data.extend(bytes(max(0, offset + len(data) - len(self.data))))
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        """Nothing can be lost."""


def mend(image: bytearray) -> Examined:
    """Check and repair; the marks in the header stay."""
    return check_and_repair(Bytes(image), header_of(image), Repairs.ALL)


def header_of(image: bytearray) -> Header:
    """The header as it is now."""
    return parse_header(bytes(image[: 1 << 21]))
