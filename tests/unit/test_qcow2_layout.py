"""The qcow2 header cluster: what it says, what is refused in which words, what survives a change."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsd.drivers.qcow2 import extensions, layout
from qsd.drivers.qcow2.extensions import BitmapsExtension, CryptoExtension, Extension
from qsd.drivers.qcow2.layout import Header, parse_header, probe_cluster_size, serialise_header
from qsd.errors import QmpError

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent / "data" / "qcow2_header_reference.json").read_text(encoding="utf-8")
)
IMAGES = {name: zlib.decompress(base64.b64decode(text)) for name, text in RECORDED["images"].items()}


def edited(image: bytes, edits: dict[str, str]) -> bytes:
    changed = bytearray(image)
    for offset, data in edits.items():
        changed[int(offset) : int(offset) + len(data) // 2] = bytes.fromhex(data)
    return bytes(changed)


def opened(image: bytes) -> str:
    """The words that refuse an image, or nothing."""
    try:
        parse_header(image[: probe_cluster_size(image[: layout.PROBE_LENGTH])])
    except QmpError as error:
        return error.desc
    return ""


def header(**changes: Any) -> Header:
    fixed: dict[str, Any] = {"size": 1 << 20, "l1_size": 1, "l1_offset": 0x30000}
    return Header(**fixed | {"refcount_table_offset": 0x10000, "refcount_table_clusters": 1} | changes)


@pytest.mark.parametrize("text", RECORDED["answers"])
def test_parse_edited_header_says_what_the_reference_says(text: str) -> None:
    for image, edits in RECORDED["answers"][text]:
        assert opened(edited(IMAGES[image], edits)) == text, (image, edits)


@pytest.mark.parametrize("name", IMAGES)
def test_serialise_gives_the_references_bytes(name: str) -> None:
    image = IMAGES[name]
    found = parse_header(image[: probe_cluster_size(image)])
    written = serialise_header(found)
    assert written.ljust(found.cluster_size, b"\0") == image[: found.cluster_size]


@pytest.mark.parametrize(
    ("length", "text"),
    [
        (0, "Image is not in qcow2 format"),
        (3, "Image is not in qcow2 format"),
        (4, "Unsupported qcow2 version 0"),
        (71, "qcow2 header too short"),
        (103, "qcow2 header too short"),
        (104, ""),
        (200, ""),
        (65535, ""),
    ],
)
def test_parse_cut_file_reads_zeroes_behind_its_end(length: int, text: str) -> None:
    assert opened(IMAGES["v3"][:length]) == text


def test_unknown_feature_is_called_by_the_name_the_image_gives() -> None:
    table = b"".join(
        bytes((kind, bit)) + name.encode().ljust(46, b"\0")
        for kind, bit, name in ((0, 7, "holograms"), (2, 9, "not this one"))
    )
    image = bytearray(serialise_header(header(incompatible=1 << 7 | 1 << 9)))
    area = extensions.serialise_extensions([Extension(extensions.EXT_FEATURE_NAMES, table)])
    image[112 : 112 + len(area)] = area
    assert opened(image) == "Unsupported qcow2 feature(s): holograms, Unknown incompatible feature: 200"


@settings(deadline=None)
@given(
    version=st.sampled_from([2, 3]),
    bits=st.integers(13, 21),
    size=st.integers(0, 1 << 33),
    backing=st.none() | st.binary(max_size=layout.MAX_BACKING_NAME),
    later=st.binary(max_size=40).map(lambda b: b.ljust(-(-len(b) // 8) * 8, b"\0")),
    kinds=st.lists(
        st.tuples(st.integers(1, 100), st.binary(max_size=50)), max_size=4, unique_by=lambda pair: pair[0]
    ),
)
def test_header_survives_the_round_trip(
    version: int, bits: int, size: int, backing: bytes | None, later: bytes, kinds: list[tuple[int, bytes]]
) -> None:
    made = header(
        version=version,
        cluster_bits=bits,
        size=size,
        l1_size=1 << 16,
        l1_offset=1 << 24,
        refcount_table_offset=1 << 25,
        backing_file=backing,
        later_fields=later if version == 3 else b"",
        header_length=72 if version == 2 else 112 + len(later),
        extensions=tuple(Extension(kind, data) for kind, data in kinds),
    )
    image = serialise_header(made)
    found = parse_header(image.ljust(made.cluster_size, b"\0"))
    assert found == made
    assert serialise_header(found) == image


def test_more_extensions_than_anybody_has_are_refused() -> None:
    """Two megabytes of empty ones: it took the daemon seconds to look at them."""
    most = extensions.MAX_EXTENSIONS
    image = bytearray(serialise_header(header(cluster_bits=16)).ljust(1 << 16, b"\0"))
    image[112:] = (struct.pack(">II", 0x1234, 0) * most).ljust((1 << 16) - 112, b"\0")
    assert opened(image) == ""
    struct.pack_into(">I", image, 112 + most * 8, 0x1234)
    assert opened(image) == "Too many header extensions"


def test_extensions_are_set_replaced_and_taken_away_in_place() -> None:
    made = header().with_extension(1, b"a").with_extension(2, b"b").with_extension(1, b"c")
    assert made.extensions == (Extension(1, b"c"), Extension(2, b"b"))
    assert made.with_extension(1, None).extensions == (Extension(2, b"b"),)


def test_known_extensions_survive_the_round_trip() -> None:
    bitmaps, crypto = BitmapsExtension(2, 64, 1 << 20), CryptoExtension(1 << 21, 1000)
    made = header(autoclear=layout.BITMAPS, crypt_method=layout.CRYPT_LUKS)
    made = made.with_extension(layout.EXT_BITMAPS, bitmaps.serialise())
    made = made.with_extension(layout.EXT_CRYPTO, crypto.serialise())
    found = parse_header(serialise_header(made))
    assert found.bitmaps_extension() == bitmaps
    assert found.crypto_extension() == crypto
    assert attrs.evolve(found, autoclear=0).bitmaps_extension() is None


def test_serialise_name_that_does_not_fit_is_refused() -> None:
    with pytest.raises(QmpError, match="No space left on device"):
        serialise_header(header(cluster_bits=9, backing_file=b"x" * 500))


@settings(deadline=None, max_examples=500)
@given(
    base=st.sampled_from(sorted(IMAGES)),
    edits=st.lists(st.tuples(st.integers(0, 600), st.binary(min_size=1, max_size=8)), min_size=1, max_size=5),
    length=st.none() | st.integers(0, 700),
)
def test_parse_damaged_header_is_a_header_or_one_error(
    base: str, edits: list[tuple[int, bytes]], length: int | None
) -> None:
    image = bytearray(IMAGES[base])
    for offset, data in edits:
        image[offset : offset + len(data)] = data
    image = image[:length]
    text = opened(bytes(image))
    if not text:
        found = parse_header(bytes(image[: 1 << 21]))
        # What later memory is asked for by.
        assert found.l1_size * 8 <= layout.MAX_L1_BYTES
        assert found.refcount_table_clusters * found.cluster_size <= layout.MAX_REFCOUNT_TABLE_BYTES
        assert found.snapshot_count <= layout.MAX_SNAPSHOTS
        assert found.l1_needed <= found.l1_size


@pytest.mark.parametrize(
    ("change", "version"),
    [
        ({}, 2),
        ({"incompatible": layout.DIRTY | layout.CORRUPT}, 2),
        ({"incompatible": 0}, 3),
        ({"incompatible": layout.DIRTY | layout.EXTENDED_L2}, 3),
        ({"incompatible": layout.DIRTY | layout.DATA_FILE}, 3),
        ({"compatible": layout.LAZY_REFCOUNTS}, 3),
        ({"autoclear": layout.WAS_V2 | layout.BITMAPS}, 3),
        ({"refcount_order": 0}, 3),
        ({"later_fields": bytes(8)}, 3),
    ],
    ids=str,
)
def test_image_that_uses_version_3_is_not_taken_for_a_marked_one_of_version_2(
    change: dict[str, Any], version: int
) -> None:
    old = Header(version=2, header_length=layout.V2_LENGTH)
    marked = attrs.evolve(old, **layout.marking(old))
    assert attrs.evolve(marked, **layout.unmarking(marked)) == old
    assert attrs.evolve(marked, **change).content_version == version
