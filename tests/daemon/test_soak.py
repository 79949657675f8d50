"""The first rounds of ``make soak``."""

from __future__ import annotations

from pathlib import Path

from soak import soak


def test_what_was_flushed_survives_kill_9(tmp_path: Path) -> None:
    soak(3, tmp_path)
