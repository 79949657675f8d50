"""The disk images under test, by kind: how each is made, and what a daemon has to be told to open it.

All but raw ones are made by the reference's qemu-img and qemu-io. They are in the page cache, or kept out of it.
"""

from __future__ import annotations

import mmap
import os
import random
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import attrs

from bench.clients import CLUSTER, Clients
from bench.workloads import KIB

# As dd writes. It decides how large the folios in the page cache get, and with them what the kernel takes
# for a small write: 4 us after 64 KiB, 13 us after 1 MiB, over 20 us after 16 MiB.
CHUNK = 1 << 20
LAYERS = 8
# What the overlays of a chain hold is in pieces of this size, each in the layer that chance picks.
PIECE = 256 * KIB
TIB = 1 << 40
SECRET = "bench"
# Linux 5.14; the mmap module has no name for it.
MADV_POPULATE_WRITE = 23


@attrs.frozen
class Request:
    """An image to make: the file, the disk's size in bytes, the images below it (lowest first), the programs."""

    path: Path
    size: int
    below: tuple[Path, ...]
    programs: Clients


@attrs.frozen
class Kind:
    """A kind of image: the driver, what follows it on the command line, the objects it needs.

    ``below`` names the kinds of the images it lies on, lowest first. ``scale`` makes the disk that many times
    larger than others. One that is ``fresh`` is made anew for every use. What ``discards`` gives space back.
    """

    make: Callable[[Request], None]
    driver: str = "qcow2"
    options: str = ""
    objects: tuple[str, ...] = ()
    below: tuple[str, ...] = ()
    scale: int = 1
    fresh: bool = False
    discards: bool = False


def make_raw(image: Request) -> None:
    """Write random bytes to a new file and bring them to the disk. Random, so that nothing compresses."""
    with image.path.open("xb", buffering=0) as file:
        for offset in range(0, image.size, CHUNK):
            file.write(os.urandom(min(CHUNK, image.size - offset)))
        os.fdatasync(file.fileno())


def make_filled(image: Request, image_format: str = "qcow2", *options: str) -> None:
    """Fill an image of another format with random bytes."""
    raw = image.path.with_suffix(".filling")
    make_raw(attrs.evolve(image, path=raw))
    qemu_img(image, "convert", "-f", "raw", "-O", image_format, *options, raw, image.path)
    raw.unlink()
    settle(image.path)


def make_luks(image: Request) -> None:
    """Fill an encrypted image; its key is tried with the fewest rounds."""
    options = ("-o", "key-secret=s0,iter-time=10")
    make_filled(image, "luks", "--object", f"secret,id=s0,data={SECRET}", *options)


def make_compressed(image: Request) -> None:
    """Compress text, which deflate makes about a third of."""
    raw = image.path.with_suffix(".filling")
    chance = random.Random(1)
    words = [chance.randbytes(chance.randrange(2, 6)).hex().encode() for _ in range(4000)]
    # As in a language, a few words are most of it.
    shares = [1 / rank for rank in range(1, len(words) + 1)]
    blocks = [b" ".join(chance.choices(words, shares, k=KIB))[: 4 * KIB] for _ in range(4000)]
    with raw.open("xb") as file:
        for _ in range(image.size // (4 * KIB)):
            file.write(chance.choice(blocks))
    qemu_img(image, "convert", "-c", "-f", "raw", "-O", "qcow2", raw, image.path)
    raw.unlink()
    settle(image.path)


def make_empty(image: Request) -> None:
    """Make an image that holds nothing, or nothing but what lies below it."""
    below = ("-b", image.below[-1], "-F", "qcow2") if image.below else ()
    qemu_img(image, "create", "-q", "-f", "qcow2", *below, image.path, str(image.size))


def make_layer(image: Request) -> None:
    """Make an overlay that holds a part of the disk: the part that chance gives its place in the chain."""
    make_empty(image)
    chance = random.Random(1)
    layers = [chance.randint(0, LAYERS) for _ in range(image.size // PIECE)]
    place = len(image.below)
    qemu_io(image, (f"write -P {place} {PIECE * piece} {PIECE}" for piece, at in enumerate(layers) if at == place))


def make_fragmented(image: Request) -> None:
    """Make a disk of 1 TiB with as many clusters as fit into ``size``, dispersed over all of it."""
    make_empty(attrs.evolve(image, size=TIB))
    places = random.Random(1).sample(range(TIB // CLUSTER), image.size // CLUSTER)
    qemu_io(image, (f"write -P 1 {CLUSTER * place} {CLUSTER}" for place in places))


def qemu_img(image: Request, *words: object) -> None:
    """Run qemu-img to its end."""
    command = [image.programs.qemu_img, *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def qemu_io(image: Request, commands: Iterable[str]) -> None:
    """Carry out qemu-io's commands on the image."""
    command = [image.programs.qemu_io, "-f", "qcow2", str(image.path)]
    script = "".join(f"{each}\n" for each in (*commands, "flush", "quit"))
    subprocess.run(command, check=True, input=script.encode(), stdout=subprocess.DEVNULL)
    settle(image.path)


def chain_below(place: int) -> tuple[str, ...]:
    """The kinds below the overlay at ``place`` of a chain, the first being 1."""
    return ("qcow2", *(f"layer{each}" for each in range(1, place)))


KINDS = {
    "raw": Kind(make_raw, "raw"),
    "qcow2": Kind(make_filled),
    "fresh": Kind(make_empty, scale=16, fresh=True),
    "trimmed": Kind(make_empty, scale=8, fresh=True, discards=True),
    "overlay": Kind(make_empty, below=("qcow2",), fresh=True),
    "zlib": Kind(make_compressed),
    **{f"layer{place}": Kind(make_layer, below=chain_below(place)) for place in range(1, LAYERS)},
    "chain": Kind(make_layer, below=chain_below(LAYERS)),
    "luks": Kind(make_luks, "luks", options=",key-secret=s0", objects=(f"secret,id=s0,data={SECRET}",)),
    "fragmented": Kind(make_fragmented),
}


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


def have_memory(size: int) -> None:
    """Use ``size`` bytes of memory and give them back to the kernel.

    A virtual machine's host may have taken memory back that was free for some seconds. What is written to a new
    file then waits for the host page by page: 40 to 140 us for 64 KiB were seen, against 17.
    """
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
            memory.madvise(MADV_POPULATE_WRITE)
        except OSError:
            for offset in range(0, size, mmap.PAGESIZE):
                memory[offset] = 1
