"""An inactive image may have another owner by now: no command writes to it, or takes it back unasked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness import RunningDaemon
from qcow2_images import img

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
    qmp.execute("blockdev-create", job_id="j", options={"driver": "qcow2", "file": "alone", "size": 0})
    assert qmp.finish_job("j") == f"Permission 'write, resize' {inactive}"
    nodes = qmp.execute("query-named-block-nodes", flat=True)
    assert {node["node-name"] for node in nodes if not node["active"]} >= {"top", "alone"}
    assert (tmp_path / "top").read_bytes() == before
