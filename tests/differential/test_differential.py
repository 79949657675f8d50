"""Ours answers as the reference does: command lines and QMP scripts, errors included."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from compare import DATA, has_loop_devices, outcome, play
from nbd_talk import server
from record import record_conversations, record_lines, record_scripts, version_of
from scripts_nbd import ARGUMENTS, CONVERSATIONS
from tables import SCRIPTS, lines

Rows = list[Any]


def recorded(name: str) -> tuple[str, Rows]:
    data = json.loads((DATA / name).read_text())
    return data["version"], data["rows"]


TABLE = {line: (words, why) for line, words, why in lines()}
VERSION, LINES = recorded("differential_lines.json")
_, STEPS = recorded("differential_scripts.json")
_, TALKS = recorded("differential_nbd.json")


@pytest.fixture(scope="module")
def run_ours() -> Iterator[Callable[[Sequence[str], Path], dict[str, Any]]]:
    """Runs of our command line, each a fork of one process that has imported everything."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def run(words: Sequence[str], where: Path) -> dict[str, Any]:
        request = {"words": list(words), "place": str(where), "seconds": 20}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer: dict[str, Any] = json.loads(server.stdout.readline())
        return answer

    yield run
    server.stdin.close()
    assert server.wait(10) == 0
    server.stdout.close()


@pytest.mark.parametrize(("line", "theirs"), LINES, ids=[line for line, _ in LINES])
def test_line_ends_as_with_the_reference(
    line: str, theirs: dict[str, Any], run_ours: Callable[[Sequence[str], Path], dict[str, Any]]
) -> None:
    words, why = TABLE[line]
    ours = outcome(run_ours, words)
    left, their_left = ours.pop("left"), theirs["left"]
    assert set(left) <= set(their_left), "left behind"  # it leaves sockets where we do not
    wanted = {key: theirs[key] for key in ("code", "out", "err")}
    if why is None:
        assert ours == wanted
    else:
        assert ours != wanted, "no longer different: take it off the list"
        assert ours["code"] == wanted["code"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_answered_as_by_the_reference(name: str) -> None:
    script = SCRIPTS[name]
    theirs = [(step, answer) for of, step, answer in STEPS if of == name]
    assert [step for step, _ in theirs] == json.loads(json.dumps(script.steps)), "record it again"
    if script.sector and not has_loop_devices():
        pytest.skip("no loop devices can be made here")
    ours = play([sys.executable, "-m", "qsd"], script, is_watched=True)
    problems = []
    for index, ((step, wanted), answer) in enumerate(zip(theirs, ours, strict=True)):
        why = script.why(index)
        if (answer == wanted) == (why is not None):
            problems.append(f"{json.dumps(step)}\n  theirs {wanted}\n  ours   {answer}\n  ({why or 'must agree'})")
    assert not problems, "\n".join(problems)


@pytest.fixture(scope="module")
def talk_to_ours() -> Iterator[Callable[[Sequence[Any]], list[Any]]]:
    """Plays a conversation with one daemon of ours."""
    with server([sys.executable, "-m", "qsd"], ARGUMENTS) as play_one:
        yield play_one


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_nbd_client_is_answered_as_by_the_reference(
    name: str, talk_to_ours: Callable[[Sequence[Any]], list[Any]]
) -> None:
    steps = CONVERSATIONS[name]
    ((recorded_steps, theirs),) = [row[1:] for row in TALKS if row[0] == name]
    assert recorded_steps == json.loads(json.dumps(steps)), "record it again"
    ours = talk_to_ours(steps)
    pairs = itertools.zip_longest(steps, theirs, ours)
    problems = [
        f"{step}\n  theirs {wanted}\n  ours   {answer}" for step, wanted, answer in pairs if answer != wanted
    ]
    assert not problems, "\n".join(problems)


def test_everything_is_recorded() -> None:
    assert [name for name, _, _ in TALKS] == list(CONVERSATIONS)
    assert [line for line, _ in LINES] == list(TABLE)
    assert {name for name, _, _ in STEPS} == set(SCRIPTS)


@pytest.mark.parametrize("what", ["lines", "scripts", "nbd"])
def test_recordings_are_what_the_reference_says(what: str, reference: Path) -> None:
    version = version_of(str(reference))
    if version != VERSION:
        pytest.skip(f"the recordings are of {VERSION}, {reference} is {version}")
    if what == "nbd":
        rows, now = TALKS, record_conversations(str(reference))
    elif what == "scripts":
        now = record_scripts(str(reference))
        played = {name for name, _, _ in now}
        rows = [row for row in STEPS if row[0] in played]
    else:
        # One in eight, unless all are asked for: a line takes the reference 30 ms.
        rows = LINES[:: 1 if "QSD_ALL_RECORDINGS" in os.environ else 8]
        now = record_lines(str(reference), [line for line, _ in rows])
    now = json.loads(json.dumps(now))
    problems = [f"{new}\n  recorded {old}" for new, old in zip(now, rows, strict=True) if new != old]
    assert not problems, "\n".join(problems)
