"""Every block driver there is, through ``check_block_driver``'s checks.

(``compress`` has no part in it: clusters are written once through it.)
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from check_block_driver import SIZE, Options, Subject, check_block_driver, use
from whole_daemon import Whole

# Where the image in the middle of a chain ends.
MIDDLE = 299_520
BACKING = random.Random(3).randbytes(SIZE // 3)


def some_file(place: Path, **more: Any) -> Options:
    return {"driver": "file", "node-name": "top", "filename": str(place / "disk"), "discard": "unmap", **more}


def on(place: Path, driver: str, *, below: Options | None = None, **more: Any) -> list[Options]:
    """A node above a file, which is a node of its own."""
    file = {**some_file(place, **(below or {})), "node-name": "file"}
    return [file, {"driver": driver, "node-name": "top", "file": "file", "discard": "unmap", **more}]


async def create(whole: Whole, options: Options, *, name: str = "disk", size: int = 0) -> None:
    """Run blockdev-create on the file ``name``."""
    path = whole.place / name
    path.write_bytes(bytes(size))
    await whole.run("blockdev-add", driver="file", node_name="raw-file", filename=str(path))
    await whole.run("blockdev-create", job_id="j", options={"file": "raw-file", "size": SIZE, **options})
    while not any(job["status"] == "concluded" for job in await whole.run("query-jobs")):
        await trio.lowlevel.checkpoint()
    assert "error" not in (await whole.run("query-jobs"))[0], await whole.run("query-jobs")
    await whole.run("job-dismiss", id="j")
    await whole.run("blockdev-del", node_name="raw-file")


def qcow2(**options: Any) -> Callable[[Whole], Awaitable[None]]:
    async def prepare(whole: Whole) -> None:
        await create(whole, {"driver": "qcow2", **options})

    return prepare


async def overlay(whole: Whole) -> None:
    (whole.place / "base").write_bytes(BACKING)
    await create(whole, {"driver": "qcow2"})


async def overlays(whole: Whole) -> None:
    """A shorter image in the middle, with something of its own."""
    await overlay(whole)
    await create(whole, {"driver": "qcow2", "size": MIDDLE}, name="middle")
    file = {"driver": "file", "filename": str(whole.place / "middle")}
    base = {"driver": "file", "filename": str(whole.place / "base")}
    await whole.run("blockdev-add", driver="qcow2", node_name="m", file=file, backing=base)
    edge = await use(whole, "m")
    await edge.write(100_000, b"middle" * 20_000)
    await edge.detach()
    await whole.run("blockdev-del", node_name="m")


async def external(whole: Whole) -> None:
    (whole.place / "data").write_bytes(b"")
    await whole.run("blockdev-add", driver="file", node_name="data-file", filename=str(whole.place / "data"))
    await create(whole, {"driver": "qcow2", "data-file": "data-file"})
    await whole.run("blockdev-del", node_name="data-file")


def encrypted(**encrypt: Any) -> Callable[[Whole], Awaitable[None]]:
    async def prepare(whole: Whole) -> None:
        pytest.importorskip("numpy")
        pytest.importorskip("cryptography")
        await whole.run("object-add", qom_type="secret", id="s", data="word")
        await create(whole, {"driver": "qcow2", "encrypt": {"key-secret": "s", **encrypt}})

    return prepare


async def luks(whole: Whole) -> None:
    pytest.importorskip("numpy")
    pytest.importorskip("cryptography")
    await whole.run("object-add", qom_type="secret", id="s", data="word")
    await create(whole, {"driver": "luks", "key-secret": "s", "iter-time": 1})


DIRECT = {"cache": {"direct": True}}
SUBJECTS: dict[str, Subject] = {
    "file": Subject(
        lambda place: [some_file(place)], reopens=({}, DIRECT, {"detect-zeroes": "on"}), is_spotted=True
    ),
    "file direct": Subject(lambda place: [some_file(place, aio="native", **DIRECT)], alignment=512),
    "file detecting zeroes": Subject(
        lambda place: [some_file(place, **{"detect-zeroes": "unmap"})], is_spotted=True
    ),
    "null-co": Subject(
        lambda _: [{"driver": "null-co", "node-name": "top", "size": SIZE}], stores=False, resizes=False
    ),
    "null-aio": Subject(
        lambda _: [
            {"driver": "null-aio", "node-name": "top", "size": SIZE, "latency-ns": 1000, "read-zeroes": True}
        ],
        stores=False,
        resizes=False,
    ),
    "raw": Subject(lambda place: on(place, "raw"), reopens=({}, {"read-only": False}), is_spotted=True),
    "raw direct": Subject(lambda place: on(place, "raw", below=DIRECT)),
    "raw from an odd offset": Subject(lambda place: on(place, "raw", offset=1001, below=DIRECT), is_torn=True),
    "raw window": Subject(lambda place: on(place, "raw", offset=777, size=SIZE - 2048), resizes=False),
    "qcow2": Subject(lambda place: on(place, "qcow2"), qcow2(), is_spotted=True),
    "qcow2 of small clusters, direct": Subject(
        lambda place: on(place, "qcow2", below=DIRECT), qcow2(**{"cluster-size": 4096, "refcount-bits": 8})
    ),
    "qcow2 with subclusters": Subject(
        lambda place: on(place, "qcow2"), qcow2(**{"extended-l2": True, "cluster-size": 65536})
    ),
    "qcow2, preallocated, raw above": Subject(
        lambda place: [
            {**some_file(place), "node-name": "file"},
            {"driver": "qcow2", "node-name": "q", "file": "file", "discard": "unmap"},
            {"driver": "raw", "node-name": "top", "file": "q", "discard": "unmap"},
        ],
        qcow2(preallocation="metadata"),
        is_spotted=True,
    ),
    "qcow2, encrypted": Subject(
        lambda place: on(place, "qcow2", encrypt={"format": "luks", "key-secret": "s"}),
        encrypted(**{"format": "luks", "iter-time": 1}),
        alignment=512,
    ),
    "qcow2, encrypted the old way": Subject(
        lambda place: on(place, "qcow2", encrypt={"format": "aes", "key-secret": "s"}),
        encrypted(format="qcow"),
        alignment=512,
    ),
    "qcow2 overlay": Subject(
        lambda place: [
            {"driver": "file", "node-name": "base", "filename": str(place / "base"), "read-only": True},
            *on(place, "qcow2", backing="base"),
        ],
        overlay,
        begins=lambda length: BACKING.ljust(length, b"\0"),
        is_spotted=True,
    ),
    "qcow2 overlay of an overlay": Subject(
        lambda place: [
            {"driver": "file", "node-name": "base", "filename": str(place / "base"), "read-only": True},
            {
                "driver": "qcow2",
                "node-name": "middle",
                "file": {"driver": "file", "filename": str(place / "middle")},
                "backing": "base",
                "read-only": True,
            },
            *on(place, "qcow2", backing="middle"),
        ],
        overlays,
        begins=lambda length: (BACKING[:100_000] + b"middle" * 20_000 + BACKING[220_000:MIDDLE]).ljust(
            length, b"\0"
        ),
        is_spotted=True,
    ),
    "qcow2 with a data file": Subject(
        lambda place: [
            {"driver": "file", "node-name": "data", "filename": str(place / "data"), "discard": "unmap"},
            *on(place, "qcow2", **{"data-file": "data"}),
        ],
        external,
        is_spotted=True,
    ),
    "luks": Subject(lambda place: on(place, "luks", **{"key-secret": "s"}), luks, alignment=512, begins=None),
}
DEVICES: dict[str, Subject] = {
    f"host_device, {sector}, {'direct' if direct else 'buffered'}": Subject(
        lambda place, more=DIRECT if direct else {}: [  # type: ignore[misc]  # bound here
            {
                "driver": "host_device",
                "node-name": "top",
                "filename": str(place / "loop"),
                "discard": "unmap",
                **more,
            }
        ],
        resizes=False,
        alignment=sector if direct else 1,
        is_spotted=not direct,
    )
    for sector in (512, 4096)
    for direct in (True, False)
}


@pytest.mark.parametrize("name", SUBJECTS)
async def test_driver(name: str, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    await check_block_driver(SUBJECTS[name], tmp_path)


@pytest.fixture
def device(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    sector = "4096" if "4096" in request.node.name else "512"
    if os.getuid() != 0 or shutil.which("losetup") is None:
        pytest.skip("loop devices need root and losetup")
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    command = ["losetup", "--find", "--show", "--sector-size", sector, str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"losetup: {done.stderr.strip()}")
    path = Path(done.stdout.strip())
    place = tmp_path / "place"
    place.mkdir()
    (place / "loop").symlink_to(path)
    yield
    subprocess.run(["losetup", "--detach", path], check=True)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", DEVICES)
async def test_device(name: str, tmp_path: Path) -> None:
    await check_block_driver(DEVICES[name], tmp_path / "place")
