"""What a result depends on: versions, kernel, processor, date."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def cpu_model() -> str:
    """Return the processor's name as the kernel knows it."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def first_line(command: Sequence[str]) -> str:
    """Return the first line a program prints of its version."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except OSError as error:
        return f"unknown ({error.strerror})"
    return (done.stdout.strip() or done.stderr.strip()).partition("\n")[0]


def package(name: str) -> str:
    """Return an installed package's version."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def facts(*, ours: str, reference: str, fio: str, nbdcopy: str) -> dict[str, str]:
    """Return the lines that head a report. ``ours`` and ``reference`` are the daemons' own version lines."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "ours": ours,
        "reference": reference,
        "python": f"{platform.python_implementation()} {platform.python_version()}, trio {package('trio')}",
        "clients": f"{first_line([fio, '--version'])}, {first_line([nbdcopy, '--version'])}",
        "kernel": f"{platform.system()} {platform.release()}",
        "processor": f"{cpu_model()}, {len(os.sched_getaffinity(0))} CPUs",
    }
