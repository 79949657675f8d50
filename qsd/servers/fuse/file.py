"""A node as a file: its attributes, and the calls that need more than one request.

What each call does and which errno it gives follow the reference; where it has no answer (statfs) this one is
sensible. A failing call raises OSError. Whatever changes the size takes turns.
"""

from __future__ import annotations

import errno
import os
import stat
import time

import attrs
import trio

from qsd.actors.edges import Edge
from qsd.errors import QmpError
from qsd.host import files
from qsd.messages import BlockState, Extent, Flag
from qsd.wire import fuse as wire
from qsd.wire.fuse import SetattrFlag

# st_blksize at least: the reference shows the request alignment, usually 1, and the C library then reads streams
# byte by byte.
BLOCK_SIZE = 4096
# A range is zeroed in pieces: a single request of terabytes could not be told from a hanging one.
ZERO_CHUNK = 1 << 30
# Bytes copied by one COPY_FILE_RANGE, in pieces of COPY_CHUNK; the caller comes back for the rest.
COPY_MAX = 64 << 20
COPY_CHUNK = 1 << 20
# Extents a search for data or holes asks for, first and then: the second extent nearly always is the answer.
FIRST_EXTENTS = 2
EXTENTS = 256
# Largest file there is (loff_t).
MAX_SIZE = (1 << 63) - 1

_TIMES = SetattrFlag.ATIME | SetattrFlag.MTIME | SetattrFlag.ATIME_NOW | SetattrFlag.MTIME_NOW
_OWNER = SetattrFlag.UID | SetattrFlag.GID
_PUNCH = files.FALLOC_FL_PUNCH_HOLE | files.FALLOC_FL_KEEP_SIZE


@attrs.define(eq=False)
class NodeFile:
    """``allow_other`` is what the mount got, not what was asked for."""

    edge: Edge
    writable: bool
    growable: bool
    writethrough: bool
    allow_other: bool = False
    mode: int = 0
    uid: int = attrs.field(factory=os.getuid)
    gid: int = attrs.field(factory=os.getgid)
    _resizing: trio.Lock = attrs.field(factory=trio.Lock)

    def __attrs_post_init__(self) -> None:
        self.mode = stat.S_IFREG | (0o600 if self.writable else 0o400)

    @property
    def length(self) -> int:
        """Bytes of the file."""
        return self.edge.length

    @property
    def write_flags(self) -> int:
        """Flags of every write."""
        return Flag.FUA.value if self.writethrough else 0

    @property
    def open_flags(self) -> int:
        """How the kernel is to treat an open file: nothing is cached, for others may write to the node."""
        flags = wire.OpenFlag.DIRECT_IO | wire.OpenFlag.PARALLEL_DIRECT_WRITES
        return int(flags if self.writable else flags | wire.OpenFlag.NOFLUSH)

    # -- facts ------------------------------------------------------------------------------------------------

    def _allocated(self) -> int:
        """Bytes used, as far as the driver knows; else the length."""
        size = self.edge.node.driver.allocated_size()
        return self.length if size is None else size

    def attributes(self) -> wire.Attributes:
        """What stat(2) shows now."""
        return wire.Attributes(
            size=self.length,
            blocks=self._allocated() // 512,
            mode=self.mode,
            uid=self.uid,
            gid=self.gid,
            block_size=max(self.edge.limits.request_alignment, BLOCK_SIZE),
            time=divmod(time.time_ns(), 1_000_000_000),
        )

    def file_system(self) -> wire.FileSystem:
        """What statvfs(3) shows: a disk of the node's length, of which what is allocated is in use."""
        blocks = -(-self.length // BLOCK_SIZE)
        free = max(0, blocks - -(-self._allocated() // BLOCK_SIZE))
        return wire.FileSystem(BLOCK_SIZE, blocks, free, free if self.writable else 0)

    # -- calls ------------------------------------------------------------------------------------------------

    async def open(self, flags: int) -> None:
        """O_TRUNC empties a growable file. On any other it means nothing: it could never be filled again."""
        if flags & os.O_ACCMODE != os.O_RDONLY and not self.writable:
            raise OSError(errno.EACCES, "read-only")
        if flags & os.O_TRUNC and self.growable and self.writable:
            async with self._resizing:
                await self._truncate(0)

    async def set_attributes(self, wanted: wire.Setattr) -> None:
        """truncate, chmod, chown; all of what is asked for, or an error first."""
        valid = wanted.valid
        if valid & _TIMES or (valid & _OWNER and not self.allow_other):
            raise OSError(errno.EOPNOTSUPP, "not kept")
        if valid & SetattrFlag.MODE:
            if wanted.mode & (stat.S_IRWXG | stat.S_IRWXO) and not self.allow_other:
                raise OSError(errno.EPERM, "nobody else has access")
            if wanted.mode & 0o222 and not self.writable:
                raise OSError(errno.EROFS, "read-only")
        if valid & SetattrFlag.SIZE:
            self._check_writable()
            async with self._resizing:
                await self._truncate(wanted.size)
        if valid & SetattrFlag.MODE:
            self.mode = stat.S_IFREG | stat.S_IMODE(wanted.mode)
        if valid & SetattrFlag.UID:
            self.uid = wanted.uid
        if valid & SetattrFlag.GID:
            self.gid = wanted.gid

    async def write(self, offset: int, data: memoryview, flags: int) -> int:
        """A write past the end of the file: it grows, or what fits is written. Returns the bytes written."""
        self._check_writable()
        end = offset + len(data)
        if end > MAX_SIZE:
            raise OSError(errno.EFBIG, "out of range")
        if self.growable:
            async with self._resizing:
                if end > self.length:
                    await self._truncate(end)
        count = min(len(data), max(0, self.length - offset))
        if count:
            await self.edge.write(offset, data[:count], flags)
        return count

    async def allocate(self, offset: int, length: int, mode: int) -> None:
        """fallocate(2)."""
        self._check_writable()
        if not length or offset + length > MAX_SIZE:
            raise OSError(errno.EFBIG if length else errno.EINVAL, "out of range")
        if mode == 0:
            await self._extend(offset, length)
        elif mode == _PUNCH:
            await self._zero_inside(offset, length, Flag.MAY_UNMAP)
        elif mode & ~files.FALLOC_FL_KEEP_SIZE == files.FALLOC_FL_ZERO_RANGE:
            if not mode & files.FALLOC_FL_KEEP_SIZE:
                async with self._resizing:
                    if offset + length > self.length:
                        await self._truncate(offset + length)
            await self._zero_inside(offset, length, Flag.NONE)
        else:
            raise OSError(errno.EOPNOTSUPP, "mode")

    async def seek(self, offset: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE from block status."""
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, "whence")
        wants_data = whence == os.SEEK_DATA
        length = self.length
        if offset > length:
            raise OSError(errno.ENXIO, "past the end")
        count = FIRST_EXTENTS
        while offset < length:
            extents: list[Extent] = await self.edge.block_status(offset, length - offset, count)
            count = EXTENTS
            if not extents:
                break
            for extent in extents:
                if bool(extent.state & BlockState.DATA) == wants_data:
                    return offset
                offset += extent.length
        if wants_data:
            raise OSError(errno.ENXIO, "no more data")
        return length

    async def copy(self, wanted: wire.CopyFileRange) -> int:
        """copy_file_range(2) inside the file. Returns the bytes copied, which may be fewer than asked for."""
        self._check_writable()
        if wanted.nodeid_out != wire.ROOT_ID or wanted.flags:
            raise OSError(errno.EINVAL, "not this file")
        source, target = wanted.offset_in, wanted.offset_out
        left = min(wanted.length, COPY_MAX, max(0, self.length - source))
        done = 0
        while done < left:
            data = await self.edge.read(source + done, min(COPY_CHUNK, left - done))
            count = await self.write(target + done, memoryview(data), self.write_flags)
            done += count
            if count < len(data):
                break
        return done

    # -- parts of them ----------------------------------------------------------------------------------------

    def _check_writable(self) -> None:
        if not self.writable:
            raise OSError(errno.EACCES, "read-only")

    async def _truncate(self, size: int) -> None:
        if size == self.length:
            return
        try:
            await self.edge.truncate(size)
        except QmpError as error:
            raise OSError(_errno_of(error, size), error.desc) from error

    async def _extend(self, offset: int, length: int) -> None:
        """Mode 0: only what lies behind the end can be allocated; what comes new is, where that is quick."""
        async with self._resizing:
            start = self.length
            if offset < start:
                raise OSError(errno.EOPNOTSUPP, "inside the file")
            await self._truncate(offset + length)
            try:
                await self._zero(start, self.length - start, Flag.NO_FALLBACK)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise

    async def _zero_inside(self, offset: int, length: int, flags: Flag) -> None:
        inside = min(length, self.length - offset)
        if inside <= 0:
            raise OSError(errno.EIO, "past the end")
        await self._zero(offset, inside, flags)

    async def _zero(self, offset: int, length: int, flags: Flag) -> None:
        flags |= Flag(self.write_flags)
        while length > 0:
            chunk = min(length, ZERO_CHUNK)
            await self.edge.write_zeroes(offset, chunk, flags)
            offset += chunk
            length -= chunk


def _errno_of(error: QmpError, size: int) -> int:
    """The errno of a refused resize: the system's, if it came from there."""
    cause = error.__cause__ or error.__context__
    if isinstance(cause, OSError) and cause.errno:
        return cause.errno
    # Formats take whole sectors only.
    return errno.EINVAL if size % 512 else errno.EOPNOTSUPP
