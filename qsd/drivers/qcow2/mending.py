"""An image that was not closed is repaired when it is opened to be written (its dirty bit says so).

The check and the repair run on a thread, which asks the loop for every read and write of the image file: other
nodes and their clients go on meanwhile, and whatever the file is, the node below it serves it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from qsd.drivers.base import Child
from qsd.drivers.qcow2.examining import Examined, Repairs, check_and_repair
from qsd.drivers.qcow2.layout import Header, unmarking
from qsd.drivers.qcow2.loading import read_header, read_snapshots, read_table
from qsd.errors import QmpError, errno_text

if TYPE_CHECKING:
    from qsd.drivers.qcow2.driver import Qcow2Driver
    from qsd.drivers.qcow2.image import Image

log = logging.getLogger("qsd.qcow2")

# Lines about damage that are kept to be told.
MAX_PROBLEMS: Final = 20


async def mend(driver: Qcow2Driver, image: Image) -> None:
    """Repair ``image``, of which nothing is in memory but header, L1 table and snapshots. Raises QmpError.

    Afterwards its header, L1 table and snapshots are those of the file. What is beyond repair leaves the mark where
    it is.
    """
    try:
        examined = await repaired(image.file, image.header)
        found, fixed = examined.found, examined.fixed
        header = await read_header(image.file)
        image.header = attrs.evolve(header, feature_names=image.header.feature_names)
        if found.corruptions:
            log.warning("%s is damaged beyond repair: %s", driver.node_name, "; ".join(found.problems))
        else:
            await image.header_changes.change(unmarking)
            log.info("%s: repaired %d leaks, %d corruptions", driver.node_name, fixed.leaks, fixed.corruptions)
        l1 = await read_table(image.file, header.l1_offset, header.l1_size, "Could not read L1 table")
        image.map.l1[:] = l1
        image.take_snapshots(*await read_snapshots(image.file, header))
    except OSError as error:
        raise QmpError(f"Could not repair dirty image: {errno_text(error.errno or 0)}") from None


async def repaired(file: Child, header: Header) -> Examined:
    """Check and repair what is in a file. Raises OSError."""
    return await trio.to_thread.run_sync(_check_and_repair, _OnThread(file), header)


def _check_and_repair(file: _OnThread, header: Header) -> Examined:
    return check_and_repair(file, header, Repairs.ALL, max_problems=MAX_PROBLEMS)


class _OnThread:
    """The image file, for a thread. Everything raises OSError."""

    def __init__(self, file: Child) -> None:
        self._file = file

    @property
    def length(self) -> int:
        """Bytes of the file."""
        return self._file.length

    def read(self, offset: int, length: int) -> bytes:
        """Bytes; beyond the end of the file they are zeroes."""
        inside = max(0, min(length, self._file.length - offset))
        data: bytes = self._ask(self._file.read, offset, inside) if inside else b""
        return data.ljust(length, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """Write; the file becomes as long as that takes."""
        self._ask(self._write, offset, data)

    def flush(self) -> None:
        """Return when everything is on the disk."""
        self._ask(self._file.flush)

    async def _write(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        if end > self._file.length and not self._file.grow(end):
            await self._file.truncate(end, exact=False)
        await self._file.write(offset, data)

    @staticmethod
    def _ask(function: Any, *args: Any) -> Any:
        return trio.from_thread.run(function, *args)
