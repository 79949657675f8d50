"""The pid file and the ready message, without a daemon around them."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qsd.errors import QmpError
from qsd.host.notify import notify
from qsd.host.pidfile import PidFile


def take_elsewhere(path: Path) -> str:
    """Try to take the pid file from another process; its error, or the empty string."""
    code = (
        "import sys\nfrom qsd.errors import QmpError\nfrom qsd.host.pidfile import PidFile\n"
        "try:\n    PidFile.create(sys.argv[1])\nexcept QmpError as error:\n    print(error.desc)"
    )
    return subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout


def test_pidfile_has_the_id_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text("much longer old content\n")
    path.chmod(0o600)
    held = PidFile.create(str(path))
    assert path.read_text() == f"{os.getpid()}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    held.remove()
    assert not path.exists()


def test_pidfile_refuses_a_second_owner(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    held = PidFile.create(str(path))
    wanted = "cannot create PID file: Cannot lock pid file: Resource temporarily unavailable\n"
    assert take_elsewhere(path) == wanted
    assert path.read_text() == f"{os.getpid()}\n"
    held.remove()
    assert take_elsewhere(path) == ""


def test_pidfile_lock_is_seen_by_fcntl_users(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    held = PidFile.create(str(path))
    child = os.fork()
    if child == 0:
        with path.open("rb+") as other:
            try:
                fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os._exit(7)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    held.remove()


def test_pidfile_survives_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    held = PidFile.create("pid")
    monkeypatch.chdir("/")
    held.remove()
    assert not (tmp_path / "pid").exists()


def test_pidfile_of_another_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    held = PidFile.create(str(path))
    path.unlink()
    path.write_text("another's\n")
    held.remove()
    assert path.read_text() == "another's\n"


def test_pidfile_already_gone_is_fine(tmp_path: Path) -> None:
    held = PidFile.create(str(tmp_path / "pid"))
    (tmp_path / "pid").unlink()
    held.remove()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("no/x", "No such file or directory"), ("", "Is a directory"), ("a\0b", "Invalid argument")],
)
def test_pidfile_that_cannot_be_made(tmp_path: Path, name: str, reason: str) -> None:
    path = f"{tmp_path}/{name}"
    with pytest.raises(QmpError) as caught:
        PidFile.create(path)
    assert caught.value.desc == f"cannot create PID file: Could not create '{path}': {reason}"


@pytest.mark.parametrize("is_abstract", [False, True])
def test_notify_reaches_the_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_abstract: bool) -> None:
    address = f"{tmp_path}/notify"
    monkeypatch.setenv("NOTIFY_SOCKET", "@" + address if is_abstract else address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + address if is_abstract else address)
        assert notify("READY=1")
        assert manager.recv(100) == b"READY=1"


@pytest.mark.parametrize(
    "address", ["", "relative", "/nonexistent/socket", "@nobody-listens-here", "/" + "x" * 200]
)
def test_notify_without_a_manager(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not notify("READY=1")
