"""Clients that come while the command line is still being worked off are served when it is done."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

from harness import RunningDaemon

Start = Callable[..., RunningDaemon]


def connected(path: Path) -> socket.socket:
    """A client of a socket that may not be there yet."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(30)
    while True:
        try:
            client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            continue
        return client


def test_nobody_is_served_before_the_last_option(daemon: Start, tmp_path: Path) -> None:
    """A chardev that waits for its client holds up what stands behind it."""
    running = daemon(
        *("--chardev", "socket,id=early,path=early,server=on,wait=off", "--monitor", "early"),
        *("--nbd-server", "addr.type=unix,addr.path=nbd"),
        *("--chardev", "socket,id=wait,path=wait,server=on"),
        *("--blockdev", "null-co,node-name=n", "--export", "nbd,id=e,node-name=n,name=late"),
        wait=False,
    )
    running.expected_stderr += ["waiting for connection on", "Unexpected end-of-file"]
    with (
        connected(tmp_path / "nbd") as client,
        connected(tmp_path / "early") as monitor,
        monitor.makefile("rb") as lines,
    ):
        monitor.sendall(b'{"execute": "qmp_capabilities"} {"execute": "query-block-exports"}')
        client.sendall(bytes.fromhex("00000003") + b"IHAVEOPT" + bytes.fromhex("0000000300000000"))
        with connected(tmp_path / "wait"):
            running.wait_ready()
            greeting, _negotiated, exports = (json.loads(lines.readline()) for _ in range(3))
            assert "QMP" in greeting
            assert [export["id"] for export in exports["return"]] == ["e"]
            data = b""
            while not data.endswith(bytes.fromhex("000000030000000100000000")):
                data += client.recv(4096)
            assert b"late" in data
