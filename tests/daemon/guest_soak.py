"""A Linux guest on an exported image, killed together with its daemon: ``make guest``.

Under QEMU a guest writes files to an ext4 file system, through virtio and NBD, and says of each when sync(1) has
returned. Meanwhile overlays, internal snapshots and bitmaps are made and taken away, and images streamed. Then both
are killed, in any order, or the daemon is asked to end. The next guest must find every file that was synced, on an
image without corruptions. ``python tests/daemon/guest_soak.py ROUNDS [SEED]``; it needs qemu-system-x86,
busybox-static and a kernel.
"""

from __future__ import annotations

import contextlib
import gzip
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import attrs
from harness import Qmp, QmpFailure, RunningDaemon
from qcow2_images import img
from soak import ENCRYPTION, MONITOR, SECRET, check, main, take_turns, wait_unlocked

BOOT: Final = Path("/boot")
MODULES: Final = (
    "virtio",
    "virtio_ring",
    "virtio_pci",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_blk",
)
SIZE: Final = 1 << 30
BASE: Final = "base.qcow2"
# Tenths of a second in which a guest has started, under emulation, and looked at its files. They are counted: while
# all of this is frozen there is none.
START: Final = 1200
VARIANTS: Final = {
    "plain": "",
    "luks": f"{ENCRYPTION},encrypt.iter-time=10",
    "extended": "extended_l2=on",
    "small clusters": "cluster_size=4k",
    "lazy": "lazy_refcounts=on",
}


def newest_kernel() -> Path:
    """The kernel the guest runs. Exits if there is none, or no emulator."""
    kernels = sorted(BOOT.glob("vmlinuz-*"))
    if not kernels or not shutil.which("qemu-system-x86_64") or not shutil.which("busybox"):
        sys.exit("guest_soak: needs a kernel in /boot, qemu-system-x86_64 and busybox (static)")
    return kernels[-1]


def archive_entry(name: str, mode: int, data: bytes) -> bytes:
    """A file of a cpio archive in the format "newc" (cpio(5))."""
    numbers = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % number for number in numbers) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def make_initrd(path: Path, kernel: Path) -> None:
    """What the guest runs: busybox, the modules for its disk, and guest_init.sh."""
    modules = Path("/lib/modules") / kernel.name.removeprefix("vmlinuz-")
    busybox = shutil.which("busybox")
    assert busybox is not None
    names = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    parts = [archive_entry(name, stat.S_IFDIR | 0o755, b"") for name in ("bin", "dev", "mnt", "modules", "proc")]
    parts.append(archive_entry("bin/busybox", stat.S_IFREG | 0o755, Path(busybox).read_bytes()))
    parts += [archive_entry(f"bin/{name}", stat.S_IFLNK | 0o777, b"busybox") for name in names if name != "busybox"]
    for name in MODULES:
        for found in modules.rglob(f"{name}.ko"):
            parts.append(archive_entry(f"modules/{name}.ko", stat.S_IFREG | 0o644, found.read_bytes()))
    init = Path(__file__).with_name("guest_init.sh").read_bytes()
    parts += [archive_entry("init", stat.S_IFREG | 0o755, init), archive_entry("TRAILER!!!", 0, b"")]
    path.write_bytes(gzip.compress(b"".join(parts), 1))


@attrs.define(eq=False)
class Guest:
    """What is known of the files of one disk: ``synced`` have these sums, ``removed`` may be gone."""

    variant: str
    place: Path
    rng: random.Random
    top: Path = attrs.field(init=False)
    images: int = 0
    boots: int = 0
    synced: dict[str, str] = attrs.field(factory=dict)
    removed: set[str] = attrs.field(factory=set)

    def __attrs_post_init__(self) -> None:
        raw = self.place / "raw"
        with raw.open("wb") as file:
            file.truncate(SIZE)
        subprocess.run(["mkfs.ext4", "-q", "-F", raw], check=True)
        self.top = self.place / BASE
        options = ["-o", VARIANTS[self.variant]] if VARIANTS[self.variant] else []
        img("convert", "--object", SECRET, "-f", "raw", "-O", "qcow2", *options, raw, self.top)
        raw.unlink()

    def __str__(self) -> str:
        return f"{self.variant}, {len(self.synced)} files synced"

    @property
    def key(self) -> str:
        """Options of the node that name the key of the image, if it has one of its own."""
        return f",{ENCRYPTION}" if self.variant == "luks" and not self.images else ""

    def console(self) -> str:
        """What the guest that runs now has said."""
        with contextlib.suppress(FileNotFoundError):
            return (self.place / f"console{self.boots}").read_text(errors="replace")
        return ""

    def start(self, kernel: Path) -> subprocess.Popen[bytes]:
        """Boot."""
        self.boots += 1
        disk = "driver=nbd,node-name=disk,server.type=unix,server.path=nbd.sock,export=d,discard=unmap"
        return subprocess.Popen(
            [
                *(
                    "qemu-system-x86_64",
                    "-accel",
                    "tcg",
                    "-m",
                    "256",
                    "-nodefaults",
                    "-display",
                    "none",
                    "-no-reboot",
                ),
                # A kernel whose emulated timer ticks late, on a busy machine, would panic.
                *("-kernel", kernel, "-initrd", "initrd", "-append", "console=ttyS0 panic=-1 no_timer_check"),
                *("-serial", f"file:console{self.boots}", "-blockdev", disk),
                *("-device", "virtio-blk-pci,drive=disk,num-queues=2"),
            ],
            cwd=self.place,
            stdin=subprocess.DEVNULL,
        )

    def look(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until the guest has looked at its files, and judge what it has found."""
        looks = 0
        while "LOOKED" not in self.console():
            assert process.poll() is None, self.console()[-3000:]
            assert looks < START, self.console()[-3000:]
            looks += 1
            time.sleep(0.1)
        has = dict(re.findall(r"^HAS (f\d+) (\w{32})", self.console(), re.MULTILINE))
        lost = [name for name, found in self.synced.items() if name not in self.removed and has.get(name) != found]
        assert not lost, f"lost or damaged: {lost}\n{self.console()[-3000:]}"

    def note(self) -> None:
        """Take down what the guest has synced and removed. Its last line may be torn."""
        text = self.console().rpartition("\n")[0]
        self.synced |= dict(re.findall(r"^SYNCED (f\d+) (\w{32})\r?$", text, re.MULTILINE))
        self.removed |= set(re.findall(r"^REMOVES (f\d+)\r?$", text, re.MULTILINE))

    def disturb(self, qmp: Qmp) -> None:
        """Change something about the image while it is written."""
        number = self.rng.randrange(4)
        commands: dict[str, dict[str, Any]] = {
            "blockdev-snapshot-internal-sync": {"device": self.node, "name": f"s{number}"},
            "blockdev-snapshot-delete-internal-sync": {"device": self.node, "name": f"s{number}"},
            "block-dirty-bitmap-add": {"node": self.node, "name": f"b{number}", "persistent": True},
            "block-dirty-bitmap-remove": {"node": self.node, "name": f"b{number}"},
            "block-stream": {"job-id": "stream", "device": self.node},
            "blockdev-snapshot-sync": {
                "node-name": self.node,
                "snapshot-file": str(self.place / f"overlay{self.images + 1}.qcow2"),
                "snapshot-node-name": f"n{self.images + 1}",
            },
        }
        name = self.rng.choice(list(commands))
        try:
            qmp.execute_raw(name, commands[name])
        except QmpFailure:
            # It is there already, not there, or in use: as the numbers fall.
            return
        if name == "blockdev-snapshot-sync":
            self.images += 1
            self.top = self.place / f"overlay{self.images}.qcow2"

    @property
    def node(self) -> str:
        """The node that is exported."""
        return f"n{self.images}"


def live_once(guest: Guest, kernel: Path) -> None:
    """Serve the image, boot, disturb, kill, check."""
    arguments = [
        *("--object", SECRET, "--blockdev", f"driver=file,node-name=f,filename={guest.top},discard=unmap"),
        *("--blockdev", f"driver=qcow2,node-name={guest.node},file=f,discard=unmap{guest.key}"),
        *("--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
        *("--export", f"type=nbd,id=e,node-name={guest.node},name=d,writable=on"),
    ]
    daemon = RunningDaemon(guest.place, [*arguments, *MONITOR])
    process = None
    try:
        daemon.wait_ready()
        process = guest.start(kernel)
        guest.look(process)
        qmp = daemon.qmp()
        end = time.monotonic() + guest.rng.uniform(2, 10)
        while time.monotonic() < end:
            time.sleep(guest.rng.uniform(0.1, 0.8))
            guest.disturb(qmp)
        assert daemon.process.poll() is None
        assert process.poll() is None
        if guest.rng.random() < 0.7:
            daemon.expected_code = -signal.SIGKILL
            daemon.process.kill()
    finally:
        if process is not None:
            process.kill()
            process.wait()
        guest.note()
        if daemon.expected_code:
            daemon.wait()
            for name in ("nbd.sock", "qmp.sock"):
                (guest.place / name).unlink(missing_ok=True)
        daemon.finish()
    wait_unlocked(guest.place)
    for path in guest.place.glob("*.qcow2"):
        check(path, f",{ENCRYPTION}" if guest.variant == "luks" and path.name == BASE else "")


def soak(rounds: int, place: Path, seed: int) -> None:
    """Let guests on images of every variant live ``rounds`` lives in all."""
    kernel = newest_kernel()
    guests = []
    for number, variant in enumerate(list(VARIANTS)[:rounds]):
        here = place / variant.replace(" ", "-")
        here.mkdir()
        make_initrd(here / "initrd", kernel)
        guests.append(Guest(variant, here, random.Random(seed + number)))
    take_turns(guests, rounds, lambda guest: live_once(guest, kernel), f"seed {seed}")


if __name__ == "__main__":
    main(soak)
