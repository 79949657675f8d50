"""An inactive image may have another owner by now: no command writes to it, or takes it back unasked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Qmp, RunningDaemon
from nbd_reader import NbdError, NbdReader
from qcow2_images import assert_clean, img

Start = Callable[..., RunningDaemon]


def test_nothing_changes_an_inactive_image(daemon: Start, tmp_path: Path) -> None:
    """The reference answers with the same words, but for one command: it asserts when the backing file's name is
    changed."""
    img("create", "-q", "-f", "qcow2", tmp_path / "base", "1M")
    img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base", tmp_path / "top")
    before = (tmp_path / "top").read_bytes()
    qmp = daemon().qmp()
    file = {"driver": "file", "filename": "top", "node-name": "file"}
    qmp.execute("blockdev-add", driver="qcow2", node_name="top", active=False, file=file)
    inactive = "unavailable on inactive node"
    refused = [
        ("block-stream", {"device": "top", "filter_node_name": "f"}),
        ("blockdev-snapshot-internal-sync", {"device": "top", "name": "s"}),
        ("change-backing-file", {"device": "top", "image_node_name": "top", "backing_file": "other"}),
        ("block_resize", {"node_name": "top", "size": 2 << 20}),
        ("block-dirty-bitmap-add", {"node": "top", "name": "b", "persistent": True}),
    ]
    assert [qmp.refusal(name, **arguments) for name, arguments in refused] == [
        "Could not create node: Inactive 'top' can't be a file child of active 'f'",
        "Block format 'qcow2' used by device 'top' does not support internal snapshots",
        "Could not change backing file to 'other': Operation not permitted",
        f"Permission 'resize' {inactive}",
        "Cannot add a persistent bitmap to read-only or inactive node 'top'",
    ]
    # Nothing is to be changed.
    qmp.execute("x-blockdev-amend", node_name="top", job_id="j", options={"driver": "qcow2"})
    assert not qmp.finish_job("j")
    qmp.execute("blockdev-add", driver="file", node_name="alone", filename="top", active=False)
    text = qmp.refusal("change-backing-file", device="alone", image_node_name="alone", backing_file="other")
    assert text == "not allowing backing file change on an image without a backing file"
    qmp.execute("blockdev-create", job_id="j", options={"driver": "qcow2", "file": "alone", "size": 0})
    assert qmp.finish_job("j") == f"Permission 'write, resize' {inactive}"
    nodes = qmp.execute("query-named-block-nodes", flat=True)
    assert {node["node-name"] for node in nodes if not node["active"]} >= {"top", "alone"}
    assert (tmp_path / "top").read_bytes() == before


def test_overlays_of_an_inactive_image_wait_with_it(daemon: Start, tmp_path: Path) -> None:
    """So a machine is snapshot that was stored just before. As in the reference."""
    for name in ("base", "alone"):
        img("create", "-q", "-f", "qcow2", tmp_path / name, "1M")
    qmp = daemon().qmp()
    qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
    file = {"driver": "file", "filename": "base"}
    qmp.execute("blockdev-add", driver="qcow2", node_name="a", active=False, file=file)
    qmp.execute("block-export-add", type="nbd", id="e", node_name="a", writable=True, allow_inactive=True)
    before = (tmp_path / "base").read_bytes()
    sync = [
        {"node-name": node, "snapshot-file": over, "snapshot-node-name": over}
        for node, over in (("a", "b"), ("b", "c"))
    ]
    qmp.execute("transaction", actions=[{"type": "blockdev-snapshot-sync", "data": each} for each in sync])
    alone = {"driver": "file", "filename": "alone", "node-name": "file"}
    qmp.execute("blockdev-add", driver="qcow2", node_name="d", file=alone, backing=None)
    failing = [{"type": "blockdev-snapshot", "data": {"node": "c", "overlay": "d"}}, {"type": "abort", "data": {}}]
    assert qmp.refusal("transaction", actions=failing) == "Transaction aborted using Abort action"
    assert active(qmp) == {"a": False, "b": False, "c": False, "d": True, "file": True}
    qmp.execute("blockdev-snapshot", node="c", overlay="d")
    assert active(qmp) == dict.fromkeys(("a", "b", "c", "d", "file"), False)
    with NbdReader(tmp_path / "nbd.sock", "a") as client:
        assert client.read(0, 512) == bytes(512)
        with pytest.raises(NbdError):
            client.write(0, b"x" * 512)
        qmp.execute("blockdev-set-active", node_name="d", active=True)
        assert active(qmp) == dict.fromkeys(("a", "b", "c", "d", "file"), True)
        client.write(0, b"x" * 512)
        assert client.read(0, 1024) == b"x" * 512 + bytes(512)
    qmp.execute("quit")
    assert (tmp_path / "base").read_bytes() == before
    for name in ("b", "c", "alone"):
        assert_clean(tmp_path / name)


def active(qmp: Qmp) -> dict[str, bool]:
    """Which nodes with names of their own are."""
    nodes = qmp.execute("query-named-block-nodes", flat=True)
    return {node["node-name"]: node["active"] for node in nodes if not node["node-name"].startswith("#")}


def test_read_only_image_with_bitmaps_comes_back(daemon: Start, tmp_path: Path) -> None:
    img("create", "-q", "-f", "qcow2", tmp_path / "a", "1M")
    img("bitmap", "--add", tmp_path / "a", "b")
    before = (tmp_path / "a").read_bytes()
    qmp = daemon().qmp()
    file = {"driver": "file", "filename": "a"}
    qmp.execute("blockdev-add", driver="qcow2", node_name="a", read_only=True, file=file)
    for active in (False, True, False, True):
        qmp.execute("blockdev-set-active", node_name="a", active=active)
        (node,) = [each for each in qmp.execute("query-named-block-nodes") if each["node-name"] == "a"]
        assert [bitmap["name"] for bitmap in node.get("dirty-bitmaps", [])] == (["b"] if active else [])
    assert (tmp_path / "a").read_bytes() == before
