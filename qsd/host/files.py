"""Files and block devices, as the drivers need them: extents, holes, zeroes, sizes, alignment.

Constants: <linux/falloc.h>, <linux/fs.h>. Functions that change something return 0 or a negative errno, because
they run on a thread and their result travels as a number.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10
PUNCH_HOLE = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE

BLKSSZGET = 0x1268
BLKGETSIZE64 = 0x80081272
BLKDISCARD = 0x1277
BLKZEROOUT = 0x127F

# Bytes: off_t.
MAX_LENGTH = (1 << 63) - 1

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

# What a file system or device says when it cannot do a thing at all.
UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.ENOTTY, errno.EPERM})


def _call(fd: int, mode: int, offset: int, length: int) -> int:
    while True:
        if _fallocate(fd, mode, offset, length) == 0:
            return 0
        error = ctypes.get_errno()
        if error != errno.EINTR:
            return -errno.EOPNOTSUPP if error in UNSUPPORTED else -error


def _ioctl_range(fd: int, request: int, offset: int, length: int) -> int:
    try:
        fcntl.ioctl(fd, request, struct.pack("=QQ", offset, length))
    except OSError as error:
        number = error.errno or errno.EIO
        return -errno.EOPNOTSUPP if number in UNSUPPORTED else -number
    return 0


def seek_extent(fd: int, offset: int, end: int) -> tuple[bool, int]:
    """Whether ``offset`` is data or a hole, and for how many bytes, at most to ``end``.

    A file system (or device) that does not know holes is all data. Raises OSError.
    """
    try:
        data = os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return False, end - offset
        return True, end - offset
    if data > offset:
        return False, min(data, end) - offset
    hole = os.lseek(fd, offset, os.SEEK_HOLE)
    if hole <= offset:
        return True, end - offset
    return True, min(hole, end) - offset


def allocate(fd: int, offset: int, length: int) -> int:
    """Give the range space on the disk and make the file that long; -EOPNOTSUPP when the file system cannot."""
    return _call(fd, 0, offset, length)


def punch_hole(fd: int, offset: int, length: int) -> int:
    """Deallocate a range of a file."""
    return _call(fd, PUNCH_HOLE, offset, length)


def discard_sectors(fd: int, offset: int, length: int) -> int:
    """Tell a device that the whole sectors inside a range are not needed."""
    sector = logical_sector_size(fd)
    start, end = -(-offset // sector) * sector, (offset + length) // sector * sector
    return _ioctl_range(fd, BLKDISCARD, start, end - start) if start < end else 0


def zero_range(fd: int, offset: int, length: int, *, may_unmap: bool, no_fallback: bool, is_device: bool) -> int:
    """Make the range read as zeroes without writing them; grows a file that ends inside the range.

    -EOPNOTSUPP when there is no fast way; ``no_fallback`` forbids ways that may write zeroes all the same.
    """
    if is_device:
        # BLKZEROOUT may write, with no promise about speed, and takes whole sectors.
        if no_fallback or (offset | length) % logical_sector_size(fd):
            return -errno.EOPNOTSUPP
        return _ioctl_range(fd, BLKZEROOUT, offset, length)
    size = os.fstat(fd).st_size
    result = -errno.EOPNOTSUPP
    if may_unmap or offset >= size:
        inside = min(length, max(0, size - offset))
        result = 0
        if inside:
            result = punch_hole(fd, offset, inside)
    if result == -errno.EOPNOTSUPP:
        result = _call(fd, FALLOC_FL_ZERO_RANGE, offset, length)
    if result == 0 and offset + length > os.fstat(fd).st_size:
        # Not ftruncate(2): others may have made the file longer since.
        result = allocate(fd, offset + length - 1, 1)
    return result


def read_ahead(fd: int, offset: int, length: int) -> int:
    """Have the page cache read the range. Raises OSError."""
    os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)
    return 0


def allocated_size(fd: int) -> int:
    """Bytes used on the host."""
    return os.fstat(fd).st_blocks * 512


def device_size(fd: int) -> int:
    """Bytes of a block device. Raises OSError."""
    buffer = fcntl.ioctl(fd, BLKGETSIZE64, bytes(8))
    return int.from_bytes(buffer, "little")


def logical_sector_size(fd: int) -> int:
    """The smallest unit a block device reads and writes. Raises OSError."""
    buffer = fcntl.ioctl(fd, BLKSSZGET, bytes(4))
    return int.from_bytes(buffer, "little")


def device_queue_limit(fd: int, name: str) -> int:
    """A number of the queue of a block device, or of the disk it is a part of; 0 when the kernel does not tell.

    Names and units: Documentation/ABI/stable/sysfs-block, ``queue/``.
    """
    number = os.fstat(fd).st_rdev
    place = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"
    for queue in (f"{place}/queue", f"{place}/../queue"):
        try:
            with open(f"{queue}/{name}", "rb") as file:
                return int(file.read())
        except (OSError, ValueError):
            continue
    return 0


def probe_direct_alignment(fd: int, *, is_device: bool) -> tuple[int, int]:
    """Alignments O_DIRECT asks of a request (offset, length) and of its memory: the smallest that a read accepts.

    An empty file accepts everything; it gets what the file system tells, or 4096, which is right everywhere.
    """
    memory = memoryview(mmap.mmap(-1, 8192))
    if not is_device and os.fstat(fd).st_size == 0:
        return direct_alignment_told(fd) or (4096, 4096)
    if is_device:
        request = logical_sector_size(fd)
    else:
        request = next((n for n in (512, 1024, 2048, 4096) if _can_read(fd, memory[:n])), 4096)
    buffer = next((n for n in (512, 1024, 2048, 4096) if _can_read(fd, memory[n : n + request])), 4096)
    return request, buffer


_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_SIZE_OF_STATX = 256


def direct_alignment_told(fd: int) -> tuple[int, int] | None:
    """The same as the file system has it (Linux 6.1; <linux/stat.h>), None where it does not tell."""
    facts = ctypes.create_string_buffer(_SIZE_OF_STATX)
    if _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, facts):
        return None
    mask, buffer, request = struct.unpack_from("=I148xII", facts)
    return (max(request, 512), max(buffer, 512)) if mask & _STATX_DIOALIGN and request else None


def _can_read(fd: int, buffer: memoryview) -> bool:
    try:
        os.preadv(fd, [buffer], 0)
    except OSError as error:
        return error.errno != errno.EINVAL
    return True


# cachestat(2), since Linux 6.5; the same number on every architecture.
_SYS_CACHESTAT = 451
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_cache_range = (ctypes.c_uint64 * 2)()
_cache_counts = (ctypes.c_uint64 * 5)()
_cache_range_at = ctypes.byref(_cache_range)
_cache_counts_at = ctypes.byref(_cache_counts)
_last_byte = bytearray(1)


_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)
# f_type of tmpfs and ramfs (<linux/magic.h>).
_MEMORY = frozenset({0x01021994, 0x858458F6})


def is_memory(fd: int) -> bool:
    """Whether a file's data is nowhere but in memory, so that reading it does not wait. Raises OSError."""
    facts = (ctypes.c_long * 32)()  # struct statfs begins with f_type and is shorter than this
    if _libc.fstatfs(fd, facts):
        raise OSError(ctypes.get_errno(), "fstatfs")
    return facts[0] in _MEMORY


def is_cached(fd: int, offset: int, length: int) -> bool:
    """Whether every page of the range is in the page cache and its last byte can be read without waiting.

    (A page that readahead has begun to fill is in the cache already; pages are filled in order.)
    Raises OSError when the kernel does not tell.
    """
    _cache_range[0], _cache_range[1] = offset, length
    if _syscall(_SYS_CACHESTAT, fd, _cache_range_at, _cache_counts_at, 0):
        raise OSError(ctypes.get_errno(), "cachestat")
    end = offset + length
    if _cache_counts[0] < (end - 1) // mmap.PAGESIZE - offset // mmap.PAGESIZE + 1:
        return False
    try:
        return os.preadv(fd, (_last_byte,), end - 1, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False


def drop_cache(fd: int) -> None:
    """Let go of the page cache of the file, so that what another host wrote is read again. May block.

    Pages that somebody has mapped stay. Raises OSError.
    """
    try:
        os.fdatasync(fd)  # dirty pages stay as well
    except OSError as error:
        if error.errno != errno.EINVAL:  # a character device has nothing to bring anywhere
            raise
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value
MINCORE_WINDOW = 128 << 20


def has_cached_pages(fd: int, length: int) -> bool:
    """Whether the page cache holds any of the first ``length`` bytes. May block. Raises OSError."""
    flags = bytearray(MINCORE_WINDOW // mmap.PAGESIZE)
    told = (ctypes.c_char * len(flags)).from_buffer(flags)
    for offset in range(0, length, MINCORE_WINDOW):
        size = min(MINCORE_WINDOW, length - offset)
        # Through libc: Python's mmap has no address of memory it may only read.
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset)
        if address == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), "mmap")
        try:
            if _libc.mincore(address, size, ctypes.byref(told)):
                raise OSError(ctypes.get_errno(), "mincore")
        finally:
            _libc.munmap(address, size)
        if any(flag & 1 for flag in flags[: -(-size // mmap.PAGESIZE)]):
            return True
    return False


# <linux/fs.h>; the numbers of the ioctls of 64-bit systems.
FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_NOCOW_FL = 0x00800000
FS_IOC_FSGETXATTR = 0x801C581F
FS_IOC_FSSETXATTR = 0x401C5820
FS_XFLAG_EXTSIZE = 0x00000800
# struct fsxattr: xflags, extsize, nextents, projid, cowextsize, padding.
_FSXATTR = struct.Struct("=IIIII8s")


def set_no_copy_on_write(fd: int) -> None:
    """Ask a file system that copies on write (btrfs) to write in place; others have nothing to turn off."""
    try:
        flags = int.from_bytes(fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8))[:4], "little")
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("=II", flags | FS_NOCOW_FL, 0))
    except OSError:
        return


def set_extent_size_hint(fd: int, hint: int) -> int:
    """Let the file grow by extents of ``hint`` bytes (XFS). 0 or a negative errno; -EOPNOTSUPP elsewhere."""
    try:
        found = bytearray(fcntl.ioctl(fd, FS_IOC_FSGETXATTR, bytes(_FSXATTR.size)))
        flags, _, *rest = _FSXATTR.unpack(found)
        fcntl.ioctl(fd, FS_IOC_FSSETXATTR, _FSXATTR.pack(flags | FS_XFLAG_EXTSIZE, hint, *rest))
    except OSError as error:
        number = error.errno or errno.EIO
        return -errno.EOPNOTSUPP if number in UNSUPPORTED else -number
    return 0
