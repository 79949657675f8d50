"""What several rooms of tests share: the reference to compare with."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qsd.actors.depth import RECURSION_LIMIT

# As the daemon's process has it; before Hypothesis looks, which does not like it to change.
sys.setrecursionlimit(RECURSION_LIMIT)
# Daemons that tests start are of the tree these tests are part of, wherever the environment was made.
os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)


def find_reference() -> Path | None:
    """The reference daemon: $QSD_REFERENCE, a private installation, or what is on PATH."""
    named = os.environ.get("QSD_REFERENCE")
    candidates = [named] if named else ["/opt/qsd-reference/bin/qemu-storage-daemon", "qemu-storage-daemon"]
    for candidate in candidates:
        found = shutil.which(candidate)
        if found is not None:
            return Path(found)
    return None


@pytest.fixture(scope="session")
def any_reference() -> Path:
    """The reference daemon in whatever version there is; skips when there is none."""
    found = find_reference()
    if found is None:
        pytest.skip("qemu-storage-daemon is not installed")
    return found


@pytest.fixture(scope="session")
def reference(any_reference: Path) -> Path:
    """A reference daemon whose words are the ones we use; skips when it is older."""
    text = subprocess.run([any_reference, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"version (\d+)\.", text)
    if version is None or int(version[1]) < 11:
        pytest.skip(f"needs qemu-storage-daemon 11 or newer, {any_reference} is: {text.splitlines()[0]}")
    return any_reference
