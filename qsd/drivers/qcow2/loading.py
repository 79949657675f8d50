"""Reading what has to be in memory while an image is open: the header, tables of 64-bit words, the snapshots."""

from __future__ import annotations

import contextlib
from array import array
from typing import Final

import trio

from qsd.drivers.base import Child
from qsd.drivers.qcow2.geometry import swap
from qsd.drivers.qcow2.layout import PROBE_LENGTH, SECTOR, Header, parse_header, parse_start, probe_cluster_size
from qsd.drivers.qcow2.snapshot_table import MAX_ENTRY, MAX_TABLE, StoredSnapshot, parse_entry
from qsd.errors import QmpError, errno_text

# Bytes of a table read at a time.
_PIECE: Final = 1 << 18


async def read_header(file: Child) -> Header:
    """The header of an image; of its cluster, what the header takes can be read. Raises QmpError."""
    try:
        size = probe_cluster_size(await _read(file, 0, PROBE_LENGTH))
        cluster, error = await _read_start(file, 0, size)
        if error is None:
            return parse_header(cluster)
        header = parse_start(cluster)
        if header is None:
            raise error
    except OSError as problem:
        raise QmpError(f"Could not read qcow2 header: {errno_text(problem.errno or 0)}") from None
    return header


async def _read(file: Child, offset: int, length: int) -> bytes:
    inside = max(0, min(length, file.length - offset))
    return await file.read(offset, inside) if inside else b""


async def _read_start(file: Child, offset: int, length: int) -> tuple[bytes, OSError | None]:
    """As much of a range as can be read from its beginning on, and why there is no more. Raises nothing.

    The same range may have a sector of somebody else's that is broken.
    """
    try:
        return await _read(file, offset, length), None
    except OSError as problem:
        error = problem
    length = min(length, file.length - offset)
    start = b""
    with contextlib.suppress(OSError):
        while len(start) < length:
            start += await file.read(offset + len(start), min(SECTOR, length - len(start)))
    return start, error


async def read_table(file: Child, offset: int, entries: int, failure: str) -> array[int]:
    """A table of 64-bit words; what lies beyond the end of the file is zeroes."""
    table = array("Q")
    try:
        # In pieces: the table is in memory once, and others run meanwhile, although what is cached is read at once.
        for start in range(0, entries * 8, _PIECE):
            if start:
                await trio.lowlevel.checkpoint()
            length = min(_PIECE, entries * 8 - start)
            found = await _read(file, offset + start, length)
            piece = array("Q", found if len(found) == length else found.ljust(length, b"\0"))
            swap(piece)
            table.extend(piece)
    except OSError as error:
        raise QmpError(f"{failure}: {errno_text(error.errno or 0)}") from None
    return table


# Bytes of the snapshot table read at a time; one entry fits in at least.
_WINDOW: Final = 2 * MAX_ENTRY
# Entries of the snapshot table looked at between two chances for others to run (1 ms).
ENTRIES: Final = 64


async def read_snapshots(file: Child, header: Header) -> tuple[tuple[StoredSnapshot, ...], int]:
    """The internal snapshots, and the bytes of the table; what lies beyond the file's end is zeroes."""
    found = []
    start, window, readable = 0, b"", 0
    error: OSError | None = None
    position = 0
    for number in range(header.snapshot_count):
        if position > MAX_TABLE:
            raise QmpError("Snapshot table too large")
        if position + MAX_ENTRY > start + len(window):
            start = position
            window, error = await _read_start(file, header.snapshots_offset + start, _WINDOW)
            readable = start + (len(window) if error else _WINDOW)
            window = window.ljust(_WINDOW, b"\0")
        if not number % ENTRIES:
            await trio.lowlevel.checkpoint()
        at = position - start
        snapshot, length = parse_entry(window[at : at + MAX_ENTRY], number)
        if error is not None and position + length > readable:
            raise QmpError(f"Could not read snapshots: {errno_text(error.errno or 0)}")
        found.append(snapshot)
        position += length
    return tuple(found), position
