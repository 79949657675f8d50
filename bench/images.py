"""The disk image under test: random bytes, in the page cache or kept out of it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

# As dd writes. It decides how large the folios in the page cache get, and with them what the kernel takes
# for a small write: 4 us after 64 KiB, 13 us after 1 MiB, over 20 us after 16 MiB.
CHUNK = 1 << 20


def make_image(path: Path, size: int) -> None:
    """Write ``size`` random bytes to a new file and bring them to the disk. Random, so that nothing compresses."""
    with path.open("xb", buffering=0) as file:
        for offset in range(0, size, CHUNK):
            file.write(os.urandom(min(CHUNK, size - offset)))
        os.fdatasync(file.fileno())


def convert(source: Path, path: Path, image_format: str) -> None:
    """Make an image of another format from a raw one, with the system's qemu-img."""
    command = ["qemu-img", "convert", "-f", "raw", "-O", image_format, source, path]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    settle(path)


def warm(path: Path) -> None:
    """Read the whole file once, so that it is in the page cache."""
    buffer = bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def forget(path: Path) -> None:
    """Drop the file from the page cache: O_DIRECT is then measured against the disk alone."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def settle(path: Path) -> None:
    """Write back what is dirty, so that it does not happen during the next measurement."""
    with path.open("rb") as file:
        os.fdatasync(file.fileno())
