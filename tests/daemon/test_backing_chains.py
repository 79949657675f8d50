"""The backing files of qcow2 images: what streaming leaves of them, what overlays may be, long chains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Qmp, RunningDaemon
from qcow2_images import assert_clean, content, img, write_raw

Start = Callable[..., RunningDaemon]

MIB = 1 << 20
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
