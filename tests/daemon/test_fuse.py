"""FUSE exports on real mounts: what users see, the programs they run, and every way a mount can end."""

from __future__ import annotations

import json
import mmap
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuse_mounts import (
    KIB,
    MIB,
    PUNCH_HOLE,
    ZERO_RANGE,
    MakeMounted,
    Start,
    client,
    error_of,
    fallocate,
    leave_dead_mount,
    mounted_files,
    need,
    needs_fuse,
)
from harness import DEADLINE, run

pytestmark = needs_fuse


@pytest.fixture
def mounted(daemon: Start, tmp_path: Path) -> Iterator[MakeMounted]:
    yield from mounted_files(daemon, tmp_path)


def mounts_at(path: Path) -> list[str]:
    """The lines of /proc/mounts that name the path."""
    return [line for line in Path("/proc/self/mounts").read_text().splitlines() if line.split(" ")[1] == str(path)]


# -- the file -------------------------------------------------------------------------------------------------


def test_what_stat_statvfs_and_mounts_show(mounted: MakeMounted) -> None:
    export = mounted(b"x" * 256 * KIB)
    os.truncate(export.path, MIB)
    facts = os.stat(export.path)
    assert (facts.st_size, facts.st_mode, facts.st_blocks, facts.st_blksize) == (MIB, 0o100600, 512, 4096)
    space = os.statvfs(export.path)
    assert (space.f_frsize, space.f_blocks, space.f_bfree, space.f_bavail) == (4096, 256, 192, 192)
    (line,) = mounts_at(export.path)
    assert line.startswith(f"qsd {export.path} fuse rw,nosuid,nodev,noatime,")
    assert ",default_permissions,allow_other,max_read=1048576 " in line


def test_truncating_open_spares_a_file_that_cannot_grow_again(mounted: MakeMounted) -> None:
    """``dd of=`` and ``>`` open with O_TRUNC; the disk must not be gone before the first byte is written."""
    export = mounted(b"x" * 8192)
    export.path.write_bytes(b"start")
    assert export.path.read_bytes() == b"start" + b"x" * (8192 - 5)


def test_synchronous_writes_are_on_the_disk(mounted: MakeMounted) -> None:
    """O_DSYNC travels with each write; what reaches the image's file system that way is a flush we cannot see from
    here, so this only shows that such writes work."""
    export = mounted(bytes(MIB))
    fd = export.open(os.O_RDWR | os.O_DSYNC)
    assert os.pwrite(fd, b"sync", 4096) == 4
    assert export.image.read_bytes()[4096:4100] == b"sync"


def test_what_others_write_is_seen_at_once(mounted: MakeMounted, tmp_path: Path) -> None:
    export = mounted(b"x" * MIB)
    (tmp_path / "second").touch()
    add = {"type": "fuse", "id": "e2", "node_name": "disk", "mountpoint": "second", "writable": True}
    export.qmp.execute("block-export-add", **add)
    reader = export.open(os.O_RDONLY)
    assert os.pread(reader, 5, 100) == b"xxxxx"
    writer = os.open(tmp_path / "second", os.O_WRONLY)
    os.pwrite(writer, b"other", 100)
    os.close(writer)
    assert os.pread(reader, 5, 100) == b"other"


def test_block_resize_is_seen_at_once(mounted: MakeMounted) -> None:
    export = mounted(bytes(MIB))
    fd = export.open()
    for size in (3 * MIB, MIB):
        assert os.fstat(fd).st_size != size or size == MIB
        export.qmp.execute("block_resize", node_name="disk", size=size)
        assert os.fstat(fd).st_size == os.stat(export.path).st_size == size
        assert len(os.pread(fd, 4 * MIB, 0)) == size


def test_discarding_gives_space_back(mounted: MakeMounted) -> None:
    export = mounted(b"x" * MIB)
    fd = export.open()
    fallocate(fd, PUNCH_HOLE | 1, 0, 512 * KIB)
    fallocate(fd, ZERO_RANGE, 768 * KIB, 64 * KIB)
    assert os.stat(export.image).st_blocks <= 1024 + 256
    assert os.fstat(fd).st_blocks == os.stat(export.image).st_blocks
    assert os.pread(fd, MIB, 0) == bytes(512 * KIB) + b"x" * 256 * KIB + bytes(64 * KIB) + b"x" * 192 * KIB


# -- programs -------------------------------------------------------------------------------------------------


def test_copies_keep_holes_and_bytes(mounted: MakeMounted, tmp_path: Path) -> None:
    data = random.Random(5).randbytes(MIB)
    export = mounted(data)
    os.truncate(export.path, 8 * MIB)
    copy = tmp_path / "copy"
    client("cp", "--sparse=auto", export.path, copy)
    assert copy.stat().st_blocks * 512 < 2 * MIB
    client("cmp", copy, export.path)
    client("dd", f"if={export.path}", f"of={tmp_path / 'direct'}", "bs=1M", "iflag=direct", "status=none")
    sums = client("sha256sum", copy, export.path, tmp_path / "direct").split()
    assert sums[0] == sums[2] == sums[4]
    copy.write_bytes(data[::-1].ljust(8 * MIB, b"\1"))
    client("dd", f"if={copy}", f"of={export.path}", "bs=128k", "status=none", "conv=notrunc,fsync")
    client("cmp", copy, export.image)
    client("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", tmp_path / "direct", export.path)
    client("qemu-img", "compare", "-f", "raw", "-F", "raw", tmp_path / "direct", export.path)
    assert json.loads(client("qemu-img", "info", "--output=json", export.path))["virtual-size"] == 8 * MIB


def test_xfs_io_does_what_it_is_told(mounted: MakeMounted) -> None:
    export = mounted(bytes(MIB), "writable=on,growable=on")

    def tell(*commands: str, flags: tuple[str, ...] = ()) -> str:
        return client("xfs_io", *flags, *(part for command in commands for part in ("-c", command)), export.path)

    tell(
        "pwrite -S 0x61 0 256k", "fpunch 64k 64k", "fzero 128k 4k", "falloc 1m 1m", "pwrite -S 0x62 2m 4k", "fsync"
    )
    tell("pwrite -S 0x63 512k 64k", "pread 0 1m", flags=("-d",))
    assert "63 63 63 63" in tell("mmap -r 0 1m", "mread -v 512k 16")
    assert "HOLE\t65536\nDATA\t131072" in tell("seek -r -a 0")
    expected = bytearray(b"a" * 256 * KIB + bytes(2 * MIB - 256 * KIB) + b"b" * 4 * KIB)
    expected[64 * KIB : 128 * KIB] = bytes(64 * KIB)
    expected[128 * KIB : 132 * KIB] = bytes(4 * KIB)
    expected[512 * KIB : 576 * KIB] = b"c" * 64 * KIB
    assert export.image.read_bytes() == expected


def test_file_system_on_a_loop_device(mounted: MakeMounted, tmp_path: Path) -> None:
    export = mounted(b"")
    os.truncate(export.path, 16 * MIB)
    client("mkfs.ext4", "-q", export.path)
    if os.getuid() == 0 and os.path.exists("/dev/loop-control"):
        inside = tmp_path / "inside"
        inside.mkdir()
        device = client("losetup", "--find", "--show", export.path).strip()
        try:
            client("mount", device, inside)
            try:
                (inside / "file").write_bytes(b"kept" * 100_000)
                (inside / "gone").write_bytes(b"gone" * 100_000)
                (inside / "gone").unlink()
                client("fstrim", inside)
            finally:
                client("umount", inside)
        finally:
            client("losetup", "-d", device)
    client("fsck.ext4", "-fn", export.path)
    export.daemon.finish()
    client("fsck.ext4", "-fn", export.image)


def test_fio_verifies_what_it_wrote(mounted: MakeMounted, tmp_path: Path) -> None:
    export = mounted(bytes(8 * MIB))
    client(
        *("fio", "--name=v", f"--filename={export.path}", "--rw=randrw", "--bs=4k-1m", "--size=8m", "--direct=1"),
        *("--ioengine=libaio", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--io_size=32m"),
        *(f"--aux-path={tmp_path}", "--verify_state_save=0"),
    )


# -- beginnings and ends --------------------------------------------------------------------------------------


def test_refusals_are_worded_as_the_reference_s(mounted: MakeMounted, tmp_path: Path) -> None:
    export = mounted(bytes(4096), "writable=off")
    qmp = export.qmp
    (tmp_path / "directory").mkdir()
    (tmp_path / "free").touch()
    qmp.execute("object-add", qom_type="iothread", id="io0")

    def refusal(**options: object) -> str:
        add = {"type": "fuse", "id": "f", "node_name": "disk", "mountpoint": "free"} | options
        return qmp.refusal("block-export-add", **add)

    assert refusal(mountpoint="nowhere") == "Failed to stat 'nowhere': No such file or directory"
    assert refusal(mountpoint="") == "Failed to stat '': No such file or directory"
    assert refusal(mountpoint="directory") == "'directory' is not a regular file"
    assert refusal(mountpoint="/dev/null") == "'/dev/null' is not a regular file"
    taken = str(export.path)
    assert refusal(mountpoint=taken) == f"There already is a FUSE export on '{taken}'"
    assert refusal(allow_inactive=True) == "Export type does not support inactive exports"
    assert refusal(allow_other="maybe") == "Parameter 'allow-other' does not accept value 'maybe'"
    assert refusal(iothread=[]) == "The set of I/O threads must not be empty"
    assert refusal(iothread=["io0", "no"]) == 'iothread "no" not found'
    multi = "Cannot use fixed-iothread for a multi-threaded export"
    assert refusal(iothread=["io0"], fixed_iothread=True) == multi
    assert refusal(id="e") == "Block export id 'e' is already in use"
    assert [each["id"] for each in qmp.execute("query-block-exports")] == ["e"]
    # An export that never was has no end to tell of, and leaves its id and its mount point free.
    add = {"type": "fuse", "id": "f", "node_name": "disk", "mountpoint": "free", "iothread": ["io0", "io0"]}
    qmp.execute("block-export-add", **add)
    assert qmp.events == []
    qmp.execute("block-export-del", id="f")
    assert qmp.wait_event("BLOCK_EXPORT_DELETED")["data"] == {"id": "f"}


def test_resize_permission_follows_what_the_export_may_do(mounted: MakeMounted, tmp_path: Path) -> None:
    export = mounted(bytes(MIB), "writable=off")
    qmp = export.qmp
    (tmp_path / "window").touch()
    (tmp_path / "other").touch()
    qmp.execute("blockdev-add", driver="raw", node_name="part", file="disk", size=4096)
    qmp.execute("block-export-add", type="fuse", id="w", node_name="part", mountpoint="window")
    add = {"type": "fuse", "id": "o", "node_name": "disk", "mountpoint": "other"}
    conflict = (
        "Permission conflict on node 'disk': permissions 'resize' are both required by an unnamed block device "
        "(uses node 'disk' as 'root' child) and unshared by node 'part' (uses node 'disk' as 'file' child)."
    )
    assert qmp.refusal("block-export-add", growable=True, **add) == conflict
    assert qmp.refusal("block-export-add", writable=True, **add) == conflict
    qmp.execute("block-export-add", **add)
    assert os.stat(tmp_path / "window").st_size == 4096


def test_command_line_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(4096))
    export = "fuse,id=e,node-name=f,mountpoint=nowhere,growable=on"
    done = run("--blockdev", "file,node-name=f,filename=disk.img", "--export", export, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"qsd: --export {export}: Failed to stat 'nowhere': No such file or directory\n"


def test_mount_on_the_image_itself(daemon: Start, tmp_path: Path) -> None:
    """The image is opened anew while its path leads to the export: when a writer comes and when it goes."""
    image = tmp_path / "disk.img"
    image.write_bytes(b"hello".ljust(4096, b"."))
    (tmp_path / "other").touch()
    running = daemon(
        *("--blockdev", f"file,node-name=f,filename={image},auto-read-only=on"),
        *("--export", f"fuse,id=e,node-name=f,mountpoint={image}"),
    )
    qmp = running.qmp()
    qmp.execute("block-export-add", type="fuse", id="o", node_name="f", mountpoint="other", writable=True)
    with (tmp_path / "other").open("r+b") as file:
        file.write(b"HE")
    assert image.read_bytes()[:5] == b"HEllo"
    qmp.execute("block-export-del", id="o")
    qmp.wait_event("BLOCK_EXPORT_DELETED")
    assert os.stat(image).st_mode == 0o100400
    running.finish()
    assert image.read_bytes()[:5] == b"HEllo"
    assert os.stat(image).st_mode != 0o100400


def test_opening_its_own_export_is_refused(mounted: MakeMounted, tmp_path: Path) -> None:
    """The daemon would wait for its own answer."""
    export = mounted(bytes(MIB), "writable=off")
    (tmp_path / "link").symlink_to(export.path)
    for name in ("mp", "link"):
        refusal = export.qmp.refusal("blockdev-add", driver="file", node_name="n", filename=name)
        assert refusal == f"Could not open '{name}': Resource deadlock avoided"
    export.qmp.execute("block-export-del", id="e")
    export.qmp.wait_event("BLOCK_EXPORT_DELETED")
    export.qmp.execute("blockdev-add", driver="file", node_name="n", filename="mp")


def test_mounting_over_another_export(mounted: MakeMounted) -> None:
    """Under another spelling it is allowed. Each export takes its own mount away, whatever lies over it."""
    export = mounted(b"x" * 4096)
    qmp = export.qmp
    qmp.execute("blockdev-add", driver="null-co", node_name="null", size=8192, read_zeroes=True)
    for number in (1, 2):
        qmp.execute(
            "block-export-add", type="fuse", id=f"n{number}", node_name="null", mountpoint="./" * number + "mp"
        )
    assert len(mounts_at(export.path)) == 3
    qmp.execute("block-export-del", id="n2")
    qmp.wait_event("BLOCK_EXPORT_DELETED")
    assert export.path.read_bytes() == bytes(8192)
    qmp.execute("block-export-del", id="n1")
    qmp.wait_event("BLOCK_EXPORT_DELETED")
    assert export.path.read_bytes() == b"x" * 4096


def test_deleting_while_the_file_is_open(mounted: MakeMounted) -> None:
    export = mounted(b"x" * 4096)
    fd = export.open(os.O_RDONLY)
    view = mmap.mmap(fd, 4096, prot=mmap.PROT_READ)
    assert view[:1] == b"x"
    export.qmp.execute("block-export-del", id="e", mode="safe")
    export.qmp.wait_event("BLOCK_EXPORT_DELETED")
    assert error_of(os.pread, fd, 10, 0) == "ENOTCONN"
    assert export.path.read_bytes() == b""
    export.qmp.execute("blockdev-del", node_name="disk")


def test_unmounting_from_outside_keeps_the_export(mounted: MakeMounted) -> None:
    export = mounted(b"x" * 4096)
    client("fusermount3", "-u", export.path)
    assert [each["id"] for each in export.qmp.execute("query-block-exports")] == ["e"]
    # The mount's numbers are free; something else there is not ours to take away.
    if os.getuid() == 0:
        client("mount", "--bind", export.image, export.path)
    export.qmp.execute("block-export-del", id="e")
    export.qmp.wait_event("BLOCK_EXPORT_DELETED")
    if os.getuid() == 0:
        assert len(mounts_at(export.path)) == 1
        client("umount", export.path)
    export.qmp.execute("block-export-add", type="fuse", id="e", node_name="disk", mountpoint=str(export.path))
    assert export.path.read_bytes() == b"x" * 4096


def test_daemon_ends_while_the_file_is_open(mounted: MakeMounted) -> None:
    export = mounted(b"x" * 4096)
    fd = export.open()
    os.pwrite(fd, b"last words", 0)
    export.daemon.finish()
    assert export.image.read_bytes()[:10] == b"last words"
    assert not mounts_at(export.path)
    assert error_of(os.pread, fd, 10, 0) == "ENOTCONN"


def test_background_daemon_takes_a_relative_mount_away(daemon: Start, tmp_path: Path) -> None:
    """It has changed its directory by then."""
    (tmp_path / "disk.img").write_bytes(b"x" * 4096)
    (tmp_path / "mp").touch()
    node = ("--blockdev", "file,node-name=f,filename=disk.img", "--export", "fuse,id=e,node-name=f,mountpoint=mp")
    done = run(*node, "--daemonize", "--pidfile", "d.pid", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mp").read_bytes() == b"x" * 4096
    pid = int((tmp_path / "d.pid").read_text())
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGTERM)
    assert select.select([pidfd], [], [], DEADLINE)[0]
    os.close(pidfd)
    assert not mounts_at(tmp_path / "mp")


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
    second.expected_stderr = ["removed the FUSE mount of a daemon that has ended"]
    assert path.read_bytes() == b"x" * 4096
    assert len(mounts_at(path)) == 1
    assert second.expected_stderr[0] in second.stderr()


def test_dead_mount_of_somebody_else_is_reported(mounted: MakeMounted, tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can mount")
    export = mounted(bytes(4096))
    other = tmp_path / "other"
    other.touch()
    leave_dead_mount(other)
    try:
        refusal = export.qmp.refusal(
            "block-export-add", type="fuse", id="f", node_name="disk", mountpoint=str(other)
        )
    finally:
        client("umount", other)
    assert refusal.startswith(f"Failed to stat '{other}': Transport endpoint is not connected")
    assert f"umount '{other}'" in refusal


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
        for turn in range(9):
            number = turn % 3 + 1
            path = tmp_path / f"mp{number}"
            add = {"type": "fuse", "id": f"e{number}", "node_name": "disk", "mountpoint": str(path)}
            qmp.execute("block-export-add", **add)
            readers = [threading.Thread(target=path.read_bytes) for _ in range(2)]
            for reader in readers:
                reader.start()
            assert path.stat().st_size == 4 * MIB
            for reader in readers:
                reader.join()
            qmp.execute("block-export-del", id=f"e{number}")
            qmp.wait_event("BLOCK_EXPORT_DELETED")
    finally:
        assert load.wait(60) == 0


# -- without privileges ---------------------------------------------------------------------------------------

# A mount namespace of its own, where /dev/fuse is open to everybody, as it is on most machines. The daemon and its
# client run there as nobody; reading what only root may is left to them, because the interpreter may lie there.
AS_NOBODY = """
import os, subprocess, sys
nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all,+dac_read_search",
          "--ambient-caps=-all,+dac_read_search", "--bounding-set=-all,+dac_read_search,+sys_admin,+setuid,+setgid")
os.mknod("fuse", 0o020666, os.makedev(10, 229))
os.chmod("fuse", 0o666)
subprocess.run(("mount", "--bind", "fuse", "/dev/fuse"), check=True)
daemon = subprocess.Popen((*nobody, sys.executable, "-m", "qsd", *sys.argv[1:], "--pidfile", "d.pid"))
while not os.path.exists("d.pid"):
    assert daemon.poll() is None
    os.sched_yield()
print(open("/proc/self/mounts").read().splitlines()[-1])
client = "import os; fd = os.open('mp', os.O_RDWR); os.pwrite(fd, b'written', 0); print(os.fstat(fd).st_uid)"
subprocess.run((*nobody, sys.executable, "-c", client), check=True)
try:
    os.stat("mp")
except PermissionError:
    print("root may not")
daemon.terminate()
assert daemon.wait(30) == 0
print([line for line in open("/proc/self/mounts") if f"{os.getcwd()}/mp fuse" in line])
"""


def test_unprivileged_user_mounts_with_fusermount3(tmp_path: Path) -> None:
    """No mount(2), but fusermount3 and the descriptor it hands over."""
    if os.getuid() != 0:
        pytest.skip("only root can become somebody else")
    need("fusermount3")
    shutil.chown(tmp_path, 65534, 65534)
    for above in (tmp_path, *tmp_path.parents[:2]):
        os.chmod(above, os.stat(above).st_mode | 0o055)
    for name, data in (("disk.img", b"x" * 4096), ("mp", b"")):
        (tmp_path / name).write_bytes(data)
        os.chown(tmp_path / name, 65534, 65534)
    said = client(
        *("unshare", "--mount", "env", f"--chdir={tmp_path}", sys.executable, "-c", AS_NOBODY),
        *("--blockdev", "file,node-name=disk,filename=disk.img"),
        *("--export", "fuse,id=e,node-name=disk,mountpoint=mp,writable=on"),
    ).splitlines()
    assert said[0].startswith(f"qsd {tmp_path}/mp fuse rw,nosuid,nodev,noatime,user_id=65534,group_id=65534,")
    assert said[1:] == ["65534", "root may not", "[]"]
    assert (tmp_path / "disk.img").read_bytes()[:8] == b"writtenx"
