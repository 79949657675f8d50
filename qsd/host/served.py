"""Which mounts this very process serves: opening a file there would wait for ourselves, for ever.

The block layer opens files on the thread that also answers FUSE. So whoever opens a path the user named asks
``refuse_own`` first. A mount is known by its id, as /proc/self/mountinfo and /proc/self/fdinfo (proc(5)) tell it.
"""

from __future__ import annotations

import errno
import os

_mount_ids: set[int] = set()


def add(mount_id: int) -> None:
    """This process serves the mount from now on."""
    _mount_ids.add(mount_id)


def discard(mount_id: int) -> None:
    """The mount has gone; its id may come to name another."""
    _mount_ids.discard(mount_id)


def refuse_own(path: str) -> None:
    """Raise OSError (EDEADLK) when ``path`` leads to a file on a mount that this process serves. Never waits."""
    if not _mount_ids:
        return
    try:
        # O_PATH walks the path and asks no file system about the file itself.
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # whoever opens it finds out why
    try:
        mount_id = _mount_of(fd)
    finally:
        os.close(fd)
    if mount_id in _mount_ids:
        raise OSError(errno.EDEADLK, os.strerror(errno.EDEADLK), path)


def _mount_of(fd: int) -> int | None:
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as facts:
            return next((int(line[7:]) for line in facts if line.startswith("mnt_id:")), None)
    except (OSError, ValueError):
        return None
