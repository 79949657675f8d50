"""Random requests over NBD against a model, on every kind of storage the file drivers serve."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import RunningDaemon
from libnbd_model import run_model

Start = Callable[..., RunningDaemon]
SIZE = 2 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    data = bytearray(random.Random(7).randbytes(SIZE))
    data[SIZE // 4 : SIZE // 2] = bytes(SIZE // 4)
    path.write_bytes(data)
    return path


def export(daemon: Start, *nodes: str) -> RunningDaemon:
    return daemon(
        *(word for node in nodes for word in ("--blockdev", node)),
        *("--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
        *("--export", "nbd,id=e,node-name=top,name=disk,writable=on"),
    )


FILES = {
    "buffered": "file,node-name=top,filename=disk.img,discard=unmap",
    "direct": "file,node-name=top,filename=disk.img,discard=unmap,cache.direct=on,aio=native",
    "io_uring": "file,node-name=top,filename=disk.img,cache.direct=on,aio=io_uring",
    "no-flush": "file,node-name=top,filename=disk.img,cache.no-flush=on",
    "detect-zeroes": "file,node-name=top,filename=disk.img,discard=unmap,detect-zeroes=unmap",
}


@pytest.mark.parametrize("depth", [1, 16])
@pytest.mark.parametrize("kind", FILES)
def test_file_keeps_to_the_model(daemon: Start, image: Path, tmp_path: Path, kind: str, depth: int) -> None:
    begins = image.read_bytes()
    running = export(daemon, FILES[kind])
    result = run_model(tmp_path, begins, seed=depth, depth=depth)
    running.finish()
    assert image.read_bytes() == result


@pytest.mark.parametrize("window", ["offset=512", "offset=1000,size=1049088"])
def test_window_keeps_to_the_model(daemon: Start, image: Path, tmp_path: Path, window: str) -> None:
    whole = image.read_bytes()
    start = int(window.split(",")[0].removeprefix("offset="))
    size = 1049088 if "size" in window else SIZE - start
    running = export(
        daemon,
        "file,node-name=f,filename=disk.img,discard=unmap",
        f"raw,node-name=top,file=f,{window},discard=unmap",
    )
    result = run_model(tmp_path, whole[start : start + size], seed=3, depth=8)
    running.finish()
    assert image.read_bytes() == whole[:start] + result + whole[start + size :]


@pytest.fixture
def loop(image: Path) -> Iterator[Callable[[int], str]]:
    """Make loop devices of the image: ``loop(sector_size)``."""
    made: list[str] = []

    def make(sector: int) -> str:
        if os.getuid() != 0 or shutil.which("losetup") is None:
            pytest.skip("loop devices need root and losetup")
        done = subprocess.run(
            ["losetup", "--find", "--show", "--sector-size", str(sector), str(image)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"losetup: {done.stderr.strip()}")
        made.append(done.stdout.strip())
        return made[-1]

    yield make
    for device in made:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.parametrize("direct", ["on", "off"])
@pytest.mark.parametrize("sector", [512, 4096])
def test_host_device_keeps_to_the_model(
    daemon: Start, image: Path, tmp_path: Path, loop: Callable[[int], str], sector: int, direct: str
) -> None:
    begins = image.read_bytes()
    node = f"host_device,node-name=top,filename={loop(sector)},cache.direct={direct},discard=unmap"
    running = export(daemon, node)
    alignment = running.qmp().execute("query-named-block-nodes")[0]["image"]["limits"]["request-alignment"]
    assert alignment == (sector if direct == "on" else 1)
    result = run_model(tmp_path, begins, seed=sector, depth=8)
    running.finish()
    assert image.read_bytes() == result


def test_two_exports_of_one_node_see_the_same_bytes(daemon: Start, image: Path, tmp_path: Path) -> None:
    running = daemon(
        *("--blockdev", "file,node-name=top,filename=disk.img"),
        *("--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
        *("--export", "nbd,id=e,node-name=top,name=disk,writable=on"),
        *("--export", "nbd,id=other,node-name=top,name=other"),
    )
    result = run_model(tmp_path, image.read_bytes(), seed=9, depth=8)
    copy = tmp_path / "copy"
    if shutil.which("nbdcopy") is None:
        pytest.skip("nbdcopy is not installed")
    subprocess.run(["nbdcopy", f"nbd+unix:///other?socket={tmp_path}/nbd.sock", copy], check=True, timeout=60)
    assert copy.read_bytes() == result
    running.finish()


def test_fio_verifies_what_it_wrote(daemon: Start, image: Path, tmp_path: Path) -> None:
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    running = export(daemon, FILES["direct"])
    done = subprocess.run(
        [
            *("fio", "--name=v", "--ioengine=nbd", f"--uri=nbd+unix:///disk?socket={tmp_path}/nbd.sock"),
            *("--rw=randrw", "--bs=512-64k", "--size=2m", "--io_size=16m", "--iodepth=32", "--verify=crc32c"),
            *("--verify_fatal=1", f"--aux-path={tmp_path}"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    running.finish()
