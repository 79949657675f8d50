"""The daemon as a directory: what it shows, what it never shows, and how its mount ends."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import RunningDaemon

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("pyfuse3") is None, reason="pyfuse3 is not installed"),
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="no access to /dev/fuse"),
]

Start = Callable[..., RunningDaemon]


@pytest.fixture
def view(daemon: Start, tmp_path: Path) -> Path:
    """A mounted view of a daemon with a disk, an export and a secret."""
    (tmp_path / "mnt").mkdir()
    (tmp_path / "disk.img").write_bytes(bytes(range(256)) * 4096)
    arguments = (
        *("--object", "secret,id=hidden,data=opensesame"),
        *("--blockdev", "file,node-name=disk,filename=disk.img"),
        *("--blockdev", "raw,node-name=window,file=disk,offset=512,size=1024"),
        *("--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
        *("--export", "nbd,id=e0,node-name=window"),
        *("--object", "qsd-view,id=view,mountpoint=mnt"),
    )
    daemon(*arguments)
    return tmp_path / "mnt"


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def test_view_shows_what_there_is(view: Path, tmp_path: Path) -> None:
    assert sorted(os.listdir(view)) == [
        *("actors", "chardevs", "exports", "graph.dot", "graph.svg", "jobs", "nodes", "objects")
    ]
    assert sorted(os.listdir(view / "nodes")) == ["disk", "window"]
    assert (view / "nodes/disk/data").read_bytes() == (tmp_path / "disk.img").read_bytes()
    assert (view / "nodes/window/data").read_bytes() == (tmp_path / "disk.img").read_bytes()[512:1536]
    assert load(view / "nodes/window/info.json")["image"]["virtual-size"] == 1024
    assert load(view / "nodes/disk/stats.json")["stats"]["rd_bytes"] > 0
    assert load(view / "exports/e0/info.json")["node-name"] == "window"
    assert (view / "exports/e0/clients").read_text() == ""
    assert load(view / "chardevs/qmp/info.json")["label"] == "qmp"
    assert '"window" -> "disk" [label="file"]' in (view / "graph.dot").read_text()
    assert "export e0" in (view / "graph.svg").read_text()
    assert "disk [node]" in (view / "actors").read_text()


def test_view_is_of_this_moment(view: Path, tmp_path: Path) -> None:
    with (tmp_path / "disk.img").open("r+b") as file:
        file.write(b"news")
    assert (view / "nodes/disk/data").read_bytes()[:4] == b"news"


def test_secrets_never_appear(view: Path) -> None:
    assert load(view / "objects/hidden/info.json")["type"] == "secret"
    for place, _names, files in os.walk(view):
        for name in files:
            assert b"opensesame" not in Path(place, name).read_bytes()


def test_view_is_read_only(view: Path) -> None:
    with pytest.raises(OSError, match="Read-only file system"):
        (view / "nodes/disk/data").open("r+b")
    with pytest.raises(FileNotFoundError):
        (view / "nodes/nobody").stat()


def test_open_data_holds_its_node(view: Path, tmp_path: Path, daemon: Start) -> None:
    (tmp_path / "two").mkdir()
    (tmp_path / "two/mnt").mkdir()
    other = daemon("--object", "qsd-view,id=view,mountpoint=mnt", place=tmp_path / "two")
    qmp = other.qmp()
    qmp.execute("blockdev-add", driver="null-co", node_name="n", size=4096, read_zeroes=True)
    with (tmp_path / "two/mnt/nodes/n/data").open("rb") as file:
        assert file.read(512) == bytes(512)
        assert qmp.refusal("blockdev-del", node_name="n") == "Node n is in use"
    os.listdir(tmp_path / "two/mnt")  # answered after the release that came before it
    qmp.execute("blockdev-del", node_name="n")
    assert os.listdir(tmp_path / "two/mnt/nodes") == []


def test_one_view_at_a_time_and_clear_refusals(daemon: Start, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    qmp = daemon().qmp()
    assert (
        qmp.refusal("object-add", qom_type="qsd-view", id="v", mountpoint="nowhere")
        == "Cannot mount a view on 'nowhere': No such file or directory"
    )
    assert (
        qmp.refusal("object-add", qom_type="qsd-view", id="v", mountpoint="qmp.sock")
        == "Cannot mount a view on 'qmp.sock': Not a directory"
    )
    for _ in range(2):
        qmp.execute("object-add", qom_type="qsd-view", id="v", mountpoint="mnt")
        assert os.path.ismount(tmp_path / "mnt")
        assert "is mounted already: 'v'" in qmp.refusal("object-add", qom_type="qsd-view", id="w", mountpoint="mnt")
        qmp.execute("object-del", id="v")
        assert not os.path.ismount(tmp_path / "mnt")


def test_unmounting_from_outside_ends_the_object(daemon: Start, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    qmp = daemon("--object", "qsd-view,id=v,mountpoint=mnt").qmp()
    subprocess.run(["fusermount3", "-u", tmp_path / "mnt"], check=True)
    # The kernel tells the daemon in its own time: the id is free once it has heard.
    while any(each["name"] == "v" for each in qmp.execute("qom-list", path="/objects")):
        pass
    qmp.execute("object-add", qom_type="qsd-view", id="v", mountpoint="mnt")
    assert os.listdir(tmp_path / "mnt/nodes") == []


def test_daemon_ends_while_a_file_is_open(daemon: Start, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    running = daemon("--object", "qsd-view,id=v,mountpoint=mnt")
    descriptor = os.open(tmp_path / "mnt/actors", os.O_RDONLY)
    try:
        running.finish()
    finally:
        with contextlib.suppress(OSError):  # the connection is gone
            os.close(descriptor)
    assert not os.path.ismount(tmp_path / "mnt")
