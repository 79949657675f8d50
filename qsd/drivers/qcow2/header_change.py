"""Changing the header of an image that is in use.

A write that fails may have reached the file all the same, and then the header leads to tables nobody keeps: who
opened the image next would find what it held at that moment. So the header the image goes on with is written back,
at once or, where that fails as well, before any other metadata (``restore``): no flush succeeds until it is there.

A change that is cut off at the end of the daemon may reach the file at any moment after that. Then no more metadata
is written: what is in the file goes with either header.

A sector arrives as a whole, or not at all. What lies behind is there before the sector that needs it: the name of
another backing file, which goes where no other is; what of it is in the first sector comes with that. Extensions
that reach into the second sector have no other place: where they would change there, the table of feature names,
which nobody needs, goes.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs
import trio

from qsd.drivers.qcow2.layout import SECTOR, Header, header_parts, place_name
from qsd.errors import QmpError
from qsd.host.shield import shield

if TYPE_CHECKING:
    from qsd.drivers.qcow2.image import Image


# What is to be different in a header.
Revision = Callable[[Header], dict[str, Any]]


class HeaderChanges:
    """See the module. ``is_certain``: the file has the header that the image goes on with, on stable storage."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._lock = trio.Lock()
        self.is_certain = True
        self._was_cut_off = False

    async def change(self, revise: Revision) -> None:
        """Let the header have other values, on stable storage. Raises OSError, and all is as before.

        ``revise`` is asked when it is the turn of this change: the one before may have set another bit.
        """
        image = self._image
        # Half of a change is none: who is cancelled waits for it.
        with shield():
            async with self._lock:
                self._check()
                # The file may have one header of several: none of their names could be written over.
                await self._restore()
                old = image.header
                changes = revise(old)
                before = await self._fitting(old, old)
                header = await self._fitting(attrs.evolve(old, **changes), old, before)
                has_name = header.backing_offset == old.backing_offset and "backing_file" not in changes
                self.is_certain = False
                try:
                    await self._write(header, has_name=has_name)
                except OSError:
                    image.header = before
                    with contextlib.suppress(OSError):
                        await self._write(before, has_name=False)
                    raise
                except trio.Cancelled:
                    self._was_cut_off = True
                    raise
                image.header = header

    async def restore(self) -> None:
        """Let the file have the header again that the image goes on with. Raises OSError."""
        if not self.is_certain:
            async with self._lock:
                self._check()
                await self._restore()

    async def _restore(self) -> None:
        if not self.is_certain:
            await self._write(self._image.header, has_name=False)

    def _check(self) -> None:
        if self._was_cut_off:
            raise OSError(errno.EIO, "a change of the header was cut off")

    async def _fitting(self, new: Header, *others: Header) -> Header:
        """The new header with a place for its name, and made so that it arrives as a whole. Raises OSError.

        ``others``: those that the file may have by then.
        """
        header = _placed(attrs.evolve(new, names_features=True), others)
        behind = _parts(header)[0][SECTOR:]
        file = self._image.file
        inside = max(0, min(len(behind), file.length - SECTOR))
        found = await file.read(SECTOR, inside) if inside else b""
        if found.ljust(len(behind), b"\0") == behind:
            return header
        return _placed(attrs.evolve(new, names_features=False), others)

    async def _write(self, header: Header, *, has_name: bool) -> None:
        """``has_name``: the name of the backing file is in its place."""
        file = self._image.file
        data, name = _parts(header)
        at = place_name(header, len(data))
        # What of the name is in the first sector arrives with that.
        inside = max(0, SECTOR - at)
        if name[inside:] and not has_name:
            await file.write(at + inside, name[inside:])
            await file.flush()
        await file.write(0, data.ljust(at, b"\0") + name[:inside] if inside else data)
        await file.flush()
        self.is_certain = True


def _placed(new: Header, others: tuple[Header, ...]) -> Header:
    """The new header with a place for its name that neither another's name nor anything else of them needs.

    Where the cluster has no such place, it goes where it goes.
    """
    # Any of them may have the table of feature names.
    front = max(len(_parts(attrs.evolve(header, names_features=True))[0]) for header in (new, *others))
    name = new.backing_file or b""
    names = [(each.backing_offset, each.backing_file or b"") for each in others]
    at = place_name(new, len(_parts(new)[0]))
    if (at, name) in names:
        return attrs.evolve(new, backing_offset=at)
    taken = [range(SECTOR, max(front, SECTOR)), *(_behind(offset, other) for offset, other in names)]
    for free in (at, front, *sorted(each.stop for each in taken)):
        wanted = _behind(free, name)
        is_apart = all(wanted.stop <= each.start or each.stop <= wanted.start for each in taken)
        if is_apart and (free == at or front <= free <= new.cluster_size - len(name)):
            return attrs.evolve(new, backing_offset=free)
    return attrs.evolve(new, backing_offset=at)


def _behind(offset: int, name: bytes) -> range:
    """Where in the cluster stands what of a name is not in the first sector."""
    return range(max(offset, SECTOR), max(offset + len(name), SECTOR))


def _parts(header: Header) -> tuple[bytes, bytes]:
    try:
        return header_parts(header)
    except QmpError:
        raise OSError(errno.ENOSPC, "the header does not fit into its cluster") from None
