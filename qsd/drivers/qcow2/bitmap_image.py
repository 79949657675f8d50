"""What the store of dirty bitmaps sees of an image (``bitmaps.BitmapImage``)."""

from __future__ import annotations

import errno
from typing import Any

from qsd.drivers.base import Child
from qsd.drivers.qcow2.layout import Header


class ReadOnlyImage:
    """An image that is only read."""

    def __init__(self, file: Child, header: Header) -> None:
        self._file = file
        self.header = header

    async def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file; beyond its end they are zeroes."""
        there = max(0, min(length, self._file.length - offset))
        data = await self._file.read(offset, there) if there else b""
        return data.ljust(length, b"\0")

    async def write(self, _offset: int, _data: bytes) -> None:
        """Refuse."""
        raise OSError(errno.EROFS, "the image is read-only")

    async def allocate(self, _count: int) -> int:
        """Refuse."""
        raise OSError(errno.EROFS, "the image is read-only")

    async def release(self, _offset: int, _count: int) -> None:
        """Refuse."""
        raise OSError(errno.EROFS, "the image is read-only")

    async def change_header(self, **_changes: Any) -> None:
        """Refuse."""
        raise OSError(errno.EROFS, "the image is read-only")

    async def flush(self) -> None:
        """Nothing was written."""
