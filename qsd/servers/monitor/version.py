"""What the monitor says it is: the level of the reference whose interface it speaks, and this program's name."""

from __future__ import annotations

from qsd import __version__
from qsd.qapi.schema.control import VersionInfo, VersionTriple

# Clients decide by this triple which commands and options they may use.
VERSION = VersionInfo(qemu=VersionTriple(micro=3, minor=1, major=11), package=f"qsd {__version__}")
