"""Changing the header of an image that is in use.

A write that fails may have reached the file all the same, and then the header leads to tables nobody keeps: who
opened the image next would find what it held at that moment. So the header the image goes on with is written back,
at once or, where that fails as well, before any other metadata (``restore``): no flush succeeds until it is there.
"""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING, Any

import attrs
import trio

from qsd.drivers.qcow2.layout import Header, serialise_header
from qsd.errors import QmpError

if TYPE_CHECKING:
    from qsd.drivers.qcow2.image import Image


class HeaderChanges:
    """See the module. ``is_certain``: the file has the header that the image goes on with, on stable storage."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._lock = trio.Lock()
        self.is_certain = True

    async def change(self, changes: dict[str, Any]) -> None:
        """Let the header have other values, on stable storage. Raises OSError, and all is as before."""
        image = self._image
        # Half of a change is none: who is cancelled waits for it.
        with trio.CancelScope(shield=True):
            async with self._lock:
                header = attrs.evolve(image.header, **changes)
                data = _serialised(header)
                self.is_certain = False
                try:
                    await self._write(data)
                except OSError:
                    with contextlib.suppress(OSError):
                        await self._write(_serialised(image.header))
                    raise
                image.header = header

    async def restore(self) -> None:
        """Let the file have the header again that the image goes on with. Raises OSError."""
        if not self.is_certain:
            async with self._lock:
                if not self.is_certain:
                    await self._write(_serialised(self._image.header))

    async def _write(self, data: bytes) -> None:
        await self._image.file.write(0, data)
        await self._image.file.flush()
        self.is_certain = True


def _serialised(header: Header) -> bytes:
    try:
        return serialise_header(header)
    except QmpError:
        raise OSError(errno.ENOSPC, "the header does not fit into its cluster") from None
