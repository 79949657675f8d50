"""Headers of qcow2 images, field by field: the reference opens the same ones, and says the same of them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from harness import Qmp, RunningDaemon
from qcow2_images import img

from qsd.drivers.qcow2.layout import (
    EXT_BACKING_FORMAT,
    EXT_BITMAPS,
    EXT_CRYPTO,
    EXT_DATA_FILE,
    FULL_LENGTH,
    V2_LENGTH,
)

Cases = Iterator[tuple[str, bytes]]
FEATURE_NAMES: Final = 0x6803F857
UNKNOWN: Final = 0x12345678
OPTIONS: Final = {
    "v3": (),
    "v2": ("-o", "compat=0.10"),
    "backing": ("-b", "base", "-F", "raw"),
    "v2-backing": ("-o", "compat=0.10", "-b", "base", "-F", "raw"),
    "data-file": ("-o", "data_file=PLACE/data"),
    "extended": ("-o", "extended_l2=on"),
    "zstd": ("-o", "compression_type=zstd"),
    "512": ("-o", "cluster_size=512"),
}
EXTENSIONS: Final = {
    EXT_BACKING_FORMAT: b"raw",
    EXT_DATA_FILE: b"data",
    EXT_BITMAPS: bytes(24),
    EXT_CRYPTO: bytes(16),
    FEATURE_NAMES: bytes(96),
    UNKNOWN: b"hello",
}


def number(value: int, size: int) -> bytes:
    return value.to_bytes(size, "big")


def edited(image: bytes, *edits: tuple[int, bytes]) -> bytes:
    found = bytearray(image)
    for offset, data in edits:
        found[offset : offset + len(data)] = data
    return bytes(found)


def extension(kind: int, data: bytes) -> bytes:
    return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)


def lengths(images: dict[str, bytes]) -> Cases:
    """Of the header, with what is there then: extensions, junk, fields of a later version."""
    for name in ("v3", "backing", "data-file", "extended", "zstd", "512"):
        for length in (
            0,
            72,
            103,
            104,
            105,
            108,
            111,
            112,
            113,
            120,
            256,
            511,
            512,
            513,
            65535,
            65536,
            65537,
            1 << 31,
        ):
            yield f"{name}: header of {length}", edited(images[name], (100, number(length, 4)))
    for length in (104, 105, 108, 112, 116, 120, 136):
        there = (100, number(length, 4)), (104, bytes(296))
        raw = extension(EXT_BACKING_FORMAT, b"raw")
        yield f"extension at {length}", edited(images["v3"], *there, (length, raw))
        yield f"junk at {length}", edited(images["v3"], *there, (length, b"\xff" * 8))
        yield f"fields up to {length}", edited(images["v3"], *there, (112, b"\xaa" * max(0, length - 112)))


def extensions(images: dict[str, bytes]) -> Cases:
    """Behind headers of both versions: one, several, of any length."""
    for name, at in (("v3", FULL_LENGTH), ("v2", V2_LENGTH)):
        bare = edited(images[name], (at, bytes(600 - at)))
        for kind, data in EXTENSIONS.items():
            for count in (1, 2, 3):
                yield f"{name}: {count} of {kind:x}", edited(bare, (at, extension(kind, data) * count))
            for length in (0, 1, 7, 17, 4096, 65536, 1 << 31, (1 << 32) - 1):
                wrong = edited(bare, (at, extension(kind, data)), (at + 4, number(length, 4)))
                yield f"{name}: {kind:x} of {length}", wrong
    yield "without the data file's name", edited(images["data-file"], (FULL_LENGTH, bytes(300)))


def names(images: dict[str, bytes]) -> Cases:
    """Of backing files, anywhere."""
    for name in ("backing", "v2-backing"):
        for offset in (0, 1, 71, 72, 103, 104, 112, 500, 65535, 65536, 65537, 1 << 31, 1 << 63):
            for length in (0, 1, 4, 1023, 1024):
                edits = (8, number(offset, 8)), (16, number(length, 4))
                yield f"{name}: {length} at {offset}", edited(images[name], *edits)


def bits(images: dict[str, bytes]) -> Cases:
    """Features, compression types, and what is to be zero."""
    for name in ("v3", "data-file", "v2"):
        for field in (72, 80, 88):
            for bit in (0, 1, 2, 3, 4, 5, 31, 32, 62, 63):
                yield f"{name}: bit {bit} of {field}", edited(images[name], (field, number(1 << bit, 8)))
    for kind in (1, 2, 255):
        yield f"compression {kind}", edited(images["v3"], (104, bytes([kind])))
        yield f"compression {kind} with its bit", edited(images["v3"], (104, bytes([kind])), (72, number(8, 8)))
    yield "compression with no bit", edited(images["zstd"], (72, bytes(8)))
    for at in range(105, 112):
        yield f"padding at {at}", edited(images["v3"], (at, b"\x01"))


def cuts(images: dict[str, bytes]) -> Cases:
    """Files that end early."""
    for name in ("v3", "v2", "backing"):
        for length in (0, 8, 71, 72, 73, 103, 104, 111, 112, 200, 511, 512, 65535, 65536):
            yield f"{name}: {length} bytes", images[name][:length]


SWEEPS: Final[list[Callable[[dict[str, bytes]], Cases]]] = [lengths, extensions, names, bits, cuts]


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """One of each kind."""
    monkeypatch.chdir(tmp_path)
    found = {}
    for name in ("base", "data"):
        Path(name).write_bytes(bytes(1 << 20))
    for name, options in OPTIONS.items():
        given = [word.replace("PLACE", str(tmp_path)) for word in options]
        img("create", "-q", "-f", "qcow2", *given, "made", "1M")
        found[name] = Path("made").read_bytes()
    return found


def told(qmp: Qmp, image: str) -> dict[str, Any]:
    """The error, or what the node says of its image."""
    file = {"driver": "file", "filename": image}
    arguments = {"driver": "qcow2", "node-name": "n", "read-only": True, "file": file}
    answer = qmp.command("blockdev-add", arguments)
    if "error" in answer:
        return answer
    (shown,) = [node["image"] for node in qmp.execute("query-named-block-nodes") if node["node-name"] == "n"]
    qmp.execute("blockdev-del", node_name="n")
    return without_limits(shown)


def without_limits(value: Any) -> Any:
    """The reference reads backing files in whole sectors where no format is named; the rest is the machine's."""
    if isinstance(value, dict):
        return {name: without_limits(each) for name, each in value.items() if name not in ("limits", "actual-size")}
    return value


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: str(sweep.__name__))
def test_every_header_is_judged_as_by_the_reference(
    daemon: Callable[..., RunningDaemon],
    tmp_path: Path,
    images: dict[str, bytes],
    reference_qmp: Qmp,
    sweep: Callable[[dict[str, bytes]], Cases],
) -> None:
    place = tmp_path / "ours"
    place.mkdir()
    running = daemon(place=place)
    running.expected_stderr += ["a program lacking bitmap support modified", "Some clusters may be leaked"]
    qmp = running.qmp()
    problems = []
    image = tmp_path / "image"
    for name, data in sweep(images):
        image.write_bytes(data)
        ours, theirs = told(qmp, str(image)), told(reference_qmp, str(image))
        if ours != theirs:
            problems.append(f"{name}\n  theirs {theirs}\n  ours   {ours}")
    assert not problems, "\n".join(problems)
