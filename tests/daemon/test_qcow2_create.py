"""blockdev-create of qcow2: what the reference's tools find in the images, and its words for what cannot be."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Qmp, RunningDaemon

Start = Callable[..., RunningDaemon]
MIB = 1 << 20
OLD = b"old" * 100_000


@pytest.fixture
def create(daemon: Start, tmp_path: Path) -> Callable[..., str]:
    """Create an image in ``f.img`` (with ``d.img`` as data file): the job's error, or nothing."""
    qmp = daemon().qmp()
    for name in ("f", "d"):
        (tmp_path / f"{name}.img").write_bytes(OLD)
        qmp.execute("blockdev-add", driver="file", node_name=name, filename=str(tmp_path / f"{name}.img"))

    def make(**options: Any) -> str:
        options = {"driver": "qcow2", "file": "f", "size": MIB} | options
        return outcome(qmp, {key.replace("_", "-"): value for key, value in options.items()})

    return make


def outcome(qmp: Qmp, options: dict[str, Any]) -> str:
    qmp.execute_raw("blockdev-create", {"job-id": "j", "options": options})
    return qmp.finish_job("j") or ""


def qemu_img(*words: str | Path) -> Any:
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    done = subprocess.run(["qemu-img", *map(str, words)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": 0},
        {"size": 5 << 40},
        {"version": "v2"},
        {"cluster_size": 512},
        {"cluster_size": 2 * MIB},
        {"extended_l2": True},
        {"compression_type": "zstd"},
        {"refcount_bits": 1, "lazy_refcounts": True},
        {"refcount_bits": 64, "preallocation": "metadata"},
        {"preallocation": "falloc"},
        {"preallocation": "full"},
        {"preallocation": "metadata", "extended_l2": True, "cluster_size": 16384},
        {"data_file": "d"},
        {"data_file": "d", "data_file_raw": True},
        {"data_file": "d", "preallocation": "full"},
        {"size": 700 * 512, "cluster_size": 512, "preallocation": "full"},
    ],
    ids=str,
)
def test_images_are_what_they_were_asked_to_be(create: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    assert create(**options) == ""
    image = tmp_path / "f.img"
    info = qemu_img("info", "-U", "--output=json", image)
    size = options.get("size", MIB)
    assert info["virtual-size"] == size
    assert info["cluster-size"] == options.get("cluster_size", 65536)
    facts = info["format-specific"]["data"]
    assert facts["compat"] == ("0.10" if options.get("version") == "v2" else "1.1")
    assert facts["refcount-bits"] == options.get("refcount_bits", 16)
    if "version" not in options:
        assert facts["lazy-refcounts"] == options.get("lazy_refcounts", False)
        assert facts["extended-l2"] == options.get("extended_l2", False)
        assert facts["compression-type"] == options.get("compression_type", "zlib")
    check = qemu_img("check", "-U", "--output=json", image)
    assert check.get("leaks", 0) == check.get("corruptions", 0) == check["check-errors"] == 0
    if "preallocation" in options or options.get("data_file_raw"):
        assert check["allocated-clusters"] == check["total-clusters"]
    if size <= MIB:
        is_seen = "data_file" in options and len(options) > 1
        (tmp_path / "expected").write_bytes((OLD if is_seen else b"").ljust(size, b"\0"))
        command = ["qemu-img", "compare", "-U", "-F", "raw", "-f", "qcow2", image, tmp_path / "expected"]
        assert subprocess.run(command, stdout=subprocess.DEVNULL, timeout=60, check=False).returncode == 0
    if options.get("preallocation") in ("falloc", "full"):
        place = tmp_path / ("d.img" if "data_file" in options else "f.img")
        assert place.stat().st_blocks * 512 >= size


def test_backing_file_is_named(create: Any, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"b" * MIB)
    assert create(backing_file="base", backing_fmt="raw") == ""
    info = qemu_img("info", "-U", "--output=json", tmp_path / "f.img")
    assert (info["backing-filename"], info["backing-filename-format"]) == ("base", "raw")
    command = ["qemu-img", "compare", "-U", "-F", "raw", "-f", "qcow2", tmp_path / "f.img", tmp_path / "base"]
    assert subprocess.run(command, stdout=subprocess.DEVNULL, timeout=60, check=False).returncode == 0


NEWER = "with compatibility level 1.1 and above (use version=v3 or greater)"
SIZES = "Cluster size must be a power of two between 512 and 2048k"
WIDTHS = "Refcount width must be a power of two and may not exceed 64 bits"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": 1000}, "Image size must be a multiple of 512 bytes"),
        ({"size": 1 << 62}, "Could not resize image: Failed to grow the L1 table: File too large"),
        ({"size": 1 << 63}, "Could not resize image: Image size cannot be negative"),
        ({"cluster_size": 1000}, SIZES),
        ({"cluster_size": 256}, SIZES),
        ({"cluster_size": 4 * MIB}, SIZES),
        ({"refcount_bits": 3}, WIDTHS),
        ({"refcount_bits": 128}, WIDTHS),
        ({"refcount_bits": 0}, WIDTHS),
        (
            {"version": "v2", "refcount_bits": 1},
            "Different refcount widths than 16 bits require compatibility level 1.1 or above "
            "(use version=v3 or greater)",
        ),
        ({"version": "v2", "lazy_refcounts": True}, f"Lazy refcounts only supported {NEWER}"),
        ({"version": "v2", "extended_l2": True}, f"Extended L2 entries are only supported {NEWER}"),
        (
            {"extended_l2": True, "cluster_size": 8192},
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
        ),
        ({"version": "v2", "compression_type": "zstd"}, f"Non-zlib compression type is only supported {NEWER}"),
        ({"backing_fmt": "raw"}, "Backing format cannot be used without backing file"),
        (
            {"backing_file": "x" * 1024, "backing_fmt": "raw"},
            f"Could not assign backing file '{'x' * 1024}' with format 'raw': Invalid argument",
        ),
        (
            {"backing_file": "b", "backing_fmt": "raw", "preallocation": "metadata"},
            "Backing file and preallocation can only be used at the same time if extended_l2 is on",
        ),
        ({"data_file_raw": True}, "data-file-raw requires data-file"),
        ({"version": "v2", "data_file": "d"}, f"External data files are only supported {NEWER}"),
        (
            {"data_file": "d", "data_file_raw": True, "backing_file": "b", "backing_fmt": "raw"},
            "Backing file and data-file-raw cannot be used at the same time",
        ),
        # Of two the one that the reference names.
        ({"file": "x", "cluster_size": 1000}, "Cannot find device='x' nor node-name='x'"),
        ({"backing_fmt": "raw", "refcount_bits": 3}, "Backing format cannot be used without backing file"),
        ({"backing_fmt": "raw", "cluster_size": 1000}, SIZES),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(create: Any, options: dict[str, Any], text: str) -> None:
    assert create(**options) == text


def test_image_is_not_its_own_data_file(create: Any, tmp_path: Path) -> None:
    """The reference meets the conflict when it opens what it has made."""
    assert create(data_file="f").startswith(
        "Permission conflict on node 'f': permissions 'write, resize' are both "
    )
    again = {"driver": "file", "filename": str(tmp_path / "f.img")}
    assert create(data_file=again) == 'Failed to get "write" lock'
    text = create(data_file={**again, "locking": "off"})
    assert text.endswith("cannot be both the image and its data file")
    assert (tmp_path / "f.img").read_bytes() == b"old" * 100_000


def test_two_images_at_once(daemon: Start, tmp_path: Path) -> None:
    """In two files both are made. In one, neither would be whole: the second is refused, as the reference does."""
    qmp = daemon().qmp()
    for name in ("f", "d"):
        (tmp_path / name).touch()
        qmp.execute("blockdev-add", driver="file", node_name=name, filename=str(tmp_path / name))
    large = {"driver": "qcow2", "size": 64 * MIB, "cluster-size": 4096, "preallocation": "metadata"}
    small = {"driver": "qcow2", "size": MIB, "preallocation": "full"}
    for files in (("f", "d"), ("f", "f")):
        # Sent together: the first job has just begun when the second comes.
        for number, (options, file) in enumerate(zip((large, small), files, strict=True)):
            arguments = {"job-id": f"j{number}", "options": {**options, "file": file}}
            qmp.send(json.dumps({"execute": "blockdev-create", "arguments": arguments}))
        assert [qmp.answer(), qmp.answer()] == [{"return": {}}] * 2
        for number in (0, 1):
            wanted = {"id": f"j{number}", "status": "concluded"}
            qmp.wait_event("JOB_STATUS_CHANGE", lambda data, wanted=wanted: data == wanted)
        errors = {job["id"]: job.get("error", "") for job in qmp.execute("query-jobs")}
        for number in (0, 1):
            qmp.execute("job-dismiss", id=f"j{number}")
        assert errors["j0"] == ""
        if files[0] != files[1]:
            assert errors["j1"] == ""
        else:
            assert errors["j1"].startswith("Permission conflict on node 'f': permissions 'write, resize' are both ")
    for name, size in (("f", 64 * MIB), ("d", MIB)):
        assert qemu_img("info", "--output=json", "-U", tmp_path / name)["virtual-size"] == size
        assert not qemu_img("check", "--output=json", "-U", tmp_path / name).get("leaks")


@pytest.mark.parametrize(
    ("size", "options", "length"),
    [
        (MIB, {"data_file_raw": True}, MIB),
        (MIB, {"preallocation": "metadata"}, MIB),
        (MIB, {"preallocation": "full"}, MIB),
        (512 << 10, {"data_file_raw": True, "preallocation": "falloc"}, MIB),
        (2 * MIB, {"data_file_raw": True}, 2 * MIB),
        (2 * MIB, {"preallocation": "full"}, 2 * MIB),
        (2 * MIB, {}, MIB),
    ],
)
def test_data_file_keeps_what_it_holds(
    daemon: Start, tmp_path: Path, size: int, options: dict[str, Any], length: int
) -> None:
    """An image may be put around a raw disk that is in use already; its file is cut where nothing of it is seen."""
    qmp = daemon().qmp()
    for name, holds in (("f", b""), ("d", b"d" * size)):
        (tmp_path / f"{name}.img").write_bytes(holds)
        qmp.execute("blockdev-add", driver="file", node_name=name, filename=str(tmp_path / f"{name}.img"))
    given = {key.replace("_", "-"): value for key, value in options.items()}
    assert outcome(qmp, {"driver": "qcow2", "file": "f", "data-file": "d", "size": MIB, **given}) == ""
    assert (tmp_path / "d.img").read_bytes() == (b"d" * size).ljust(length, b"\0")[:length]
