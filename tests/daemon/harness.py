"""A whole daemon under test, and a small blocking QMP client to talk to it.

Nothing here sleeps: readiness comes over ``$NOTIFY_SOCKET``, the end over a pidfd.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PROGRAM = (sys.executable, "-m", "qsd")
DEADLINE = 30.0  # seconds; only ever reached by a failing test


class QmpFailure(Exception):
    """A command answered with an error."""

    def __init__(self, error: dict[str, str]) -> None:
        super().__init__(f"{error['class']}: {error['desc']}")
        self.error_class = error["class"]
        self.desc = error["desc"]


class Qmp:
    """A QMP connection. ``events`` collects what came between answers."""

    def __init__(self, path: Path | str, *, negotiate: bool = True) -> None:
        self.events: list[dict[str, Any]] = []
        with contextlib.ExitStack() as stack:
            self.socket = stack.enter_context(socket.socket(socket.AF_UNIX))
            self.socket.settimeout(DEADLINE)
            self.socket.connect(str(path))
            self._stream = stack.enter_context(self.socket.makefile("rb"))
            self.greeting = self.receive()
            if negotiate:
                self.execute("qmp_capabilities")
            stack.pop_all()  # from here on it is ``close`` that closes

    def send(self, text: str | bytes) -> None:
        """Send raw text."""
        self.socket.sendall(text.encode() if isinstance(text, str) else text)

    def receive(self) -> dict[str, Any]:
        """The next message, event or answer; EOFError at the end."""
        line = self._stream.readline()
        if not line:
            raise EOFError("the monitor closed the connection")
        message: dict[str, Any] = json.loads(line)
        return message

    def answer(self) -> dict[str, Any]:
        """The next message that is no event."""
        while "event" in (message := self.receive()):
            self.events.append(message)
        return message

    def command(self, name: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a command, return the whole answer."""
        self.send(json.dumps({"execute": name} | ({} if arguments is None else {"arguments": arguments})) + "\n")
        return self.answer()

    def execute(self, name: str, /, **arguments: Any) -> Any:
        """Run a command (``node_name=`` stands for ``node-name``); return its value or raise QmpFailure."""
        return self.execute_raw(name, {key.rstrip("_").replace("_", "-"): item for key, item in arguments.items()})

    def execute_raw(self, name: str, arguments: dict[str, Any]) -> Any:
        """The same with the arguments' names as they are on the wire."""
        answer = self.command(name, arguments or None)
        if "error" in answer:
            raise QmpFailure(answer["error"])
        return answer["return"]

    def refusal(self, name: str, /, **arguments: Any) -> str:
        """Run a command that must fail; return the description of its error."""
        try:
            value = self.execute(name, **arguments)
        except QmpFailure as failure:
            return failure.desc
        raise AssertionError(f"{name} was accepted and returned {value!r}")

    def wait_event(self, name: str, matches: Callable[[dict[str, Any]], bool] = lambda _: True) -> dict[str, Any]:
        """The first event of that name whose data matches, among those seen and those to come; it is consumed."""
        while True:
            for event in self.events:
                if event["event"] == name and matches(event.get("data", {})):
                    self.events.remove(event)
                    return event
            message = self.receive()
            assert "event" in message, f"unexpected answer {message}"
            self.events.append(message)

    def finish_job(self, name: str) -> str | None:
        """Wait for the end of the only job there is and dismiss it; its error."""
        self.wait_event("JOB_STATUS_CHANGE", lambda data: data["status"] == "concluded")
        (job,) = self.execute("query-jobs")
        self.execute("job-dismiss", id=name)
        error: str | None = job.get("error")
        return error

    def rest(self) -> list[dict[str, Any]]:
        """Everything until the daemon closes the connection."""
        return [json.loads(line) for line in self._stream]

    def close(self) -> None:
        self._stream.close()
        self.socket.close()


class RunningDaemon:
    """A daemon process in a directory of its own."""

    def __init__(
        self,
        place: Path,
        arguments: Iterable[str | Path],
        *,
        program: tuple[str, ...] = PROGRAM,
        pass_fds: tuple[int, ...] = (),
        stdin: Any = subprocess.DEVNULL,
        stdout: Any = subprocess.PIPE,
        env: dict[str, str] | None = None,
    ) -> None:
        self.place = place
        self.expected_stderr: list[str] = []  # patterns of lines that are no failure
        self.expected_code = 0
        self._control = tempfile.TemporaryDirectory(prefix="qsd-test-")
        notify = os.path.join(self._control.name, "notify")
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(notify)
        self._stderr = open(os.path.join(self._control.name, "stderr"), "w+b")  # noqa: SIM115  # closed in ``finish``
        self.process = subprocess.Popen(
            [*program, *map(str, arguments)],
            cwd=place,
            stdin=stdin,
            stdout=stdout,
            stderr=self._stderr,
            pass_fds=pass_fds,
            env={**os.environ, **(env or {}), "NOTIFY_SOCKET": notify},
        )
        self._clients: list[Qmp] = []
        self._finished = False

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_ready(self) -> None:
        """Wait until everything is up. Fails when the daemon ends instead."""
        pidfd = os.pidfd_open(self.pid)
        try:
            end = time.monotonic() + DEADLINE
            while (left := end - time.monotonic()) > 0:
                readable, _, _ = select.select([self._notify, pidfd], [], [], left)
                if self._notify in readable and b"READY=1" in self._notify.recv(4096):
                    return
                if pidfd in readable:
                    code = self.process.wait()
                    raise AssertionError(f"the daemon ended with {code} before it was ready:\n{self.stderr()}")
            raise AssertionError(f"the daemon was not ready in {DEADLINE} s:\n{self.stderr()}")
        finally:
            os.close(pidfd)

    def qmp(self, name: str = "qmp.sock") -> Qmp:
        """Connect to the monitor socket ``name`` in the daemon's directory and negotiate."""
        client = Qmp(self.place / name)
        self._clients.append(client)
        return client

    def stderr(self) -> str:
        """What the daemon wrote to stderr so far."""
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace")

    def terminate(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; returns the exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for the end; returns the exit code."""
        return self.process.wait(DEADLINE)

    def finish(self) -> None:
        """End the daemon and judge how it went: exit code, stderr, what it left behind."""
        if self._finished:
            return
        self._finished = True
        for client in self._clients:
            with contextlib.suppress(OSError):
                client.close()
        try:
            if self.process.poll() is None:
                self.terminate()
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGUSR1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1.0)
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the daemon did not end on SIGTERM:\n{self.stderr()}") from None
        finally:
            text = self.stderr()
            self._stderr.close()
            self._notify.close()
            self._control.cleanup()
            if self.process.stdout is not None:
                self.process.stdout.close()
            if self.process.stdin is not None:
                self.process.stdin.close()
        patterns = [re.compile(pattern) for pattern in self.expected_stderr]
        lines = [line for line in text.splitlines() if not any(pattern.search(line) for pattern in patterns)]
        assert not lines, "unexpected on stderr:\n" + "\n".join(lines)
        assert self.process.returncode == self.expected_code, f"exit code {self.process.returncode}"
        left = [path for path in self.place.rglob("*") if is_left_over(path)]
        assert not left, f"left behind: {left}"


def write_half(path: Path, size: int, seed: int) -> Path:
    """Make an image whose first half is random bytes and whose second is a hole."""
    path.write_bytes(random.Random(seed).randbytes(size // 2))
    os.truncate(path, size)
    return path


def is_left_over(path: Path) -> bool:
    """Whether a path is a socket or pid file that a daemon should have removed."""
    try:
        return stat.S_ISSOCK(path.lstat().st_mode) or path.suffix == ".pid"
    except FileNotFoundError:
        return False


def run(
    *arguments: str | Path, program: tuple[str, ...] = PROGRAM, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run the daemon to its end (for arguments it refuses or only answers)."""
    return subprocess.run(
        [*program, *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=DEADLINE,
        check=False,
        stdin=subprocess.DEVNULL,
        **options,
    )
