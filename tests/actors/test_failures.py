"""What the crash of each kind of actor means for the daemon: the failure table, on the whole daemon."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing
from whole_daemon import Whole, whole_daemon

from qsd.errors import ActorStopped, QmpError


@pytest.fixture
async def whole(tmp_path: Path) -> AsyncIterator[Whole]:
    async with whole_daemon(tmp_path) as made:
        await made.run("blockdev-add", driver="null-co", node_name="disk", size=1 << 20)
        address = {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}
        await made.run("nbd-server-start", addr=address)
        await made.run("block-export-add", type="nbd", id="e", node_name="disk", name="x", writable=True)
        address = {"type": "unix", "data": {"path": str(tmp_path / "qmp")}}
        await made.run("chardev-add", id="c", backend={"type": "socket", "data": {"addr": address}})
        yield made


async def join(whole: Whole) -> trio.SocketStream:
    """Connect to the NBD export and choose it."""
    stream = await trio.open_unix_socket(whole.place / "nbd")
    greeting = b""
    while len(greeting) < 18:
        greeting += await stream.receive_some()
    await stream.send_all(b"\0\0\0\3" + b"IHAVEOPT" + (1).to_bytes(4, "big") + (1).to_bytes(4, "big") + b"x")
    reply = b""
    while len(reply) < 10:
        reply += await stream.receive_some()
    return stream


async def gone(stream: trio.SocketStream) -> bool:
    """Whether the other end has closed the connection."""
    with trio.fail_after(10):
        try:
            return await stream.receive_some() == b""
        except trio.BrokenResourceError:
            return True


async def test_crashed_connection_is_closed_and_nobody_else_hurt(
    whole: Whole, caplog: pytest.LogCaptureFixture
) -> None:
    async with await join(whole) as stream:
        await whole.crash("connection")
        assert await gone(stream)
    async with await join(whole):
        assert whole.actor("connection").name == "nbd client 2"
    assert [entry["id"] for entry in await whole.run("query-block-exports")] == ["e"]
    assert whole.events == []
    assert "nbd client 1 crashed" in caplog.text


async def test_crashed_export_is_deleted_with_its_event(whole: Whole, caplog: pytest.LogCaptureFixture) -> None:
    async with await join(whole) as stream:
        await whole.crash("export")
        assert await gone(stream)
    assert [(event["event"], event["data"]) for event in whole.events] == [("BLOCK_EXPORT_DELETED", {"id": "e"})]
    assert await whole.run("query-block-exports") == []
    await whole.run("blockdev-del", node_name="disk")  # nobody uses it any more
    assert "export e crashed" in caplog.text


async def test_crashed_node_refuses_requests_and_the_daemon_goes_on(
    whole: Whole, caplog: pytest.LogCaptureFixture
) -> None:
    await whole.crash("node")
    async with await join(whole) as stream:
        # NBD_CMD_READ of 512 bytes at 0: a simple reply with EIO.
        await stream.send_all(bytes.fromhex("25609513 0000 0000 0000000000000001 0000000000000000 00000200"))
        reply = b""
        while len(reply) < 16:
            reply += await stream.receive_some()
        assert reply == bytes.fromhex("67446698 00000005 0000000000000001")
    await whole.run("block-export-del", id="e", mode="hard")
    await trio.testing.wait_all_tasks_blocked()
    await whole.run("blockdev-del", node_name="disk")
    assert "disk crashed" in caplog.text


async def test_crashed_chardev_is_gone_and_its_name_free(whole: Whole, caplog: pytest.LogCaptureFixture) -> None:
    await whole.crash("chardev")
    assert await whole.run("query-chardev") == []
    assert not (whole.place / "qmp").exists()
    await whole.run("chardev-add", id="c", backend={"type": "null", "data": {}})
    assert not whole.supervisor.stop_requested.is_set()
    assert "chardev c crashed" in caplog.text


@pytest.mark.parametrize("kind", ["graph", "data plane", "nbd server", "events", "command gate"])
async def test_crash_of_what_everything_stands_on_stops_the_daemon(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with whole_daemon(tmp_path) as whole:
        await whole.run("blockdev-add", driver="null-co", node_name="disk")
        await whole.crash(kind)
        assert whole.supervisor.stop_requested.is_set()
    assert isinstance(whole.supervisor.fatal, TypeError)
    assert "crashed" in caplog.text


async def test_command_to_a_crashed_actor_is_an_error_and_no_hang(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with whole_daemon(tmp_path) as whole:
        await whole.crash("graph")
        with trio.fail_after(10), pytest.raises((ActorStopped, QmpError)):
            await whole.run("blockdev-add", driver="null-co", node_name="disk")
    assert "graph crashed" in caplog.text
