"""What the store of dirty bitmaps sees of an image (``bitmaps.BitmapImage``)."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qsd.drivers.qcow2.image import Freeing, Image
from qsd.drivers.qcow2.layout import MAX_SIZE
from qsd.drivers.qcow2.metadata_map import BITMAP_DIRECTORY
from qsd.drivers.qcow2.storing import write_all

if TYPE_CHECKING:
    from qsd.drivers.qcow2.driver import Qcow2Driver
    from qsd.drivers.qcow2.layout import Header


class DriverImage:
    """The image a node has open, whichever that is: it is another one after the node was activated."""

    def __init__(self, driver: Qcow2Driver) -> None:
        self._driver = driver

    @property
    def header(self) -> Header:
        """The header as it is in the file."""
        return self._driver.image.header

    @property
    def length(self) -> int:
        """Bytes of the file."""
        return self._driver.image.file.length

    async def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file; beyond its end they are zeroes."""
        if offset + length > MAX_SIZE:
            raise OSError(errno.EIO, "no file is that long")
        file = self._driver.image.file
        there = max(0, min(length, file.length - offset))
        data = await file.read(offset, there) if there else b""
        return data.ljust(length, b"\0")

    async def write(self, pieces: Iterable[tuple[int, bytes]]) -> None:
        """Write pieces to clusters that were allocated here."""
        await write_all(self._writable().file, pieces)

    async def allocate(self, count: int) -> int:
        """The offset of ``count`` free clusters in a row, which have one reference from now on."""
        image = self._writable()
        first = await self._driver.settled(image.refs.allocate_contiguous, count)
        return first << image.geometry.cluster_bits

    async def release(self, offset: int, count: int) -> None:
        """Take a reference from clusters the file does not refer to any more, unless they are no such clusters."""
        image = self._writable()
        bits = image.geometry.cluster_bits
        first = offset >> bits
        if offset & (image.geometry.cluster_size - 1) or image.metadata.find(range(first, first + count)):
            raise OSError(errno.EINVAL, "clusters of something else")
        for cluster in range(first, first + count):
            if not await self._driver.settled(image.refs.get, cluster):
                raise OSError(errno.EINVAL, "clusters without a reference")
        image.release(offset, count, Freeing.OTHER)

    async def change_header(self, **changes: Any) -> None:
        """Let the header have other values, on stable storage."""
        image = self._writable()
        before = image.header.bitmaps_extension()
        await image.change_header(**changes)
        after = image.header.bitmaps_extension()
        if before is not None:
            image.metadata.remove(before.offset, before.size)
        if after is not None:
            image.metadata.add(BITMAP_DIRECTORY, after.offset, after.size)

    async def flush(self) -> None:
        """Everything done so far, reference counts included, reaches stable storage."""
        image = self._writable()
        await self._driver.writeback.settle()
        await image.file.flush()

    def _writable(self) -> Image:
        if not self._driver.is_writable:
            raise OSError(errno.EROFS, "the image is read-only")
        if self._driver.is_broken:
            raise OSError(errno.EIO, "the image is corrupt")
        return self._driver.image
