"""QEMU's own QMP client library, ``qemu.qmp``, talks to the daemon: asynchronous, legacy, and as the listener."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from harness import RunningDaemon

qmp = pytest.importorskip("qemu.qmp")

Start = Callable[..., RunningDaemon]
SECONDS = 30


def talk(path: Path, conversation: Callable[[Any], Awaitable[None]]) -> None:
    """Connect, hold the conversation, leave."""

    async def run() -> None:
        client = qmp.QMPClient("test")
        async with asyncio.timeout(SECONDS):
            await client.connect(str(path))
            try:
                await conversation(client)
            finally:
                await client.disconnect()

    asyncio.run(run())


def test_commands_and_errors(daemon: Start, tmp_path: Path) -> None:
    daemon()

    async def conversation(client: Any) -> None:
        version = await client.execute("query-version")
        assert version["qemu"]["major"] == 11
        with pytest.raises(qmp.ExecuteError, match="The command nope has not been found") as caught:
            await client.execute("nope")
        assert caught.value.received["error"]["class"] == "CommandNotFound"
        schema = await client.execute("query-qmp-schema")
        assert any(entry["name"] == "blockdev-add" for entry in schema)

    talk(tmp_path / "qmp.sock", conversation)
    talk(tmp_path / "qmp.sock", conversation)  # the next client starts afresh


def test_many_commands_at_once(daemon: Start, tmp_path: Path) -> None:
    daemon()

    async def conversation(client: Any) -> None:
        names = [f"io{number}" for number in range(50)]
        await asyncio.gather(
            *(client.execute("object-add", {"qom-type": "iothread", "id": name}) for name in names)
        )
        listed = await client.execute("qom-list", {"path": "/objects"})
        assert {entry["name"] for entry in listed} >= set(names)

    talk(tmp_path / "qmp.sock", conversation)


def test_events(daemon: Start, tmp_path: Path) -> None:
    daemon(
        *("--blockdev", "null-co,node-name=n", "--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
        *("--export", "nbd,id=e,node-name=n"),
    )

    async def conversation(client: Any) -> None:
        with client.listener("BLOCK_EXPORT_DELETED") as listener:
            await client.execute("block-export-del", {"id": "e"})
            event = await listener.get()
        assert event["data"] == {"id": "e"}
        assert event["timestamp"]["seconds"] > 0

    talk(tmp_path / "qmp.sock", conversation)


def test_out_of_band_is_refused_by_every_command(daemon: Start, tmp_path: Path) -> None:
    daemon()

    async def conversation(client: Any) -> None:
        with pytest.raises(qmp.ExecuteError, match="The command query-version does not support OOB"):
            await client.execute("query-version", oob=True)

    talk(tmp_path / "qmp.sock", conversation)


def test_quit_ends_the_connection(daemon: Start, tmp_path: Path) -> None:
    running = daemon()

    async def run() -> None:
        client = qmp.QMPClient("test")
        async with asyncio.timeout(SECONDS):
            await client.connect(str(tmp_path / "qmp.sock"))
            await client.execute("quit")
            with contextlib.suppress(EOFError):  # or not, when it has not noticed yet
                await client.disconnect()

    asyncio.run(run())
    assert running.wait() == 0


def test_daemon_connects_to_a_listening_client(daemon: Start, tmp_path: Path) -> None:
    # As QEMU's own tests do it: the monitor's socket is a client.
    path = tmp_path / "listen.sock"

    async def run() -> None:
        client = qmp.QMPClient("test")
        async with asyncio.timeout(SECONDS):
            await client.start_server(str(path))
            daemon(
                *("--chardev", "socket,id=c,path=listen.sock", "--monitor", "c"),
                monitor=False,
                wait=False,
            )
            await client.accept()
            assert await client.execute("query-chardev") == [
                {"label": "c", "filename": f"unix:{path}", "frontend-open": True}
            ]
            await client.disconnect()

    asyncio.run(run())
    path.unlink()  # the library leaves it


def test_legacy_interface(daemon: Start, tmp_path: Path) -> None:
    from qemu.qmp.legacy import QEMUMonitorProtocol

    daemon()
    monitor = QEMUMonitorProtocol(str(tmp_path / "qmp.sock"))
    monitor.connect()
    assert monitor.cmd("query-version")["qemu"]["major"] == 11
    assert monitor.cmd_raw("nope")["error"]["class"] == "CommandNotFound"
    monitor.close()
