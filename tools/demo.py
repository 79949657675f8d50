#!/usr/bin/env python3
"""Start a daemon that exports a small disk over NBD, say what to try, and run until Ctrl-C (``make run``)."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

PLACE = Path("demo")
SIZE = 64 << 20
SECTOR = 512
START = 2048  # first sector of the partition
MESSAGE = b"Hello from a disk served by qsd.\n"

WHAT_NEXT = """
qsd serves {image} (64 MiB, one FAT16 partition) until Ctrl-C. In another terminal, in this directory:

  qemu-img info 'nbd+unix:///demo?socket=demo/nbd.sock'
  nbdinfo --map 'nbd+unix:///demo?socket=demo/nbd.sock'
  nbdcopy 'nbd+unix:///demo?socket=demo/nbd.sock' demo/copy.img && cmp demo/disk.img demo/copy.img
  python3 tools/qmp.py demo/qmp.sock query-block-exports
  python3 tools/qmp.py demo/qmp.sock query-named-block-nodes '{{"flat": true}}'
  kill -USR1 $(cat demo/qsd.pid)        # prints here what runs inside the daemon
"""


def make_disk(path: Path) -> None:
    """Write a partition table, a FAT16 file system and one file in it, HELLO.TXT."""
    total = SIZE // SECTOR - START
    per_cluster, reserved, root_entries, fat_sectors = 4, 4, 512, 128
    boot = b"\xeb\x3c\x90qsd demo" + struct.pack(
        "<HBHBHHBHHHIIBBBI11s8s",
        *(SECTOR, per_cluster, reserved, 2, root_entries, 0, 0xF8, fat_sectors, 63, 255, START, total),
        *(0x80, 0, 0x29, 0x71736400, b"QSD DEMO   ", b"FAT16   "),
    )
    fat = struct.pack("<HHH", 0xFFF8, 0xFFFF, 0xFFFF)  # media, end mark, the one cluster of HELLO.TXT
    label = struct.pack("<11sB20x", b"QSD DEMO   ", 8)
    entry = struct.pack("<11sB14xHI", b"HELLO   TXT", 0x20, 2, len(MESSAGE))
    table = struct.pack("<B3sB3sII", 0, b"\xff\xff\xff", 0x0E, b"\xff\xff\xff", START, total)
    first_fat = START + reserved
    root = first_fat + 2 * fat_sectors
    data = root + root_entries * 32 // SECTOR
    pieces = {
        446: table,
        510: b"\x55\xaa",
        START * SECTOR: boot,
        START * SECTOR + 510: b"\x55\xaa",
        first_fat * SECTOR: fat,
        (first_fat + fat_sectors) * SECTOR: fat,
        root * SECTOR: label + entry,
        data * SECTOR: MESSAGE,
    }
    with path.open("wb") as file:
        file.truncate(SIZE)
        for offset, piece in pieces.items():
            file.seek(offset)
            file.write(piece)


def main() -> int:
    PLACE.mkdir(exist_ok=True)
    image = PLACE / "disk.img"
    if not image.exists():
        make_disk(image)
    # Ctrl-C reaches the daemon as well, which then shuts down; here we only wait for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(b"")  # an abstract name of the kernel's choice
        ready = listener.getsockname().replace(b"\0", b"@", 1).decode()
        daemon = subprocess.Popen(
            [
                *(str(Path(sys.executable).with_name("qsd")), "--pidfile", "demo/qsd.pid"),
                *("--blockdev", f"driver=file,node-name=disk,filename={image}"),
                *("--nbd-server", "addr.type=unix,addr.path=demo/nbd.sock"),
                *("--export", "type=nbd,id=demo,node-name=disk,name=demo,writable=on"),
                *("--chardev", "socket,id=qmp,path=demo/qmp.sock,server=on,wait=off", "--monitor", "chardev=qmp"),
            ],
            env={**os.environ, "NOTIFY_SOCKET": ready},
            # An ignored signal stays ignored over exec, so the daemon gets the default back first.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        if wait_ready(listener, daemon):
            print(WHAT_NEXT.format(image=image), flush=True)
        return daemon.wait()


def wait_ready(listener: socket.socket, daemon: subprocess.Popen[bytes]) -> bool:
    """Wait until the daemon says that it is up (True) or ends (False)."""
    listener.settimeout(0.2)
    while daemon.poll() is None:
        try:
            if b"READY=1" in listener.recv(4096):
                return True
        except TimeoutError:
            continue
    return False


if __name__ == "__main__":
    sys.exit(main())
