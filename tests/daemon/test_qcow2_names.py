"""The files an image names, and the names a node goes by."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Qmp, RunningDaemon
from qcow2_images import img

Start = Callable[..., RunningDaemon]
MIB = 1 << 20


@pytest.fixture
def running(daemon: Start) -> RunningDaemon:
    return daemon()


@pytest.fixture
def qmp(running: RunningDaemon, tmp_path: Path) -> Qmp:
    """A daemon's monitor, and beside it ``base.raw``, ``base.qcow2`` and ``top.qcow2`` on the former."""
    (tmp_path / "base.raw").write_bytes(b"base" * (MIB // 4))
    img("create", "-q", "-f", "qcow2", tmp_path / "base.qcow2", MIB)
    img("create", "-q", "-f", "qcow2", "-b", tmp_path / "base.raw", "-F", "raw", tmp_path / "top.qcow2")
    return running.qmp()


def naming(path: Path, name: bytes, *, data_file: bool = False, kind: bytes | None = None) -> Path:
    """An image of 1 MiB that names a backing file (of unknown format or ``kind``) or a data file, byte by byte."""
    img("create", "-q", "-f", "qcow2", path, MIB)
    image = bytearray(path.read_bytes())
    if data_file:
        image[72:80] = struct.pack(">Q", 4)
        extension = struct.pack(">II", 0x44415441, len(name)) + name + bytes(-len(name) % 8 + 8)
        image[112 : 112 + len(extension)] = extension
    else:
        format_ = b"" if kind is None else struct.pack(">II", 0xE2792ACA, len(kind)) + kind + bytes(-len(kind) % 8)
        at = 120 + len(format_)
        image[112:at] = format_ + bytes(8)
        image[at : at + len(name)] = name
        image[8:20] = struct.pack(">QI", at, len(name))
    path.write_bytes(image)
    return path


def file_of(path: Path) -> dict[str, Any]:
    return {"driver": "file", "filename": str(path)}


def shown(qmp: Qmp, name: str = "n") -> dict[str, Any]:
    (node,) = [node for node in qmp.execute("query-named-block-nodes") if node["node-name"] == name]
    found: dict[str, Any] = node
    return found


def name_of(qmp: Qmp, tmp_path: Path, **options: Any) -> Any:
    """The name a qcow2 node opened with these options goes by: its file's or the members of a tree."""
    qmp.execute("blockdev-add", **{"driver": "qcow2", "node-name": "n", **options})
    name = shown(qmp)["file"]
    qmp.execute("blockdev-del", node_name="n")
    if not name.startswith("json:"):
        return Path(name).name
    return json.loads(name.removeprefix("json:").replace(f"{tmp_path}/", ""))


def test_name_tells_another_backing_file_only(qmp: Qmp, tmp_path: Path) -> None:
    top, base, other = (file_of(tmp_path / name) for name in ("top.qcow2", "base.raw", "base.qcow2"))
    tree = {"driver": "qcow2", "file": {"driver": "file", "filename": "top.qcow2"}}
    assert name_of(qmp, tmp_path, file=top) == "top.qcow2"
    assert name_of(qmp, tmp_path, file=top, backing={"driver": "raw", "file": base}) == "top.qcow2"
    assert name_of(qmp, tmp_path, file=top, backing=None) == {"backing": None, **tree}
    assert name_of(qmp, tmp_path, file=top, backing=other) == {
        "backing": {"driver": "file", "filename": "base.qcow2"},
        **tree,
    }
    assert name_of(qmp, tmp_path, file={"driver": "raw", "file": other}) == {
        "driver": "qcow2",
        "file": {"driver": "raw", "file": {"driver": "file", "filename": "base.qcow2"}},
    }


def test_options_are_named_in_the_order_of_the_reference(daemon: Start, reference_qmp: Qmp, tmp_path: Path) -> None:
    """Who compares names as texts finds the same ones."""
    place = tmp_path / "ours"
    place.mkdir()
    qmp = daemon(place=place).qmp()
    (tmp_path / "base.raw").write_bytes(bytes(3 * MIB))
    secret = ("--object", "secret,id=s,data=x")
    img("create", "-q", "-f", "luks", *secret, "-o", "key-secret=s,iter-time=10", tmp_path / "luks", MIB)
    of_qcow2 = f"encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,data_file={tmp_path / 'data'}"
    img("create", "-q", "-f", "qcow2", *secret, "-o", of_qcow2, tmp_path / "all.qcow2", MIB)
    window = {"driver": "raw", "offset": 512, "size": 4096, "file": file_of(tmp_path / "base.raw")}
    nothing = {"driver": "null-co", "size": MIB, "read-zeroes": True}
    whole = {
        "driver": "qcow2",
        "file": file_of(tmp_path / "all.qcow2"),
        "data-file": file_of(tmp_path / "data"),
        "backing": window,
        "encrypt": {"format": "luks", "key-secret": "s"},
    }
    detached = {"driver": "luks", "file": window["file"], "header": file_of(tmp_path / "luks"), "key-secret": "s"}
    for monitor in (qmp, reference_qmp):
        monitor.execute_raw("object-add", {"qom-type": "secret", "id": "s", "data": "x"})
    for options in (window, nothing, whole, detached, {"driver": "compress", "file": whole}):
        names = []
        for monitor in (qmp, reference_qmp):
            monitor.execute_raw("blockdev-add", {"node-name": "n", "read-only": True, **options})
            names.append(shown(monitor)["file"])
            monitor.execute("blockdev-del", node_name="n")
        assert names[0] == names[1]


def test_empty_name_instead_of_null_is_warned_about(running: RunningDaemon, qmp: Qmp, tmp_path: Path) -> None:
    running.expected_stderr.append("deprecated")
    assert "backing" in name_of(qmp, tmp_path, file=file_of(tmp_path / "top.qcow2"), backing="")
    assert 'warning: Use of "backing": "" is deprecated; use "backing": null instead' in running.stderr()


def test_name_of_an_overlay_follows_the_name_in_its_image(qmp: Qmp, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    qmp.execute("blockdev-add", driver="raw", node_name="low", file=file_of(tmp_path / "base.raw"))
    qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(tmp_path / "nbd.sock")}})
    qmp.execute("block-export-add", type="nbd", id="e", node_name="low")
    qmp.execute(
        "blockdev-snapshot-sync",
        node_name="low",
        snapshot_file=str(overlay),
        snapshot_node_name="n",
        format="qcow2",
    )
    assert shown(qmp)["file"] == str(overlay)
    qmp.execute("change-backing-file", device="n", image_node_name="n", backing_file="elsewhere")
    assert shown(qmp)["file"].startswith("json:")
    assert shown(qmp)["image"]["backing-filename"] == "elsewhere"
    assert shown(qmp)["image"]["backing-filename-format"] == "raw"
    info = json.loads(img("info", "-U", "--output=json", overlay))
    assert (info["backing-filename"], info["backing-filename-format"]) == ("elsewhere", "raw")
    qmp.execute("change-backing-file", device="n", image_node_name="n", backing_file=str(tmp_path / "base.raw"))
    assert shown(qmp)["file"] == str(overlay)
    text = qmp.refusal("change-backing-file", device="n", image_node_name="n", backing_file="x" * 1024)
    assert text == f"Could not change backing file to '{'x' * 1024}': Invalid argument"
    qmp.execute("change-backing-file", device="n", image_node_name="n", backing_file="")
    assert "backing-filename" not in json.loads(img("info", "-U", "--output=json", overlay))


def test_name_ends_at_a_zero_byte(qmp: Qmp, tmp_path: Path) -> None:
    naming(tmp_path / "cut.qcow2", b"base.raw\0/etc/passwd")
    naming(tmp_path / "none.qcow2", b"\0base.raw")
    for image, depth in (("cut.qcow2", 1), ("none.qcow2", 0)):
        qmp.execute("blockdev-add", driver="qcow2", node_name="n", file=file_of(tmp_path / image))
        node = shown(qmp)
        assert node["backing_file_depth"] == depth
        assert node["image"].get("backing-filename") == ("base.raw" if depth else None)
        qmp.execute("blockdev-del", node_name="n")


def test_name_that_is_not_utf8_is_shown_so_that_clients_can_read_it(qmp: Qmp, tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/\xff")).write_bytes(bytes(MIB))
    naming(tmp_path / "odd.qcow2", b"\xff")
    qmp.execute("blockdev-add", driver="qcow2", node_name="n", file=file_of(tmp_path / "odd.qcow2"))
    assert shown(qmp)["image"]["backing-filename"] == "\ufffd"


def raw(**more: Any) -> str:
    """The JSON name of ``base.raw`` with further options."""
    tree = {"driver": "raw", "file.driver": "file", "file.filename": "base.raw", **more}
    return f"json:{json.dumps(tree)}"


BAD_JSON = "Could not parse the JSON options"
# A backing file's name whose format the image does not tell, and what comes of it; None: it is opened. Where the
# reference says otherwise, that stands behind it.
OTHERS: list[tuple[str, str | None]] = [
    ("base.qcow2", None),
    ("./base.raw", None),
    ("file:base.raw", None),
    ("/dev/null", None),
    ('json:{"driver": "null-co"}', None),
    ('json:{"file.filename": "base.raw"}', None),
    ('json:{"file": {"driver": "file", "filename": "base.qcow2"}}', None),
    ("missing", "Could not open 'missing': No such file or directory"),
    ("x" * 400, f"Could not open '{'x' * 400}': File name too long"),
    ("directory", "'file' driver requires 'directory' to be a regular file"),
    ("fifo", "'file' driver requires 'fifo' to be a regular file"),  # waits for a writer
    ("short.qcow2", "qcow2 header too short"),
    ("host_device:base.raw", "'host_device' driver requires 'base.raw' to be either a character or block device"),
    ("a:b", "Unknown protocol 'a'"),
    ("raw:base.raw", "Unknown protocol 'raw'"),
    ("fat:directory", "Unknown protocol 'fat'"),  # opens it
    ("json:{}", "Must specify either driver or file"),
    ("json:x", f"{BAD_JSON}: 1:1: JSON parse error, invalid keyword 'x'"),
    ("json:[]", "Invalid JSON object given"),
    ('json:{"driver": "raw", "offset": "512", "size": "1024", "file.filename": "base.raw"}', None),
    ('json:{"driver": "raw", "offset": 512, "size": "0x400", "file.filename": "base.raw"}', None),
    ('json:{"driver": "qcow2", "read-only": "on", "file.filename": "base.qcow2"}', None),
    (
        'json:{"driver": "qcow2", "read-only": "maybe", "file.filename": "base.qcow2"}',
        "Parameter 'read-only' expects 'on' or 'off'",
    ),
    ('json:{"driver": "null-co", "size": "1048576"}', None),
    ('json:{"driver": "null-co", "size": "-1"}', "Value '-1' is out of range for parameter 'size'"),  # dies
    ('json:{"file.filename": "nbd:x"}', None),
    ('json:{"driver": "null-co", "driver": "null-co"}', f"{BAD_JSON}: 1:33: JSON parse error, duplicate key"),
    ("file:nbd:x", None),
    ("./json:x", None),
    ("file:json:x", None),
    ("file:", "The 'file' block driver requires a file name"),
    ("a\nb", None),
    (".", "'file' driver requires '.' to be a regular file"),
    ("base.raw/", "Could not open 'base.raw/': Not a directory"),
    ("/dev/fd/0", None),  # which is /dev/null
    ("/dev/fdset/7", "Could not open '/dev/fdset/7': No such file or directory"),  # no such set: other words
    ("/proc/self/mem", "Could not open '/proc/self/mem': Input/output error"),
    ("fd:3", "Unknown protocol 'fd'"),
    ("quorum:x", "Unknown protocol 'quorum'"),
    # The reference opens these, or dials out, before anybody has said that it may.
    ("nbd:x", "Unknown protocol 'nbd'"),
    ("nbd:unix:/nonexistent", "Unknown protocol 'nbd'"),
    ("nbd+unix:///x?socket=/nonexistent", "Unknown protocol 'nbd+unix'"),
    ("http://127.0.0.1:1/x", "Unknown protocol 'http'"),
    ("ssh://127.0.0.1:1/x", "Unknown protocol 'ssh'"),
    ("blkdebug::base.raw", "Unknown protocol 'blkdebug'"),
    ("host_cdrom:/dev/null", "Unknown protocol 'host_cdrom'"),
    ('json:{"driver": "nbd", "path": "/nonexistent"}', "Unknown driver 'nbd'"),
    ('json:{"driver": "nope"}', "Unknown driver 'nope'"),
    ('json:{"driver": ["raw"]}', "Must specify either driver or file"),
    # Options in names may be strings, as on a command line.
    (raw(offset="512", size="1k"), None),
    (raw(offset="0x200", size=1024.0), None),
    (raw(offset="x"), "Parameter 'offset' expects a non-negative number below 2^64"),
    (raw(offset="-1"), "Value '-1' is out of range for parameter 'offset'"),
    (raw(**{"read-only": "on", "cache.direct": "off"}), None),
    (raw(**{"read-only": "maybe"}), "Parameter 'read-only' expects 'on' or 'off'"),
    (raw(**{"read-only": 1}), "Parameter 'read-only' expects 'on' or 'off'"),
    (raw(**{"file.aio-max-batch": "4", "file.drop-cache": "off"}), None),
    (raw(**{"file.aio-max-batch": "x"}), "Parameter 'aio-max-batch' expects a number"),
    (raw(**{"file.drop-cache": "x"}), "Parameter 'drop-cache' expects 'on' or 'off'"),
    (raw(**{"file.locking": "x"}), "invalid parameter value: x"),
    (raw(discard="x"), "Invalid discard option"),
    (raw(nope=1), "Block format 'raw' does not support the option 'nope'"),
    (raw(**{"file.nope": 1}), "Block protocol 'file' doesn't support the option 'nope'"),
    ('json:{"driver": "raw"}', 'A block device must be specified for "file"'),
    ('json:{"driver": "raw", "file": {}}', 'A block device must be specified for "file"'),
    ('json:{"driver": "raw", "file": 1}', 'A block device must be specified for "file"'),
    ('json:{"driver": "raw", "file": {"driver": "nope"}}', "Unknown driver 'nope'"),
    ('json:{"driver": "raw", "file": {"driver": "file"}}', "The 'file' block driver requires a file name"),
    ('json:{"driver": "file", "filename": 1}', "The 'file' block driver requires a file name"),
    ('json:{"driver": "raw", "file.driver": "raw", "file.file.filename": "base.raw"}', None),
    ('json:{"driver": "raw", "file.filename": "base.raw", "file": {"locking": "off"}}', None),
    ('json:{"driver": "qcow2", "file.filename": "base.qcow2", "backing": null, "lazy-refcounts": "on"}', None),
    (
        'json:{"driver": "qcow2", "file.filename": "base.qcow2", "overlap-check": "x"}',
        "Unsupported value 'x' for qcow2 option 'overlap-check'. Allowed are any of the following: none, constant, "
        "cached, all",
    ),
    (raw(backing=None, size=None), None),
    (raw(**{"backing": "", "file.backing": None}), None),
    (raw(backing="x"), "An image cannot name the node 'x'"),  # does not know backing files of raw images
    (raw(**{"data-file": None}), "Block format 'raw' does not support the option 'data-file'"),
    ('json:{"driver": "qcow2", "file.filename": "base.qcow2", "data-file": null, "lazy-refcounts": null}', None),
    ('json:{"driver": "raw", "file": "mine"}', "An image cannot name the node 'mine'"),  # opens it
]


@pytest.fixture
def base_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory has a raw image and a qcow2 image."""
    monkeypatch.chdir(tmp_path)
    Path("base.raw").write_bytes(bytes(MIB))
    img("create", "-q", "-f", "qcow2", "base.qcow2", MIB)


@pytest.mark.usefixtures("base_images")
def test_backing_file_of_any_name_is_opened_or_refused_at_once(daemon: Start) -> None:
    Path("short.qcow2").write_bytes(Path("base.qcow2").read_bytes()[:100])
    Path("directory").mkdir()
    os.mkfifo("fifo")
    for name in ("nbd:x", "json:x", "a\nb"):
        Path(name).write_bytes(bytes(MIB))
    qmp = daemon().qmp()
    qmp.execute("blockdev-add", driver="null-co", node_name="mine")
    for name, text in OTHERS:
        naming(Path("image"), name.encode())
        arguments = {"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "image"}}
        answer = qmp.command("blockdev-add", arguments)
        wanted = None if text is None else f"Could not open backing file: {text}"
        assert answer.get("error", {}).get("desc") == wanted, name
        if text is None:
            assert len(qmp.execute("query-named-block-nodes")) > 1
            qmp.execute("blockdev-del", node_name="n")
        assert [node["node-name"] for node in qmp.execute("query-named-block-nodes")] == ["mine"]


@pytest.mark.parametrize("names", [("image",), ("image", "other")], ids=["itself", "one another"])
def test_images_that_are_their_own_backing_files_are_refused(
    qmp: Qmp, tmp_path: Path, names: tuple[str, ...]
) -> None:
    for name, backing in zip(names, (*names[1:], names[0]), strict=True):
        naming(tmp_path / name, backing.encode())
    text = qmp.refusal(
        "blockdev-add", driver="qcow2", node_name="n", file=file_of(tmp_path / "image"), read_only=True
    )
    assert text.endswith("The chain of images is too long")
    assert qmp.execute("query-named-block-nodes") == []


# A data file's name is a path, whatever it looks like.
DATA_FILES: list[tuple[bytes, str | None]] = [
    (b"base.raw", None),
    (b"nbd:x", None),
    (b"a\nb", None),
    (b"/dev/null", None),
    (b"base.raw\0x", None),
    (b'json:{"driver": "null-co"}', 'Could not open \'json:{"driver": "null-co"}\': No such file or directory'),
    (b"nbd:unix:/x", "Could not open 'nbd:unix:/x': No such file or directory"),
    (b"http://127.0.0.1:1/", "Could not open 'http://127.0.0.1:1/': No such file or directory"),
    (b"file:base.raw", "Could not open 'file:base.raw': No such file or directory"),
    (b"", "The 'file' block driver requires a file name"),
    (b"\0base.raw", "The 'file' block driver requires a file name"),
    (b"directory", "Could not open 'directory': Is a directory"),
    (b"image", 'Failed to get shared "resize" lock'),
]


def test_data_file_of_any_name_is_a_path(daemon: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("directory").mkdir()
    for file in ("base.raw", "nbd:x", "a\nb"):
        Path(file).write_bytes(bytes(MIB))
    qmp = daemon().qmp()
    for name, text in DATA_FILES:
        naming(Path("image"), name, data_file=True)
        arguments = {"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "image"}}
        answer = qmp.command("blockdev-add", arguments)
        assert answer.get("error", {}).get("desc") == text, name
        if text is None:
            qmp.execute("blockdev-del", node_name="n")
        assert qmp.execute("query-named-block-nodes") == []


NO_DEVICE = "'host_device' driver requires 'base.raw' to be either a character or block device"
# What an image says the format of its backing file is, and what comes of it where that is a lie, or is none.
FORMATS: list[tuple[str, str, str | None]] = [
    ("base.qcow2", "raw", None),
    ("base.raw", "qcow2", "Image is not in qcow2 format"),
    ("base.raw", "luks", "Parameter 'key-secret' is required for cipher"),
    ("base.raw", "file", None),
    (
        "base.raw",
        "host_device",
        "'host_device' driver requires 'base.raw' to be either a character or block device",
    ),
    ("base.raw", "RAW", "Unknown driver 'RAW'"),
    ("base.raw", "json", "Unknown driver 'json'"),
    ("base.raw", "raw\0qcow2", None),
    ("base.raw", "", None),
    ('json:{"driver": "qcow2", "file.filename": "base.raw"}', "raw", None),
    ('json:{"driver": "raw", "file.filename": "base.raw"}', "qcow2", "Image is not in qcow2 format"),
]


@pytest.mark.usefixtures("base_images")
def test_format_of_a_backing_file_is_what_the_image_says(daemon: Start) -> None:
    """A qcow2 image that is said to be raw is its bytes, whatever they name."""
    qmp = daemon().qmp()
    for name, kind, text in FORMATS:
        naming(Path("image"), name.encode(), kind=kind.encode())
        arguments = {"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "image"}}
        answer = qmp.command("blockdev-add", arguments)
        wanted = None if text is None else f"Could not open backing file: {text}"
        assert answer.get("error", {}).get("desc") == wanted, (name, kind)
        if text is None:
            drivers = [node["drv"] for node in qmp.execute("query-named-block-nodes")]
            assert drivers.count("qcow2") == 1, (name, kind)
            qmp.execute("blockdev-del", node_name="n")


def test_names_that_look_like_others_are_told_as_they_are(qmp: Qmp, tmp_path: Path) -> None:
    """A file called ``json:x`` made every query fail."""
    (tmp_path / "json:x").write_bytes(bytes(MIB))
    qmp.execute("blockdev-add", driver="raw", node_name="n", file={"driver": "file", "filename": "json:x"})
    assert shown(qmp)["file"] == "json:x"


def test_data_file_in_this_process_memory_is_refused(qmp: Qmp, tmp_path: Path) -> None:
    image = file_of(naming(tmp_path / "evil.qcow2", b"/proc/self/mem", data_file=True))
    text = "Could not refresh total sector count: Invalid argument"
    assert qmp.refusal("blockdev-add", driver="qcow2", node_name="n", file=image) == text
    assert qmp.refusal("blockdev-add", **{"driver": "file", "node-name": "n", "filename": "/proc/self/mem"}) == text


def test_backing_file_is_opened_after_the_image_has_been_looked_at(qmp: Qmp, tmp_path: Path) -> None:
    top, raw = file_of(tmp_path / "top.qcow2"), file_of(tmp_path / "base.raw")
    for file, backing, text in [
        (raw, "nope", "Image is not in qcow2 format"),
        (
            top,
            "nope",
            "Could not open backing file: Cannot find device='nope' nor node-name='nope'",
        ),
        (
            top,
            {"driver": "qcow2", "file": top},
            'Could not open backing file: Failed to get shared "write" lock',
        ),
    ]:
        assert qmp.refusal("blockdev-add", driver="qcow2", node_name="n", file=file, backing=backing) == text
    assert qmp.execute("query-named-block-nodes") == []


def test_reopen_reads_a_file_that_was_opened_before_the_node(qmp: Qmp, tmp_path: Path) -> None:
    for name in ("base.raw", "base.qcow2"):
        qmp.execute("blockdev-add", driver="file", node_name=name, filename=str(tmp_path / name))
    qmp.execute("blockdev-add", driver="qcow2", node_name="n", backing=None, file=file_of(tmp_path / "top.qcow2"))
    options = {"driver": "qcow2", "node-name": "n", "backing": None}
    # A node that is held does not answer; the reference takes what is no image, and reads it as one.
    text = qmp.refusal("blockdev-reopen", options=[{**options, "file": "base.raw"}])
    assert text == "Image is not in qcow2 format"
    qmp.execute("blockdev-reopen", options=[{**options, "file": "base.qcow2"}])
    assert Path(shown(qmp)["file"]).name == "base.qcow2"
