"""How many clients, for how long, and what their export adds to their requests."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from whole_daemon import Whole, whole_daemon

from qsd.actors.node import Node
from qsd.messages import Flag, Op, Request
from qsd.servers.nbd import server
from qsd.servers.nbd.server import NbdService

CAN_MULTI_CONN = 1 << 8
GO = (
    struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 7, 7) + struct.pack(">I1sH", 1, b"n", 0)
)  # no information asked for
GO_REPLY = 20 + 14 + 20 + 12 + 20


class Client:
    """A client that reads what it expects, or finds that it was dropped."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream

    async def read(self, count: int) -> bytes:
        """That many bytes; fewer when the server hangs up."""
        data = b""
        with trio.fail_after(10):
            while len(data) < count:
                try:
                    part = await self.stream.receive_some(count - len(data))
                except trio.BrokenResourceError:
                    part = b""
                if not part:
                    break
                data += part
        return data

    async def go(self) -> int:
        """Negotiate; the transmission flags."""
        assert len(await self.read(18)) == 18
        await self.stream.send_all(GO)
        reply = await self.read(GO_REPLY)
        assert len(reply) == GO_REPLY, "refused"
        return int.from_bytes(reply[64:66], "big")

    async def request(self, kind: int, offset: int, length: int, payload: bytes = b"", *, flags: int = 0) -> int:
        """The errno a request ends with."""
        head = struct.pack(">IHHQQI", 0x25609513, flags, kind, 1, offset, length)
        await self.stream.send_all(head + payload)
        return int.from_bytes((await self.read(16))[4:8], "big")


@asynccontextmanager
async def served(place: Path, *, export: dict[str, object] | None = None, **limits: int) -> AsyncIterator[Whole]:
    async with whole_daemon(place) as whole:
        await whole.run("blockdev-add", driver="null-co", node_name="n", size=1 << 20)
        address = {"type": "unix", "data": {"path": str(place / "nbd")}}
        await whole.run("nbd-server-start", addr=address, **limits)
        await whole.run("block-export-add", type="nbd", id="e", node_name="n", writable=True, **(export or {}))
        try:
            yield whole
        finally:
            for client in clients:
                await client.stream.aclose()
            clients.clear()


clients: list[Client] = []


async def connect(place: Path) -> Client:
    """A new client; it is closed with the server."""
    clients.append(Client(await trio.open_unix_socket(place / "nbd")))
    return clients[-1]


def service_of(whole: Whole) -> NbdService:
    service = whole.actor("nbd server")
    assert isinstance(service, NbdService)
    return service


@pytest.mark.parametrize("step", ["__init__", "start"])
async def test_client_that_cannot_be_served_does_not_keep_the_export(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For want of memory, or of places in epoll. The export could not be deleted any more."""

    def fail(*_args: object, **_more: object) -> None:
        raise MemoryError

    async with served(tmp_path) as whole:
        with monkeypatch.context() as patch:
            patch.setattr(server.Transmission, step, fail)
            client = await connect(tmp_path)
            await client.go()
            assert not await client.read(1)
        await whole.run("block-export-del", id="e", mode="hard")
        with trio.fail_after(5):
            while await whole.run("query-block-exports"):
                await trio.lowlevel.checkpoint()
        assert any(event["event"] == "BLOCK_EXPORT_DELETED" for event in whole.events)


async def test_export_of_a_node_that_fails_half_way_can_be_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It waited for requests that nobody had any more, and so did ``nbd-server-stop``."""

    def fail(_batch: list[Request]) -> None:
        raise RuntimeError("half way")

    async with served(tmp_path) as whole:
        node = whole.actor("node")
        assert isinstance(node, Node)
        client = await connect(tmp_path)
        await client.go()
        node.driver.submit = fail  # type: ignore[method-assign]
        await client.stream.send_all(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 512))
        assert not await client.read(1), "the connection ends"
        await whole.run("nbd-server-stop")
        assert any(event["event"] == "BLOCK_EXPORT_DELETED" for event in whole.events)
        await whole.run("blockdev-del", node_name="n")
    assert "n: requests failed: RuntimeError('half way')" in caplog.text


async def test_slow_negotiation_is_ended(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async with served(tmp_path, handshake_max_seconds=1) as whole:
        service_of(whole).handshake_seconds = 0.05  # type: ignore[assignment]  # the test need not take a second
        quick = await connect(tmp_path)
        assert await quick.go()
        slow = await connect(tmp_path)
        assert len(await slow.read(19)) == 18
        # One who has chosen an export may be silent.
        assert await quick.request(3, 0, 0) == 0
    assert "handshake timed out" in capfd.readouterr().err


async def test_one_connection_means_one(tmp_path: Path) -> None:
    """The next waits until the first has left, however long that takes; nobody is told of several connections."""
    async with served(tmp_path, max_connections=1):
        first = await connect(tmp_path)
        assert not await first.go() & CAN_MULTI_CONN
        second = await connect(tmp_path)
        flags: list[int] = []

        async def go() -> None:
            flags.append(await second.go())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(go)
            for _ in range(20):
                assert await first.request(3, 0, 0) == 0
            assert not flags
            await first.stream.aclose()
        assert not flags[0] & CAN_MULTI_CONN


async def test_several_connections_are_said_to_be_possible(tmp_path: Path) -> None:
    async with served(tmp_path, max_connections=2):
        for _ in range(2):
            assert await (await connect(tmp_path)).go() & CAN_MULTI_CONN


async def test_half_open_connection_makes_room_for_one_that_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "PATIENCE_S", 0.05)
    async with served(tmp_path, max_connections=2):
        settled = await connect(tmp_path)
        await settled.go()
        lurker = await connect(tmp_path)
        assert len(await lurker.read(18)) == 18
        good = await connect(tmp_path)
        await good.go()
        assert await lurker.read(1) == b""
        assert await settled.request(3, 0, 0) == 0
    assert "given up for a client that waits" in capfd.readouterr().err


@pytest.mark.parametrize("writethrough", [True, False])
async def test_writethrough_makes_every_write_durable(tmp_path: Path, writethrough: bool) -> None:
    async with served(tmp_path, export={"writethrough": writethrough}) as whole:
        driver = whole.daemon.services.graph.find("n").driver
        seen: list[tuple[int, bool]] = []
        submit = driver.submit

        def watch(batch: list[Request]) -> None:
            seen.extend((request.op, bool(request.flags & Flag.FUA)) for request in batch)
            submit(batch)

        driver.submit = watch  # type: ignore[method-assign]
        client = await connect(tmp_path)
        await client.go()
        assert await client.request(1, 0, 512, bytes(512)) == 0
        assert await client.request(6, 0, 512) == 0
        assert await client.request(1, 0, 512, bytes(512), flags=1) == 0
    assert [pair for pair in seen if pair[0] != Op.FLUSH] == [
        (Op.WRITE, writethrough),
        (Op.WRITE_ZEROES, writethrough),
        (Op.WRITE, True),
    ]
