"""Clients who get in each other's way do no harm to one who keeps to himself, whatever the image is."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest
from disk_model import Model
from harness import RunningDaemon
from nbd_reader import NbdReader
from qcow2_images import TINY_CACHES, VARIANTS, assert_clean, img, node_options, write_raw

Start = Callable[..., RunningDaemon]
NAMES: Final = ("plain", "cluster-512", "extended-16k", "zlib", "chain-4k", "chain-extended", "data-file", "lazy")
CROWD: Final = 4
STEPS: Final = 60


class Part:
    """A client's part of a disk, from ``start`` on, as a disk of its own."""

    def __init__(self, client: NbdReader, start: int) -> None:
        self._client = client
        self._start = start

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        if name == "flush":
            return method  # type: ignore[no-any-return]
        return lambda offset, *args, **more: method(self._start + offset, *args, **more)


def meddle(path: Path, seed: int, end: int) -> None:
    """Write, zero, discard and flush where others do that at the same time."""
    rng = random.Random(seed)
    with NbdReader(path, "d") as client:
        for _ in range(STEPS):
            length = rng.choice((512, 4096, 30_000, 70_000, 200_000))
            offset = rng.randrange(end - length)
            kind = rng.randrange(8)
            if kind < 4:
                client.write(offset, rng.randbytes(length), fua=rng.random() < 0.1)
            elif kind < 5:
                client.write_zeroes(offset, length, may_unmap=rng.random() < 0.5)
            elif kind < 7:
                client.trim(offset, length)
            else:
                client.flush()


def keep_to_oneself(path: Path, seed: int, start: int, end: int) -> bytes:
    """Do anything, and find it as it was left; what the part holds at last."""
    with NbdReader(path, "d") as client:
        part: Any = Part(client, start)
        model = Model(part.read(0, end - start), seed)
        for _ in range(STEPS):
            model.step(part)
        assert part.read(0, end - start) == model.data
        return bytes(model.data)


@pytest.mark.parametrize("caches", [{}, TINY_CACHES], ids=["usual-caches", "tiny-caches"])
@pytest.mark.parametrize("name", NAMES)
def test_who_keeps_to_himself_is_not_harmed_by_others(
    daemon: Start, tmp_path: Path, name: str, caches: dict[str, int]
) -> None:
    made = VARIANTS[name](tmp_path)
    size = len(made.data)
    # In the middle of a cluster: they share its table and its edges.
    middle = size // 2 // 512 * 512 + 512
    running = daemon("--nbd-server", "addr.type=unix,addr.path=nbd.sock")
    qmp = running.qmp()
    qmp.execute_raw("blockdev-add", node_options(made.path, "n", **caches))
    qmp.execute("block-export-add", type="nbd", id="e", node_name="n", name="d", writable=True)
    path = tmp_path / "nbd.sock"
    with ThreadPoolExecutor(CROWD + 1) as pool:
        crowd = [pool.submit(meddle, path, seed, middle) for seed in range(CROWD)]
        seen = pool.submit(keep_to_oneself, path, 7, middle, size).result()
        for each in crowd:
            each.result()
    with NbdReader(path, "d") as client:
        whole = client.read(0, size)
    assert whole[middle:] == seen
    qmp.execute("block-export-del", id="e")
    qmp.wait_event("BLOCK_EXPORT_DELETED")
    qmp.execute("blockdev-del", node_name="n")
    assert_clean(made.path)
    img("compare", "-q", "-f", "qcow2", "-F", "raw", made.path, write_raw(tmp_path, "expected.raw", whole))
