"""Knowing mounts by their line in mountinfo, and refusing paths that lead back to us."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsd.host import mount, served
from qsd.host.mount import Entry, parse_mount_info

INFO = r"""
23 28 0:21 / /proc rw,nosuid shared:5 - proc proc rw
30 28 0:30 / /tmp/with\040blank\134slash rw,nosuid,nodev,noatime shared:1 master:2 - fuse qsd rw,user_id=0
31 30 0:31 / /tmp/with\040blank\134slash ro - fuse.sshfs me@host:/ rw
not a line
32 x
""".strip()


def test_entries_are_read() -> None:
    assert parse_mount_info(INFO) == [
        Entry(23, "0:21", "/proc", "proc", "proc"),
        Entry(30, "0:30", "/tmp/with blank\\slash", "fuse", "qsd"),
        Entry(31, "0:31", "/tmp/with blank\\slash", "fuse.sshfs", "me@host:/"),
    ]


@given(st.text(max_size=200))
def test_any_text_is_read(text: str) -> None:
    assert all(isinstance(entry, Entry) for entry in parse_mount_info(text))


def test_our_own_mounts_are_in_it() -> None:
    assert any(entry.path == "/" for entry in mount.entries())


def test_mount_points_must_be_regular_files(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    assert mount.check_mountpoint(str(tmp_path / "link")) == (str(tmp_path / "file"), False)
    with pytest.raises(ValueError, match="not a regular file"):
        mount.check_mountpoint(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        mount.check_mountpoint(str(tmp_path / "nothing"))


def test_paths_on_mounts_we_serve_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    (tmp_path / "link").symlink_to(path)
    fd = os.open(path, os.O_PATH)
    facts = Path(f"/proc/self/fdinfo/{fd}").read_text()
    os.close(fd)
    mount_id = next(int(line.split()[1]) for line in facts.splitlines() if line.startswith("mnt_id"))
    served.refuse_own(str(path))
    served.add(mount_id)
    try:
        for name in (path, tmp_path / "link"):
            with pytest.raises(OSError, match="deadlock") as caught:
                served.refuse_own(str(name))
            assert caught.value.errno == errno.EDEADLK
        served.refuse_own(str(tmp_path / "nothing"))
        served.refuse_own("/proc/self/stat")
    finally:
        served.discard(mount_id)
    served.refuse_own(str(path))
