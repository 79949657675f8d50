"""kill -9 under load, again and again: ``python tests/daemon/soak.py ROUNDS`` (``make soak``).

A guest writes through NBD, sixteen requests at a time, and flushes now and then, while bitmaps and snapshots come
and go; in the middle of it the daemon is killed. What is left must check without corruptions, by qemu-img and by
``qsd check``, and the next daemon must show everything that was flushed. The same images live through all rounds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import attrs
from guest import Allowed, GuestOp, assert_shown
from harness import RunningDaemon, run
from nbd_reader import FLUSH, TRIM, WRITE, WRITE_ZEROES, NbdReader
from qcow2_images import SIZE, VARIANTS, Made, find, img

from qsd.drivers.qcow2.layout import DIRTY, parse_header
from qsd.messages import Op

T = TypeVar("T")

DEPTH: Final = 16
# <fcntl.h>; the module has no name for it.
F_OFD_SETLKW: Final = 38
MONITOR: Final = ("--chardev", "socket,id=qmp,path=qmp.sock,server=on,wait=off", "--monitor", "qmp")
KILLED: Final = (
    *("plain", "snapshots", "chain", "luks", "cluster-512", "extended", "chain-extended", "v2", "data-file"),
    *("data-file-raw", "lazy", "refcount-1"),
)
SECRET: Final = "secret,id=s,data=password"
ENCRYPTION: Final = "encrypt.format=luks,encrypt.key-secret=s"
TAKE, DROP = "blockdev-snapshot-internal-sync", "blockdev-snapshot-delete-internal-sync"
COMMANDS: Final = {Op.WRITE: WRITE, Op.WRITE_ZEROES: WRITE_ZEROES, Op.DISCARD: TRIM, Op.FLUSH: FLUSH}


@attrs.define(eq=False)
class Disk:
    """An image and what is known of its disk: ``base`` is what was last seen, ``allowed`` what has come since."""

    name: str
    path: Path
    unit: int
    base: bytes
    rng: random.Random
    numbers: int = 0
    clock: int = 0
    finished: list[GuestOp] = attrs.field(factory=list)
    origin: GuestOp = attrs.field(init=False)
    allowed: Allowed = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.see(self.base)

    def __str__(self) -> str:
        return f"{self.name}, {self.numbers} requests"

    @property
    def key(self) -> str:
        """Options of the node that name its key."""
        return f",{ENCRYPTION}" if self.name == "luks" else ""

    @property
    def keeps_bitmaps(self) -> bool:
        """Whether bitmaps are stored in it."""
        return self.name != "v2"

    @property
    def keeps_snapshots(self) -> bool:
        """Whether there are snapshots."""
        return self.name not in ("data-file", "data-file-raw", "refcount-1")

    def see(self, data: bytes) -> None:
        """From now on the disk is known to hold ``data``."""
        units = len(data) // self.unit
        self.base, self.finished = data, []
        self.origin = GuestOp(0, Op.WRITE, 0, units, done=-1)
        self.allowed = Allowed(units, self.origin)

    def value(self, op: GuestOp, unit: int) -> bytes:
        """What a unit holds after a request."""
        if op is self.origin:
            return self.base[unit * self.unit : (unit + 1) * self.unit]
        return (b"%07d:%07d;" % (op.number, unit)) * (self.unit // 16) if op.kind == Op.WRITE else bytes(self.unit)

    def request(self) -> tuple[GuestOp, bytes]:
        """A new request, and what it writes."""
        self.numbers += 1
        self.clock += 1
        (kind,) = self.rng.choices((Op.WRITE, Op.WRITE_ZEROES, Op.DISCARD, Op.FLUSH), (12, 3, 2, 1))
        units = len(self.allowed.units)
        count = 0 if kind == Op.FLUSH else self.rng.randint(1, min(units, self.rng.choice((1, 8, 64))))
        first = self.rng.randrange(units - count + 1)
        op = GuestOp(self.numbers, kind, first, count, issued=self.clock)
        if kind == Op.FLUSH:
            op.covers, self.finished = self.finished, []
        else:
            self.allowed.add(op)
        data = b"".join(self.value(op, unit) for unit in range(first, first + count)) if kind == Op.WRITE else b""
        return op, data

    def ended(self, op: GuestOp) -> None:
        """The request has been answered."""
        self.clock += 1
        op.done = self.clock
        if op.kind == Op.FLUSH:
            for other in op.covers:
                self.allowed.settle(other)
        else:
            self.finished.append(op)


class Load(NbdReader):
    """Many requests under way at once."""

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        except BrokenPipeError:
            # Nobody is left to say goodbye to.
            self._stream.close()
            self.socket.close()

    def run(self, disk: Disk, answers: int, under_way: dict[int, GuestOp]) -> None:
        """Go on until so many answers have come; ``under_way`` has what is then, by cookie."""
        while answers:
            while len(under_way) < DEPTH:
                op, data = disk.request()
                under_way[op.number] = op
                place = op.first * disk.unit, op.count * disk.unit
                header = struct.pack(">IHHQQI", 0x25609513, 0, COMMANDS[op.kind], op.number, *place)
                self.socket.sendall(header + data)
            self.take_answer(disk, under_way)
            answers -= 1

    def take_answer(self, disk: Disk, under_way: dict[int, GuestOp]) -> bool:
        """Wait for an answer; False when there are no more."""
        try:
            data = self._stream.read(16)
        except ConnectionResetError:
            return False
        if len(data) < 16:
            return False
        magic, error, cookie = struct.unpack(">IIQ", data)
        assert (magic, error) == (0x67446698, 0), (magic, error)
        disk.ended(under_way.pop(cookie))
        return True


@contextlib.contextmanager
def serving(disk: Disk, place: Path) -> Iterator[RunningDaemon]:
    """A daemon with the disk as export ``d``."""
    arguments = [
        *("--object", SECRET),
        *("--blockdev", f"driver=file,node-name=f,filename={disk.path}"),
        *("--blockdev", f"driver=qcow2,node-name=n,file=f,discard=unmap{disk.key}"),
        *("--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
        *("--export", "type=nbd,id=e,node-name=n,name=d,writable=on"),
    ]
    running = RunningDaemon(place, [*arguments, *MONITOR])
    try:
        running.wait_ready()
        yield running
    finally:
        if running.process.poll() is not None:
            # Killed: its sockets are still there.
            for name in ("nbd.sock", "qmp.sock"):
                (place / name).unlink(missing_ok=True)
        running.finish()


def kill_once(disk: Disk, place: Path) -> None:
    """Look at what the last round has left, write, be killed, and check the image."""
    with serving(disk, place) as running, Load(place / "nbd.sock", "d") as load:
        look_again(disk, load)
        under_way: dict[int, GuestOp] = {}
        load.run(disk, disk.rng.randrange(1, 400), under_way)
        qmp = running.qmp()
        if disk.keeps_bitmaps:
            name = f"b{disk.numbers}"
            qmp.execute("block-dirty-bitmap-add", node="n", name=name, persistent=True)
        if disk.keeps_snapshots:
            # Nobody waits for it: it is to be killed in the midst.
            command = disk.rng.choice((TAKE, DROP, DROP))
            qmp.send(json.dumps({"execute": command, "arguments": {"device": "n", "name": "s"}}))
        load.run(disk, disk.rng.randrange(1, 20), under_way)
        running.expected_code = -signal.SIGKILL
        running.terminate(signal.SIGKILL)
        # What had been answered has ended.
        while load.take_answer(disk, under_way):
            pass
    wait_unlocked(disk.path.parent)
    check(disk.path, disk.key)


def wait_unlocked(place: Path) -> None:
    """Return when nobody has a file locked: a killed daemon's locks go with its io_uring, after it has ended."""
    for path in place.iterdir():
        with open(path, "r+b") as file:
            # The bytes the reference locks: start, length, any owner.
            wanted = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 100, 200, 0)
            fcntl.fcntl(file, F_OFD_SETLKW, wanted)


def look_again(disk: Disk, client: NbdReader) -> None:
    """Read all of the disk: everything shows what it may show."""
    whole = len(disk.allowed.units) * disk.unit
    data = b"".join(client.read(at, min(1 << 20, whole - at)) for at in range(0, whole, 1 << 20))
    assert_shown(data, 0, disk.allowed.units, disk.unit, disk.value)
    disk.see(data)


def check(image: Path, key: str = "") -> None:
    """Leaks at most, by both checks; of an image that is marked dirty, when it has been repaired.

    ``key``: options of the node that name its key.
    """
    path = image
    with image.open("rb") as file:
        is_dirty = parse_header(file.read(1 << 21)).incompatible & DIRTY
    if is_dirty:
        path = image.with_suffix(".repaired")
        shutil.copy(image, path)
        repaired = run("check", "-r", "all", path)
        assert repaired.returncode == 0, repaired.stdout + repaired.stderr
    options = f"driver=qcow2,file.driver=file,file.filename={path}{key}"
    command = [find("qemu-img"), "check", "--object", SECRET, "--image-opts", options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (0, 3), done.stdout + done.stderr
    ours = run("check", path)
    assert ours.returncode in (0, 3), ours.stdout + ours.stderr


def encrypted(place: Path) -> Made:
    """A new image that is encrypted; what it holds shows when it is first opened."""
    path = place / "image.qcow2"
    options = f"{ENCRYPTION},encrypt.iter-time=10"
    img("create", "-q", "--object", SECRET, "-f", "qcow2", "-o", options, path, SIZE)
    return Made(path, bytes(SIZE))


def make(name: str, place: Path, seed: int) -> Disk:
    """A disk of that variant."""
    here = place / name
    here.mkdir()
    made = encrypted(here) if name == "luks" else VARIANTS[name](here)
    return Disk(name, made.path, 512 if "512" in name else 4096, made.data, random.Random(seed))


def take_turns(subjects: Sequence[T], rounds: int, live: Callable[[T], None], told: str) -> None:
    """Let each in its turn ``live`` once, ``rounds`` lives in all; ``told``: how to have the same again."""
    for number in range(rounds):
        subject = subjects[number % len(subjects)]
        try:
            live(subject)
        except BaseException as error:
            error.add_note(f"round {number}, {subject}, {told}")
            raise
        print(f"round {number + 1} of {rounds}: {subject}", file=sys.stderr)


def soak(rounds: int, place: Path, seed: int = 0) -> None:
    """Kill daemons ``rounds`` times, on images of several variants in turn."""
    disks = [make(name, place, seed + number) for number, name in enumerate(KILLED[:rounds])]
    take_turns(disks, rounds, lambda disk: kill_once(disk, place), f"seed {seed}")
    for disk in disks:
        with serving(disk, place), Load(place / "nbd.sock", "d") as client:
            look_again(disk, client)


def main(function: Callable[[int, Path, int], None]) -> None:
    """What the command line asks for: rounds and, to have the same again, a seed."""
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 20)
    with tempfile.TemporaryDirectory(prefix="qsd-soak-", dir=os.environ.get("TMPDIR", "/var/tmp")) as directory:
        function(int(sys.argv[1]), Path(directory), seed)


if __name__ == "__main__":
    main(soak)
