"""Compressed clusters: descriptors, streams, and what hostile streams come to."""

from __future__ import annotations

import errno
import random
import tracemalloc
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsd.drivers.qcow2 import compressed
from qsd.drivers.qcow2.compressed import Inflater
from qsd.drivers.qcow2.layout import COMPRESSION_ZLIB, COMPRESSION_ZSTD
from qsd.errors import QmpError

CLUSTER = 65536


def kinds() -> list[Any]:
    reason = "the Python package zstandard is not installed"
    skip = pytest.mark.skipif(compressed.zstandard is None, reason=reason)
    return [COMPRESSION_ZLIB, pytest.param(COMPRESSION_ZSTD, marks=skip)]


# Where each is asked for, those that would come before it are not installed.
ENGINES = {"libdeflate": (), "isal_zlib": ("libdeflate",), "zlib": ("libdeflate", "isal_zlib")}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    if getattr(compressed, name) is None:
        pytest.skip(f"the Python package of {name} is not installed")
    for other in ENGINES[name]:
        monkeypatch.setattr(compressed, other, None)
    return name


# -- descriptors ---------------------------------------------------------------------------------------------


def test_decode_entry_golden() -> None:
    # 64 KiB clusters: x = 54. Three more sectors from byte 0x50123 on.
    assert compressed.decode_entry(1 << 62 | 3 << 54 | 0x50123, 16) == (0x50123, 4 * 512 - 0x123)


@settings(deadline=None)
@given(bits=st.integers(9, 21), data=st.data())
def test_entry_covers_what_was_encoded(bits: int, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, (1 << min(62 - (bits - 8), 56)) - 1))
    length = data.draw(st.integers(1, 1 << bits))
    entry = compressed.encode_entry(offset, length, bits)
    assert entry >> 62 == 1
    found, covered = compressed.decode_entry(entry, bits)
    assert found == offset
    assert length <= covered < length + 512
    assert (offset + covered) % 512 == 0


@settings(deadline=None)
@given(bits=st.integers(9, 21), entry=st.integers(0, (1 << 62) - 1))
def test_decode_entry_of_any_bits_is_bounded(bits: int, entry: int) -> None:
    offset, length = compressed.decode_entry(1 << 62 | entry, bits)
    assert 0 <= offset < 1 << 62
    assert 0 < length <= 2 << bits


@pytest.mark.parametrize(
    ("offset", "length"), [(1 << 54, 512), (-1, 512), (0, 0), (511, 2 * CLUSTER), (1 << 60, 1)], ids=str
)
def test_encode_entry_of_what_cannot_be_said_is_refused(offset: int, length: int) -> None:
    with pytest.raises(OverflowError):
        compressed.encode_entry(offset, length, 16)


# -- streams -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("size", [512, CLUSTER, 2 << 20])
def test_inflate_gives_back_what_was_deflated(engine: str, kind: int, size: int) -> None:
    cluster = (b"".join(b"%d," % i for i in range(size // 4)) * 2)[:size]
    packed = compressed.deflate(cluster, kind)
    assert packed is not None
    assert len(packed) < size
    # What comes behind in the last sector belongs to somebody else.
    assert Inflater(size, kind).inflate(packed + b"\xff" * 300) == cluster


@pytest.mark.parametrize("kind", kinds())
def test_deflate_noise_is_left_alone(engine: str, kind: int) -> None:
    assert compressed.deflate(random.Random(1).randbytes(CLUSTER), kind) is None


def test_deflated_stream_keeps_to_the_window_the_reference_reads(engine: str) -> None:
    block = random.Random(2).randbytes(6000)
    packed = compressed.deflate((block * 11)[:CLUSTER])
    if packed is not None:
        assert zlib.decompressobj(-12).decompress(packed) == (block * 11)[:CLUSTER]


def test_inflate_larger_window_is_read(engine: str) -> None:
    block = random.Random(3).randbytes(20000)
    cluster = (block * 4)[:CLUSTER]
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    assert Inflater(CLUSTER).inflate(deflater.compress(cluster) + deflater.flush()) == cluster


@pytest.mark.parametrize("kind", kinds())
def test_inflate_stream_of_more_than_a_cluster_stops_there(engine: str, kind: int) -> None:
    size = 16 << 20
    if kind == COMPRESSION_ZLIB:
        deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
        bomb = b"".join(deflater.compress(bytes(1 << 20)) for _ in range(size >> 20)) + deflater.flush()
    else:
        bomb = compressed.zstandard.ZstdCompressor().compress(bytes(size))
    bomb = bomb[: 2 * CLUSTER]
    tracemalloc.start()
    try:
        assert Inflater(CLUSTER, kind).inflate(bomb) == bytes(CLUSTER)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("shorter", [1, 512, CLUSTER])
def test_inflate_stream_of_less_than_a_cluster_is_eio(engine: str, kind: int, shorter: int) -> None:
    packed = compressed.deflate(bytes(CLUSTER), kind)
    assert packed is not None
    with pytest.raises(OSError, match="compressed cluster") as caught:
        Inflater(CLUSTER + shorter, kind).inflate(packed)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("kind", kinds())
@settings(deadline=None)
@given(data=st.data())
def test_inflate_any_bytes_is_a_cluster_or_eio(kind: int, data: st.DataObject) -> None:
    stream = data.draw(st.binary(max_size=300))
    if data.draw(st.booleans()):  # a real stream, damaged
        stream = bytearray(compressed.deflate(b"some guest data " * 256, kind) or b"")
        for _ in range(data.draw(st.integers(0, 4))):
            stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
        stream = bytes(stream[: data.draw(st.integers(0, len(stream)))])
    try:
        cluster = Inflater(4096, kind).inflate(stream)
    except OSError as error:
        code = error.errno
    else:
        code = errno.EIO if len(cluster) == 4096 else 0
    assert code == errno.EIO


@pytest.mark.skipif(compressed.zstandard is None, reason="the Python package zstandard is not installed")
def test_inflate_zstd_frame_that_asks_for_a_huge_window_is_eio() -> None:
    # Magic, a frame header without single segment flag whose window descriptor says 2 GiB, one RLE block.
    frame = b"\x28\xb5\x2f\xfd\x00" + bytes([21 << 3]) + (CLUSTER << 3 | 2 | 1).to_bytes(3, "little") + b"A"
    with pytest.raises(OSError, match="broken compressed cluster") as caught:
        Inflater(CLUSTER, COMPRESSION_ZSTD).inflate(frame)
    assert caught.value.errno == errno.EIO


def test_require_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    compressed.require(COMPRESSION_ZLIB)
    monkeypatch.setattr(compressed, "zstandard", None)
    with pytest.raises(QmpError, match=r"^qcow2: compression type zstd needs "):
        compressed.require(COMPRESSION_ZSTD)
    with pytest.raises(QmpError, match=r"^qcow2: unknown compression type: 2$"):
        compressed.require(2)


def test_faster_library_of_the_last_comparison_inflates(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0]
    used: list[str] = []

    def engine(name: str, cost: int) -> Any:
        def inflate(_data: bytes, size: int) -> bytes:
            used.append(name)
            clock[0] += costs[name] * cost
            return bytes(size)

        return inflate

    costs = {"a": 3, "b": 2}
    monkeypatch.setattr(compressed, "_engines", lambda _kind: [engine("a", 1000), engine("b", 1000)])
    monkeypatch.setattr(compressed.time, "thread_time_ns", lambda: clock[0])
    inflater = Inflater(512)
    for _ in range(compressed.PERIOD):
        inflater.inflate(b"")
    half = compressed.TRIAL // 2
    assert (used.count("a"), used[-1]) == (half, "b")
    # Another kind of data.
    costs.update(a=1, b=9)
    for _ in range(compressed.PERIOD):
        inflater.inflate(b"")
    assert (used.count("b"), used[-1]) == (half + compressed.PERIOD - compressed.TRIAL + half, "a")
