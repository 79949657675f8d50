"""What a qcow2 node tells about itself: ImageInfo and its format-specific part, file names."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

from qsd.drivers import filenames
from qsd.drivers.base import Child
from qsd.drivers.implicit import full_name
from qsd.drivers.qcow2.layout import (
    COMPRESSION_NAMES,
    CORRUPT,
    EXT_BACKING_FORMAT,
    EXT_DATA_FILE,
    LAZY_REFCOUNTS,
    Header,
)
from qsd.errors import QmpError
from qsd.qapi.rows import Rows

if TYPE_CHECKING:
    from qsd.drivers.qcow2.encryption import Encryption


def text(name: bytes) -> str:
    """A name in the image, as Python has file names; as in the reference it ends at a zero byte."""
    return name.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def name_of(child: Child) -> str:
    """The file name a child is reported by."""
    inner: Any = child
    return filenames.name_of(inner.node.driver)


def allocated_size(children: dict[str, Child]) -> int | None:
    """Bytes used on the host, by the image and its data file."""
    total = 0
    for name in ("file", "data-file"):
        child: Any = children.get(name)
        if child is not None:
            size = child.node.driver.allocated_size()
            if size is None:
                return None
            total += size
    return total


def naming_options(children: dict[str, Child], options: Any, *, has_other_backing: bool) -> dict[str, str]:
    """What an image cannot be opened again without, its files aside; the values are JSON.

    ``has_other_backing``: its backing file is not the one that it names itself.
    """
    named: dict[str, str] = {}
    if has_other_backing:
        backing: Any = children.get("backing")
        named["backing"] = "null" if backing is None else filenames.tree_text(backing.node.driver)
    if options.encrypt is not None:
        # The format is not told: the header says it. The password stays a name.
        named["encrypt.key-secret"] = json.dumps(options.encrypt.key_secret)
    return named


def image_facts(header: Header, place: str) -> dict[str, Any]:
    """Cluster size and what the header says about a backing file."""
    facts: dict[str, Any] = {"cluster-size": header.cluster_size}
    name = text(header.backing_file or b"")
    if name:
        facts["backing-filename"] = name
        with contextlib.suppress(QmpError):  # relative to an image without a directory
            facts["full-backing-filename"] = full_name(name, place)
        kind = header.extension(EXT_BACKING_FORMAT)
        if kind:
            facts["backing-filename-format"] = text(kind)
    return facts


def format_specific(header: Header, bitmaps: Rows[Any] | None, encryption: Encryption | None) -> dict[str, Any]:
    """``ImageInfoSpecificQCow2``."""
    data: dict[str, Any] = {
        "compat": "0.10" if header.content_version < 3 else "1.1",
        "compression-type": COMPRESSION_NAMES[header.compression_type],
        "refcount-bits": header.refcount_bits,
    }
    if header.content_version >= 3:
        data["lazy-refcounts"] = bool(header.compatible & LAZY_REFCOUNTS)
        data["corrupt"] = bool(header.incompatible & CORRUPT)
        data["extended-l2"] = header.has_extended_l2
        # Told also where the image does not use it.
        name = header.extension(EXT_DATA_FILE)
        if name is not None:
            data["data-file"] = text(name)
    if header.has_data_file:
        data["data-file-raw"] = header.is_data_file_raw
    if encryption is not None:
        data["encrypt"] = encryption.facts()
    if bitmaps:
        data["bitmaps"] = bitmaps
    return {"type": "qcow2", "data": data}
