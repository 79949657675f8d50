"""New qcow2 images as values: every cluster is counted once, and the header leads to what is there."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsd.drivers.qcow2 import layout, refcount_codec
from qsd.drivers.qcow2.layout import Header
from qsd.drivers.qcow2.new_image import COPIED, PIECE, NewImage, header_cluster, metadata, place
from qsd.errors import QmpError

OFFSET = (1 << 56) - 512


def written(image: NewImage) -> tuple[Header, bytes]:
    """The whole file, read back."""
    placement = place(image)
    size = image.header.cluster_size
    file = bytearray(placement.end * size)
    parts = [(0, header_cluster(placement.header)), *metadata(placement)]
    for offset, part in parts:
        assert offset % min(size, PIECE) == len(part) % min(size, PIECE) == 0
        assert not any(file[offset : offset + len(part)]), "two parts in one place"
        file[offset : offset + len(part)] = part
    return layout.parse_header(bytes(file[:size])), bytes(file)


def words(file: bytes, offset: int, count: int) -> tuple[int, ...]:
    return struct.unpack_from(f">{count}Q", file, offset)


def counted(header: Header, file: bytes) -> list[int]:
    """The refcounts of all clusters of the file."""
    size = header.cluster_size
    counts: list[int] = []
    blocks = list(words(file, header.refcount_table_offset, header.refcount_table_clusters * size // 8))
    while blocks and not blocks[-1]:
        blocks.pop()  # a table of 1-bit counts has room for four thousand million clusters
    per_block = refcount_codec.block_entries(header.cluster_bits, header.refcount_order)
    clusters = len(file) // size
    for number, block in enumerate(blocks):
        if block:
            counts.extend(refcount_codec.decode(file[block : block + size], header.refcount_order))
        elif number * per_block < clusters:
            # A table of 1-bit counts has room for 4 Gi clusters: only as many zeroes as there are clusters.
            counts.extend([0] * per_block)
    assert not any(counts[clusters:])
    return counts[:clusters]


images = st.builds(
    lambda bits, order, clusters, extended, v2, allocates: NewImage(
        header=Header(
            version=2 if v2 else 3,
            header_length=72 if v2 else 112,
            cluster_bits=max(bits, 14) if extended and not v2 else bits,
            size=clusters * 512,
            incompatible=layout.EXTENDED_L2 if extended and not v2 else 0,
            refcount_order=4 if v2 else order,
        ),
        allocates=allocates,
    ),
    bits=st.integers(9, 16),
    order=st.integers(0, 6),
    clusters=st.integers(0, 3000),
    extended=st.booleans(),
    v2=st.booleans(),
    allocates=st.booleans(),
)


@settings(deadline=None, max_examples=80)
@given(images)
def test_every_cluster_is_counted_once(image: NewImage) -> None:
    header, file = written(image)
    assert header.size == image.header.size
    assert counted(header, file) == [1] * (len(file) // header.cluster_size)
    tables = [entry for entry in words(file, header.l1_offset, header.l1_size) if entry]
    assert len(tables) == (header.l1_needed if image.allocates else 0)
    places = []
    for entry in tables:
        assert entry & COPIED
        step = header.l2_entry_size // 8
        entries = words(file, entry & OFFSET, header.cluster_size // 8)[::step]
        places += [each & OFFSET for each in entries if each]
    guest = -(-header.size // header.cluster_size) if image.allocates else 0
    assert len(set(places)) == len(places) == guest
    assert all(len(file) > place >= header.cluster_size for place in places)


def test_data_in_another_file_stands_where_the_guest_has_it() -> None:
    header = Header(cluster_bits=16, size=1 << 20, incompatible=layout.DATA_FILE)
    read, file = written(NewImage(header=header, allocates=True))
    (table,) = words(file, read.l1_offset, 1)
    entries = words(file, table & OFFSET, 16)
    assert entries == tuple(index << 16 | COPIED for index in range(16))
    assert len(file) == 5 << 16


@pytest.mark.parametrize(
    ("size", "bits", "text"),
    [
        (1 << 62, 16, "Could not resize image: Failed to grow the L1 table: File too large"),
        (1 << 50, 9, "Could not resize image: Failed to grow the L1 table: File too large"),
        (
            (1 << 63) - 512,
            21,
            "Could not resize image: offset(9223372036854775296) exceeds maximum(9223372035781033984)",
        ),
    ],
)
def test_sizes_beyond_the_format_are_refused(size: int, bits: int, text: str) -> None:
    with pytest.raises(QmpError) as caught:
        place(NewImage(header=Header(cluster_bits=bits, size=size)))
    assert caught.value.desc == text


def test_large_image_is_placed_in_no_time() -> None:
    placement = place(NewImage(header=Header(cluster_bits=16, size=64 << 40)))
    assert placement.end < 200


def test_large_tables_are_made_in_pieces() -> None:
    """A table of 2 MiB took 30 ms, and an L1 table may have 32 MiB."""
    placement = place(NewImage(header=Header(size=1 << 40, cluster_bits=21), allocates=True))
    parts = list(metadata(placement))
    assert max(len(part) for _offset, part in parts[1:]) <= max(PIECE, 1 << 21)
    tables = placement.l2_tables << 21
    pieces = [(offset, part) for offset, part in parts if tables <= offset < tables + (1 << 21)]
    assert len(pieces) == (1 << 21) // PIECE
    entries = words(b"".join(part for _offset, part in pieces), 0, 1 << 18)
    assert entries == tuple(((placement.data + cluster) << 21) | COPIED for cluster in range(1 << 18))
