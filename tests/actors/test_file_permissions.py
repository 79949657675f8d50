"""What a file's node leaves behind when it cannot get what is asked of it: no lock, no wish, no descriptor."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from whole_daemon import Whole, whole_daemon

from qsd.actors.edges import RootOptions
from qsd.block.permissions import Perm
from qsd.errors import QmpError
from qsd.host import locks
from qsd.host.locks import ByteLocks

READER = RootOptions(Perm.CONSISTENT_READ)
WRITER = RootOptions(Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL & ~Perm.WRITE)


@pytest.fixture
def disk(tmp_path: Path) -> str:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    return str(path)


def refuse(monkeypatch: pytest.MonkeyPatch, flag: int, number: int) -> None:
    """Let opening with ``flag`` fail."""
    original: Callable[..., int] = os.open

    def refusing(path: Any, flags: int, *args: Any, **more: Any) -> int:
        if flags & flag and ("/proc/self/fd" in str(path) or str(path).endswith("disk")):
            raise OSError(number, "refused")
        return original(path, flags, *args, **more)

    monkeypatch.setattr(os, "open", refusing)


async def add(whole: Whole, filename: str) -> Any:
    await whole.run("blockdev-add", driver="file", node_name="n", filename=filename, auto_read_only=True)
    return whole.daemon.services.graph.find("n").driver


async def test_locks_of_a_writer_that_cannot_open_the_file_are_given_back(
    disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They kept other processes from the image."""
    async with whole_daemon(tmp_path) as whole:
        driver = await add(whole, disk)
        before, open_files = set(driver._locks.held), len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patch:
            refuse(patch, os.O_RDWR, errno.EMFILE)
            with pytest.raises(QmpError, match="Too many open files"):
                await whole.daemon.services.graph.attach("n", WRITER)
        assert driver._locks.held == before
        with open(disk, "rb") as other:
            ByteLocks(disk).acquire(other.fileno(), Perm.WRITE, Perm.ALL)
        assert len(os.listdir("/proc/self/fd")) == open_files
        edge = await whole.daemon.services.graph.attach("n", WRITER)
        await edge.write(0, b"x" * 512)
        await edge.detach()


async def test_locks_that_the_new_descriptor_cannot_have_are_given_back(
    disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = locks._set

    async with whole_daemon(tmp_path) as whole:
        driver = await add(whole, disk)
        before, open_files = set(driver._locks.held), len(os.listdir("/proc/self/fd"))

        def full(fd: int, kind: int, byte: int) -> None:
            if fd != driver.io.fd:
                raise OSError(errno.ENOLCK, "no locks left")
            original(fd, kind, byte)

        with monkeypatch.context() as patch:
            patch.setattr(locks, "_set", full)
            with pytest.raises(QmpError, match="No locks available"):
                await whole.daemon.services.graph.attach("n", WRITER)
        assert driver._locks.held == before
        assert len(os.listdir("/proc/self/fd")) == open_files


async def test_a_reopen_that_failed_is_forgotten(
    disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next writer was to have the file as the reopen wanted it, which cannot be."""
    async with whole_daemon(tmp_path) as whole:
        await add(whole, disk)
        options = {"driver": "file", "node-name": "n", "filename": disk, "auto-read-only": True}
        refuse(monkeypatch, os.O_DIRECT, errno.EINVAL)
        with pytest.raises(QmpError, match="filesystem does not support O_DIRECT"):
            await whole.run("blockdev-reopen", options=[options | {"cache": {"direct": True}}])
        edge = await whole.daemon.services.graph.attach("n", WRITER)
        await edge.write(0, b"x" * 512)
        await edge.detach()
