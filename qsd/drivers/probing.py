"""Telling an image's format from its first bytes, for backing files whose overlay does not say.

Everything that is known to be a format is told apart, also what no driver here can open: it must not be taken
for raw. What is raw stays raw, whatever a guest writes into it later: a backing file is only read.
"""

from __future__ import annotations

import os
import stat
from typing import Final

from qsd.errors import QmpError, errno_text
from qsd.host import served

PROBE_BYTES: Final = 2048

# Offset, bytes there, format.
_MAGICS: Final = (
    (0, b"QFI\xfb\0\0\0\x01", "qcow"),
    (0, b"QFI\xfb", "qcow2"),
    (0, b"LUKS\xba\xbe\0\x01", "luks"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image\0", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\n", "cloop"),
)


def format_of(start: bytes, name: str = "") -> str:
    """The format of an image that begins with ``start`` (``PROBE_BYTES`` of it) and is called ``name``."""
    for offset, magic, found in _MAGICS:
        if start[offset : offset + len(magic)] == magic:
            return found
    # A dmg is known by its end only; the reference goes by the name as well.
    return "dmg" if name.endswith(".dmg") else "raw"


def protocol_of(path: str) -> str:
    """The driver that opens ``path``: devices are not files."""
    try:
        served.refuse_own(path)
        mode = os.stat(path).st_mode
    except OSError:
        return "file"  # which says what is wrong
    return "host_device" if stat.S_ISBLK(mode) or stat.S_ISCHR(mode) else "file"


def probe(path: str) -> str:
    """The format of the file or device ``path``. Raises QmpError as opening it would."""
    start = _start(path)
    return "raw" if start is None else format_of(start, path)


def encryption_of(path: str) -> str:
    """The encryption of the qcow2 image ``path``, or what it has if it has one. Raises QmpError."""
    start = _start(path) or b""
    return "aes" if start[32:36] == b"\0\0\0\x01" else "luks"


def _start(path: str) -> bytes | None:
    """The first bytes, None of what can be no image."""
    try:
        served.refuse_own(path)
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            return None
        with open(path, "rb", buffering=0) as file:
            return file.read(PROBE_BYTES) or b""
    except OSError as error:
        raise QmpError(f"Could not open '{path}': {errno_text(error.errno or 0)}") from None
