"""Runs ``nbd_model.py``: random requests through libnbd against a model."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("nbd_model.py")


@cache
def python_with_libnbd() -> str:
    """Debian's binding belongs to Debian's interpreter, which may not be the first on PATH."""
    for python in ("/usr/bin/python3", "python3"):
        if (
            shutil.which(python)
            and not subprocess.run([python, "-c", "import nbd"], capture_output=True).returncode
        ):
            return python
    pytest.skip("python3-libnbd is not installed")


def run_model(place: Path, begins: bytes, *, seed: int, depth: int, count: int = 150) -> bytes:
    """The bytes of the export afterwards."""
    (place / "begins").write_bytes(begins)
    done = subprocess.run(
        [python_with_libnbd(), SCRIPT],
        env={
            **os.environ,
            "SOCKET": str(place / "nbd.sock"),
            "IMAGE": str(place / "begins"),
            "RESULT": str(place / "result"),
            "SEED": str(seed),
            "DEPTH": str(depth),
            "COUNT": str(count),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "agreed", done.stderr
    return (place / "result").read_bytes()
