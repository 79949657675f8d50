"""file and host_device: life, locks, permissions and reopening of one descriptor; ``FileIo`` moves its data."""

from __future__ import annotations

import errno
import os
import stat
from functools import partial
from typing import Any, ClassVar

import trio

from qsd.block.permissions import Perm
from qsd.drivers.base import Driver, Host, Limits, Mode
from qsd.drivers.file_io import FUA, FileIo
from qsd.drivers.spot import Spot, end_epoch
from qsd.errors import QmpError, errno_text
from qsd.host import files, locks, served

_WRITING = Perm.WRITE | Perm.WRITE_UNCHANGED | Perm.RESIZE


class FileDriver(Driver):
    """A regular file."""

    name: ClassVar[str] = "file"
    can_truncate: ClassVar[bool] = True
    lasting: ClassVar[tuple[str, ...]] = ("locking", "filename", "aio_max_batch", "aio", "drop_cache", "pr_manager")
    fixed: ClassVar[frozenset[str]] = frozenset(lasting) - {"drop_cache"}

    def __init__(self, node_name: str, options: Any, mode: Mode, host: Host) -> None:
        super().__init__(node_name, options, mode, host)
        self.io = FileIo(self)
        self.submit = self.io.submit  # type: ignore[method-assign]  # one call less for every batch
        self._path = ""
        self._locks: locks.ByteLocks | None = None
        self._next_fd = -1
        self._next_writable = False
        self._next_direct = False
        self._next_mode: Mode | None = None
        self._wanted: tuple[Perm, Perm] = (Perm.NONE, Perm.ALL)
        self._before: set[int] = set()

    def submit(self, batch: list[Any]) -> None:
        """Bound to ``FileIo.submit`` for each object."""
        self.io.submit(batch)

    def spot(self) -> Spot | None:
        """The file itself, unless it is read past the page cache."""
        fd, flags = self.io.fd, self.io.spot_flags
        if fd < 0 or self.io.direct or flags is None:
            return None

        def find(offset: int, length: int) -> tuple[int, int, int] | None:
            return (fd, offset, flags) if offset + length <= self.length else None

        return Spot(find, fd, flags)

    # -- opening ----------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open the file as the mode says; with auto-read-only read-only until a writer comes."""
        options, mode = self.options, self.mode
        self._path = options.filename
        if not self._path:
            raise QmpError(f"The '{self.name}' block driver requires a file name")
        if options.pr_manager is not None:
            raise QmpError(f"No persistent reservation manager with id '{options.pr_manager}'")
        self.io.aio_mode = "threads" if options.aio is None else str(options.aio.value)
        self.io.fua = _fua(mode)
        writable = not mode.read_only and not mode.auto_read_only
        self._check_kind(writable=writable)
        fd = self._open_fd(writable=writable, direct=mode.cache_direct)
        try:
            self._check_open(fd)
            self._choose_locks(fd)
            self._take(fd, writable=writable, direct=mode.cache_direct)
        except BaseException:
            os.close(fd)
            self.io.fd = -1
            raise

    def _check_kind(self, *, writable: bool) -> None:
        try:
            served.refuse_own(self._path)
            mode = os.stat(self._path).st_mode
        except OSError as error:
            raise self._cannot_open(error) from None
        if stat.S_ISDIR(mode) and writable:
            raise QmpError(f"Could not open '{self._path}': Is a directory")
        if self.io.aio_mode == "native" and not self.mode.cache_direct:
            raise QmpError("aio=native was specified, but it requires cache.direct=on, which was not specified.")
        self._check_type(mode)

    def _check_type(self, mode: int) -> None:
        if not stat.S_ISREG(mode):
            raise QmpError(f"'file' driver requires '{self._path}' to be a regular file")

    def _check_open(self, fd: int) -> None:
        # The name may lead elsewhere by now: what was opened is what counts.
        self._check_type(os.fstat(fd).st_mode)
        try:
            # A file without an end is no image: /proc/self/mem calls itself a regular file, and a guest whose image
            # names it as its data file would write this process's memory.
            os.lseek(fd, 0, os.SEEK_END)
        except OSError as error:
            raise QmpError(f"Could not refresh total sector count: {errno_text(error.errno or 0)}") from None

    def _open_fd(self, *, writable: bool, direct: bool) -> int:
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        try:
            return os.open(self._place(), flags)
        except OSError as error:
            if direct and error.errno == errno.EINVAL:
                raise QmpError(f"Could not open '{self._path}': filesystem does not support O_DIRECT") from None
            raise self._cannot_open(error) from None

    def _place(self) -> str:
        """What to open. Opened anew it is the same file, wherever its path leads by now: to a FUSE export of this
        very node, for one, and that cannot be opened from here.
        """
        again = f"/proc/self/fd/{self.io.fd}"
        return again if self.io.fd >= 0 and os.path.lexists(again) else self._path

    def _cannot_open(self, error: OSError) -> QmpError:
        return QmpError(f"Could not open '{self._path}': {errno_text(error.errno or 0)}")

    def _choose_locks(self, fd: int) -> None:
        wish = "auto" if self.options.locking is None else str(self.options.locking.value)
        if wish == "off":
            return
        if not locks.is_supported(fd):
            if wish == "on":
                raise QmpError("File locking requested but open file description locking syscall is unavailable")
            return
        self._locks = locks.ByteLocks(self._path)

    def _take(self, fd: int, *, writable: bool, direct: bool) -> None:
        io = self.io
        io.fd, io.writable, io.direct = fd, writable, direct
        end_epoch()
        io.lender.forget()
        self.limits = Limits()
        if direct:
            request, memory = files.probe_direct_alignment(fd, is_device=io.is_device)
            self.limits = Limits(request_alignment=request, min_mem_alignment=memory)
        if io.is_device:
            self._look_at_queue(fd, direct=direct)
        self.length = self._size(fd)

    def _look_at_queue(self, fd: int, *, direct: bool) -> None:
        limits = self.limits
        limits.max_hw_transfer = files.device_queue_limit(fd, "max_sectors_kb") << 10
        limits.max_hw_iov = files.device_queue_limit(fd, "max_segments")
        limits.pdiscard_alignment = files.device_queue_limit(fd, "discard_granularity")
        if not direct:
            # Only whole sectors are zeroed without writing them (``files.zero_range``).
            limits.pwrite_zeroes_alignment = files.logical_sector_size(fd)

    def _size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    async def close(self) -> None:
        """Close the descriptor; its locks go with it."""
        if self.io.fd >= 0:
            self.io.let_go()
            os.close(self.io.fd)
            self.io.fd = -1
            end_epoch()

    # -- permissions ------------------------------------------------------------------------------------------

    async def prepare_permissions(self, perm: Perm, shared: Perm) -> None:
        """Lock what the parents use and do not share; get a writable descriptor when they write."""
        self._wanted = (perm, shared)
        if self._locks is not None:
            self._before = set(self._locks.held)
            self._locks.acquire(self.io.fd, perm, shared)
        try:
            self._prepare_descriptor(perm)
        except BaseException:
            self.abort_permissions()
            raise

    def _prepare_descriptor(self, perm: Perm) -> None:
        mode = self._next_mode or self.mode
        writable = self._next_writable if self._next_fd >= 0 else self.io.writable
        if perm & _WRITING and not writable and not mode.read_only:
            fd = self._open_fd(writable=True, direct=mode.cache_direct)
            if self._next_fd >= 0:
                os.close(self._next_fd)
            self._next_fd, self._next_writable, self._next_direct = fd, True, mode.cache_direct
        if self._next_fd >= 0 and self._locks is not None:
            self._locks.copy(self._next_fd)

    def commit_permissions(self) -> None:
        """Use the new descriptor, release what is no longer needed."""
        perm, shared = self._wanted
        if self._next_fd < 0 and self.mode.auto_read_only and self.io.writable and not perm & _WRITING:
            self._go_back_to_reading()
        self._switch()
        if self._locks is not None:
            self._locks.shrink(self.io.fd, perm, shared)

    def _go_back_to_reading(self) -> None:
        try:
            fd = self._open_fd(writable=False, direct=self.io.direct)
        except QmpError:
            return  # the file may be gone from the path: a writable descriptor serves readers as well
        if self._locks is not None:
            try:
                self._locks.copy(fd)
            except QmpError:
                os.close(fd)
                return
        self._next_fd, self._next_writable, self._next_direct = fd, False, self.io.direct

    def _switch(self) -> None:
        if self._next_fd < 0:
            return
        old = self.io.fd
        self._take(self._next_fd, writable=self._next_writable, direct=self._next_direct)
        self._next_fd = -1
        os.close(old)

    def abort_permissions(self) -> None:
        """Drop the new bytes and the new descriptor."""
        if self._locks is not None:
            self._locks.restore(self.io.fd, self._before)
        if self._next_fd >= 0 and self._next_mode is None:
            os.close(self._next_fd)
            self._next_fd = -1

    # -- reopening --------------------------------------------------------------------------------------------

    async def prepare_reopen(self, options: Any, mode: Mode) -> None:
        """Open a second descriptor when access or caching changes."""
        writable = not mode.read_only and (not mode.auto_read_only or self.io.writable)
        if writable != self.io.writable or mode.cache_direct != self.io.direct:
            self._next_fd = self._open_fd(writable=writable, direct=mode.cache_direct)
            self._next_writable, self._next_direct = writable, mode.cache_direct
        self._next_mode = mode

    def commit_reopen(self, options: Any, mode: Mode) -> None:
        """Take the options; the descriptor follows in ``commit_permissions``."""
        super().commit_reopen(options, mode)
        self.io.fua = _fua(mode)
        self._next_mode = None

    def abort_reopen(self) -> None:
        """Forget the second descriptor."""
        self._next_mode = None
        if self._next_fd >= 0:
            os.close(self._next_fd)
            self._next_fd = -1

    # -- the rest ---------------------------------------------------------------------------------------------

    async def truncate(self, size: int, *, exact: bool = True) -> None:
        """Grow or shrink the file."""
        try:
            self._set_length(size)
        except OSError as error:
            raise QmpError(f"Could not resize file: {errno_text(error.errno or 0)}") from None
        self.length = self._size(self.io.fd)

    def grow(self, size: int) -> bool:
        """Extend the file by a hole."""
        if size > self.length:
            self._set_length(size)
            self.length = self._size(self.io.fd)
        return True

    def _set_length(self, size: int) -> None:
        if size > files.MAX_LENGTH:
            # An image's table may lead anywhere.
            raise OSError(errno.EFBIG, "no file is that long")
        os.ftruncate(self.io.fd, size)
        self.io.resized()

    async def activate(self) -> None:
        """Forget what the page cache holds: the image's last owner may have written it on another host.

        ``drop-cache=off`` says that nobody has; ``x-check-cache-dropped`` makes an error of pages that stay.
        """
        if self.options.drop_cache is not False:
            checked = bool(self.options.x_check_cache_dropped)
            try:
                await trio.to_thread.run_sync(partial(_forget, self.io.fd, self.length, is_checked=checked))
            except OSError as error:
                raise QmpError(f"Could not drop the page cache: {errno_text(error.errno or 0)}") from None
        self.refresh_length()

    def refresh_length(self) -> None:
        """Look at the file again."""
        self.length = self._size(self.io.fd)

    def allocated_size(self) -> int | None:
        """Bytes used on the host."""
        return files.allocated_size(self.io.fd)

    def filename(self) -> str:
        """The path."""
        return str(self._path)

    def format_specific(self) -> dict[str, Any] | None:
        """The file's specific part is empty without an extent size hint."""
        return {"type": "file", "data": {}}

    def dirty_flag(self) -> bool | None:
        """A file is never dirty."""
        return False

    def driver_statistics(self) -> dict[str, Any] | None:
        """Discards, by outcome."""
        io = self.io
        return {
            "driver": self.name,
            "discard-nb-ok": io.discard_ok,
            "discard-nb-failed": io.discard_failed,
            "discard-bytes-ok": io.discard_bytes_ok,
        }


def _forget(fd: int, length: int, *, is_checked: bool) -> None:
    files.drop_cache(fd)
    if is_checked and files.has_cached_pages(fd, length):
        raise QmpError("page cache still in use!")


class HostDeviceDriver(FileDriver):
    """A block device."""

    name: ClassVar[str] = "host_device"

    def _check_type(self, mode: int) -> None:
        if not (stat.S_ISBLK(mode) or stat.S_ISCHR(mode)):
            raise QmpError(f"'host_device' driver requires '{self._path}' to be either a character or block device")

    def _check_open(self, fd: int) -> None:
        super()._check_open(fd)
        self.io.is_device = stat.S_ISBLK(os.fstat(fd).st_mode)

    def _size(self, fd: int) -> int:
        return files.device_size(fd) if self.io.is_device else os.lseek(fd, 0, os.SEEK_END)

    async def truncate(self, size: int, *, exact: bool = True) -> None:
        """A device has the size it has: only what fits is accepted."""
        length = self._size(self.io.fd)
        if size > length:
            raise QmpError("Cannot grow device files")
        if exact and size < length:
            raise QmpError("Cannot resize device files")

    def grow(self, size: int) -> bool:
        """A device has the size it has."""
        if size > self.length:
            raise OSError(errno.ENOSPC, "the device ends here")
        return True


def _fua(mode: Mode) -> int:
    return 0 if mode.cache_no_flush else FUA
