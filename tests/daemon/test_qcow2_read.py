"""qcow2 images of every variant, read through the daemon: the bytes and the block status are the reference's."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import RunningDaemon
from nbd_reader import NbdReader
from qcow2_images import VARIANTS, Made, find

Start = Callable[..., RunningDaemon]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    made = {}
    for name, make in VARIANTS.items():
        place = tmp_path_factory.mktemp(name)
        made[name] = make(place)
    return made


def arguments(images: dict[str, Made], socket: str) -> list[str]:
    words = ["--nbd-server", f"addr.type=unix,addr.path={socket}"]
    for number, (name, made) in enumerate(images.items()):
        words += [
            "--blockdev",
            f"driver=qcow2,node-name=n{number},read-only=on,file.driver=file,file.filename={made.path}",
            "--export",
            f"type=nbd,id=e{number},node-name=n{number},name={name},allocation-depth=on",
        ]
    return words


def uri(socket: Path, name: str) -> str:
    return f"nbd+unix:///{name}?socket={socket}"


def status_of(socket: Path, name: str, context: str) -> Any:
    done = subprocess.run(
        [find("nbdinfo"), "--json", f"--map={context}", uri(socket, name)],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return json.loads(done.stdout)


@contextlib.contextmanager
def running_reference(program: Path, images: dict[str, Made], place: Path) -> Iterator[Path]:
    """The reference serving the same images; yields its socket."""
    socket, pidfile = place / "reference.sock", place / "reference.pid"
    words = arguments(images, str(socket))
    subprocess.run([program, *words, "--daemonize", "--pidfile", pidfile], check=True, timeout=60)
    try:
        yield socket
    finally:
        pid = int(pidfile.read_text())
        pidfd = os.pidfd_open(pid)
        os.kill(pid, signal.SIGTERM)
        select.select([pidfd], [], [], 30)
        os.close(pidfd)
        socket.unlink(missing_ok=True)
        pidfile.unlink(missing_ok=True)


def runs(extents: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
    """Offset, length and type, neighbours of one type joined: where answers end is the server's affair."""
    joined: list[tuple[int, int, int]] = []
    for extent in extents:
        offset, length, kind = extent["offset"], extent["length"], extent["type"]
        if joined and joined[-1][2] == kind:
            joined[-1] = (joined[-1][0], joined[-1][1] + length, kind)
        else:
            joined.append((offset, length, kind))
    return joined


def test_every_variant_holds_what_was_written(daemon: Start, images: dict[str, Made], tmp_path: Path) -> None:
    daemon(*arguments(images, "nbd.sock"))
    nbdcopy = find("nbdcopy")
    for name, made in images.items():
        copy = tmp_path / "copy.raw"
        subprocess.run([nbdcopy, uri(tmp_path / "nbd.sock", name), copy], check=True, timeout=60)
        assert copy.read_bytes() == made.data, name
        copy.unlink()


def test_requests_of_all_sizes(daemon: Start, images: dict[str, Made], tmp_path: Path) -> None:
    daemon(*arguments(images, "nbd.sock"))
    rng = random.Random(5)
    for name, made in images.items():
        with NbdReader(tmp_path / "nbd.sock", name) as reader:
            for _ in range(60):
                length = rng.choice((1, 512, 700, 4096, 65536, 70_000, 1 << 20))
                offset = rng.randrange(len(made.data) - length)
                assert reader.read(offset, length) == made.data[offset : offset + length], (name, offset, length)


@pytest.mark.parametrize("context", ["base:allocation", "qemu:allocation-depth"])
def test_block_status_is_the_reference_s(
    context: str, daemon: Start, images: dict[str, Made], tmp_path: Path, reference: Path
) -> None:
    daemon(*arguments(images, "nbd.sock"))
    with running_reference(reference, images, tmp_path) as theirs:
        for name in images:
            ours = runs(status_of(tmp_path / "nbd.sock", name, context))
            assert ours == runs(status_of(theirs, name, context)), name
