"""What the kernel knows about a process: processor time and resident memory, its children included."""

from __future__ import annotations

import os
from pathlib import Path

PROC = Path("/proc")


def family(pid: int) -> list[int]:
    """Return the process and all that descend from it."""
    found = [pid]
    for each in found:
        for task in (PROC / str(each) / "task").glob("*"):
            found.extend(int(word) for word in (task / "children").read_text().split())
    return found


def parse_stat_ticks(stat: str) -> int:
    """Return utime + stime of a ``/proc/PID/stat`` line, in clock ticks. The name in it may hold anything."""
    fields = stat[stat.rindex(")") + 2 :].split()
    return int(fields[11]) + int(fields[12])


def parse_status_kib(status: str, key: str) -> int:
    """Return one memory figure of ``/proc/PID/status`` in KiB. Raises KeyError."""
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0])
    raise KeyError(key)


def cpu_seconds(pid: int) -> float:
    """Return the processor time used so far, user and system; its resolution is a clock tick, usually 10 ms."""
    ticks = sum(parse_stat_ticks((PROC / str(each) / "stat").read_text()) for each in family(pid))
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int, key: str) -> float:
    """Return ``VmRSS`` (now) or ``VmHWM`` (at most so far) in MiB."""
    return sum(parse_status_kib((PROC / str(each) / "status").read_text(), key) for each in family(pid)) / 1024
