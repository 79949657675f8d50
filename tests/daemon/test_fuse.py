"""FUSE exports on real mounts: what the kernel and its users see, and every way a mount can end."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Qmp, RunningDaemon

pytestmark = pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="no access to /dev/fuse")

Start = Callable[..., RunningDaemon]
libc = ctypes.CDLL(None, use_errno=True)
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, COLLAPSE = 1, 2, 16, 8
KIB, MIB = 1 << 10, 1 << 20


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def need(program: str) -> str:
    found = shutil.which(program, path=f"{os.environ['PATH']}:/sbin:/usr/sbin")
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


def client(*command: str | Path) -> str:
    """Run a program on the mounted file; a daemon that does not answer would hang it for ever."""
    done = subprocess.run(
        [need(str(command[0])), *map(str, command[1:])], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Mounted:
    """A daemon with one export; ``path`` is the file."""

    def __init__(self, start: Start, place: Path, export: str, node: str = "discard=unmap") -> None:
        self.image = place / "disk.img"
        self.path = place / "mp"
        self.path.touch()
        self.daemon = start(
            *("--blockdev", f"file,node-name=disk,filename={self.image},{node}"),
            *("--export", f"fuse,id=e,node-name=disk,mountpoint={self.path},{export}"),
        )
        self.qmp: Qmp = self.daemon.qmp()
        self.descriptors: list[int] = []

    def open(self, flags: int) -> int:
        self.descriptors.append(os.open(self.path, flags))
        return self.descriptors[-1]

    def close(self) -> None:
        for descriptor in self.descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)


@pytest.fixture
def mounted(daemon: Start, tmp_path: Path) -> Iterator[Callable[..., Mounted]]:
    made: list[Mounted] = []

    def make(data: bytes, export: str = "writable=on", node: str = "discard=unmap") -> Mounted:
        (tmp_path / "disk.img").write_bytes(data)
        made.append(Mounted(daemon, tmp_path, export, node))
        return made[-1]

    yield make
    for each in made:
        each.close()


def error_of(function: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(OSError) as caught:  # noqa: PT011  # the errno is compared
        function(*args)
    return errno.errorcode[caught.value.errno or 0]


def test_attributes_and_statfs(mounted: Any) -> None:
    export = mounted(bytes(MIB))
    facts = os.stat(export.path)
    assert (facts.st_size, facts.st_mode, facts.st_nlink, facts.st_ino) == (MIB, 0o100600, 1, 1)
    assert facts.st_uid == os.getuid()
    space = os.statvfs(export.path)
    assert space.f_blocks * space.f_frsize == MIB
    (line,) = (line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {export.path} " in line)
    assert " fuse qsd rw," in line.partition(" - ")[0] + line[line.index(" - ") :].replace(" - ", " ")


def test_read_only_export_refuses_every_change(mounted: Any) -> None:
    export = mounted(bytes(MIB), "writable=off")
    assert os.stat(export.path).st_mode == 0o100400
    assert error_of(export.open, os.O_RDWR) == "EROFS"
    assert error_of(os.truncate, export.path, 10) == "EROFS"
    assert error_of(os.chmod, export.path, 0o777) == "EROFS"
    assert export.path.read_bytes() == bytes(MIB)


def test_writes_beyond_the_end(mounted: Any) -> None:
    fixed = mounted(b"x" * 8192)
    fd = fixed.open(os.O_RDWR)
    assert os.pwrite(fd, b"abcdef", 8190) == 2
    assert error_of(os.pwrite, fd, b"abcdef", 8192) == "EIO"
    assert os.pread(fd, 100, 8190) == b"ab"
    assert fixed.image.read_bytes() == b"x" * 8190 + b"ab"


def test_growable_export_grows(mounted: Any) -> None:
    export = mounted(b"x" * 8192, "writable=on,growable=on")
    fd = export.open(os.O_RDWR)
    assert os.pwrite(fd, b"end", 100_000) == 3
    assert os.stat(export.path).st_size == -(-100_003 // 512) * 512
    assert export.image.read_bytes() == b"x" * 8192 + bytes(100_000 - 8192) + b"end"


def test_truncate_and_fallocate(mounted: Any) -> None:
    export = mounted(b"x" * MIB)
    fd = export.open(os.O_RDWR)
    os.ftruncate(fd, 2 * MIB)
    assert os.fstat(fd).st_size == export.image.stat().st_size == 2 * MIB
    os.truncate(export.path, MIB)
    assert os.fstat(fd).st_size == MIB
    fallocate(fd, 0, MIB, MIB)
    assert os.fstat(fd).st_size == 2 * MIB
    assert error_of(fallocate, fd, 0, 0, 4096) == "ENOTSUP"
    assert error_of(fallocate, fd, KEEP_SIZE, 0, 4096) == "ENOTSUP"
    assert error_of(fallocate, fd, COLLAPSE, 0, 4096) == "ENOTSUP"
    before = export.image.stat().st_blocks
    fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, 512 * KIB)
    assert export.image.stat().st_blocks < before
    fallocate(fd, ZERO_RANGE, 600 * KIB, 8 * KIB)
    fallocate(fd, ZERO_RANGE | KEEP_SIZE, 2 * MIB - 4096, 1 * MIB)
    assert os.fstat(fd).st_size == 2 * MIB
    expected = bytes(512 * KIB) + b"x" * (88 * KIB) + bytes(8 * KIB) + b"x" * (416 * KIB) + bytes(MIB)
    assert export.path.read_bytes() == expected


def test_holes_are_found(mounted: Any) -> None:
    export = mounted(b"")
    os.truncate(export.path, 4 * MIB)
    fd = export.open(os.O_RDWR)
    os.pwrite(fd, b"d" * 65536, MIB)
    os.fsync(fd)
    assert os.lseek(fd, 0, os.SEEK_DATA) == MIB
    assert os.lseek(fd, MIB, os.SEEK_HOLE) == MIB + 65536
    assert os.lseek(fd, 2 * MIB, os.SEEK_HOLE) == 2 * MIB
    assert error_of(os.lseek, fd, 2 * MIB, os.SEEK_DATA) == "ENXIO"
    assert error_of(os.lseek, fd, 4 * MIB, os.SEEK_HOLE) == "ENXIO"
    client("cp", "--sparse=always", export.path, export.image.with_name("copy"))
    assert export.image.with_name("copy").stat().st_blocks < 1024
    assert export.image.with_name("copy").read_bytes() == export.image.read_bytes()


def test_attributes_that_can_be_changed(mounted: Any) -> None:
    shared = mounted(bytes(4096), "writable=on,allow-other=on")
    os.chmod(shared.path, 0o644)
    os.chown(shared.path, 12, 34)
    facts = os.stat(shared.path)
    assert (facts.st_mode, facts.st_uid, facts.st_gid) == (0o100644, 12, 34)
    assert error_of(os.utime, shared.path, (1, 1)) == "ENOTSUP"


def test_attributes_that_cannot_be_changed(mounted: Any) -> None:
    own = mounted(bytes(4096), "writable=on,allow-other=off")
    assert error_of(os.chmod, own.path, 0o644) == "ENOTSUP"
    assert error_of(os.chown, own.path, 12, 34) == "ENOTSUP"
    assert error_of(os.getxattr, own.path, "user.x") == "ENOTSUP"


def test_resize_is_seen_at_once(mounted: Any) -> None:
    export = mounted(bytes(MIB))
    assert os.stat(export.path).st_size == MIB
    export.qmp.execute("block_resize", node_name="disk", size=3 * MIB)
    assert os.stat(export.path).st_size == 3 * MIB


@pytest.mark.parametrize("node", ["discard=unmap", "discard=unmap,cache.direct=on"])
@pytest.mark.parametrize("seed", [1, 2])
def test_random_operations_against_a_model(mounted: Any, seed: int, node: str) -> None:
    chance = random.Random(seed)
    model = bytearray(chance.randbytes(300 * KIB))
    export = mounted(bytes(model), "writable=on,growable=on", node)
    fd, direct = export.open(os.O_RDWR), export.open(os.O_RDWR | os.O_DIRECT)
    aligned = mmap.mmap(-1, 128 * KIB)
    for _ in range(250):
        offset = chance.randrange(len(model))
        length = chance.randrange(1, 100_000)
        action = chance.choice(
            ("read", "write", "direct write", "direct read", "punch", "zero", "size", "map", "sync")
        )
        if action == "read":
            assert os.pread(fd, length, offset) == model[offset : offset + length]
        elif action == "write":
            data = chance.randbytes(length)
            assert os.pwrite(fd, data, offset) == length
            model.extend(bytes(max(0, -(-(offset + length) // 512) * 512 - len(model))))
            model[offset : offset + length] = data
        elif action == "direct read":
            start = offset // 4096 * 4096
            count = os.preadv(direct, [memoryview(aligned)[: 64 * KIB]], start)
            assert aligned[:count] == model[start : start + 64 * KIB]
        elif action == "direct write" and len(model) > 64 * KIB:
            start = chance.randrange(len(model) - 64 * KIB) // 4096 * 4096
            data = chance.randbytes(64 * KIB)
            aligned[: 64 * KIB] = data
            assert os.pwritev(direct, [memoryview(aligned)[: 64 * KIB]], start) == 64 * KIB
            model[start : start + 64 * KIB] = data
        elif action in ("punch", "zero"):
            end = min(len(model), offset + length)
            fallocate(fd, (PUNCH_HOLE if action == "punch" else ZERO_RANGE) | KEEP_SIZE, offset, end - offset)
            model[offset:end] = bytes(end - offset)
        elif action == "size":
            size = chance.randrange(1, 800) * 512
            os.ftruncate(fd, size)
            model = model[:size] + bytes(max(0, size - len(model)))
        elif action == "map":
            with mmap.mmap(fd, len(model), prot=mmap.PROT_READ) as view:
                assert view[offset : offset + 5000] == model[offset : offset + 5000]
        else:
            os.fsync(fd)
            # A file that ends within a sector shows zeroes up to the sector's end.
            assert export.image.read_bytes().ljust(len(model), b"\0") == model
        assert os.fstat(fd).st_size == len(model)
    os.fsync(fd)
    assert export.image.read_bytes().ljust(len(model), b"\0") == model


def test_file_systems_live_on_it(mounted: Any) -> None:
    export = mounted(b"")
    os.truncate(export.path, 16 * MIB)
    client("mkfs.ext4", "-q", export.path)
    client("fsck.ext4", "-fn", export.path)
    client("fsck.ext4", "-fn", export.image)


def test_tools_read_and_write_it(mounted: Any, tmp_path: Path) -> None:
    data = random.Random(5).randbytes(3 * MIB)
    export = mounted(data)
    info = json.loads(client("qemu-img", "info", "--output=json", export.path))
    assert info["virtual-size"] == 3 * MIB
    client("dd", f"if={export.path}", f"of={tmp_path / 'copy'}", "bs=1M", "iflag=direct", "status=none")
    assert (tmp_path / "copy").read_bytes() == data
    (tmp_path / "other").write_bytes(data[::-1])
    client("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", tmp_path / "other", export.path)
    sums = client("sha256sum", export.path, tmp_path / "other").split()
    assert sums[0] == sums[2]


def test_fio_verifies(mounted: Any, tmp_path: Path) -> None:
    export = mounted(bytes(8 * MIB))
    client(
        *("fio", "--name=v", f"--filename={export.path}", "--rw=randrw", "--bs=4k-64k", "--size=8m", "--direct=1"),
        *("--ioengine=libaio", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--io_size=16m"),
        f"--aux-path={tmp_path}",
    )


def test_mount_on_the_image_itself(daemon: Start, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"hello".ljust(4096, b"."))
    running = daemon(
        *("--blockdev", f"file,node-name=f,filename={image}"),
        *("--blockdev", "raw,node-name=r,file=f,offset=2,size=512"),
        *("--export", f"fuse,id=e,node-name=r,mountpoint={image},writable=on"),
    )
    with image.open("r+b") as file:
        assert file.read(3) == b"llo"
        file.seek(0)
        file.write(b"LLO")
    running.finish()
    assert image.read_bytes()[:5] == b"heLLO"


def test_refusals_in_the_reference_s_words(mounted: Any, tmp_path: Path) -> None:
    export = mounted(bytes(4096))
    (tmp_path / "directory").mkdir()
    add = {"type": "fuse", "id": "f", "node_name": "disk"}
    for mountpoint, text in (
        (tmp_path / "nowhere", f"Failed to stat '{tmp_path}/nowhere': No such file or directory"),
        (tmp_path / "directory", f"'{tmp_path}/directory' is not a regular file"),
        (export.path, f"There already is a FUSE export on '{export.path}'"),
    ):
        assert export.qmp.refusal("block-export-add", mountpoint=str(mountpoint), **add) == text
    refusal = export.qmp.refusal("block-export-add", mountpoint=str(tmp_path / "x"), allow_inactive=True, **add)
    assert refusal == "Export type does not support inactive exports"
    assert len(export.qmp.execute("query-block-exports")) == 1


def test_deleting_while_the_file_is_open(mounted: Any) -> None:
    export = mounted(b"x" * 4096)
    fd = export.open(os.O_RDONLY)
    export.qmp.execute("block-export-del", id="e")
    export.qmp.wait_event("BLOCK_EXPORT_DELETED")
    assert error_of(os.pread, fd, 10, 0) == "ENOTCONN"
    assert export.path.read_bytes() == b""
    export.qmp.execute("blockdev-del", node_name="disk")


def test_unmounting_from_outside_keeps_the_export(mounted: Any) -> None:
    export = mounted(b"x" * 4096)
    client("fusermount3", "-u", export.path)
    assert [each["id"] for each in export.qmp.execute("query-block-exports")] == ["e"]
    export.qmp.execute("block-export-del", id="e")
    export.qmp.wait_event("BLOCK_EXPORT_DELETED")
    add = {"type": "fuse", "id": "e", "node_name": "disk", "mountpoint": str(export.path)}
    export.qmp.execute("block-export-add", **add)
    assert export.path.read_bytes() == b"x" * 4096


def test_daemon_ends_while_the_file_is_open(mounted: Any) -> None:
    export = mounted(b"x" * 4096)
    fd = export.open(os.O_RDWR)
    os.pwrite(fd, b"last words", 0)
    export.daemon.finish()
    assert export.image.read_bytes()[:10] == b"last words"
    assert not os.path.ismount(export.path)


def test_dead_mount_of_a_killed_daemon_is_taken_away(daemon: Start, tmp_path: Path) -> None:
    image, path = tmp_path / "disk.img", tmp_path / "mp"
    image.write_bytes(b"x" * 4096)
    path.touch()
    arguments = (
        *("--blockdev", f"file,node-name=disk,filename={image}"),
        *("--export", f"fuse,id=e,node-name=disk,mountpoint={path}"),
    )
    first = daemon(*arguments, monitor=False)
    first.expected_code = -signal.SIGKILL
    first.terminate(signal.SIGKILL)
    assert error_of(os.stat, path) == "ENOTCONN"
    second = daemon(*arguments, monitor=False)
    second.expected_stderr = [f"Took away a dead mount that a killed daemon had left on '{path}'"]
    assert path.read_bytes() == b"x" * 4096
    second.finish()
    assert "Took away" in second.expected_stderr[0]
    assert path.read_bytes() == b""


def test_exports_come_and_go_under_load(daemon: Start, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4 * MIB))
    for number in range(4):
        (tmp_path / f"mp{number}").touch()
    running = daemon(
        *("--blockdev", f"file,node-name=disk,filename={image}"),
        *("--export", f"fuse,id=e0,node-name=disk,mountpoint={tmp_path / 'mp0'},writable=on"),
    )
    qmp = running.qmp()
    load = subprocess.Popen(
        [
            *(need("fio"), "--name=l", f"--filename={tmp_path / 'mp0'}", "--rw=randrw", "--bs=4k", "--size=4m"),
            *("--direct=1", "--ioengine=libaio", "--iodepth=8", "--io_size=32m", f"--aux-path={tmp_path}"),
        ],
        stdout=subprocess.DEVNULL,
    )
    try:
        for turn in range(12):
            number = turn % 3 + 1
            path = tmp_path / f"mp{number}"
            add = {"type": "fuse", "id": f"e{number}", "node_name": "disk", "mountpoint": str(path)}
            qmp.execute("block-export-add", **add)
            assert path.stat().st_size == 4 * MIB
            assert len(path.read_bytes()) == 4 * MIB
            qmp.execute("block-export-del", id=f"e{number}")
            qmp.wait_event("BLOCK_EXPORT_DELETED")
    finally:
        assert load.wait(60) == 0


# Another user may not be able to read the environment this runs in: everything is imported first.
AS_NOBODY = """
import encodings.idna, os, pkgutil, importlib, qsd, qsd.__main__
for module in pkgutil.walk_packages(qsd.__path__, "qsd."):
    if "view.operations" not in module.name:
        importlib.import_module(module.name)
notify = os.environ["NOTIFY_SOCKET"]
os.chmod(os.path.dirname(notify), 0o755)
os.chmod(notify, 0o666)
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
raise SystemExit(qsd.__main__.main())
"""


def test_unprivileged_user_mounts_with_fusermount3(daemon: Start, tmp_path: Path) -> None:
    """The whole daemon as another user: no mount(2), but fusermount3 and the descriptor it hands over."""
    need("fusermount3")
    if os.getuid() != 0:
        pytest.skip("only root can become somebody else")
    if os.stat("/dev/fuse").st_mode & 0o006 != 0o006:
        pytest.skip("/dev/fuse is not open to everybody here")
    for above in (tmp_path, *tmp_path.parents[:2]):
        os.chmod(above, 0o755)
    os.chown(tmp_path, 65534, 65534)
    for name, data in (("disk.img", b"x" * 4096), ("mp", b"")):
        (tmp_path / name).write_bytes(data)
        os.chown(tmp_path / name, 65534, 65534)
    running = daemon(
        *("--blockdev", "file,node-name=disk,filename=disk.img"),
        *("--export", "fuse,id=e,node-name=disk,mountpoint=mp,writable=on,allow-other=off"),
        program=(sys.executable, "-c", AS_NOBODY),
        monitor=False,
    )
    # Without allow-other not even root may enter.
    assert error_of((tmp_path / "mp").read_bytes) == "EACCES"
    writer = "import os; os.setgid(65534); os.setuid(65534); os.write(os.open('mp', os.O_WRONLY), b'written')"
    subprocess.run([sys.executable, "-c", writer], cwd=tmp_path, check=True, timeout=60)
    running.finish()
    assert (tmp_path / "disk.img").read_bytes()[:8] == b"writtenx"
    assert not os.path.ismount(tmp_path / "mp")
