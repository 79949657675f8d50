"""Write down what the reference answers: ``python tests/differential/record.py [PROGRAM]``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection
from typing import Any

from compare import DATA, has_loop_devices, outcome, play, run_program
from nbd_talk import server
from scripts_nbd import ARGUMENTS, CONVERSATIONS
from tables import SCRIPTS, lines

PROGRAM = "/opt/qsd-reference/bin/qemu-storage-daemon"


def version_of(program: str) -> str:
    """Major and minor version."""
    text = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"version (\d+\.\d+)", text)
    assert match is not None
    return match[1]


def write(name: str, about: str, version: str, rows: list[Any]) -> None:
    body = ",\n".join(json.dumps(row, sort_keys=True) for row in rows)
    text = f'{{"about": {json.dumps(about)}, "version": "{version}", "rows": [\n{body}\n]}}\n'
    (DATA / name).write_text(text)


def record_lines(program: str, wanted: Collection[str] | None = None) -> list[Any]:
    """One row a line (of those wanted, or of all): the line and its outcome."""
    rows = []
    for line, words, _ in lines():
        if wanted is not None and line not in wanted:
            continue
        found = outcome(run_program(program), words)
        assert found["code"] is not None, f"still running: {line}"
        rows.append([line, found])
    return rows


def record_scripts(program: str) -> list[Any]:
    """One row a step: the script's name, the step and its answer."""
    rows = []
    for name, script in SCRIPTS.items():
        if script.sector and not has_loop_devices():
            continue
        answers = play([program], script)
        rows += [[name, step, answer] for step, answer in zip(script.steps, answers, strict=True)]
    return rows


def record_conversations(program: str) -> list[Any]:
    """One row a conversation: its name, the steps and the answers."""
    with server([program], ARGUMENTS) as play_one:
        return [[name, steps, play_one(steps)] for name, steps in CONVERSATIONS.items()]


def main() -> None:
    program = sys.argv[1] if len(sys.argv) > 1 else PROGRAM
    version = version_of(program)
    about = "Written by tests/differential/record.py: what the reference answers to"
    write("differential_lines.json", f"{about} the lines of lines.txt.", version, record_lines(program))
    write("differential_nbd.json", f"{about} scripts_nbd.py.", version, record_conversations(program))
    write("differential_scripts.json", f"{about} the scripts of tables.py.", version, record_scripts(program))


if __name__ == "__main__":
    main()
