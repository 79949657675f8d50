"""What a mounted file is asked besides plain reads and writes: attributes, its length, holes, flushing.

What can be answered from memory is answered at once; the rest is a task of the export's. The errno values are
those of the reference where it has the call.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import attrs
import trio

from qsd.actors.edges import RootEdge
from qsd.errors import QmpError, errno_text
from qsd.messages import BlockState, Flag
from qsd.wire import fuse
from qsd.wire.fuse import Opcode

# How long the kernel may believe attributes. A change of the length that it did not ask for is told at once.
ATTRIBUTES_VALID = 1
# Extents of block status looked at in one go.
STATUS_EXTENTS = 64
# Errors of resizing that have an errno of their own; all others are EINVAL.
_TRUNCATE_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EPERM, errno.EACCES, errno.ENOMEM)
_READABLE, _WRITABLE = 0o400, 0o600


class Spawn(Protocol):
    """Starts a task of the export's own."""

    def __call__(self, function: Callable[..., Awaitable[None]], *args: Any, name: str) -> None: ...


@attrs.frozen
class Rights:
    """What the export allows."""

    writable: bool
    growable: bool
    allow_other: bool
    writethrough: bool


class Operations:
    """See the module. ``send`` gives the kernel an answer."""

    def __init__(self, edge: RootEdge, rights: Rights, spawn: Spawn, send: Callable[[bytes], None]) -> None:
        self._edge = edge
        self._rights = rights
        self._spawn = spawn
        self._send = send
        self._mode = _WRITABLE if rights.writable else _READABLE
        self._uid, self._gid = os.getuid(), os.getgid()
        self._time = time.time_ns()
        self._written = self._write_count()
        # Changes of the length take turns, each looking at what the one before left.
        self._resizing = trio.Lock()
        self._write_flags = Flag.FUA.value if rights.writethrough else 0

    # -- requests ---------------------------------------------------------------------------------------------

    def control(self, header: fuse.Header, body: fuse.Body) -> None:
        """Answer a request, now or later."""
        now = _NOW.get(header.opcode)
        if now is not None:
            reply = now(self, header, body)
            if header.opcode not in fuse.SILENT:
                self._send(reply)
            return
        later = _LATER.get(header.opcode)
        if later is None:
            # The kernel remembers that for most calls and does not ask again.
            self._send(fuse.refuse(header.unique, errno.ENOSYS))
            return
        self._spawn(self._answer_later, header.unique, later, body, name=Opcode(header.opcode).name.lower())

    async def _answer_later(
        self, unique: int, function: Callable[[Operations, Any], Awaitable[bytes]], body: fuse.Body
    ) -> None:
        try:
            reply = fuse.answer(unique, await function(self, body))
        except QmpError as error:
            reply = fuse.refuse(unique, _errno_of(error))
        except OSError as error:
            reply = fuse.refuse(unique, error.errno or errno.EIO)
        self._send(reply)

    def write_beyond(self, unique: int, offset: int, data: memoryview, give_back: Callable[[], None]) -> None:
        """A write that reaches beyond the end: it grows the node, or ends where the node does."""
        self._spawn(self._write_beyond, unique, offset, data, give_back, name="write beyond the end")

    async def _write_beyond(
        self, unique: int, offset: int, data: memoryview, give_back: Callable[[], None]
    ) -> None:
        async def write(_operations: Operations, _body: Any) -> bytes:
            if self._rights.growable:
                await self._grow(offset + len(data))
            count = max(0, min(len(data), self._edge.length - offset))
            if count:
                await self._edge.write(offset, data[:count], self._write_flags)
            return fuse.pack_written(count)

        try:
            await self._answer_later(unique, write, fuse.Plain())
        finally:
            give_back()

    # -- at once ----------------------------------------------------------------------------------------------

    def _init(self, header: fuse.Header, body: Any) -> bytes:
        try:
            return fuse.answer(header.unique, fuse.negotiate(body))
        except fuse.ProtocolError:
            return fuse.refuse(header.unique, errno.EPROTO)

    def _open(self, header: fuse.Header, _body: Any) -> bytes:
        return fuse.answer(header.unique, fuse.pack_open(fuse.PARALLEL_DIRECT_WRITES))

    def _getattr(self, header: fuse.Header, _body: Any) -> bytes:
        return fuse.answer(header.unique, self._attributes())

    def _statfs(self, header: fuse.Header, _body: Any) -> bytes:
        return fuse.answer(header.unique, fuse.pack_statfs(self._edge.length, self._allocated()))

    def _nothing(self, header: fuse.Header, _body: Any) -> bytes:
        return fuse.answer(header.unique)

    def _allocated(self) -> int:
        found = self._edge.node.driver.allocated_size()
        return self._edge.length if found is None else found

    def _write_count(self) -> int:
        stats = self._edge.node.stats
        return stats.wr_operations + stats.zeroes_operations + stats.unmap_operations

    def _attributes(self) -> bytes:
        written = self._write_count()
        if written != self._written:
            # Somebody wrote, here or elsewhere: the kernel drops its pages of the file when it sees another time.
            self._written, self._time = written, time.time_ns()
        return fuse.pack_attributes(
            fuse.Attributes(
                size=self._edge.length,
                allocated=self._allocated(),
                mode=stat.S_IFREG | self._mode,
                uid=self._uid,
                gid=self._gid,
                block_size=self._edge.limits.request_alignment,
                time=self._time,
            ),
            ATTRIBUTES_VALID,
        )

    # -- later ------------------------------------------------------------------------------------------------

    async def _setattr(self, change: fuse.SetAttr) -> bytes:
        rights = self._rights
        wanted = change.valid & ~fuse.SET_CONTEXT
        allowed = fuse.SET_SIZE
        if rights.allow_other:
            allowed |= fuse.SET_MODE | fuse.SET_UID | fuse.SET_GID
        if wanted & ~allowed:
            raise OSError(errno.ENOTSUP, "such attributes cannot be changed")
        if wanted & fuse.SET_MODE and not rights.writable and change.mode & 0o222:
            raise OSError(errno.EROFS, "read-only export")
        if wanted & fuse.SET_SIZE:
            if not rights.writable:
                raise OSError(errno.EACCES, "read-only export")
            async with self._resizing:
                await self._edge.truncate(change.size)
        if wanted & fuse.SET_MODE:
            self._mode = stat.S_IMODE(change.mode)
        if wanted & fuse.SET_UID:
            self._uid = change.uid
        if wanted & fuse.SET_GID:
            self._gid = change.gid
        self._time = max(self._time + 1, time.time_ns())
        return self._attributes()

    async def _grow(self, end: int) -> None:
        async with self._resizing:
            if end > self._edge.length:
                await self._edge.truncate(end)

    async def _fallocate(self, wanted: fuse.Fallocate) -> bytes:
        if not self._rights.writable:
            raise OSError(errno.EACCES, "read-only export")
        end = wanted.offset + wanted.length
        mode = wanted.mode
        if mode == 0:
            if end <= self._edge.length:
                raise OSError(errno.EOPNOTSUPP, "nothing can be reserved inside the file")
            await self._grow(end)
        elif mode == fuse.PUNCH_HOLE | fuse.KEEP_SIZE:
            await self._zero(wanted.offset, end, Flag.MAY_UNMAP.value)
        elif mode & ~fuse.KEEP_SIZE == fuse.ZERO_RANGE:
            if not mode & fuse.KEEP_SIZE and end > self._edge.length and self._rights.growable:
                await self._grow(end)
            await self._zero(wanted.offset, end, 0)
        else:
            raise OSError(errno.EOPNOTSUPP, "no such mode")
        return b""

    async def _zero(self, start: int, end: int, flags: int) -> None:
        end = min(end, self._edge.length)
        if start < end:
            await self._edge.write_zeroes(start, end - start, flags | self._write_flags)

    async def _lseek(self, wanted: fuse.Lseek) -> bytes:
        offset, length = wanted.offset, self._edge.length
        if wanted.whence not in (fuse.SEEK_DATA, fuse.SEEK_HOLE):
            raise OSError(errno.EINVAL, "no such whence")
        seeks_hole = wanted.whence == fuse.SEEK_HOLE
        if offset >= length:
            raise OSError(errno.ENXIO, "beyond the end")
        while offset < length:
            for extent in await self._edge.block_status(offset, length - offset, STATUS_EXTENTS):
                if bool(extent.state & BlockState.ZERO) == seeks_hole:
                    return fuse.pack_offset(offset)
                offset += extent.length
        if not seeks_hole:
            raise OSError(errno.ENXIO, "no more data")
        return fuse.pack_offset(length)

    async def _flush(self, _body: Any) -> bytes:
        await self._edge.flush()
        return b""


def _errno_of(error: QmpError) -> int:
    """The errno of a resize that was refused in words."""
    if "does not support resize" in error.desc:
        return errno.ENOTSUP
    return next((number for number in _TRUNCATE_ERRORS if error.desc.endswith(errno_text(number))), errno.EINVAL)


_NOW: dict[int, Callable[[Operations, fuse.Header, Any], bytes]] = {
    Opcode.INIT: Operations._init,
    Opcode.OPEN: Operations._open,
    Opcode.GETATTR: Operations._getattr,
    Opcode.STATFS: Operations._statfs,
    Opcode.RELEASE: Operations._nothing,
    Opcode.DESTROY: Operations._nothing,
    Opcode.FORGET: Operations._nothing,
    Opcode.BATCH_FORGET: Operations._nothing,
}
_LATER: dict[int, Callable[[Operations, Any], Awaitable[bytes]]] = {
    Opcode.SETATTR: Operations._setattr,
    Opcode.FALLOCATE: Operations._fallocate,
    Opcode.LSEEK: Operations._lseek,
    Opcode.FSYNC: Operations._flush,
    Opcode.FLUSH: Operations._flush,
}
