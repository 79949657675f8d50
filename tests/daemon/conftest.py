"""Fixtures for tests with a whole daemon: ours, and the reference to compare with."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import RunningDaemon

MONITOR = ("--chardev", "socket,id=qmp,path=qmp.sock,server=on,wait=off", "--monitor", "qmp")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Callable[..., RunningDaemon]]:
    """Start daemons: ``daemon("--blockdev", ..., monitor=True, wait=True)``, each with a monitor on ``qmp.sock``.

    They are ended after the test, which fails if one of them ended badly, wrote to stderr or left files behind.
    """
    started: list[RunningDaemon] = []

    def start(
        *arguments: str | Path, monitor: bool = True, wait: bool = True, place: Path | None = None, **options: Any
    ) -> RunningDaemon:
        made = RunningDaemon(place or tmp_path, [*arguments, *(MONITOR if monitor else ())], **options)
        started.append(made)
        if wait:
            made.wait_ready()
        return made

    yield start
    errors = []
    for running in reversed(started):
        try:
            running.finish()
        except AssertionError as error:
            errors.append(str(error))
    assert not errors, "\n".join(errors)


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
