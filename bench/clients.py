"""The programs that make the load: how they are called, and how their output is read."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from bench.workloads import KIB, Export, Tool, Unit, Workload

EXPORT = "disk"
# What fio calls the job that counts.
MEASURED = "load"
CLUSTER = 64 * KIB
MEGA = 1_000_000


class ClientError(Exception):
    """A client failed, hung, or said something unreadable."""


@attrs.frozen
class Clients:
    """Which programs to run."""

    fio: str = "fio"
    nbdcopy: str = "nbdcopy"
    nbdinfo: str = "nbdinfo"
    qemu_img: str = "qemu-img"
    qemu_io: str = "qemu-io"


@attrs.frozen
class Load:
    """How hard and how long: seconds measured, seconds of warming up before, size of the image in bytes."""

    seconds: float
    ramp: float
    size: int

    @property
    def deadline(self) -> float:
        """Seconds after which a client counts as hung."""
        return 60 + 10 * (self.seconds + self.ramp)


def nbd_uri(socket: Path) -> str:
    """Return the address of the export on a unix socket."""
    return f"nbd+unix:///{EXPORT}?socket={socket}"


def fio_command(program: str, workload: Workload, load: Load, target: str) -> list[str]:
    """Return fio's command line for an NBD URI or a mounted file.

    The random map is off: it costs the client much and finds nothing here.
    """
    if workload.export is Export.NBD:
        engine = ["--ioengine=nbd", f"--uri={target}"]
    else:
        engine = ["--ioengine=libaio", "--direct=1", f"--filename={target}"]
    if workload.allocates:
        length = [f"--number_ios={load.size // CLUSTER // 2}"]
    else:
        runtime, ramp = (f"{round(seconds * 1000)}ms" for seconds in (load.seconds, load.ramp))
        length = ["--time_based", f"--runtime={runtime}", f"--ramp_time={ramp}"]
    common = [*engine, f"--size={load.size}", *length, "--norandommap"]
    words = [program, "--output-format=json", "--group_reporting=1", f"--name={MEASURED}", *common]
    words += [f"--rw={workload.rw}", f"--bs={workload.block}", f"--iodepth={workload.depth}"]
    words += [f"--numjobs={workload.clients}", *([f"--fsync={workload.fsync}"] if workload.fsync else [])]
    for side in workload.beside:
        words += ["--name=beside", "--new_group", *common, f"--rw={side.rw}", f"--bs={side.block}"]
        words += [f"--iodepth={side.depth}", f"--rate_iops={side.rate},{side.rate},{side.rate}"]
    return words


def parse_fio(output: str, unit: Unit) -> float:
    """Return what fio measured, both directions of what counts together, in ``unit``.

    fio prints lines of its own before and after the JSON object. Raises ClientError if there is no such object, if
    a job reports an error, or if nothing was done.
    """
    start, end = output.find("{"), output.rfind("}")
    try:
        jobs = json.loads(output[start : end + 1])["jobs"]
        failed = [job["error"] for job in jobs if job["error"]]
        sides: list[dict[str, Any]] = [
            job[side] for job in jobs if job["jobname"] == MEASURED for side in ("read", "write")
        ]
        total = sum(float(side["iops"]) if unit is Unit.IOPS else side["bw_bytes"] / MEGA for side in sides)
    except (ValueError, KeyError, TypeError) as error:
        raise ClientError(f"fio's output cannot be read ({error!r}): {output[-300:]!r}") from error
    if failed:
        raise ClientError(f"fio reports error {failed[0]}")
    if not total:
        raise ClientError("fio did nothing")
    return total


def run(command: Sequence[str], *, deadline: float) -> str:
    """Run a client to its end and return its standard output. Raises ClientError."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=deadline, check=False)
    except FileNotFoundError as error:
        raise ClientError(f"{command[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise ClientError(f"{command[0]} did not end within {deadline:.0f} s") from error
    if done.returncode:
        raise ClientError(
            f"{command[0]} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-300:]}"
        )
    return done.stdout


def measure(clients: Clients, workload: Workload, load: Load, target: str, prefix: Sequence[str]) -> float:
    """Put the load on the export once and return the figure in the workload's unit. Raises ClientError.

    ``target`` is the export's URI or the mounted file; ``prefix`` is put before the command line (taskset, chrt).
    """
    if workload.tool is Tool.FIO:
        command = [*prefix, *fio_command(clients.fio, workload, load, target)]
        return parse_fio(run(command, deadline=load.deadline), workload.unit)
    if workload.tool is Tool.NBDCOPY:
        _, seconds = timed([*prefix, clients.nbdcopy, target, "null:"], load.deadline)
        return load.size / MEGA / seconds
    shown, seconds = timed([*prefix, clients.nbdinfo, "--map", target], load.deadline)
    return shown.count("\n") / seconds


def timed(command: Sequence[str], deadline: float) -> tuple[str, float]:
    """Run a client to its end; its standard output and the seconds it took. Raises ClientError."""
    begin = time.monotonic()
    shown = run(command, deadline=deadline)
    return shown, time.monotonic() - begin
