"""Mounting a FUSE file system: mount(2) for root, fusermount3 and its hand-over of the descriptor for others.

Everything here may block (a path may lead through a file system this very process serves): call it on a thread.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import shutil
import socket
import subprocess
from collections.abc import Sequence

import attrs

SOURCE = "qsd"
_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
_MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


@attrs.frozen
class MountOptions:
    """How to mount; ``options`` are FUSE's own, as mount(8) lists them."""

    read_only: bool
    root_mode: int
    options: Sequence[str]


def mount(path: str, how: MountOptions) -> int:
    """Mount on ``path``; the descriptor on which the kernel asks. Raises OSError."""
    return _mount_as_root(path, how) if os.geteuid() == 0 else _mount_as_user(path, how)


def _mount_as_root(path: str, how: MountOptions) -> int:
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    flags = _MS_NOSUID | _MS_NODEV | (_MS_RDONLY if how.read_only else 0)
    owner = f"fd={fd},rootmode={how.root_mode:o},user_id={os.geteuid()},group_id={os.getegid()}"
    data = ",".join((owner, *how.options)).encode()
    if _libc.mount(SOURCE.encode(), os.fsencode(path), b"fuse", ctypes.c_ulong(flags), data):
        number = ctypes.get_errno()
        os.close(fd)
        raise OSError(number, os.strerror(number))
    return fd


def _fusermount() -> str:
    found = shutil.which("fusermount3") or shutil.which("fusermount")
    if found is None:
        raise OSError(errno.ENOENT, "fusermount3 is not installed")
    return found


def _mount_as_user(path: str, how: MountOptions) -> int:
    mode = "ro" if how.read_only else "rw"
    options = ",".join((mode, "nosuid", "nodev", f"fsname={SOURCE}", *how.options))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        done = subprocess.run(
            [_fusermount(), "-o", options, "--", path],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        theirs.close()
        if done.returncode:
            raise OSError(errno.EPERM, done.stderr.strip() or "fusermount3 failed")
        _data, descriptors, _flags, _address = socket.recv_fds(ours, 1, 1)
    if not descriptors:
        raise OSError(errno.EPROTO, "fusermount3 handed over no descriptor")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]


def is_connected(fd: int) -> bool:
    """False when the file system has been unmounted or its connection aborted."""
    poll = select.poll()
    poll.register(fd, 0)
    return not poll.poll(0)


def unmount(path: str) -> None:
    """Take the mount away from the path at once; who has it open keeps it until it is closed. Raises OSError."""
    if os.geteuid() == 0:
        if _libc.umount2(os.fsencode(path), _MNT_DETACH):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return
    done = subprocess.run(
        [_fusermount(), "-u", "-q", "-z", "--", path], stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if done.returncode:
        raise OSError(errno.EPERM, done.stderr.decode(errors="replace").strip() or "fusermount3 failed")


def clean_stale(path: str) -> bool:
    """Unmount a dead mount of ours that a killed daemon left on ``path``; whether there was one. Raises OSError.

    Dead is what answers ENOTCONN; ours is what was mounted from ``SOURCE``.
    """
    try:
        os.stat(path)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            return False
    else:
        return False
    if not _is_ours(os.path.abspath(path)):
        return False
    unmount(path)
    return True


def _is_ours(path: str) -> bool:
    """Whether the topmost mount on ``path`` is a FUSE file system of ours (proc(5), mountinfo)."""
    found = False
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            fields, _, rest = line.partition(b" - ")
            kind, source = rest.split()[:2]
            if _unescaped(fields.split()[4]) == os.fsencode(path):
                found = kind == b"fuse" and source == SOURCE.encode()
    return found


def _unescaped(name: bytes) -> bytes:
    for code in (b"\\040", b"\\011", b"\\012", b"\\134"):
        name = name.replace(code, bytes((int(code[1:], 8),)))
    return name
