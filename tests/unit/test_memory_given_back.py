"""Large bitmaps leave the process when they are freed, although they are in memory in small pieces."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Resident kilobytes with a bitmap of 64 MiB, and after it was freed; something small lies between its pieces.
SCRIPT = """
from pathlib import Path
from qsd.block.bitmap import DirtyBitmap
from qsd.host.memory import give_back_memory, keep_freed_memory

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

keep_freed_memory()
bits, kept = DirtyBitmap(32 << 40, 65536), []
for start in range(0, 64 << 20, 1 << 18):
    bits.load(start, bytes(range(256)) * 1024)
    kept.append(bytearray(700))
full = resident()
bits.clear()
give_back_memory()
print(full, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such call")
def test_freed_bitmaps_go_back_to_the_kernel() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    full, after = map(int, done.stdout.split())
    assert full - after > 48 << 10
