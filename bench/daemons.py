"""A storage daemon under test: its command line, its life, and how one knows that it is ready."""

from __future__ import annotations

import functools
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

import attrs

from bench.clients import nbd_uri
from bench.images import KINDS, Kind
from bench.workloads import IOTHREAD, Export

START_DEADLINE = 20.0
STOP_DEADLINE = 15.0
POLL = 0.001
NBD_MAGIC = b"NBDMAGIC"
NBD_SOCKET, QMP_SOCKET, MOUNTED = "nbd.sock", "qmp.sock", "disk"


class DaemonError(Exception):
    """A daemon did not come up, or did not go down."""


class Placement(Enum):
    """On which processors daemon and client run."""

    ANY = "any CPU"
    PINNED = "one CPU"


@attrs.frozen
class Side:
    """One of the two daemons: the words that start it, and how it calls itself."""

    name: str
    command: tuple[str, ...]
    version: str


@attrs.frozen
class Setup:
    """One way to run a daemon. ``mode`` is one of ``Workload.modes``, or None for the daemon's own default.

    ``kind`` is the image's; ``below`` are the images it lies on, lowest first, each one qcow2.
    """

    side: Side
    image: Path
    direct: bool = False
    mode: str | None = None
    placement: Placement = Placement.ANY
    export: Export = Export.NBD
    kind: Kind = KINDS["raw"]
    below: tuple[Path, ...] = ()


@functools.cache
def pinned_prefix() -> tuple[str, ...]:
    """Return the words that put a program on one CPU, first in line there; () where that is not allowed."""
    if not (shutil.which("taskset") and shutil.which("chrt")):
        return ()
    prefix = ("taskset", "-c", str(max(os.sched_getaffinity(0))), "chrt", "-r", "1")
    return prefix if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0 else ()


def prefix_of(placement: Placement) -> tuple[str, ...]:
    """Return what goes before a command line to place it."""
    return pinned_prefix() if placement is Placement.PINNED else ()


def version_of(command: Sequence[str]) -> str:
    """Return the first line of ``--version``, or what went wrong instead."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"version unknown ({error})"
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines and done.returncode == 0 else "version unknown"


def daemon_command(setup: Setup, place: Path) -> list[str]:
    """Return the whole command line, the same for both: one image, one export, a monitor. Sockets, and the file to
    mount on, are in ``place``.
    """
    mode = setup.mode or ""
    thread = ",iothread=t0" if mode.endswith(IOTHREAD) else ""
    if setup.export is Export.NBD:
        export = [
            *("--nbd-server", f"addr.type=unix,addr.path={place / NBD_SOCKET}"),
            *("--export", f"type=nbd,id=e0,node-name=r0,name=disk,writable=on{thread}"),
        ]
    else:
        export = ["--export", f"type=fuse,id=e0,node-name=r0,mountpoint={place / MOUNTED},writable=on{thread}"]
    return [
        *setup.side.command,
        *(("--object", "iothread,id=t0") if thread else ()),
        *(word for each in setup.kind.objects for word in ("--object", each)),
        *nodes(setup, mode.removesuffix(IOTHREAD)),
        *("--chardev", f"socket,id=c0,path={place / QMP_SOCKET},server=on,wait=off", "--monitor", "chardev=c0"),
        *export,
    ]


def nodes(setup: Setup, aio: str) -> list[str]:
    """Return the command line's words that make the image's nodes: r0 on f0, lower layers r1 on f1 and so on."""
    options = f",cache.direct={'on' if setup.direct else 'off'}" + (f",aio={aio}" if aio else "")
    words = []
    backing = ""
    for number, path in zip(range(len(setup.below), 0, -1), setup.below, strict=True):
        words += ["--blockdev", f"driver=file,node-name=f{number},filename={path},read-only=on{options}"]
        words += ["--blockdev", f"driver=qcow2,node-name=r{number},file=f{number},read-only=on{backing}"]
        backing = f",backing=r{number}"
    discard = ",discard=unmap" if setup.kind.discards else ""
    words += ["--blockdev", f"driver=file,node-name=f0,filename={setup.image}{options}{discard}"]
    words += [
        "--blockdev",
        f"driver={setup.kind.driver},node-name=r0,file=f0{setup.kind.options}{backing}{discard}",
    ]
    return words


class Daemon:
    """A running daemon. ``started`` is the time (monotonic, seconds) just before its process was made."""

    def __init__(self, setup: Setup, process: subprocess.Popen[bytes], started: float, place: Path) -> None:
        self.setup = setup
        self.started = started
        self.qmp = place / QMP_SOCKET
        self._nbd = place / NBD_SOCKET
        self._mounted = place / MOUNTED
        self._process = process
        self._log = place / "log"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def target(self) -> str:
        """What a client is told to use: the export's URI, or the mounted file."""
        return nbd_uri(self._nbd) if self.setup.export is Export.NBD else str(self._mounted)

    def connect(self, path: Path) -> socket.socket:
        """Connect to one of the daemon's sockets as soon as it listens. Raises DaemonError if it never does."""
        deadline = time.monotonic() + START_DEADLINE
        while True:
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            client.settimeout(START_DEADLINE)
            try:
                client.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                client.close()
            else:
                return client
            self._wait_a_little(deadline, "listen")

    def _wait_a_little(self, deadline: float, what: str) -> None:
        if self._process.poll() is not None:
            raise DaemonError(f"{self.setup.side.name} ended with {self._process.returncode}: {self.last_words()}")
        if time.monotonic() > deadline:
            raise DaemonError(f"{self.setup.side.name} did not {what} within {START_DEADLINE:.0f} s")
        time.sleep(POLL)

    def wait_ready(self) -> None:
        """Return when the export can be used. Raises DaemonError."""
        if self.setup.export is Export.NBD:
            self._wait_for_greeting()
            return
        deadline = time.monotonic() + START_DEADLINE
        while not self._mounted.stat().st_size:
            self._wait_a_little(deadline, "mount")

    def _wait_for_greeting(self) -> None:
        with self.connect(self._nbd) as client:
            try:
                greeting = client.recv(len(NBD_MAGIC))
            except OSError as error:
                raise DaemonError(f"{self.setup.side.name} does not greet NBD clients: {error}") from error
        if greeting != NBD_MAGIC:
            raise DaemonError(f"{self.setup.side.name} greets NBD clients with {greeting!r}")

    def last_words(self) -> str:
        """Return the end of what the daemon printed."""
        words = " ".join(self._log.read_text(errors="replace").split())
        return words[-300:] or "it said nothing"

    def stop(self) -> None:
        """End the process, by force after a deadline; then raises DaemonError, for that is a finding too."""
        self._process.terminate()
        try:
            self._process.wait(STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise DaemonError(f"{self.setup.side.name} ignored SIGTERM for {STOP_DEADLINE:.0f} s") from None


@contextmanager
def running(setup: Setup, room: Path) -> Iterator[Daemon]:
    """Run a daemon for the length of a ``with`` block, in ``room`` (a short path). Raises DaemonError."""
    place = room / "run"
    unmount(place / MOUNTED)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / MOUNTED).touch()
    command = [*prefix_of(setup.placement), *daemon_command(setup, place)]
    with (place / "log").open("wb") as log:
        started = time.monotonic()
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        except OSError as error:
            raise DaemonError(f"{setup.side.name} cannot be started: {error}") from error
    daemon = Daemon(setup, process, started, place)
    try:
        yield daemon
    except BaseException:
        # What went wrong inside is the news; a slow end would only hide it.
        process.kill()
        process.wait()
        raise
    else:
        daemon.stop()
    finally:
        unmount(place / MOUNTED)


def unmount(path: Path) -> None:
    """Take away what a killed daemon has left mounted."""
    with Path("/proc/self/mounts").open() as mounts:
        if any(line.split(" ")[1] == str(path) for line in mounts):
            subprocess.run(["umount", "-l", path], check=False)
