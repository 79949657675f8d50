"""``qsd check`` on disks that are full, and on files that cannot be read everywhere, beside ``qemu-img check``."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from fuse_mounts import needs_fuse
from harness import DEADLINE, PROGRAM
from test_check import make, run, tool

from qsd import cli_check
from qsd.drivers.qcow2.geometry import OFFSET_MASK
from qsd.drivers.qcow2.layout import Header, parse_header

# -- full disks ----------------------------------------------------------------------------------------------------


def test_repair_that_cannot_write_tells_what_it_found(tmp_path: Path, reference: Path) -> None:
    """It told the failure only."""
    image = make(tmp_path, "old")
    assert run(tool("qemu-img"), "amend", "-o", "compat=1.1", image).returncode == 0
    data = bytearray(image.read_bytes())
    at = int.from_bytes(data[64:72], "big") + 36
    data[at : at + 4] = bytes(4)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(data), len(data)))

    for program in (PROGRAM, (reference.parent / "qemu-img",)):
        image.write_bytes(data)
        words = [*map(str, program), "check", "-r", "all", str(image)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, preexec_fn=limit)
        first, failure, last = done.stderr.splitlines()
        assert (done.returncode, done.stdout) == (1, "")
        assert "snapshot table entry 0 is incomplete" in first
        assert "ERROR failed to update snapshot table: File too large" in failure
        assert last.partition(": ")[2] == "Check failed: File too large"


@pytest.mark.parametrize("damage", ["no table", "no block", "block off its place", "reserved bits", "data too"])
def test_refcounts_are_built_anew_where_no_byte_more_can_be_written(
    tmp_path: Path, reference: Path, damage: str
) -> None:
    """They were to be written behind the end; the reference succeeds in some cases."""
    image = make(tmp_path, "plain")
    data = bytearray(image.read_bytes())
    table, l1 = int.from_bytes(data[48:56], "big"), int.from_bytes(data[40:48], "big")
    block = int.from_bytes(data[table : table + 8], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & 0x00FFFFFFFFFFFE00
    if damage == "no table":
        data[56:60] = bytes(4)
    elif damage == "data too":
        used = next(at for at in range(l2 + 8, l2 + 512, 8) if data[at] & 0x80)
        data[used : used + 8] = (block | 1 << 63).to_bytes(8, "big")
    else:
        entry = {"no block": 0, "block off its place": block + 512, "reserved bits": block + 1}[damage]
        data[table : table + 8] = entry.to_bytes(8, "big")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(data), len(data)))

    if damage == "data too":
        image.write_bytes(data)
    assert run(tool("qemu-img"), "convert", "-O", "raw", "-U", image, tmp_path / "raw").returncode == 0
    image.write_bytes(data)
    words = [*PROGRAM, "check", "-r", "all", str(image)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, preexec_fn=limit)
    assert done.returncode == 0, done.stderr
    assert run(reference.parent / "qemu-img", "check", image).returncode == 0
    compared = run(tool("qemu-img"), "compare", "-f", "qcow2", "-F", "raw", image, tmp_path / "raw")
    assert compared.returncode == 0, compared.stdout


# -- what cannot be read -------------------------------------------------------------------------------------------

PAGE: Final = 4096
# A server of a file in which a page cannot be read, or not written.
SERVER: Final = """#!/bin/sh
file=FILE
case "$1" in
get_size) exec stat -L -c %s $file ;;
can_write | can_flush | flush) exit 0 ;;
thread_model) echo serialize_requests; exit 0 ;;
pread | pwrite) ;;
*) exit 2 ;;
esac
if [ $1 = CALL ] && [ $4 -lt $((START + 4096)) ] && [ $(($4 + $3)) -gt START ]; then
    echo "EIO broken" >&2
    exit 1
fi
case "$1" in
pread) exec dd if=$file skip=$4 count=$3 iflag=count_bytes,skip_bytes bs=64k 2>/dev/null ;;
pwrite) exec dd of=$file seek=$4 conv=notrunc oflag=seek_bytes bs=64k 2>/dev/null ;;
esac
"""


@contextlib.contextmanager
def broken(file: Path, start: int, call: str = "pread") -> Iterator[Path]:
    """The same file, of which a page cannot be read, or be written."""
    place = file.with_suffix(".broken")
    place.mkdir(exist_ok=True)
    server, mounted, ready = place / "server", place / "image", place / "ready"
    server.write_text(SERVER.replace("FILE", str(file)).replace("CALL", call).replace("START", str(start)))
    server.chmod(0o755)
    mounted.touch()
    if not ready.exists():
        os.mkfifo(ready)
    told = os.open(ready, os.O_RDONLY | os.O_NONBLOCK)
    words = [tool("nbdfuse"), "-P", str(ready), str(mounted), "[", tool("nbdkit"), "sh", str(server), "]"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE)
    try:
        assert select.select([told], [], [], DEADLINE)[0], "it is not mounted"
        yield mounted
    finally:
        os.close(told)
        run(tool("fusermount3"), "-u", mounted)
        process.communicate(timeout=DEADLINE)


def word(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "big") & OFFSET_MASK


def places(data: bytes, header: Header) -> dict[str, int]:
    """Where an image's metadata is."""
    bitmaps = header.bitmaps_extension()
    assert bitmaps is not None
    return {
        "header": 0,
        "beside the header": PAGE,
        "refcount table": header.refcount_table_offset,
        "refcount block": word(data, header.refcount_table_offset),
        "L1": header.l1_offset,
        "L2": word(data, header.l1_offset),
        "snapshots": header.snapshots_offset,
        "snapshot's L1": word(data, header.snapshots_offset),
        "bitmaps": bitmaps.offset,
        "bitmap table": word(data, bitmaps.offset),
    }


@needs_fuse
def test_what_cannot_be_read_is_told_as_the_other_tells_it(
    tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was taken for zeroes where something before it could be read, and told as a failed check elsewhere."""
    image = make(tmp_path, "plain")
    data = image.read_bytes()
    different = {}
    for name, start in places(data, parse_header(data[: 1 << 16])).items():
        with broken(image, start) as mounted:
            for words in ((), ("-f", "qcow2"))[: 2 if name == "header" else 1]:
                theirs = run(reference.parent / "qemu-img", "check", *words, mounted)
                code = cli_check.check("qsd", [*words, str(mounted)])
                told = capsys.readouterr()
                output, expected = theirs.stdout, theirs.stderr.replace("qemu-img", "qsd check")
                if name == "refcount block":
                    # It tells every cluster, and figures of what it did not look at.
                    first, *_more, last = expected.splitlines(keepends=True)
                    output, expected = "", first + last.replace("failed", "failed: Input/output error")
                if (theirs.returncode, output, expected) != (code, told.out, told.err):
                    different[name, words] = (theirs, told)
    assert not different


@needs_fuse
def test_what_is_behind_a_broken_sector_is_not_taken_for_zeroes(tmp_path: Path) -> None:
    """A read that comes to it ends before it. The repair then gave back what the table led to."""
    image = make(tmp_path, "plain")
    data = image.read_bytes()
    table = places(data, parse_header(data[: 1 << 16]))["L2"]
    with broken(image, table + PAGE) as mounted:
        done = run(*PROGRAM, "check", "-r", "all", mounted)
    assert done.returncode == 1
    assert done.stderr.endswith(
        "ERROR: I/O error in check_refcounts_l2\nqsd check: Check failed: Input/output error\n"
    )
    assert image.read_bytes() == data


@needs_fuse
def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    image = make(tmp_path, "plain")
    data = bytearray(image.read_bytes())
    block = places(bytes(data), parse_header(data[: 1 << 16]))["refcount block"]
    data[block + 2 * 5 + 1] += 1
    image.write_bytes(data)
    with broken(image, block, "pwrite") as mounted:
        done = run(*PROGRAM, "check", "-r", "all", mounted)
    assert done.returncode == 1
    assert done.stderr.endswith("\nqsd check: Check failed: Input/output error\n")
    assert image.read_bytes() == data
