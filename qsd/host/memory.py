"""Where a buffer lies: addresses for the kernel, and for alignment; and a pool of buffers that lie well."""

from __future__ import annotations

import ctypes
import mmap


class _PyBuffer(ctypes.Structure):
    """CPython's Py_buffer, as far as the address needs it (PEP 3118)."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


# <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
# Larger than what is made for one request: an unpacked cluster of 2 MiB with its header.
_FROM_HEAP = 4 << 20
_KEEP = 8 << 20


def keep_freed_memory() -> None:
    """Let the C library keep the last 8 MiB that were freed, instead of asking the kernel again and again.

    The page faults of 64 KiB take 17 us.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        mallopt(_M_MMAP_THRESHOLD, _FROM_HEAP)
        mallopt(_M_TRIM_THRESHOLD, _KEEP)


def give_back_memory() -> None:
    """Let the C library give the kernel back what it keeps of freed memory, but for 8 MiB: after something large.

    Takes 0.2 ms, or 13 where there are 128 MiB in small pieces, which nothing else gives back.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:  # glibc
        malloc_trim(ctypes.c_size_t(_KEEP))


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int)
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_PyBuffer),)
_addressof = ctypes.addressof
_from_buffer = ctypes.c_char.from_buffer


def address_of(buffer: memoryview) -> int:
    """The memory address of a contiguous buffer; valid while the buffer's owner lives and does not resize."""
    try:
        return _addressof(_from_buffer(buffer))
    except TypeError:  # read-only
        return _address_of_constant(buffer)
    except ValueError:  # empty
        return 0


def _address_of_constant(buffer: memoryview) -> int:
    view = _PyBuffer()
    _get_buffer(buffer, ctypes.byref(view), 0)
    address = view.buf or 0
    _release_buffer(ctypes.byref(view))
    return int(address)


class AlignedPool:
    """Page-aligned buffers in sizes of powers of two; free ones are kept up to ``limit`` bytes in all.

    A mapping of its own for every 4 KiB costs 25 us (mmap, page fault, munmap).
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept = 0
        self._free: dict[int, list[tuple[memoryview, int]]] = {}

    def take(self, length: int) -> tuple[memoryview, int]:
        """A buffer of at least ``length`` bytes and its address."""
        size = max(mmap.PAGESIZE, 1 << (length - 1).bit_length())
        free = self._free.get(size)
        if free:
            self._kept -= size
            return free.pop()
        view = memoryview(mmap.mmap(-1, size))
        return view, address_of(view)

    def give_back(self, item: tuple[memoryview, int]) -> None:
        """Take back a buffer nobody uses any more."""
        size = len(item[0])
        if self._kept + size <= self._limit:
            self._kept += size
            self._free.setdefault(size, []).append(item)

    def clear(self) -> None:
        """Free what is kept."""
        self._kept = 0
        self._free.clear()
