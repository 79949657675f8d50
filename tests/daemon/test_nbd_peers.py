"""Our exports under the reference's own NBD client, images between two daemons, and clients that vanish."""

from __future__ import annotations

import os
import resource
import socket
import struct
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Qmp, RunningDaemon, write_half
from test_nbd import tool

Start = Callable[..., RunningDaemon]
SIZE = 4 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return write_half(tmp_path / "disk.img", SIZE, seed=4)


def serve(daemon: Start, image: Path) -> RunningDaemon:
    return daemon(
        *("--blockdev", f"file,node-name=f,filename={image},discard=unmap"),
        *("--nbd-server", "addr.type=unix,addr.path=nbd"),
        *("--export", "nbd,id=e,node-name=f,name=disk,writable=on,allocation-depth=on"),
    )


def test_reference_serves_on_what_we_serve(
    daemon: Start, image: Path, tmp_path: Path, reference_qmp: Qmp, reference: Path
) -> None:
    """Its nbd node is our client, and exports our export once more: every request goes through both."""
    serve(daemon, image)
    theirs = str(tmp_path / "theirs")
    server = {"type": "unix", "path": str(tmp_path / "nbd")}
    node = {"driver": "nbd", "server": server, "export": "disk", "discard": "unmap"}
    reference_qmp.execute("blockdev-add", node_name="n", **node)
    reference_qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": theirs}})
    reference_qmp.execute("block-export-add", type="nbd", id="x", node_name="n", name="again", writable=True)
    uri = f"nbd+unix:///again?socket={theirs}"
    commands = [
        *(
            "write -P 1 0 64k",
            "write -P 2 1000 3",
            "write -f -P 3 65536 512",
            "write -z 128k 64k",
            "write -z -u 256k 64k",
        ),
        *("discard 512k 64k", "flush", "read -P 2 1000 3", "read -P 3 65536 512", "read -P 0 128k 64k"),
        *("read -P 0 256k 64k", f"write -P 9 {SIZE - 512} 512", f"read -P 9 {SIZE - 512} 512"),
    ]
    words = [word for command in commands for word in ("-c", command)]
    qemu_io = tool(str(reference.with_name("qemu-io")))
    done = subprocess.run(
        [qemu_io, "-f", "raw", "-d", "unmap", *words, uri], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout
    for name in ("qemu-img", str(reference.with_name("qemu-img"))):
        subprocess.run([tool(name), "compare", "-f", "raw", "-F", "raw", uri, image], check=True, timeout=60)
    mapped = [
        subprocess.run(
            [tool("qemu-img"), "map", "--output=json", "-f", "raw", place],
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout.count(b'"zero": true')
        for place in (uri, image)
    ]
    assert mapped[0] == mapped[1] > 0
    reference_qmp.execute("block-export-del", id="x", mode="hard")
    reference_qmp.wait_event("BLOCK_EXPORT_DELETED")
    reference_qmp.execute("nbd-server-stop")
    reference_qmp.execute("blockdev-del", node_name="n")


@pytest.mark.parametrize("ours_first", [True, False])
def test_image_is_one_daemon_s_to_write(
    daemon: Start, image: Path, tmp_path: Path, reference_qmp: Qmp, ours_first: bool
) -> None:
    """Locks keep out a running reference, and its keep out us; readers that share are let in."""
    ours = daemon().qmp()
    first, second = (ours, reference_qmp) if ours_first else (reference_qmp, ours)
    for qmp, name in ((first, "1"), (second, "2")):
        qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(tmp_path / name)}})
        qmp.execute("blockdev-add", driver="file", node_name="f", filename=str(image))
    export = {"type": "nbd", "id": "e", "node_name": "f"}
    first.execute("block-export-add", **export, writable=True)
    # A raw export lets others write, but nobody may resize while it is there.
    assert second.refusal("block_resize", node_name="f", size=2 * SIZE) == 'Failed to get "resize" lock'
    second.execute("block-export-add", **export)
    assert first.refusal("block_resize", node_name="f", size=2 * SIZE)
    for qmp in (first, second):
        qmp.execute("block-export-del", id="e")
        qmp.wait_event("BLOCK_EXPORT_DELETED")
    second.execute("block_resize", node_name="f", size=2 * SIZE)
    assert image.stat().st_size == 2 * SIZE
    for qmp in (first, second):
        qmp.execute("blockdev-del", node_name="f")
        qmp.execute("nbd-server-stop")


def vanish_after(path: Path, data: bytes, *, read: int = 0) -> None:
    """A client that sends something and is gone, with a reset if the kernel can send one."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(path))
        client.recv(18, socket.MSG_WAITALL)
        client.sendall(data)
        while read > 0:
            read -= len(client.recv(read))


def open_files(pid: int) -> Counter[str]:
    """What a process has open, and how often."""
    names = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    return Counter(name if name.startswith("/") else name.partition(":")[0] for name in names)


HELLO = struct.pack(">I", 3)
GOODBYE = HELLO + b"IHAVEOPT" + struct.pack(">II", 2, 0)
GO = HELLO + b"IHAVEOPT" + struct.pack(">II", 7, 10) + struct.pack(">I4sH", 4, b"disk", 0)


def request(kind: int, offset: int, length: int) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, 0, kind, 7, offset, length)


@pytest.mark.parametrize(
    ("data", "read"),
    [
        (b"", 0),
        (GOODBYE, 0),
        (HELLO, 0),
        (HELLO + b"IHAVEOPT" + struct.pack(">II", 3, 0) * 50, 0),
        (HELLO + b"IHAVEOPT" + struct.pack(">II", 7, 4000) + b"x" * 100, 0),
        (HELLO + request(0, 0, 4096), 0),  # a command before its time
        (GO, 0),
        (GO + request(0, 0, 1 << 20) * 40, 1000),  # gone while it is answered
        (GO + request(1, 0, 1 << 20) + b"x" * 70_000, 0),  # gone within its payload
        (GO + request(1, 0, 0xFFFFFFFF) + b"x" * 70_000, 0),
        (GO + request(0, 0, 0xFFFFFFFF) * 100, 0),
        (GO + b"\0" * 70_000, 0),
        (GO + b"IHAVEOPT" + struct.pack(">II", 3, 0), 0),  # an option after its time
    ],
    ids=range(13),
)
def test_clients_that_vanish_leave_nothing(
    daemon: Start, image: Path, tmp_path: Path, data: bytes, read: int
) -> None:
    """Neither descriptors nor the disk's bytes nor the next client suffer, and the export can go."""
    running = serve(daemon, image)
    if data not in (b"", GOODBYE):  # who only looks in, or says goodbye, is no failure
        running.expected_stderr.append("option negotiation failed")
    qmp = running.qmp()
    before = image.read_bytes()
    descriptors = open_files(running.pid)
    for _ in range(20):
        vanish_after(tmp_path / "nbd", data, read=read)
    uri = f"nbd+unix:///disk?socket={tmp_path}/nbd"
    subprocess.run([tool("qemu-img"), "compare", "-f", "raw", "-F", "raw", uri, image], check=True, timeout=60)
    assert image.read_bytes() == before
    qmp.execute("nbd-server-stop")
    assert qmp.execute("query-block-exports") == []
    qmp.execute("blockdev-del", node_name="f")
    # The listener and the image have gone, and nothing has come.
    descriptors["socket"] -= 1
    del descriptors[str(image)]
    turns = 1000  # a connection's socket is closed a moment after the export it had has gone
    while open_files(running.pid) != descriptors and (turns := turns - 1):
        qmp.execute("query-block-exports")
    assert open_files(running.pid) == descriptors
    assert resource.getpagesize() * int(Path(f"/proc/{running.pid}/statm").read_text().split()[1]) < 200 << 20
