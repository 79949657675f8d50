"""Compressed clusters: where one lies, and what its bytes inflate to.

Pure. Follows the qcow2 specification ("Compressed Clusters Descriptor"): a descriptor holds the host offset of the
first byte and how many more 512-byte sectors the data reaches into, never its exact length.

A cluster inflates to exactly one cluster or not at all: what comes after that is ignored (the next compressed
cluster may begin in the last sector), output is bounded before it is made, and a zstd frame that asks for a window
of more than 8 MiB is refused. Whatever is wrong with a stream is OSError(EIO), because that is what the read
that met it ends with.

``isal`` (ISA-L) deflates when it is installed, and it or ``deflate`` (libdeflate) inflates, whichever is faster
with an image's clusters; else zlib does. zstd needs ``zstandard``. 64 KiB of a Linux system's files inflate in
99 to 131 us with libdeflate, 115 to 199 with ISA-L, 244 to 328 with zlib; of words at random in 144, 117 and 313.
"""

from __future__ import annotations

import errno
import threading
import time
import zlib
from collections.abc import Callable
from functools import cache
from itertools import count
from typing import Any, Final, Protocol

from qsd.drivers.qcow2.layout import COMPRESSION_NAMES, COMPRESSION_ZLIB, COMPRESSION_ZSTD
from qsd.errors import QmpError

try:
    import deflate as libdeflate
except ImportError:
    libdeflate = None  # type: ignore[assignment]  # an extra
try:
    from isal import isal_zlib
except ImportError:
    isal_zlib = None  # type: ignore[assignment]  # an extra
try:
    import zstandard
except ImportError:
    zstandard = None  # type: ignore[assignment]  # an extra

COMPRESSED: Final = 1 << 62
SECTOR: Final = 512

# Streams are written for the 4 KiB window that the reference inflates with; any window is read.
_WRITE_WINDOW: Final = -12
_READ_WINDOW: Final = -15
# What RFC 8878 asks every decoder to support. Encoders take more only when told to.
_MAX_ZSTD_WINDOW: Final = 8 << 20
# ISA-L's best: within 2 % of zlib's default size at a tenth of its time.
_ISAL_LEVEL: Final = 3
# How often libraries are compared, and with how many clusters. A slower one takes 20 to 50 % longer.
PERIOD: Final = 512
TRIAL: Final = 16
# Takes packed bytes and the size of a cluster.
_Engine = Callable[[bytes | memoryview, int], bytes | bytearray]
_INFLATE_ERRORS: tuple[type[Exception], ...] = (zlib.error,)
if isal_zlib is not None:
    _INFLATE_ERRORS += (isal_zlib.error,)  # type: ignore[operator]  # its stub takes the class for an instance


class _Zstd(threading.local):
    """A thread's contexts: making one for every cluster costs a fifth of the work, in page faults."""

    def __init__(self) -> None:
        self.compressor: Any = zstandard.ZstdCompressor()
        self.decompressor: Any = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW)


@cache
def _contexts() -> _Zstd:
    return _Zstd()


class _Inflater(Protocol):
    def decompress(self, data: bytes | memoryview, max_length: int = ..., /) -> bytes: ...


class _Deflater(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


def decode_entry(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Host offset and length of the sectors' bytes from there on, of a compressed L2 entry (bytes).

    The length is an upper bound and reaches at most two clusters; the file may end before it does.
    """
    shift = 62 - (cluster_bits - 8)
    offset = entry & ((1 << shift) - 1)
    sectors = (entry >> shift & ((1 << (cluster_bits - 8)) - 1)) + 1
    return offset, sectors * SECTOR - offset % SECTOR


def encode_entry(offset: int, length: int, cluster_bits: int) -> int:
    """The L2 entry of ``length`` compressed bytes at host ``offset``; OverflowError when it cannot be said."""
    shift = 62 - (cluster_bits - 8)
    more = (offset + length - 1) // SECTOR - offset // SECTOR
    if not 0 <= offset < 1 << min(shift, 56) or not 0 <= more < 1 << (cluster_bits - 8):
        raise OverflowError(f"no compressed cluster can have {length} bytes at {offset}")
    return COMPRESSED | more << shift | offset


def require(compression_type: int) -> None:
    """Raise QmpError unless clusters of that type can be read and written here."""
    if compression_type not in COMPRESSION_NAMES:
        raise QmpError(f"qcow2: unknown compression type: {compression_type}")
    if compression_type == COMPRESSION_ZSTD and zstandard is None:
        raise QmpError("qcow2: compression type zstd needs the Python package zstandard (extra qsd[compress])")


class Inflater:
    """Inflates the clusters of one image, on any thread.

    Of two libraries, the one that took less processor time for some of every ``PERIOD`` clusters inflates the rest.
    """

    def __init__(self, cluster_size: int, compression_type: int = COMPRESSION_ZLIB) -> None:
        self._cluster_size = cluster_size
        self._engines = _engines(compression_type)
        self._numbers = count()
        self._spent = [0] * len(self._engines)
        self._best = self._engines[0]

    def inflate(self, data: bytes | memoryview) -> bytes | bytearray:
        """The cluster that ``data`` begins with; raises OSError(EIO) for anything else than a whole cluster."""
        engines = self._engines
        number = next(self._numbers) % PERIOD
        if number >= TRIAL or len(engines) == 1:
            return self._best(data, self._cluster_size)
        which = number % len(engines)
        begin = time.thread_time_ns()
        cluster = engines[which](data, self._cluster_size)
        self._spent[which] += time.thread_time_ns() - begin
        if number == TRIAL - 1:
            self._best = engines[self._spent.index(min(self._spent))]
            # What was before counts half, and less each time.
            self._spent = [spent // 2 for spent in self._spent]
        return cluster


def _engines(compression_type: int) -> list[_Engine]:
    if compression_type == COMPRESSION_ZSTD:
        return [_inflate_zstd]
    if libdeflate is None:
        return [_inflate_stream]
    return [_inflate_libdeflate] if isal_zlib is None else [_inflate_libdeflate, _inflate_stream]


def _inflate_libdeflate(data: bytes | memoryview, cluster_size: int) -> bytes | bytearray:
    try:
        return _whole(libdeflate.deflate_decompress(data, cluster_size), cluster_size)
    except libdeflate.DeflateError:
        # It takes a stream for broken that goes on when the cluster is full; for the others that is all right.
        return _inflate_stream(data, cluster_size)


def _inflate_stream(data: bytes | memoryview, cluster_size: int) -> bytes | bytearray:
    """With ISA-L, or with zlib where that is not installed."""
    inflater: _Inflater = (zlib if isal_zlib is None else isal_zlib).decompressobj(_READ_WINDOW)
    try:
        cluster = inflater.decompress(data, cluster_size)
    except _INFLATE_ERRORS as error:
        raise OSError(errno.EIO, f"broken compressed cluster: {error}") from None
    return _whole(cluster, cluster_size)


def _whole(cluster: bytes | bytearray, cluster_size: int) -> bytes | bytearray:
    if len(cluster) != cluster_size:
        raise OSError(errno.EIO, "compressed cluster ends early")
    return cluster


def _inflate_zstd(data: bytes | memoryview, cluster_size: int) -> bytes | bytearray:
    require(COMPRESSION_ZSTD)
    cluster = bytearray(cluster_size)
    view = memoryview(cluster)
    try:
        reader = _contexts().decompressor.stream_reader(data, read_across_frames=True)
        while view:
            count = reader.readinto(view)
            if not count:
                raise OSError(errno.EIO, "compressed cluster ends early")
            view = view[count:]
    except zstandard.ZstdError as error:
        raise OSError(errno.EIO, f"broken compressed cluster: {error}") from None
    return cluster


def deflate(cluster: bytes | bytearray | memoryview, compression_type: int = COMPRESSION_ZLIB) -> bytes | None:
    """The compressed bytes of a cluster, or None when that saves nothing (it is then written as it is)."""
    data: Any = cluster
    if compression_type == COMPRESSION_ZSTD:
        require(COMPRESSION_ZSTD)
        packed = _contexts().compressor.compress(data)
    else:
        deflater: _Deflater
        if isal_zlib is None:
            deflater = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, _WRITE_WINDOW, 9)
        else:
            deflater = isal_zlib.compressobj(_ISAL_LEVEL, isal_zlib.DEFLATED, _WRITE_WINDOW)
        packed = deflater.compress(data) + deflater.flush()
    return packed if len(packed) < len(cluster) else None
