"""The table of exports where two commands meet, or a command and the daemon's end."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing
from whole_daemon import Whole, whole_daemon

from qsd.actors.supervisor import Floor
from qsd.errors import ActorStopped, QmpError
from qsd.servers.nbd.export import NbdExport


async def prepare(whole: Whole) -> None:
    await whole.run("blockdev-add", driver="null-co", node_name="n", size=1 << 20)
    await whole.run("nbd-server-start", addr={"type": "unix", "data": {"path": str(whole.place / "nbd")}})


async def add(whole: Whole) -> None:
    await whole.run("block-export-add", type="nbd", id="e", node_name="n")


def deletions(whole: Whole) -> int:
    return sum(event["event"] == "BLOCK_EXPORT_DELETED" for event in whole.events)


async def test_of_two_exports_with_one_id_the_first_stays(tmp_path: Path) -> None:
    """Who came second took the first out of the table: it lived on, and nobody could delete it."""
    refused: list[str] = []

    async def try_to_add(whole: Whole) -> None:
        try:
            await add(whole)
        except QmpError as error:
            refused.append(error.desc)

    async with whole_daemon(tmp_path) as whole:
        await prepare(whole)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(try_to_add, whole)
            nursery.start_soon(try_to_add, whole)
        assert refused == ["Block export id 'e' is already in use"]
        assert [entry["id"] for entry in await whole.run("query-block-exports")] == ["e"]
        await whole.run("block-export-del", id="e")
        await trio.testing.wait_all_tasks_blocked()
        await whole.run("blockdev-del", node_name="n")


async def test_the_id_of_an_export_that_cannot_be_is_free(tmp_path: Path) -> None:
    async with whole_daemon(tmp_path) as whole:
        await prepare(whole)
        with pytest.raises(QmpError, match="is not found"):
            await whole.run("block-export-add", type="nbd", id="e", node_name="n", bitmaps=["none"])
        await add(whole)


@pytest.mark.parametrize("first", ["command", "end"])
async def test_deletion_that_meets_the_end_is_told_once(
    first: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with whole_daemon(tmp_path) as whole:
        await prepare(whole)
        await add(whole)
        actor = whole.actor("export")
        # Both wait for the graph.
        async with trio.open_nursery() as nursery, whole.daemon.services.graph.topology.lock:
            if first == "end":
                nursery.start_soon(whole.supervisor.stop, actor)
                await trio.testing.wait_all_tasks_blocked()
                with pytest.raises(QmpError, match="already shutting down"):
                    await whole.run("block-export-del", id="e")
            else:
                await whole.run("block-export-del", id="e")
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(whole.supervisor.stop, actor)
                await trio.testing.wait_all_tasks_blocked()
        assert deletions(whole) == 1
        await add(whole)
        await whole.run("block-export-del", id="e")
    assert deletions(whole) == 2
    assert "crashed" not in caplog.text


class Adding:
    """An export that is being added: it does not start before ``go_on``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_starting = trio.Event()
        self.go_on = trio.Event()
        self.error: Exception | None = None
        original = NbdExport.started

        async def started(export: NbdExport) -> None:
            self.is_starting.set()
            await self.go_on.wait()
            await original(export)

        monkeypatch.setattr(NbdExport, "started", started)

    async def run(self, whole: Whole) -> None:
        try:
            await add(whole)
        except (QmpError, ActorStopped) as error:
            self.error = error


async def test_end_of_the_server_ends_an_export_that_is_being_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stayed behind: the next server had it."""
    adding = Adding(monkeypatch)
    async with whole_daemon(tmp_path) as whole:
        await prepare(whole)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(adding.run, whole)
            await adding.is_starting.wait()
            async with trio.open_nursery() as inner:
                inner.start_soon(whole.run, "nbd-server-stop")
                await trio.testing.wait_all_tasks_blocked()
                adding.go_on.set()
        assert str(adding.error) == "NBD server not running"
        assert await whole.run("query-block-exports") == []
        assert not deletions(whole), "there was none"
        assert [actor for actor in whole.supervisor.actors() if actor.kind == "export"] == []
        await whole.run("blockdev-del", node_name="n")


async def test_name_of_an_nbd_export_that_is_being_added_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There were two of that name, and clients got the first."""
    adding = Adding(monkeypatch)
    async with whole_daemon(tmp_path) as whole:
        await prepare(whole)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(adding.run, whole)
            await adding.is_starting.wait()
            nursery.cancel_scope.deadline = trio.current_time() + 5
            with pytest.raises(QmpError, match="NBD server already has export named 'n'"):
                await whole.run("block-export-add", type="nbd", id="other", node_name="n")
            adding.go_on.set()
        assert adding.error is None
        assert [entry["id"] for entry in await whole.run("query-block-exports")] == ["e"]


async def test_end_of_the_daemon_ends_an_export_that_is_being_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was in the table when it had stopped, and its node in use."""
    adding = Adding(monkeypatch)
    async with whole_daemon(tmp_path) as whole:
        await prepare(whole)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(adding.run, whole)
            await adding.is_starting.wait()
            nursery.start_soon(whole.supervisor.close_floor, Floor.EXPORTS)
            await trio.testing.wait_all_tasks_blocked()
            adding.go_on.set()
        # Whichever comes first.
        assert deletions(whole) == (adding.error is None)
        assert await whole.run("query-block-exports") == []
        await whole.run("blockdev-del", node_name="n")
    assert not caplog.text


async def test_crashed_export_that_cannot_let_go_is_deleted_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """It stayed in the table, and could not be deleted: its actor was gone."""

    async def hang(_export: NbdExport) -> None:
        await trio.sleep_forever()

    async with whole_daemon(tmp_path) as whole:
        await prepare(whole)
        await add(whole)
        monkeypatch.setattr(NbdExport, "close", hang)
        actor = whole.actor("export")

        async def fail() -> None:
            raise RuntimeError("as arranged")

        actor.spawn(fail, name="test")
        await actor.stopped.wait()
        assert deletions(whole) == 1
        assert await whole.run("query-block-exports") == []
        await whole.run("blockdev-del", node_name="n")
