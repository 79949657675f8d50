"""What a node's options and its threshold do to requests that pass it: seen at the node below, and in events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
from whole_daemon import Whole, whole_daemon

from qsd.actors.edges import RootEdge, RootOptions
from qsd.block.permissions import Perm
from qsd.messages import Flag, Op, Request

SIZE = 1 << 20


@attrs.define(eq=False)
class Stack:
    """A raw node ``r`` above a node ``f``; ``seen`` is what has reached f's driver."""

    whole: Whole
    edge: RootEdge
    seen: list[tuple[Op, int, int, Flag]] = attrs.field(factory=list)

    def events(self) -> list[Any]:
        """The thresholds passed since the last look."""
        data = [event["data"] for event in self.whole.events if event["event"] == "BLOCK_WRITE_THRESHOLD"]
        self.whole.events.clear()
        return data

    async def arm(self, name: str, threshold: int) -> None:
        await self.whole.run("block-set-write-threshold", node_name=name, write_threshold=threshold)

    async def armed(self) -> dict[str, int]:
        nodes = await self.whole.run("query-named-block-nodes")
        return {node["node-name"]: node["write_threshold"] for node in nodes}


async def stack(whole: Whole, below: dict[str, Any] | None = None, **options: Any) -> Stack:
    path = whole.place / "img"
    path.write_bytes(bytes(SIZE))
    await whole.run("blockdev-add", driver="file", node_name="f", filename=str(path), **(below or {}))
    await whole.run("blockdev-add", driver="raw", node_name="r", file="f", **options)
    graph = whole.daemon.services.graph
    edge = await graph.attach("r", RootOptions(Perm.CONSISTENT_READ | Perm.WRITE))
    made = Stack(whole, edge)
    driver = graph.find("f").driver
    submit = driver.submit

    def watch(batch: list[Request]) -> None:
        made.seen.extend((Op(one.op), one.offset, one.length, Flag(one.flags)) for one in batch)
        submit(batch)

    driver.submit = watch  # type: ignore[method-assign]
    return made


def passed(name: str, exceeded: int) -> dict[str, Any]:
    return {"node-name": name, "amount-exceeded": exceeded, "write-threshold": 4096}


async def test_threshold_is_told_once_by_the_node_it_was_set_for(tmp_path: Path) -> None:
    """The figures are those of the reference, discards among them."""
    async with whole_daemon(tmp_path) as whole:
        made = await stack(whole, {"discard": "unmap"}, discard="unmap")
        edge = made.edge
        await made.arm("f", 4096)
        await edge.write(0, bytes(4096))
        await edge.read(8192, 4096)
        await edge.flush()
        assert made.events() == []
        assert await made.armed() == {"f": 4096, "r": 0}
        await edge.write(4000, bytes(97))
        assert made.events() == [passed("f", 1)]
        assert await made.armed() == {"f": 0, "r": 0}
        await edge.write(8192, bytes(512))
        assert made.events() == []
        for operation, exceeded in (
            (lambda: edge.write_zeroes(8192, 512), 4608),
            (lambda: edge.write_zeroes(8192, 4096, Flag.MAY_UNMAP), 8192),
            (lambda: edge.discard(8192, 4096), 8192),
        ):
            await made.arm("f", 4096)
            await operation()
            assert made.events() == [passed("f", exceeded)]
        for name in "fr":
            await made.arm(name, 4096)
        await edge.write(5000, bytes(1000))
        assert made.events() == [passed("r", 1904), passed("f", 1904)]
        await made.arm("f", 4096)
        await made.arm("f", 0)
        await edge.write(8192, bytes(512))
        assert made.events() == []


@pytest.mark.parametrize(
    ("mode", "discard", "expected"),
    [
        ("off", "unmap", (Op.WRITE, Flag.NONE)),
        ("on", "unmap", (Op.WRITE_ZEROES, Flag.NONE)),
        ("unmap", "unmap", (Op.WRITE_ZEROES, Flag.MAY_UNMAP)),
    ],
)
async def test_detect_zeroes_turns_writes_of_zeroes_into_what_they_are(
    tmp_path: Path, mode: str, discard: str, expected: tuple[Op, Flag]
) -> None:
    async with whole_daemon(tmp_path) as whole:
        made = await stack(whole, {"discard": "unmap"}, **{"detect-zeroes": mode, "discard": discard})
        await made.edge.write(4096, bytes(8192))
        await made.edge.write(4096, bytes(8191) + b"x")
        assert made.seen == [
            (expected[0], 4096, 8192, expected[1]),
            (Op.WRITE, 4096, 8192, Flag.NONE),
        ]


@pytest.mark.parametrize("discard", ["ignore", "unmap"])
async def test_discard_says_who_may_give_up_what(tmp_path: Path, discard: str) -> None:
    async with whole_daemon(tmp_path) as whole:
        made = await stack(whole, {"discard": "unmap"}, discard=discard)
        await made.edge.discard(0, 4096)
        await made.edge.write_zeroes(8192, 4096, Flag.MAY_UNMAP)
        unmaps = discard == "unmap"
        assert made.seen == [
            *([(Op.DISCARD, 0, 4096, Flag.NONE)] if unmaps else []),
            (Op.WRITE_ZEROES, 8192, 4096, Flag.MAY_UNMAP if unmaps else Flag.NONE),
        ]


@pytest.mark.parametrize("no_flush", [True, False])
async def test_no_flush_keeps_flushes_from_the_disk(tmp_path: Path, no_flush: bool) -> None:
    async with whole_daemon(tmp_path) as whole:
        made = await stack(whole, {"cache": {"no-flush": no_flush}})
        await made.edge.write(0, b"x" * 512)
        await made.edge.flush()
        flushes = [one for one in made.seen if one[0] is Op.FLUSH]
        assert len(flushes) == (0 if no_flush else 1)


class WatchedAio:
    """An aio engine; ``synced`` says of each of its writes whether it waits for the disk, of each sync yes."""

    def __init__(self, aio: Any) -> None:
        self._aio = aio
        self.synced: list[bool] = []

    def write(self, *args: Any, dsync: bool = False) -> None:
        self.synced.append(dsync)
        self._aio.write(*args, dsync=dsync)

    def fsync(self, *args: Any) -> None:
        self.synced.append(True)
        self._aio.fsync(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._aio, name)


async def test_no_flush_lets_no_write_wait_for_the_disk(tmp_path: Path) -> None:
    """FUA is a flush of its own."""
    async with whole_daemon(tmp_path) as whole:
        made = await stack(whole, {"cache": {"no-flush": False}})
        io = whole.daemon.services.graph.find("f").driver.io
        watched = io._aio = WatchedAio(io._aio)
        file = {"driver": "file", "node-name": "f", "filename": str(tmp_path / "img")}
        for no_flush in (False, True, False):
            await whole.run("blockdev-reopen", options=[{**file, "cache": {"no-flush": no_flush}}])
            watched.synced.clear()
            await made.edge.write(0, b"x" * 512, Flag.FUA)
            await made.edge.write_zeroes(4096, 4096, Flag.FUA)
            assert any(watched.synced) is not no_flush
            if not no_flush:
                assert watched.synced == [True, True]
