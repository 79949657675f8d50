"""Disks over NBD, with the clients people use: qemu-img, qemu-io, libnbd's tools, and raw bytes."""

from __future__ import annotations

import random
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import RunningDaemon, write_half
from nbd_reader import NbdError, NbdReader

Start = Callable[..., RunningDaemon]

SIZE = 8 << 20


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return write_half(tmp_path / "disk.img", SIZE, seed=1)


def export(daemon: Start, image: Path, *, writable: str = "on", node: str = "") -> RunningDaemon:
    return daemon(
        "--blockdev",
        f"driver=file,node-name=f0,filename={image},discard=unmap{node}",
        "--blockdev",
        "driver=raw,node-name=r0,file=f0,discard=unmap",
        "--nbd-server",
        "addr.type=unix,addr.path=nbd.sock",
        "--export",
        f"type=nbd,id=e0,node-name=r0,name=disk,writable={writable}",
    )


def uri(image: Path) -> str:
    return f"nbd+unix:///disk?socket={image.parent}/nbd.sock"


def test_qemu_img_compares_and_converts(daemon: Start, image: Path, tmp_path: Path) -> None:
    export(daemon, image, writable="off")
    qemu_img = tool("qemu-img")
    copy = tmp_path / "copy.img"
    subprocess.run([qemu_img, "convert", "-f", "raw", "-O", "raw", uri(image), copy], check=True, timeout=60)
    assert copy.read_bytes() == image.read_bytes()
    answer = subprocess.run(
        [qemu_img, "map", "-f", "raw", uri(image)], check=True, timeout=60, capture_output=True, text=True
    )
    assert "0x400000" in answer.stdout


def test_nbdcopy_both_ways(daemon: Start, image: Path, tmp_path: Path) -> None:
    export(daemon, image)
    nbdcopy = tool("nbdcopy")
    source = tmp_path / "new.img"
    source.write_bytes(random.Random(2).randbytes(SIZE))
    subprocess.run([nbdcopy, "--flush", source, uri(image)], check=True, timeout=60)
    assert image.read_bytes() == source.read_bytes()
    back = tmp_path / "back.img"
    subprocess.run([nbdcopy, uri(image), back], check=True, timeout=60)
    assert back.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("node", ["", ",cache.direct=on"])
def test_qemu_io_against_a_model(daemon: Start, image: Path, node: str) -> None:
    export(daemon, image, node=node)
    qemu_io = tool("qemu-io")
    model = bytearray(image.read_bytes())
    rng = random.Random(3)
    commands: list[str] = []
    for _ in range(120):
        offset, length = rng.randrange(SIZE - 70000), rng.randrange(1, 70000)
        kind = rng.choice(["write", "zero", "read"])
        if kind == "write":
            pattern = rng.randrange(1, 256)
            commands += ["-c", f"write -P {pattern} {offset} {length}"]
            model[offset : offset + length] = bytes([pattern]) * length
        elif kind == "zero":
            commands += ["-c", f"write -z {rng.choice(['', '-u '])}{offset} {length}"]
            model[offset : offset + length] = bytes(length)
        else:
            start = offset // 4096 * 4096
            run = len(model[start : start + 4096].lstrip(model[start : start + 1])) == 0
            if run:
                commands += ["-c", f"read -P {model[start]} {start} 4096"]
    done = subprocess.run(
        [qemu_io, "-f", "raw", *commands, "-c", "flush", uri(image)],
        check=True,
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert "failed" not in done.stdout + done.stderr
    assert image.read_bytes() == bytes(model)


def test_client_of_the_reference_writes_through(daemon: Start, image: Path, reference: Path) -> None:
    """With extended headers it leaves the payload flag out of writes with FUA."""
    export(daemon, image)
    qemu_io = tool(str(reference.with_name("qemu-io")))
    words = ["-c", "write -P 7 512 1024", "-c", "write -z 4096 4096", "-c", "read -P 7 512 1024", "-c", "flush"]
    for cache in ("writethrough", "writeback"):
        done = subprocess.run(
            [qemu_io, "-f", "raw", "-t", cache, *words, uri(image)],
            check=True,
            timeout=60,
            capture_output=True,
            text=True,
        )
        assert "failed" not in done.stdout + done.stderr
    assert image.read_bytes()[512:1536] == b"\7" * 1024


def test_discard_frees_space(daemon: Start, image: Path) -> None:
    export(daemon, image)
    before = image.stat().st_blocks
    subprocess.run(
        [tool("qemu-io"), "-f", "raw", "-d", "unmap", "-c", "discard 0 1M", uri(image)],
        check=True,
        timeout=60,
        stdout=subprocess.DEVNULL,
    )
    assert image.stat().st_blocks <= before - (1 << 20) // 512


def test_nbdinfo_maps_the_hole(daemon: Start, image: Path) -> None:
    export(daemon, image)
    answer = subprocess.run(
        [tool("nbdinfo"), "--map", uri(image)], check=True, timeout=60, capture_output=True, text=True
    )
    rows = [line.split()[:3] for line in answer.stdout.splitlines()]
    assert rows == [["0", str(SIZE // 2), "0"], [str(SIZE // 2), str(SIZE // 2), "3"]]


def test_exported_image_is_locked_against_qemu_img(daemon: Start, image: Path) -> None:
    export(daemon, image)
    theirs = subprocess.run(
        [tool("qemu-img"), "resize", "-f", "raw", image, "16M"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert theirs.returncode == 1
    assert 'Failed to get "resize" lock' in theirs.stderr


def test_image_locked_by_qemu_is_refused(daemon: Start, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    subprocess.run([tool("qemu-img"), "create", "-q", "-f", "qcow2", image, "8M"], check=True, timeout=30)
    writer = subprocess.Popen(
        [tool("qemu-io"), "-f", "qcow2", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write("length\n")
        writer.stdin.flush()
        while "8 MiB" not in writer.stdout.readline():
            pass
        qmp = daemon().qmp()
        qmp.execute("blockdev-add", driver="file", **{"node-name": "f0", "filename": str(image)})
        qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
        add = {"type": "nbd", "id": "e0", "node-name": "f0", "writable": True}
        assert qmp.refusal("block-export-add", **add) == 'Failed to get "write" lock'
        # Nothing is left of the attempt: the node can go.
        assert qmp.execute("query-block-exports") == []
        qmp.execute("blockdev-del", **{"node-name": "f0"})
    finally:
        writer.communicate("quit\n", timeout=30)


class Raw:
    """A client that says what it wants, byte by byte."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(str(path))

    def go(self) -> None:
        self.read(18)
        self.sock.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 1, 4) + b"disk")
        self.read(10)

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.sock.recv(count - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def request(self, kind: int, offset: int, length: int, *, flags: int = 0, payload: bytes = b"") -> int:
        self.sock.sendall(struct.pack(">IHHQQI", 0x25609513, flags, kind, 7, offset, length) + payload)
        magic, error, cookie = struct.unpack(">IIQ", self.read(16))
        assert (magic, cookie) == (0x67446698, 7)
        return int(error)


@pytest.fixture
def connect(image: Path) -> Iterator[Callable[[], Raw]]:
    """Make raw clients of the export's socket; they are closed after the test."""
    made: list[Raw] = []

    def client() -> Raw:
        made.append(Raw(image.parent / "nbd.sock"))
        return made[-1]

    yield client
    for one in made:
        one.sock.close()


@pytest.mark.parametrize(
    ("kind", "offset", "length", "flags"),
    [
        (8, 0, 512, 0),  # no such command
        (0, SIZE, 1, 0),
        (0, 2**64 - 1, 4096, 0),
        (0, 0, 0xFFFFFFFF, 0),
        (0, 0, 512, 0x80),  # no such flag
        (4, SIZE - 1, 2, 0),
        (6, 0, 0xFFFFFFFF, 0),
        (7, 0, 512, 0),  # block status was not negotiated
    ],
)
def test_bad_request_is_an_error_and_no_more(
    daemon: Start, image: Path, connect: Callable[[], Raw], kind: int, offset: int, length: int, flags: int
) -> None:
    export(daemon, image)
    client = connect()
    client.go()
    assert client.request(kind, offset, length, flags=flags) == 22
    assert client.request(0, 0, 512) == 0
    assert client.read(512) == image.read_bytes()[:512]


def test_write_to_a_read_only_export_is_refused_and_skipped(
    daemon: Start, image: Path, connect: Callable[[], Raw]
) -> None:
    export(daemon, image, writable="off")
    client = connect()
    client.go()
    before = image.read_bytes()
    assert client.request(1, 0, 100_000, payload=b"x" * 100_000) == 22
    assert client.request(0, 0, 16) == 0
    assert client.read(16) == before[:16]


def test_half_open_clients_stop_nobody(daemon: Start, image: Path, connect: Callable[[], Raw]) -> None:
    """200 of them: twice as many as connections are allowed."""
    running = export(daemon, image)
    running.expected_stderr.append("given up for a client that waits")
    lurkers = [connect() for _ in range(100)]
    for lurker in lurkers[::2]:
        lurker.read(18)
        lurker.sock.sendall(b"\0\0\0")
    lurkers += [connect() for _ in range(100)]
    client = connect()
    client.go()
    assert client.request(0, 0, 512) == 0
    client.read(512)
    qmp = running.qmp()
    qmp.execute("nbd-server-stop")
    with pytest.raises((EOFError, ConnectionError)):
        client.read(1)
    for lurker in lurkers:
        with pytest.raises((EOFError, ConnectionError)):
            lurker.read(19)
    qmp.wait_event("BLOCK_EXPORT_DELETED")
    assert qmp.execute("query-block-exports") == []


def test_export_life_over_qmp(daemon: Start, image: Path) -> None:
    running = daemon()
    qmp = running.qmp()
    assert qmp.refusal("block-export-del", id="nope") == "Export 'nope' is not found"
    qmp.execute("blockdev-add", driver="file", **{"node-name": "f0", "filename": str(image)})
    add = {"type": "nbd", "id": "e0", "node-name": "f0", "writable": True}
    assert qmp.refusal("block-export-add", **add) == "NBD server not running"
    qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
    assert (
        qmp.refusal("nbd-server-start", addr={"type": "unix", "data": {"path": "x"}})
        == "NBD server already running"
    )
    qmp.execute("block-export-add", **add)
    assert qmp.refusal("block-export-add", **add) == "Block export id 'e0' is already in use"
    assert qmp.refusal("blockdev-del", **{"node-name": "f0"}) == "Node f0 is in use"
    assert "permissions 'resize' are both required" in qmp.refusal(
        "block_resize", **{"node-name": "f0", "size": 2 * SIZE}
    )
    qmp.execute("block-set-write-threshold", **{"node-name": "f0", "write-threshold": 1000})
    qmp.execute("block-export-del", id="e0")
    qmp.wait_event("BLOCK_EXPORT_DELETED")
    qmp.execute("block_resize", **{"node-name": "f0", "size": 2 * SIZE})
    assert image.stat().st_size == 2 * SIZE
    qmp.execute("blockdev-del", **{"node-name": "f0"})
    assert qmp.execute("query-named-block-nodes") == []


def test_client_reads_nothing_outside_of_a_window_that_has_become_smaller(daemon: Start, image: Path) -> None:
    """What is in the page cache was read all the same, without the node that would have refused it."""
    window = {"driver": "raw", "node-name": "w", "file": "f0"}
    running = export(daemon, image)
    qmp = running.qmp()
    qmp.execute_raw("blockdev-add", {**window, "size": 16384})
    qmp.execute_raw("block-export-add", {"type": "nbd", "id": "e1", "node-name": "w", "name": "window"})
    with NbdReader(image.parent / "nbd.sock", "window") as client:
        assert client.read(8192, 4096) == image.read_bytes()[8192:12288]
        qmp.execute_raw("blockdev-reopen", {"options": [{**window, "size": 8192}]})
        assert client.read(4096, 4096) == image.read_bytes()[4096:8192]
        for offset in (6144, 8192):
            with pytest.raises(NbdError):
                client.read(offset, 4096)
