"""Playing the same thing to two daemons: command lines and QMP scripts, and what must not count as a difference.

The reference's answers are recorded (``python tests/differential/record.py`` writes them), so that ours is compared
everywhere; where a reference of the recorded version is at hand, the recordings are checked against it as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from script import Script

DATA = Path(__file__).parents[1] / "data"
SECONDS = 10.0  # only a failing test waits so long

# What a program finds in its directory.
FILES: dict[str, bytes] = {"img": bytes(1 << 20), "key64": b"AAAA", "events": b"nbd_*\nbogus_event\n#no\n\n-nope\n"}


@contextmanager
def place() -> Iterator[Path]:
    """A directory with the files above."""
    with tempfile.TemporaryDirectory(prefix="qsd-diff-") as name:
        for file, content in FILES.items():
            Path(name, file).write_bytes(content)
        yield Path(name)


# -- command lines ----------------------------------------------------------------------------------------------

Run = Callable[[Sequence[str], Path], dict[str, Any]]


def run_program(program: str) -> Run:
    """Run the program itself."""

    def run(words: Sequence[str], where: Path) -> dict[str, Any]:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = subprocess.Popen(
                [program, *words], cwd=where, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )
            try:
                code: int | None = process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = None
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="surrogateescape"))
        return {"code": code, "out": texts[0], "err": texts[1]}

    return run


def outcome(run: Run, words: Sequence[str]) -> dict[str, Any]:
    """Code and texts of a run, and the names of what it left behind."""
    with place() as where:
        result = run(words, where)
        left = sorted(set(os.listdir(where)) - set(FILES))
    texts = {name: result[name].replace("qemu-storage-daemon", "qsd") for name in ("out", "err")}
    return {"code": result["code"], **texts, "left": left}


# -- QMP scripts ------------------------------------------------------------------------------------------------


class Talk:
    """A daemon with a monitor, and a client of it. ``program`` is a command."""

    def __init__(self, program: Sequence[str], arguments: Sequence[str], where: Path) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # closed in ``end``
        chardev = ("--chardev", "socket,id=qmp,path=qmp,server=on,wait=off", "--monitor", "qmp")
        self.process = subprocess.Popen(
            [*program, *arguments, *chardev], cwd=where, stdin=subprocess.DEVNULL, stderr=self._stderr
        )
        self._where = where
        self._socket = self._connect(where / "qmp")
        self._held = ""
        self._asked: Any = None
        self.events: list[Any] = []

    def _connect(self, path: Path) -> socket.socket:
        end = time.monotonic() + SECONDS
        while True:
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(SECONDS)
            try:
                client.connect(str(path))
            except OSError:
                client.close()
                assert time.monotonic() < end, "the daemon did not come up"
                assert self.process.poll() is None, "the daemon has ended"
                time.sleep(0.005)
            else:
                return client

    def receive(self) -> Any:
        """The next message, pretty or not."""
        while True:
            self._held = self._held.lstrip()
            try:
                value, end = json.JSONDecoder().raw_decode(self._held)
            except ValueError:
                try:
                    data = self._socket.recv(1 << 16)
                except TimeoutError:
                    raise AssertionError(f"no answer to {self._asked}") from None
                if not data:
                    raise EOFError from None
                self._held += data.decode()
            else:
                self._held = self._held[end:]
                return value

    def ask(self, message: Any) -> Any:
        """Send a message (JSON, or a text as it is) and return the answer; events are kept."""
        self._asked = message
        text = message if isinstance(message, str) else json.dumps(message)
        self._socket.sendall(text.encode("utf-8", "surrogateescape"))
        while "event" in (answer := self.receive()):
            self.events.append(answer)
        return answer

    def wait_event(self, name: str) -> Any:
        """The next event of that name."""
        while True:
            for event in self.events:
                if event["event"] == name:
                    self.events.remove(event)
                    return event
            self.events.append(self.receive())

    def take_until(self, job: str, status: str) -> list[Any]:
        """The events about a job, in order, up to the one with this status."""
        found: list[Any] = []
        seen = 0
        while True:
            while seen == len(self.events):
                self.events.append(self.receive())
            data = self.events[seen].get("data", {})
            if job not in (data.get("id"), data.get("device")):
                seen += 1
                continue
            found.append(self.events.pop(seen))
            if data.get("status") == status:
                return found

    def end(self) -> None:
        self._socket.close()
        self.process.terminate()
        self.process.wait(SECONDS)
        self._stderr.close()


# Limits that are what the machine's disks and kernel make them.
_OF_THE_MACHINE = frozenset(
    {"discard-alignment", "max-hw-iov", "max-hw-transfer", "min-mem-alignment", "request-alignment"}
)
_NAMES = re.compile(r"#block[0-9]+")
_MADE_UP = re.compile(r"/tmp/(?:qemu-socket-\w+|qsd-diff-\w+)")
_PORT = re.compile(r"(127\.0\.0\.1|\[?::1\]?|0\.0\.0\.0):[0-9]{2,5}")


class Normaliser:
    """Takes out of messages what differs from run to run, and the members ``unseen``.

    Generated names are numbered as they appear.
    """

    def __init__(self, unseen: Collection[str] = ()) -> None:
        self._unseen = {"timestamp", *unseen}
        self._names: dict[str, str] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: "the kernel's" if key in _OF_THE_MACHINE and value[key] > 1 else self(value[key])
                for key in sorted(value)
                if key not in self._unseen
            }
        if isinstance(value, list):
            # Lists the reference keeps in hash tables, and newest-first ones, come in any order.
            return sorted((self(item) for item in value), key=lambda item: json.dumps(item, sort_keys=True))
        if isinstance(value, str):
            if value.startswith("json:{"):
                # The members come in any order here, too.
                return "json:" + json.dumps(self(json.loads(value.removeprefix("json:"))))
            value = _NAMES.sub(lambda match: self._names.setdefault(match[0], f"#{len(self._names)}"), value)
            return _PORT.sub(r"\1:PORT", _MADE_UP.sub("MADE-UP", value))
        return value


@cache
def has_loop_devices() -> bool:
    """Whether loop devices can be made here."""
    try:
        with place() as where, loop_device(where, 512):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def loop_device(where: Path, sector: int) -> Iterator[str]:
    """A loop device of the image, by its path; none when ``sector`` is 0."""
    if not sector:
        yield ""
        return
    command = ["losetup", "--find", "--show", "--sector-size", str(sector), str(where / "img")]
    path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield path
    finally:
        subprocess.run(["losetup", "--detach", path], check=True)


def _renamed(value: Any, name: str, other: str) -> Any:
    return json.loads(json.dumps(value).replace(name, other)) if name and other else value


def held(pid: int) -> list[Any]:
    """What a process has open, each with its locks; sockets and the like without their numbers."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
            facts = Path(f"/proc/{pid}/fdinfo/{fd}").read_text().splitlines()
            locks = sorted(line.split(":", 2)[2] for line in facts if line.startswith("lock:"))
            found.append([target if target.startswith("/") else target.partition(":")[0], locks])
    return sorted(found)


def play(program: Sequence[str], script: Script, *, is_watched: bool = False) -> list[Any]:
    """What the daemon answers to each step; a string that begins with ``event `` waits for that event. Events that
    are waited for one behind the other may come in any order; those of ``until JOB STATUS`` have theirs.
    ``is_watched``: what ends in an error may neither leave nor take away descriptors and locks."""
    answers: list[Any] = []
    events = 0
    normal = Normaliser(script.unseen)
    with place() as where, loop_device(where, script.sector) as device:
        for name, content in script.files.items():
            (where / name).write_bytes(content)
        talk = Talk(program, script.arguments, where)
        try:
            talk.receive()
            for step in script.steps:
                if isinstance(step, str) and step.startswith("event "):
                    events += 1
                    answers.append(normal(talk.wait_event(step.removeprefix("event "))))
                    answers[-events:] = sorted(answers[-events:], key=json.dumps)
                elif isinstance(step, str) and step.startswith("until "):
                    events = 0
                    answers.append([normal(event) for event in talk.take_until(*step.split()[1:])])
                else:
                    events = 0
                    before = held(talk.process.pid) if is_watched else []
                    answer = talk.ask(_renamed(step, "LOOP", device))
                    if is_watched and "error" in answer:
                        assert held(talk.process.pid) == before, f"half-made: {step}"
                    answers.append(normal(_renamed(answer, device, "LOOP")))
        finally:
            talk.end()
    return answers
