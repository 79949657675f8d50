"""Coming up, waiting and going down, with a start function of the test's own instead of a command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import attrs
import pytest
import trio

from qsd.actors.core import Actor, receives
from qsd.actors.supervisor import Floor, Supervisor
from qsd.errors import QmpError
from qsd.life import Process, run


@attrs.frozen
class Boom:
    """Makes the actor crash."""


class Fragile(Actor):
    kind = "fragile"

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__(name)
        self.log = log

    async def started(self) -> None:
        self.log.append(f"{self.name} up")

    async def stopping(self) -> None:
        self.log.append(f"{self.name} down")

    @receives(Boom)
    async def _boom(self, message: Boom) -> None:
        raise RuntimeError("boom")


def kill_here(number: signal.Signals) -> None:
    """Send a signal to this thread: threads of earlier tests do not block it, and the process would end there."""
    signal.pthread_kill(threading.get_ident(), number)


class Life:
    """Records what ``run`` does around a start function."""

    def __init__(self, pidfile: Path | None = None) -> None:
        self.log: list[str] = []
        self.supervisor: Supervisor | None = None
        self.up = trio.Event()
        self.process = Process(str(pidfile) if pidfile else None, self._came_up, self._failed)

    def _came_up(self) -> None:
        self.log.append("ready")
        self.up.set()

    def _failed(self, error: QmpError) -> None:
        self.log.append(error.desc)

    async def start(self, supervisor: Supervisor) -> int | None:
        self.supervisor = supervisor
        await supervisor.start(Fragile("low", self.log), Floor.CORE)
        self.high = Fragile("high", self.log)
        await supervisor.start(self.high, Floor.MONITORS)
        return None


WHOLE_LIFE = ["low up", "high up", "ready", "high down", "low down"]


async def test_stop_request_closes_the_floors_from_the_inside(tmp_path: Path) -> None:
    life = Life(tmp_path / "pid")
    async with trio.open_nursery() as nursery:

        async def stop() -> None:
            await life.up.wait()
            assert (tmp_path / "pid").read_text() == f"{os.getpid()}\n"
            assert life.supervisor is not None
            life.supervisor.stop_daemon()

        nursery.start_soon(stop)
        assert await run(life.start, life.process) == 0
    assert life.log == WHOLE_LIFE
    assert not (tmp_path / "pid").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_signal_stops(number: signal.Signals) -> None:
    life = Life()
    async with trio.open_nursery() as nursery:

        async def kill() -> None:
            await life.up.wait()
            kill_here(number)

        nursery.start_soon(kill)
        assert await run(life.start, life.process) == 0
    assert life.log == WHOLE_LIFE


async def test_sigusr1_prints_the_tree_and_changes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    life = Life()
    async with trio.open_nursery() as nursery:

        async def kill() -> None:
            await life.up.wait()
            kill_here(signal.SIGUSR1)
            kill_here(signal.SIGTERM)

        nursery.start_soon(kill)
        assert await run(life.start, life.process) == 0
    assert life.log == WHOLE_LIFE
    printed = capfd.readouterr().err
    assert "monitors/\n  high [fragile] served=0" in printed


async def test_exit_code_of_a_start_that_has_nothing_to_wait_for(tmp_path: Path) -> None:
    life = Life(tmp_path / "pid")

    async def refuse(supervisor: Supervisor) -> int | None:
        await life.start(supervisor)
        return 1

    assert await run(refuse, life.process) == 1
    assert life.log == ["low up", "high up", "high down", "low down"]
    assert not (tmp_path / "pid").exists()


async def test_stop_while_starting_cancels_it() -> None:
    life = Life()

    async def stuck(supervisor: Supervisor) -> int | None:
        await life.start(supervisor)
        kill_here(signal.SIGTERM)
        await trio.sleep_forever()
        return None

    assert await run(stuck, life.process) == 0
    assert life.log == ["low up", "high up", "high down", "low down"]


async def test_pidfile_that_cannot_be_made_ends_the_start(tmp_path: Path) -> None:
    life = Life(tmp_path / "no" / "pid")
    assert await run(life.start, life.process) == 1
    wanted = f"cannot create PID file: Could not create '{tmp_path}/no/pid': No such file or directory"
    assert life.log == ["low up", "high up", wanted, "high down", "low down"]


async def test_crash_nobody_planned_for_ends_the_daemon_as_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    life = Life()
    async with trio.open_nursery() as nursery:

        async def crash() -> None:
            await life.up.wait()
            life.high.ref.tell(Boom())

        nursery.start_soon(crash)
        assert await run(life.start, life.process) == 1
    assert life.log == WHOLE_LIFE
    assert "high crashed" in caplog.text
    assert "boom" in caplog.text


async def test_start_nobody_waits_for_any_more_ends_as_a_failure(tmp_path: Path) -> None:
    life = Life(tmp_path / "pid")

    def came_up() -> None:
        raise BrokenPipeError

    assert await run(life.start, attrs.evolve(life.process, came_up=came_up)) == 1
    assert life.log == ["low up", "high up", "high down", "low down"]
    assert not (tmp_path / "pid").exists()


HANGS = """
import os, signal, sys, threading
import trio
import qsd.life
from qsd.actors.core import Actor
from qsd.actors.supervisor import Floor
from qsd.host.signals import block

class Stuck(Actor):
    async def stopping(self):
        if sys.argv[1] == "loop":
            threading.Event().wait()
        else:
            await trio.to_thread.run_sync(threading.Event().wait)

async def start(supervisor):
    if sys.argv[1] == "start":
        os.kill(os.getpid(), signal.SIGTERM)
        await trio.to_thread.run_sync(threading.Event().wait)
    await supervisor.start(Stuck("stuck"), Floor.CORE)

def came_up():
    if sys.argv[1] == "loop before":
        sender = threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGTERM))
        sender.start()
        threading.Event().wait()
    os.kill(os.getpid(), signal.SIGTERM)

qsd.life.LONGEST_CLOSE = 0.0
block(qsd.life.SIGNALS)
sys.exit(trio.run(qsd.life.run, start, qsd.life.Process("pid", came_up, print)))
"""


@pytest.mark.parametrize("where", ["start", "thread", "loop", "loop before"])
def test_what_cannot_be_called_off_does_not_keep_the_process(where: str, tmp_path: Path) -> None:
    words = [sys.executable, "-c", HANGS, where]
    ended = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert ended.stderr == "qsd: still waiting for something after 0 s: ending without it\n"
    assert ended.returncode == 1
    assert list(tmp_path.iterdir()) == []
