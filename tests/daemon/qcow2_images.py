"""qcow2 images of every variant, made by qemu-img, with what a guest should see in them."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import attrs
import pytest

SIZE = 6 << 20
# Tables are thrown out and written back all the time. The sizes fit every variant; slices are as large as the
# smallest cluster.
TINY_CACHES: Final = {"l2-cache-size": 1, "l2-cache-entry-size": 512, "refcount-cache-size": 1}


def node_options(image: Path, node: str, **more: Any) -> dict[str, Any]:
    """What ``blockdev-add`` takes for a qcow2 image in a file that hears of discards."""
    file = {"driver": "file", "filename": str(image)}
    return {"driver": "qcow2", "node-name": node, "discard": "unmap", "file": file, **more}


def find(name: str) -> str:
    """The newest program of that name there is; skips the test when there is none."""
    found = shutil.which(f"/opt/qsd-reference/bin/{name}") or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run_patiently(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program of the reference's.

    With LUKS it measures how fast it hashes, and gives up where others use the processor: then again.
    """
    for _ in range(100):
        done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=60, check=False)
        if "Unable to get accurate CPU usage" not in done.stderr:
            break
    return done


def img(*arguments: str | Path) -> str:
    """Run qemu-img; its output."""
    done = run_patiently(find("qemu-img"), *arguments)
    assert done.returncode == 0, f"qemu-img {' '.join(map(str, arguments))}: {done.stdout}{done.stderr}"
    return done.stdout


def create(program: str | Path, *words: str | Path) -> None:
    """Run ``qemu-img create``, with a secret "abc" named s that images may be encrypted with."""
    done = run_patiently(program, "create", "-q", "--object", "secret,id=s,data=abc", *words)
    assert done.returncode == 0, done.stderr


def io(image: Path, *commands: str, kind: str = "qcow2") -> None:
    """Run qemu-io's commands on an image."""
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        [find("qemu-io"), "-f", kind, *words, str(image)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout + done.stderr, done.stdout + done.stderr


def assert_clean(image: Path) -> None:
    """The reference's check finds nothing, leaks included."""
    img("check", "-q", image)


def content(seed: int, size: int = SIZE) -> bytes:
    """A disk: noise, text that compresses, zeroes, in runs of all sizes."""
    rng = random.Random(seed)
    parts: list[bytes] = []
    left = size
    while left:
        length = min(left, rng.choice((512, 3000, 4096, 65536, 100_000, 300_000, 1 << 20)))
        kind = rng.randrange(4)
        if kind == 0:
            parts.append(bytes(length))
        elif kind == 1:
            parts.append((b"%06d " % rng.randrange(10**6)) * (length // 7) + bytes(length % 7))
        else:
            parts.append(rng.randbytes(length))
        left -= length
    return b"".join(parts)


@attrs.frozen
class Made:
    """An image and what is in it."""

    path: Path
    data: bytes


def write_raw(place: Path, name: str, data: bytes) -> Path:
    path = place / name
    path.write_bytes(data)
    return path


def converted(place: Path, *options: str, compress: bool = False, seed: int = 1) -> Made:
    data = content(seed)
    raw = write_raw(place, "source.raw", data)
    image = place / "image.qcow2"
    words = [word for option in options for word in ("-o", option)]
    img("convert", *(["-c"] if compress else []), "-f", "raw", "-O", "qcow2", *words, raw, image)
    return Made(image, data)


def chain(place: Path, layers: int = 3, *, options: str = "", grow: int = 0) -> Made:
    """Overlays with some of everything in each: data, zeroes, discarded clusters; ``grow`` bytes more each."""
    data = bytearray(content(2))
    base = write_raw(place, "base.raw", bytes(data))
    below, kind = base, "raw"
    rng = random.Random(3)
    for number in range(layers):
        data += bytes(grow)
        image = place / f"layer{number}.qcow2"
        words = ["-o", options] if options else []
        img("create", "-q", "-f", "qcow2", *words, "-b", below.name, "-F", kind, image, len(data))
        commands = []
        for _ in range(12):
            offset = rng.randrange(len(data) - 140_000) // 512 * 512
            length = rng.choice((512, 4096, 65536, 131072))
            if rng.randrange(3):
                pattern = rng.randrange(1, 256)
                commands.append(f"write -q -P {pattern} {offset} {length}")
                data[offset : offset + length] = bytes([pattern]) * length
            else:
                commands.append(f"write -q -z {rng.choice(('', '-u '))}{offset} {length}")
                data[offset : offset + length] = bytes(length)
        io(image, *commands)
        below, kind = image, "qcow2"
    return Made(below, bytes(data))


def snapshots(place: Path) -> Made:
    made = converted(place)
    img("snapshot", "-c", "one", made.path)
    data = bytearray(made.data)
    io(made.path, "write -q -P 7 100000 300000", "write -q -z 1M 128k")
    data[100_000:400_000] = b"\7" * 300_000
    data[1 << 20 : (1 << 20) + (128 << 10)] = bytes(128 << 10)
    img("snapshot", "-c", "two", made.path)
    io(made.path, "write -q -P 9 300000 300000")
    data[300_000:600_000] = b"\11" * 300_000
    return Made(made.path, bytes(data))


def data_file(place: Path, *, raw: bool) -> Made:
    data = content(4)
    source = write_raw(place, "source.raw", data)
    image = place / "image.qcow2"
    options = f"data_file={place}/data.raw,data_file_raw={'on' if raw else 'off'}"
    img("convert", "-f", "raw", "-O", "qcow2", "-o", options, source, image)
    return Made(image, data)


def preallocated(place: Path, mode: str) -> Made:
    image = place / "image.qcow2"
    img("create", "-q", "-f", "qcow2", "-o", f"preallocation={mode}", image, SIZE)
    data = bytearray(SIZE)
    io(image, "write -q -P 5 70000 90000", "write -q -z 128k 64k")
    data[70_000:160_000] = b"\5" * 90_000
    data[131072:196608] = bytes(65536)
    return Made(image, bytes(data))


def written_in_parts(place: Path, cluster: int) -> Made:
    """Clusters of which only a part was written: the rest is holes in the file. The last one is cut off."""
    image, data = place / "image.qcow2", bytearray(3 << 20)
    img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", image, len(data))
    for offset, length, value in ((0, 100_000, 17), (700_000, 130_000, 34), (len(data) - 512, 512, 51)):
        io(image, f"write -q -P {value} {offset} {length}")
        data[offset : offset + length] = bytes([value]) * length
    io(image, f"write -q -c -P 68 1M {cluster}")
    data[1 << 20 : (1 << 20) + cluster] = b"\x44" * cluster
    return Made(image, bytes(data))


VARIANTS: dict[str, Callable[[Path], Made]] = {
    "plain": converted,
    "v2": lambda place: converted(place, "compat=0.10"),
    "cluster-512": lambda place: converted(place, "cluster_size=512"),
    "cluster-4k": lambda place: converted(place, "cluster_size=4k"),
    "cluster-2M": lambda place: converted(place, "cluster_size=2M"),
    "extended": lambda place: converted(place, "extended_l2=on"),
    "extended-16k": lambda place: converted(place, "extended_l2=on,cluster_size=16k"),
    "refcount-1": lambda place: converted(place, "refcount_bits=1"),
    "refcount-64": lambda place: converted(place, "refcount_bits=64"),
    "lazy": lambda place: converted(place, "lazy_refcounts=on"),
    "zlib": lambda place: converted(place, compress=True),
    "zlib-512": lambda place: converted(place, "cluster_size=512", compress=True),
    "zlib-2M": lambda place: converted(place, "cluster_size=2M", compress=True),
    "zlib-extended": lambda place: converted(place, "extended_l2=on", compress=True),
    "zstd": lambda place: converted(place, "compression_type=zstd", compress=True),
    "chain": chain,
    "chain-growing": lambda place: chain(place, grow=200_192),
    "chain-extended": lambda place: chain(place, options="extended_l2=on"),
    "chain-4k": lambda place: chain(place, options="cluster_size=4k"),
    "snapshots": snapshots,
    "data-file": lambda place: data_file(place, raw=False),
    "data-file-raw": lambda place: data_file(place, raw=True),
    "parts-16k": lambda place: written_in_parts(place, 16 << 10),
    "parts-64k": lambda place: written_in_parts(place, 64 << 10),
    "prealloc-metadata": lambda place: preallocated(place, "metadata"),
    "prealloc-full": lambda place: preallocated(place, "full"),
}
