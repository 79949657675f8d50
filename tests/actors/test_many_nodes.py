"""Long chains of nodes, and what is told about them: everything is looked at once, however much stands above it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from qcow2_fakes import new_image
from watching import note_calls
from whole_daemon import Whole, whole_daemon

from qsd.drivers.file import FileDriver
from qsd.drivers.qcow2.layout import Header


async def stacked(whole: Whole, levels: int) -> None:
    (whole.place / "disk").write_bytes(bytes(4096))
    await whole.run("blockdev-add", driver="file", node_name="n0", filename=str(whole.place / "disk"))
    for number in range(1, levels + 1):
        await whole.run("blockdev-add", driver="raw", node_name=f"n{number}", file=f"n{number - 1}")


async def overlays(whole: Whole, count: int) -> None:
    """Images that know nothing of one another."""
    for number in range(count):
        (whole.place / f"{number}").write_bytes(new_image(Header(size=1 << 20)))
        await whole.run(
            "blockdev-add",
            driver="qcow2",
            node_name=f"n{number}",
            file={"driver": "file", "filename": str(whole.place / f"{number}")},
            backing=f"n{number - 1}" if number else None,
        )


async def test_nodes_are_asked_for_their_names_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every raw node asked the one below it twice, and that one again: 30 of them held it for minutes."""
    asked = note_calls(monkeypatch, FileDriver, "filename")
    async with whole_daemon(tmp_path) as whole:
        await stacked(whole, 12)
        asked.clear()
        answer = await whole.run("query-named-block-nodes")
        assert len(asked) == 1
        tree = json.loads(answer[0]["file"].removeprefix("json:"))
        for _level in range(11):
            assert tree["driver"] == "raw"
            tree = tree["file"]
        assert tree == {"driver": "raw", "file": {"driver": "file", "filename": str(tmp_path / "disk")}}


async def test_very_long_names_are_told_in_part(tmp_path: Path) -> None:
    """As in the reference; a name is as long as everything below it."""
    async with whole_daemon(tmp_path) as whole:
        await stacked(whole, 200)
        top, below, *_rest = await whole.run("query-named-block-nodes", flat=True)
        assert len(top["file"]) == 4095
        assert top["file"].endswith("...")
        assert top["image"]["filename"] == top["file"]
        assert top["file"][:4000] == below["file"][:4000]


async def test_statistics_leave_out_backing_files(tmp_path: Path) -> None:
    """The reference tells them for devices only; with them 200 overlays made an answer of 35 MB."""
    async with whole_daemon(tmp_path) as whole:
        await overlays(whole, 3)
        for stats in await whole.run("query-blockstats", query_nodes=True):
            assert "backing" not in stats
            assert ("parent" in stats) == stats["node-name"].startswith("n")
