"""Whatever a client asks, it gets an answer of the declared shape or an error, and the daemon goes on.

The commands and their arguments are made from the daemon's own introspection: mostly well-formed, over a handful of
names so that they meet, with something else thrown in now and then.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from whole_daemon import whole_daemon

from qsd.commands.context import Context
from qsd.commands.dispatch import execute
from qsd.errors import QmpError
from qsd.qapi.core import SCHEMA
from qsd.qapi.introspect import introspect
from qsd.qapi.visit import from_json
from qsd.wire.qmp_json import dumps

COMMANDS = 25  # in a life of the daemon
TYPES: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in introspect()}
# Names that mean something now and then: nodes, objects, files, paths, a socket.
TEXTS = (
    "n",
    "m",
    "n",
    "img",
    "img",
    "t",
    "q",
    "s",
    "/objects",
    "type",
    "file",
    "",
    "x/y",
    "é",
    "a" * 300,
    "1",
    "0",
)
NUMBERS = (0, 1, 1, 2, 512, 4096, 65536, 1 << 20, 1 << 20, 1 << 31, -1, 3, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
JUNK: tuple[Any, ...] = (None, True, 1.5, "", [], {}, [[]], {"n": {}}, "n", -1)
# What must not be tried on the machine the tests run on: its terminal, its mounts, its disk, waiting for ever.
SKIPPED_COMMANDS = {"quit"}
SKIPPED_MEMBERS = {"wait", "preallocation", "latency-ns"}
SKIPPED_VALUES = {
    *("stdio", "pty", "fuse", "qsd-view", "host_device", "host_cdrom", "vsock", "vhost-user-blk", "vduse-blk")
}
# What there is to begin with.
PRELUDE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("blockdev-add", {"driver": "file", "node-name": "n", "filename": "img", "locking": "off"}),
    ("blockdev-add", {"driver": "raw", "node-name": "m", "file": "n"}),
    ("blockdev-add", {"driver": "null-co", "node-name": "q", "size": 1 << 20}),
    ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "s"}}}),
    ("block-export-add", {"type": "nbd", "id": "e", "node-name": "m"}),
    ("object-add", {"qom-type": "iothread", "id": "t"}),
    ("chardev-add", {"id": "c", "backend": {"type": "ringbuf", "data": {}}}),
)


class Maker:
    """Makes values of introspected types."""

    def __init__(self, source: random.Random) -> None:
        self.random = source

    def value(self, name: str, depth: int = 0) -> Any:
        """A value of the type, or now and then of another."""
        if self.random.random() < 0.02:
            return self.random.choice(JUNK)
        entry = TYPES[name]
        shape = entry["meta-type"]
        if shape == "builtin":
            return self.builtin(entry["json-type"])
        if shape == "enum":
            values = [item for item in entry["values"] if item not in SKIPPED_VALUES]
            return self.random.choice(values or ["x"])
        if shape == "array":
            count = self.random.choice((0, 1, 1, 2)) if depth < 6 else 0
            return [self.value(entry["element-type"], depth + 1) for _ in range(count)]
        if shape == "alternate":
            members = entry["members"]
            if depth > 4:
                members = [item for item in members if TYPES[item["type"]]["meta-type"] != "object"] or members
            return self.value(self.random.choice(members)["type"], depth + 1)
        return self.object(entry, depth)

    def builtin(self, kind: str) -> Any:
        """A value of a built-in type."""
        if kind == "string":
            return self.random.choice(TEXTS)
        if kind == "int":
            return self.random.choice(NUMBERS)
        if kind == "boolean":
            return self.random.random() < 0.5
        return self.random.choice(JUNK) if kind == "value" else None if kind == "null" else 0.5

    def object(self, entry: dict[str, Any], depth: int = 0) -> dict[str, Any]:
        """An object; optional members are there one time in four."""
        made: dict[str, Any] = {}
        members = list(entry["members"])
        for item in members:
            if item["name"] in SKIPPED_MEMBERS or ("default" in item and self.random.random() < 0.75):
                continue
            if self.random.random() > 0.02:
                made[item["name"]] = self.value(item["type"], depth + 1)
        for case in entry.get("variants", ()):
            if case["case"] == made.get(entry["tag"]):
                made |= self.object(TYPES[case["type"]], depth)
        if self.random.random() < 0.02:
            made["surplus"] = 1
        return made

    def command(self) -> tuple[str, dict[str, Any]]:
        """A command and its arguments."""
        name = self.random.choice([name for name in SCHEMA.commands if name not in SKIPPED_COMMANDS])
        return name, self.object(TYPES[TYPES[name]["arg-type"]])


async def live(place: Path, commands: list[tuple[str, dict[str, Any]]], said: list[str]) -> None:
    """Run the commands in a daemon of their own; every answer is checked against what is declared."""
    Path(place, "img").write_bytes(bytes(1 << 20))
    async with whole_daemon(place) as whole:
        for index, (name, arguments) in enumerate([*PRELUDE, *commands]):
            said.append(f"{name} {json.dumps(arguments)}")
            with trio.fail_after(20):
                try:
                    answer = await execute(Context(whole.daemon.services), name, arguments)
                except QmpError as error:
                    said.append(f"  {error.desc[:200]}")
                    if not error.desc or index < len(PRELUDE):
                        raise
                    continue
            said.append("  ok")
            declared = SCHEMA.commands[name].returns
            if declared is not None:
                from_json(declared, json.loads(dumps(answer)))
        assert whole.supervisor.fatal is None
        assert not whole.supervisor.stop_requested.is_set()


def descriptors() -> dict[str, str]:
    """What is open, by number."""
    gc.collect()
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return {number: name for number, name in found.items() if "/proc/" not in name}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_any_command_is_answered(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    maker = Maker(random.Random(seed))
    place = tmp_path / str(seed)
    place.mkdir(exist_ok=True)
    monkeypatch.chdir(place)
    before = descriptors()
    said: list[str] = []
    try:
        trio.run(live, place, [maker.command() for _ in range(COMMANDS)], said)
        assert "crashed" not in caplog.text
        assert "Traceback" not in caplog.text
        assert descriptors() == before
    except BaseException:
        print("\n".join(said))
        raise
