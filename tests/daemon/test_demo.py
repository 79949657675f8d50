"""``make run``: what it prints is what works."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from harness import DEADLINE

ROOT = Path(__file__).parents[2]


def test_demo_prints_what_to_type_and_it_works(tmp_path: Path) -> None:
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    demo = subprocess.Popen(
        [sys.executable, "tools/demo.py"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert demo.stdout is not None
        commands = []
        for line in demo.stdout:
            if line.startswith("  python3 tools/qmp.py"):
                commands.append(shlex.split(line, comments=True))
            elif line.startswith("  kill"):
                break
        assert len(commands) == 2
        for command in commands:
            done = subprocess.run(
                command, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE, check=True
            )
            assert "disk" in done.stdout
    finally:
        pid = int((tmp_path / "demo/qsd.pid").read_text())
        os.kill(pid, signal.SIGINT)
        _out, errors = demo.communicate(timeout=DEADLINE)
    assert (demo.returncode, errors) == (0, "")
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["disk.img"]
