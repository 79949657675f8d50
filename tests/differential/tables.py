"""What is played to both daemons: the command lines of lines.txt, and QMP scripts."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from script import Script
from scripts_block import SCRIPTS as _BLOCK
from scripts_chardev import SCRIPTS as _CHARDEV
from scripts_children import SCRIPTS as _CHILDREN
from scripts_corners import SCRIPTS as _CORNERS
from scripts_exports import SCRIPTS as _EXPORTS
from scripts_graph import SCRIPTS as _GRAPH
from scripts_images import SCRIPTS as _IMAGES
from scripts_jobs import SCRIPTS as _JOBS
from scripts_luks import SCRIPTS as _LUKS
from scripts_monitor import SCRIPTS as _MONITOR
from scripts_nodes import SCRIPTS as _NODES
from scripts_objects import SCRIPTS as _OBJECTS
from scripts_qcow2 import SCRIPTS as _QCOW2

SCRIPTS: dict[str, Script] = {
    **_MONITOR,
    **_OBJECTS,
    **_CHARDEV,
    **_BLOCK,
    **_NODES,
    **_EXPORTS,
    **_QCOW2,
    **_LUKS,
    **_GRAPH,
    **_IMAGES,
    **_JOBS,
    **_CORNERS,
    **_CHILDREN,
}


def lines() -> Iterator[tuple[str, list[str], str | None]]:
    """Each line of lines.txt, its words, and why its outcome is not the reference's (None: it is)."""
    why = None
    for line in Path(__file__).with_name("lines.txt").read_text().splitlines():
        if line.startswith("#!"):
            why = line.removeprefix("#!").strip()
        elif not line:
            why = None
        elif not line.startswith("#"):
            yield line, shlex.split(line), why
