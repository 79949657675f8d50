"""Mounting a FUSE connection on a file, and taking it away: mount(2), or fusermount3 where that is not allowed.

Everything here may block for as long as a path takes to resolve, which is for ever when the path leads to a FUSE
mount that this very thread serves: call it on another.

A mount of ours is known by its entry in /proc/self/mountinfo (proc(5)), not by its path: it may have been moved,
and something else may be mounted over it since. ``SOURCE`` is the name it has there, by which a later daemon
recognises what a killed one left behind.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import os
import re
import select
import shutil
import socket
import stat
import threading
from collections.abc import Sequence

import attrs

from qsd.host import served
from qsd.host.programs import run_program

SOURCE = "qsd"
DEVICE = "/dev/fuse"
MOUNT_INFO = "/proc/self/mountinfo"
# Seconds fusermount3 may take: it resolves the path as well.
HELPER_SECONDS = 30.0

_MS_RDONLY = 1
_MS_NOSUID = 2
_MS_NODEV = 4
_MS_NOATIME = 1024
_MNT_DETACH = 2
# What mount(2) answers to a process that may not mount.
_NOT_ALLOWED = (errno.EPERM, errno.EACCES)

_libc = ctypes.CDLL(None, use_errno=True)
_mount = _libc.mount
_mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_umount2 = _libc.umount2
_umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


class MountError(Exception):
    """The mount could not be made or taken away; the text says why."""


@attrs.frozen
class MountOptions:
    """How to mount. ``max_read`` is the largest READ in bytes."""

    read_only: bool
    allow_other: bool
    max_read: int


@attrs.frozen
class Entry:
    """A line of mountinfo. ``device`` is major:minor, the file system's own for FUSE."""

    mount_id: int
    device: str
    path: str
    fs_type: str
    source: str


@attrs.frozen
class Mounted:
    """A FUSE connection: its descriptor (non-blocking, close-on-exec), and where it is mounted."""

    fd: int
    path: str
    entry: Entry | None
    allow_other: bool


# -- what is mounted ------------------------------------------------------------------------------------------


def parse_mount_info(text: str) -> list[Entry]:
    """The entries of mountinfo, oldest first; of several with one path the last is on top."""
    found = []
    for line in text.splitlines():
        words = line.split(" ")
        with contextlib.suppress(ValueError, IndexError):
            tail = words.index("-", 6)
            found.append(Entry(int(words[0]), words[2], _plain(words[4]), words[tail + 1], _plain(words[tail + 2])))
    return found


def _plain(word: str) -> str:
    """Undo proc's octal escapes of blanks and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), word)


def entries() -> list[Entry]:
    """What is mounted in this process's namespace."""
    try:
        with open(MOUNT_INFO, encoding="utf-8", errors="surrogateescape") as file:
            return parse_mount_info(file.read())
    except OSError:
        return []


def _on_top(path: str, found: Sequence[Entry]) -> Entry | None:
    return next((entry for entry in reversed(found) if entry.path == path), None)


# -- the mount point ------------------------------------------------------------------------------------------


def check_mountpoint(path: str) -> tuple[str, bool]:
    """The mount point's absolute path without symbolic links, and whether a stale mount of ours was removed there.

    Raises OSError as stat(2) does, ValueError when it is no regular file, MountError for a stale mount that is
    not ours to remove.
    """
    cleaned = False
    while True:
        try:
            mode = os.stat(path).st_mode
            break
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
        real = os.path.realpath(path)
        # A FUSE mount nobody serves any more. Whoever made it has ended, so no data can be lost with it.
        entry = _on_top(real, entries())
        if entry is None or entry.source != SOURCE or entry.fs_type != "fuse":
            raise MountError(f"a FUSE mount whose server has ended is in the way; remove it with: umount '{real}'")
        try:
            _unmount_path(real)
        except MountError as problem:
            raise MountError(
                f"the mount of a daemon that has ended is in the way and cannot be removed ({problem}); "
                f"remove it with: umount '{real}'"
            ) from None
        cleaned = True
    if not stat.S_ISREG(mode):
        raise ValueError("not a regular file")
    return os.path.realpath(path), cleaned


# -- mounting -------------------------------------------------------------------------------------------------


def mount(path: str, options: MountOptions) -> Mounted:
    """Mount a new connection on the regular file ``path``, as ``check_mountpoint`` gave it. Raises MountError."""
    # The file itself is held while we mount on it: its name could lead elsewhere by then.
    try:
        anchor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise MountError(f"{path}: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(anchor).st_mode):
            raise MountError(f"{path} is no regular file any more")
        fd = _mount_ourselves(f"/proc/self/fd/{anchor}", options)
    finally:
        os.close(anchor)
    if fd is None:
        fd = _mount_with_helper(path, options)
    os.set_blocking(fd, False)
    entry = _on_top(path, entries())
    if entry is not None and (entry.source != SOURCE or entry.fs_type != "fuse"):
        entry = None
    if entry is not None:
        served.add(entry.mount_id)
    return Mounted(fd, path, entry, options.allow_other)


class Attempt:
    """A mount being made on a thread. Who gives it up need not wait: it is undone once it has come about."""

    def __init__(self, path: str, options: MountOptions) -> None:
        self._path = path
        self._options = options
        self._lock = threading.Lock()
        self._is_given_up = False
        self._mounted: Mounted | None = None

    def run(self) -> Mounted:
        """Mount, on a thread. Raises MountError."""
        mounted = mount(self._path, self._options)
        with self._lock:
            if not self._is_given_up:
                self._mounted = mounted
                return mounted
        _undo(mounted)
        raise MountError("given up")

    def give_up(self) -> None:
        """Nobody wants it any more."""
        with self._lock:
            self._is_given_up = True
        if self._mounted is not None:
            threading.Thread(target=_undo, args=(self._mounted,), daemon=True).start()


def _undo(mounted: Mounted) -> None:
    with contextlib.suppress(MountError):
        unmount(mounted)
    os.close(mounted.fd)


def _mount_ourselves(path: str, options: MountOptions) -> int | None:
    """mount(2); None when this process is not allowed to."""
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _NOT_ALLOWED:
            return None
        raise MountError(f"{DEVICE}: {error.strerror}") from None
    words = [
        f"fd={fd}",
        f"rootmode={stat.S_IFREG:o}",
        f"user_id={os.getuid()}",
        f"group_id={os.getgid()}",
        *_common_words(options),
    ]
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOATIME | (_MS_RDONLY if options.read_only else 0)
    if _mount(SOURCE.encode(), os.fsencode(path), b"fuse", flags, ",".join(words).encode()) == 0:
        return fd
    number = ctypes.get_errno()
    os.close(fd)
    if number in _NOT_ALLOWED:
        return None
    raise MountError(f"mount: {os.strerror(number)}")


def _common_words(options: MountOptions) -> list[str]:
    words = ["default_permissions", f"max_read={options.max_read}"]
    return [*words, "allow_other"] if options.allow_other else words


def _helper() -> str:
    found = shutil.which("fusermount3") or shutil.which("fusermount")
    if found is None:
        raise MountError("not permitted to mount, and fusermount3 is not installed")
    return found


def _mount_with_helper(path: str, options: MountOptions) -> int:
    """fusermount3 mounts and hands the descriptor over on the socket that ``_FUSE_COMMFD`` names."""
    words = ["ro" if options.read_only else "rw", "nosuid", "nodev", "noatime", f"fsname={SOURCE}"]
    command = [_helper(), "-o", ",".join([*words, *_common_words(options)]), "--", path]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        said = _run(command, theirs.fileno())
        theirs.close()
        fd = _receive_fd(ours)
    if fd is None:
        raise MountError(said or f"{command[0]} handed over no descriptor")
    return fd


def _run(command: list[str], fd: int | None = None) -> str:
    """Run the helper to its end; what it said if it failed, else nothing. Raises MountError."""
    env = dict(os.environ) if fd is None else os.environ | {"_FUSE_COMMFD": str(fd)}
    try:
        code, said = run_program(command, env, HELPER_SECONDS, fd)
    except TimeoutError:
        raise MountError(f"{command[0]} did not end") from None
    except OSError as error:
        raise MountError(f"{command[0]}: {error.strerror}") from None
    return "" if code == 0 else " ".join(said.split()) or f"{command[0]} failed"


def _receive_fd(sock: socket.socket) -> int | None:
    fds = array.array("i")
    _data, control, _flags, _address = sock.recvmsg(1, socket.CMSG_SPACE(fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    for extra in fds[1:]:
        os.close(extra)
    return fds[0] if fds else None


# -- unmounting -----------------------------------------------------------------------------------------------


def lost(mounted: Mounted) -> None:
    """The connection has ended from outside: the mount's id may name another by now."""
    if mounted.entry is not None:
        served.discard(mounted.entry.mount_id)


def unmount(mounted: Mounted) -> None:
    """Take the mount out of the tree at once, even when it is in use. Nothing happens when it is gone already.

    Raises MountError: it cannot be reached, or must not be taken away by us.
    """
    found = entries()
    if mounted.entry is None:
        # mountinfo told nothing when we mounted: the path is all there is.
        if not found:
            _unmount_path(mounted.path)
        return
    lost(mounted)
    mine = next((entry for entry in found if _is_same(entry, mounted.entry)), None)
    # Without its connection it is gone, unless that was aborted: its ids may name another mount by now.
    if mine is None or not (_is_connected(mounted.fd) or _is_dead(mine.path)):
        return
    if _on_top(mine.path, found) != mine:
        raise MountError(f"something else is mounted over '{mine.path}'")
    _unmount_path(mine.path)


def _is_connected(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, 0)
    return not poll.poll(0)


def _is_dead(path: str) -> bool:
    try:
        os.stat(path)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def _is_same(entry: Entry, other: Entry) -> bool:
    return (entry.mount_id, entry.device, entry.source) == (other.mount_id, other.device, other.source)


def _unmount_path(path: str) -> None:
    if _umount2(os.fsencode(path), _MNT_DETACH) == 0:
        return
    number = ctypes.get_errno()
    if number != errno.EPERM:
        raise MountError(f"umount '{path}': {os.strerror(number)}")
    said = _run([_helper(), "-u", "-q", "-z", "--", path])
    if said:
        raise MountError(said)
