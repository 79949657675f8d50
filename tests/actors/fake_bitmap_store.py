"""Dirty bitmaps in an image that is a dictionary; fails where the world says so."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Any

import attrs

from qsd.block.bitmap import DirtyBitmap
from qsd.block.dirty import NamedBitmap
from qsd.errors import QmpError


@attrs.define
class Stored:
    """A bitmap in the image."""

    bits: DirtyBitmap
    is_auto: bool
    is_in_use: bool = False


class FakeBitmapStore:
    """The ``BitmapStore`` of one image. ``check_io`` raises OSError when the image cannot be written now."""

    def __init__(self, image: dict[str, Stored], driver: Any) -> None:
        self.image = image
        self._driver = driver

    async def _io(self, what: str) -> None:
        driver = self._driver
        try:
            await driver.world.pass_point(what, driver.node_name)
        except QmpError:
            raise OSError(errno.EIO, what) from None
        # As everything else the image is made of, it is reached through the child.
        await driver.children["file"].write(0, b"bitmap")

    def check(self, name: str, length: int, others: Iterable[NamedBitmap]) -> None:
        if len(list(others)) >= 3:
            raise QmpError("Maximum number of persistent bitmaps is already reached")

    async def load(self, size: int) -> list[NamedBitmap]:
        await self._driver.world.pass_point("load", self._driver.node_name)
        return [
            NamedBitmap(
                name,
                DirtyBitmap(size, 512) if stored.is_in_use else stored.bits.copy(),
                is_recording=stored.is_auto and not stored.is_in_use,
                is_persistent=True,
                is_inconsistent=stored.is_in_use,
            )
            for name, stored in self.image.items()
        ]

    async def mark_in_use(self) -> None:
        if not all(stored.is_in_use for stored in self.image.values()):
            await self._io("mark")
            for stored in self.image.values():
                stored.is_in_use = True

    async def store(self, bitmaps: Iterable[NamedBitmap]) -> None:
        try:
            await self._io("store")
        except OSError:
            raise QmpError("Failed to write bitmap 'x' to file: Input/output error") from None
        before = dict(self.image)
        self.image.clear()
        for bitmap in bitmaps:
            assert bitmap.name is not None
            if bitmap.is_inconsistent:
                self.image[bitmap.name] = before[bitmap.name]
            else:
                self.image[bitmap.name] = Stored(bitmap.bits.copy(), bitmap.is_recording)
        # The old ones are given up.
        await self._driver.world.pass_point("stored", self._driver.node_name)

    async def remove(self, name: str) -> None:
        if name in self.image:
            await self._io("remove")
            del self.image[name]

    def facts(self) -> list[dict[str, Any]]:
        return [{"name": name} for name in self.image]
