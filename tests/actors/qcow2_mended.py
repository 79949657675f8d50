"""What opening a dirty image does to its bytes, without a node, or without the node's thread."""

from __future__ import annotations

from typing import Any

from qsd.drivers.qcow2.examining import Examined, Repairs, check_and_repair
from qsd.drivers.qcow2.layout import SECTOR, Header, parse_header


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


async def repaired(file: Any, _header: Header) -> Examined:
    """``mending.repaired`` of a file in memory, at once."""
    image = bytearray(file.data)
    examined = mend(image)
    if len(image) > file.length:
        await file.truncate(len(image))
    for start in range(0, len(image), SECTOR):
        piece = bytes(image[start : start + SECTOR])
        if piece != file.data[start : start + SECTOR]:
            await file.write(start, piece)
    await file.flush()
    return examined


def header_of(image: bytearray) -> Header:
    """The header as it is now."""
    return parse_header(bytes(image[: 1 << 21]))
