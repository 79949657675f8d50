"""``qsd check``: the consistency of an image file, in the words and with the exit codes of ``qemu-img check``."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

import attrs

from qsd.block.bitmap import DirtyBitmap
from qsd.block.permissions import Perm
from qsd.drivers.qcow2 import bitmap_layout, layout, snapshot_table
from qsd.drivers.qcow2.check import Checker, Findings
from qsd.drivers.qcow2.repair import Repaired, repair
from qsd.errors import QmpError, errno_text
from qsd.host.locks import ByteLocks

CLEAN, FAILED, CORRUPT, LEAKING, UNSUPPORTED = 0, 1, 2, 3, 63
# Bytes of the snapshot table read at a time; one entry fits in at least.
_WINDOW: Final = 8 * snapshot_table.MAX_ENTRY


class _Image:
    """An image file, locked against writers (and for repairs against everybody) unless all is shared by force."""

    def __init__(self, filename: str, *, writable: bool, force_share: bool) -> None:
        if writable and force_share:
            raise QmpError(f"Could not open '{filename}': force-share=on can only be used with read-only images")
        self.filename = filename
        try:
            self.fd = os.open(filename, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            raise QmpError(f"Could not open '{filename}': {errno_text(error.errno or 0)}") from None
        perm = Perm.CONSISTENT_READ | (Perm.WRITE | Perm.RESIZE if writable else Perm.NONE)
        shared = Perm.ALL if force_share else Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
        try:
            ByteLocks(filename).acquire(self.fd, perm, shared)
        except BaseException:
            os.close(self.fd)
            raise
        self.length = os.lseek(self.fd, 0, os.SEEK_END)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes at an offset, wherever an image says that something is; zeroes beyond the end."""
        found = os.pread(self.fd, length, offset) if offset < self.length else b""
        return found.ljust(length, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """Write all of it."""
        while data:
            count = os.pwrite(self.fd, data, offset)
            offset, data = offset + count, data[count:]
        self.length = max(self.length, offset)

    def flush(self) -> None:
        """Return when everything is on the disk."""
        os.fsync(self.fd)


def check(prog: str, words: Sequence[str]) -> int:
    """Run the sub-command; its exit code: 0 clean, 1 not checked, 2 corrupt, 3 leaks only, 63 not supported."""
    options = _parse(prog, words)
    try:
        image = _Image(options.image, writable=options.repair is not None, force_share=options.force_share)
    except QmpError as error:
        sys.stderr.write(f"{prog} check: {error.desc}\n")
        return FAILED
    try:
        return _check(prog, options, image)
    except (QmpError, OSError) as error:
        text = error.desc if isinstance(error, QmpError) else errno_text(error.errno or 0)
        sys.stderr.write(f"{prog} check: Could not open '{options.image}': {text}\n")
        return FAILED
    finally:
        os.close(image.fd)


class _Parser(argparse.ArgumentParser):
    """Wrong words mean that nothing was checked; argparse's own exit code 2 would say that the image is corrupt."""

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"{self.prog}: {message}\nTry '{self.prog} --help' for more information\n")


def _parse(prog: str, words: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog=f"{prog} check", description="Check a qcow2 image, and repair it.")
    parser.add_argument("image", help="the image file; it must not be open for writing elsewhere")
    parser.add_argument("-f", "--format", help="the image's format (default: what its first bytes say)")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but what is wrong, on stderr")
    parser.add_argument(
        "-U",
        "--force-share",
        action="store_true",
        help="look at an image others write to; what is shown may be wrong",
    )
    parser.add_argument("--output", choices=("human", "json"), default="human")
    parser.add_argument(
        "-r", "--repair", choices=("leaks", "all"), help="give leaked clusters back; all: also counts and flags"
    )
    parser.add_argument("--progress", action="store_true", help="show on stderr how far it is")
    return parser.parse_args(words)


def _check(prog: str, options: argparse.Namespace, image: _Image) -> int:
    if options.format not in (None, "qcow2", "raw"):
        raise QmpError(f"Unknown driver '{options.format}'")
    start = image.read(0, layout.PROBE_LENGTH)
    probed = start.startswith(layout.MAGIC)
    if options.format == "qcow2" and not probed:
        raise QmpError("Image is not in qcow2 format")
    if options.format == "raw" or not probed:
        sys.stderr.write(f"{prog} check: This image format does not support checks\n")
        return UNSUPPORTED
    header = _header(image)
    _check_bitmaps(header, image)
    _check_snapshots(header, image)
    progress = _show_progress if options.progress and not options.quiet else _ignore
    found = Checker(header, image.read, image.length, progress).run()
    fixed = Repaired()
    if options.repair is not None and (found.leaks or found.corruptions):
        leaks_only = options.repair == "leaks"
        fixed = repair(header, image.read, image.write, found, leaks_only=leaks_only, flush=image.flush)
        image.flush()
        header = _header(image)
        found = Checker(header, image.read, image.length, progress).run()
        if not found.corruptions and header.incompatible & (layout.DIRTY | layout.CORRUPT):
            _clear_marks(image, header)
    if options.quiet:
        sys.stderr.writelines(f"{problem}\n" for problem in found.problems)
    elif options.output == "json":
        print(json.dumps(_as_json(options.image, found, fixed), indent=4))
    else:
        print(_as_text(found, fixed))
    return CORRUPT if found.corruptions else LEAKING if found.leaks else CLEAN


def _header(image: _Image) -> layout.Header:
    start = image.read(0, layout.PROBE_LENGTH)
    return layout.parse_header(image.read(0, layout.probe_cluster_size(start)))


def _check_bitmaps(header: layout.Header, image: _Image) -> None:
    """Raise QmpError when the image could not be opened for what it says about its bitmaps."""
    extension = header.bitmaps_extension() if header.version >= 3 else None
    if extension is None:
        return
    directory = image.read(extension.offset, extension.size)
    # Tables that do not overlap: 65535 of them could lead to the same megabytes.
    room = image.length + header.cluster_size
    for entry in bitmap_layout.parse_directory(directory, extension.count, header.cluster_size):
        if entry.flags & bitmap_layout.IN_USE:
            continue
        bits = DirtyBitmap.data_length_of(header.size, 1 << entry.granularity_bits)
        if entry.table_entries != -(-bits // header.cluster_size):
            raise QmpError(f"Could not read bitmap '{entry.text}' from image: {errno_text(errno.EINVAL)}")
        room -= entry.table_entries * 8
        try:
            if room < 0:
                raise ValueError("the tables overlap")
            bitmap_layout.parse_table(image.read(entry.table_offset, entry.table_entries * 8), header.cluster_size)
        except ValueError:
            what = f"Could not read bitmap_table table from image for bitmap '{entry.text}'"
            raise QmpError(f"{what}: {errno_text(errno.EINVAL)}") from None


def _check_snapshots(header: layout.Header, image: _Image) -> None:
    """Raise QmpError when the image could not be opened for what it says about its snapshots."""
    start, window = 0, b""
    position = 0
    for number in range(header.snapshot_count):
        if position > snapshot_table.MAX_TABLE:
            raise QmpError("Snapshot table too large")
        if position + snapshot_table.MAX_ENTRY > start + len(window):
            start, window = position, image.read(header.snapshots_offset + position, _WINDOW)
        at = position - start
        _snapshot, length = snapshot_table.parse_entry(window[at : at + snapshot_table.MAX_ENTRY], number)
        position += length


def _clear_marks(image: _Image, header: layout.Header) -> None:
    """The image is consistent: it need not be repaired when it is opened next, and may be written to."""
    clean = attrs.evolve(header, **layout.unmarking(header))
    if clean.version == header.version:
        marks = clean.incompatible & ~layout.CORRUPT
        image.write(layout.V2_LENGTH, marks.to_bytes(8, "big"))
    else:
        image.write(0, layout.serialise_header(clean))
    image.flush()


def _ignore(_done: int, _total: int) -> None:
    """Nobody wants to know."""


def _show_progress(done: int, total: int) -> None:
    sys.stderr.write(f"    ({100 * done / total if total else 100:.2f}/100%)\r")
    if done == total:
        sys.stderr.write("\n")


def _as_json(filename: str, found: Findings, fixed: Repaired) -> dict[str, Any]:
    shown = {
        "image-end-offset": found.image_end,
        "total-clusters": found.total_clusters,
        "check-errors": 0,
        "leaks": found.leaks,
        "leaks-fixed": fixed.leaks,
        "allocated-clusters": found.allocated_clusters,
        "filename": filename,
        "format": "qcow2",
        "compressed-clusters": found.compressed_clusters,
        "fragmented-clusters": found.fragmented_clusters,
        "corruptions": found.corruptions,
        "corruptions-fixed": fixed.corruptions,
    }
    always = ("image-end-offset", "total-clusters", "check-errors", "filename", "format")
    return {key: value for key, value in shown.items() if value or key in always}


def _as_text(found: Findings, fixed: Repaired) -> str:
    lines = list(found.problems)
    add: Callable[[str], None] = lines.append
    if fixed.leaks or fixed.corruptions:
        add(
            "The following inconsistencies were found and repaired:\n\n"
            f"    {fixed.leaks} leaked clusters\n    {fixed.corruptions} corruptions\n\n"
            "Double checking the fixed image now..."
        )
    if not found.corruptions and not found.leaks:
        add("No errors were found on the image.")
    if found.corruptions:
        add(
            f"\n{found.corruptions} errors were found on the image.\n"
            "Data may be corrupted, or further writes to the image may corrupt it."
        )
    if found.leaks:
        add(
            f"\n{found.leaks} leaked clusters were found on the image.\n"
            "This means waste of disk space, but no harm to data."
        )
    if found.total_clusters and found.allocated_clusters:
        total, used = found.total_clusters, found.allocated_clusters
        add(
            f"{used}/{total} = {100 * used / total:.2f}% allocated, "
            f"{100 * found.fragmented_clusters / used:.2f}% fragmented, "
            f"{100 * found.compressed_clusters / used:.2f}% compressed clusters"
        )
    add(f"Image end offset: {found.image_end}")
    return "\n".join(lines)
