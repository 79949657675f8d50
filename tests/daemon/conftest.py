"""Fixtures for tests with a whole daemon: ours, and the reference to compare with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Qmp, RunningDaemon, run

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


@pytest.fixture
def reference_qmp(reference: Path, tmp_path: Path) -> Iterator[Qmp]:
    """A monitor of a reference daemon; it is ready when its foreground process has ended."""
    words = ("--daemonize", "--pidfile", "theirs.pid", *MONITOR)
    assert run(*words, program=(str(reference),), cwd=tmp_path).returncode == 0
    qmp = Qmp(tmp_path / "qmp.sock")
    yield qmp
    qmp.execute("quit")
    with contextlib.suppress(ConnectionResetError):
        qmp.rest()
    qmp.close()
