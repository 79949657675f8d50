"""Long chains of nodes, and what is told about them: everything is looked at once, however much stands above it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from qcow2_fakes import new_image
from watching import note_calls
from whole_daemon import Whole, whole_daemon

from qsd.actors.depth import MAX_DEPTH
from qsd.actors.edges import RootOptions
from qsd.block.permissions import Perm
from qsd.drivers.file import FileDriver
from qsd.drivers.qcow2.layout import Header
from qsd.errors import QmpError

WRITER = RootOptions(Perm.CONSISTENT_READ | Perm.WRITE)
TOO_DEEP = f"more than {MAX_DEPTH} deep"


async def stacked(whole: Whole, levels: int) -> None:
    (whole.place / "disk").write_bytes(bytes(4096))
    await whole.run("blockdev-add", driver="file", node_name="n0", filename=str(whole.place / "disk"))
    for number in range(1, levels + 1):
        await whole.run("blockdev-add", driver="raw", node_name=f"n{number}", file=f"n{number - 1}")


async def stacked_on(whole: Whole, node: str, levels: int) -> None:
    """The last is r0."""
    for number in reversed(range(levels)):
        await whole.run("blockdev-add", driver="raw", node_name=f"r{number}", file=node)
        node = f"r{number}"


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


async def use(whole: Whole, name: str) -> None:
    """Everything that goes through all of a stack."""
    edge = await whole.daemon.services.graph.attach(name, WRITER)
    await edge.write(512, b"a" * 512)
    assert await edge.read(0, 2048) == bytes(512) + b"a" * 512 + bytes(1024)
    await edge.write_zeroes(512, 512)
    await edge.discard(1024, 512)
    assert sum(extent.length for extent in await edge.block_status(0, edge.length, 9)) == edge.length
    await edge.flush()
    await edge.quiesce()
    await edge.detach()
    await whole.run("block_resize", node_name=name, size=2 << 20)
    nodes = await whole.run("query-named-block-nodes", flat=True)
    assert len(nodes) >= MAX_DEPTH
    assert next(node for node in nodes if node["node-name"] == name)["image"]["virtual-size"] == 2 << 20


async def test_the_deepest_stack_works_and_none_is_deeper(tmp_path: Path) -> None:
    """From 300 nodes on requests failed where the stack ended, and answers were lost."""
    async with whole_daemon(tmp_path) as whole:
        await stacked(whole, MAX_DEPTH - 1)
        top = f"n{MAX_DEPTH - 1}"
        await use(whole, top)
        with pytest.raises(QmpError, match=TOO_DEEP):
            await whole.run("blockdev-add", driver="raw", node_name="more", file=top)
        # Nothing is left of it, neither a name nor an edge.
        await whole.run("blockdev-add", driver="raw", node_name="more", file="n0")
        with pytest.raises(QmpError, match=TOO_DEEP):
            await whole.run("blockdev-reopen", options=[{"driver": "raw", "node-name": "more", "file": top}])
        await whole.run("blockdev-del", node_name="more")
        await whole.run("blockdev-del", node_name=top)


async def test_the_deepest_chain_of_overlays_works(tmp_path: Path) -> None:
    """Each has a file below it, so there is one level less. What is written first comes from all layers."""
    async with whole_daemon(tmp_path) as whole:
        await overlays(whole, MAX_DEPTH - 1)
        await use(whole, f"n{MAX_DEPTH - 2}")


async def test_no_snapshot_makes_a_chain_too_deep(tmp_path: Path) -> None:
    async with whole_daemon(tmp_path) as whole:
        await overlays(whole, 2)
        await stacked_on(whole, "n1", MAX_DEPTH - 3)
        (tmp_path / "o").write_bytes(new_image(Header(size=1 << 20)))
        file = {"driver": "file", "filename": str(tmp_path / "o")}
        await whole.run("blockdev-add", driver="qcow2", node_name="o", file=file, backing=None)
        # It goes between the two and what stands on them.
        with pytest.raises(QmpError, match=TOO_DEEP):
            await whole.run("blockdev-snapshot", node="n1", overlay="o")
        await whole.run("blockdev-del", node_name="r0")
        await whole.run("blockdev-snapshot", node="n1", overlay="o")


async def test_options_may_not_nest_deeper_than_nodes(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    options: dict[str, Any] = {"driver": "file", "filename": str(tmp_path / "disk")}
    for _level in range(MAX_DEPTH):
        options = {"driver": "raw", "file": options}
    async with whole_daemon(tmp_path) as whole:
        with pytest.raises(QmpError, match=TOO_DEEP):
            await whole.run("blockdev-add", node_name="n", **options)
        assert not await whole.run("query-named-block-nodes")
        await whole.run("blockdev-add", node_name="n", **options["file"])
