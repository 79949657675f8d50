"""The backing files of qcow2 images: what streaming leaves of them, what overlays may be, long chains."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Qmp, RunningDaemon
from nbd_reader import NbdError, NbdReader
from qcow2_images import assert_clean, content, img, write_raw

Start = Callable[..., RunningDaemon]

MIB = 1 << 20
EPERM = "^1$"
CREATE = ("create", "-q", "-f", "qcow2")


def make_chain(place: Path, *options: str) -> bytes:
    """``base``, and ``mid`` and ``top`` above it; the data."""
    data = content(5, MIB)
    raw = write_raw(place, "base.raw", data)
    img("convert", "-O", "qcow2", raw, place / "base")
    for name, backing in (("mid", "base"), ("top", "mid")):
        img(*CREATE, *options, "-F", "qcow2", "-b", backing, place / name)
    return data


def add(qmp: Qmp, name: str, **options: Any) -> None:
    file = {"driver": "file", "filename": name}
    qmp.execute_raw("blockdev-add", {"driver": "qcow2", "node-name": name, "file": file, **options})


def named(image: Path) -> tuple[str | None, str | None]:
    """The backing file that an image names, and its format."""
    info = json.loads(img("info", "-U", "--output=json", image))
    return info.get("backing-filename"), info.get("backing-filename-format")


def told(qmp: Qmp, name: str) -> Any:
    """How a node is reported: a file name, or the options."""
    nodes = qmp.execute("query-named-block-nodes", flat=True)
    (text,) = [node["file"] for node in nodes if node["node-name"] == name]
    return json.loads(text.removeprefix("json:")) if text.startswith("json:") else text


def tree(name: str, **more: Any) -> dict[str, Any]:
    return {"driver": "qcow2", "file": {"driver": "file", "filename": name}, **more}


def test_streaming_ends_with_the_image_standing_alone_or_on_its_base(daemon: Start, tmp_path: Path) -> None:
    data = make_chain(tmp_path)
    img(*CREATE, "-F", "qcow2", "-b", "mid", tmp_path / "other")
    qmp = daemon().qmp()
    for name, base in (("top", {}), ("other", {"base": "base"})):
        add(qmp, name)
        qmp.execute("block-stream", device=name, job_id="job", auto_dismiss=False, **base)
        assert qmp.finish_job("job") is None
        assert told(qmp, name) == name
    assert named(tmp_path / "top") == (None, None)
    assert named(tmp_path / "other") == ("base", "qcow2")
    for name in ("top", "other"):
        qmp.execute("blockdev-del", node_name=name)
        assert_clean(tmp_path / name)
        img("convert", "-O", "raw", tmp_path / name, tmp_path / "shown")
        assert (tmp_path / "shown").read_bytes() == data


def test_names_of_a_long_chain_are_told_at_once(daemon: Start, tmp_path: Path) -> None:
    """Each image names another backing file than it is given, and asks that for its name."""
    make_chain(tmp_path)
    qmp = daemon().qmp()
    add(qmp, "base")
    below, wanted = "base", tree("base")
    for number in range(24):
        name = f"n{number}"
        img(*CREATE, tmp_path / name, "1M")
        add(qmp, name, backing=below)
        below, wanted = name, tree(name, backing=wanted)
    assert told(qmp, below) == wanted


def test_an_overlay_may_have_filters_above_it(daemon: Start, tmp_path: Path) -> None:
    make_chain(tmp_path)
    img(*CREATE, tmp_path / "alone", "1M")
    qmp = daemon().qmp()
    add(qmp, "base")
    add(qmp, "alone")
    qmp.execute("blockdev-add", driver="raw", node_name="filter", file="alone")
    qmp.execute("blockdev-snapshot", node="base", overlay="alone")
    assert qmp.refusal("blockdev-snapshot", node="filter", overlay="alone") == (
        "The overlay already has a backing image"
    )


def test_image_that_was_taken_for_raw_stays_raw(daemon: Start, tmp_path: Path) -> None:
    data = bytearray(content(6, MIB))
    write_raw(tmp_path, "base.raw", bytes(data))
    img(*CREATE, "-F", "raw", "-b", tmp_path / "base.raw", tmp_path / "top")
    top = bytearray((tmp_path / "top").read_bytes())
    told = top.index(struct.pack(">II", 0xE2792ACA, 3))
    top[told : told + 16] = bytes(16)
    (tmp_path / "top").write_bytes(top)
    qmp = daemon().qmp()
    add(qmp, "top")
    (base,) = [node["node-name"] for node in qmp.execute("query-named-block-nodes") if node["drv"] == "raw"]
    below = {"driver": "file", "filename": str(tmp_path / "base.raw"), "read-only": False}
    writable = {"driver": "raw", "read-only": False, "file": below}
    qmp.execute("blockdev-reopen", options=[{**tree("top"), "node-name": "top", "backing": writable}])
    qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(tmp_path / "nbd.sock")}})
    qmp.execute("block-export-add", type="nbd", id="e", name="e", node_name=base, writable=True)
    header = (tmp_path / "top").read_bytes()[:4096]
    with NbdReader(tmp_path / "nbd.sock", "e") as client:
        for offset, length in ((0, 4096), (0, 512), (0, 4), (1, 600), (512, 512), (700, 1000)):
            piece = header[offset : offset + length] if offset <= 1 else header[:length]
            if offset:
                client.write(offset, piece)
                data[offset : offset + length] = piece
            else:
                with pytest.raises(NbdError, match=EPERM):
                    client.write(offset, piece)
        assert client.read(0, MIB) == data
        # All but the first byte of the magic number is there by now.
        with pytest.raises(NbdError, match=EPERM):
            client.write(0, header[:1])
        client.write(0, b"R")
