"""blockdev-snapshot-sync makes an image, or says why not and leaves nothing behind."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from whole_daemon import whole_daemon

from qsd.drivers.calls import SlowPath
from qsd.errors import QmpError

HEADER = "Could not write qcow2 header: No space left on device"
TABLES = "Could not write refcount table: No space left on device"


@pytest.mark.parametrize(
    ("write", "text"), [(1, HEADER), (2, TABLES), (4, TABLES), (5, HEADER), (6, HEADER), (7, None)]
)
async def test_overlay_that_does_not_fit_is_told_of_and_taken_away(
    write: int, text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was an error nobody had planned for, and what had been written stayed on the disk that was full."""
    real = SlowPath.write
    count = 0

    async def full(self: Any, offset: int, data: bytes, flags: int = 0) -> None:
        nonlocal count
        count += 1
        if count >= write:
            raise OSError(errno.ENOSPC, "full")
        await real(self, offset, data, flags)

    overlay = tmp_path / "overlay"
    asked = {"node_name": "n", "snapshot_file": str(overlay), "snapshot_node_name": "o"}
    async with whole_daemon(tmp_path) as whole:
        await whole.run("blockdev-add", driver="null-co", node_name="n", size=1 << 20)
        await whole.run("nbd-server-start", addr={"type": "unix", "data": {"path": str(tmp_path / "s")}})
        await whole.run("block-export-add", type="nbd", id="e", node_name="n")
        with monkeypatch.context() as patched:
            patched.setattr(SlowPath, "write", full)
            if text is None:
                await whole.run("blockdev-snapshot-sync", **asked)
            else:
                with pytest.raises(QmpError) as told:
                    await whole.run("blockdev-snapshot-sync", **asked)
                assert told.value.desc == text
        if text is not None:
            assert not overlay.exists()
            await whole.run("blockdev-snapshot-sync", **asked)
        assert overlay.exists()
