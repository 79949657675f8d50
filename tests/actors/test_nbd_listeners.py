"""Where the NBD server listens: one address or several, until it stops, and again."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from whole_daemon import Whole, whole_daemon

from qsd.servers.nbd.server import NbdService


def ports(whole: Whole) -> list[tuple[socket.AddressFamily, int]]:
    service = whole.actor("nbd server")
    assert isinstance(service, NbdService)
    return [(one.socket.family, one.socket.getsockname()[1]) for one in service._listeners]


async def is_served(family: socket.AddressFamily, port: int) -> bool:
    """Whether somebody there says NBDMAGIC."""
    with trio.socket.socket(family) as client:
        try:
            await client.connect(("::1" if family == socket.AF_INET6 else "127.0.0.1", port))
        except ConnectionRefusedError:
            return False
        with trio.fail_after(10):
            return await client.recv(8) == b"NBDMAGIC"


@pytest.mark.parametrize("host", ["", "localhost", "127.0.0.1", "::1"])
async def test_every_address_of_a_host_is_served_until_the_stop(host: str, tmp_path: Path) -> None:
    async with whole_daemon(tmp_path) as whole:
        for _ in range(2):
            await whole.run("nbd-server-start", addr={"type": "inet", "data": {"host": host, "port": "0"}})
            listening = ports(whole)
            assert listening
            for family, port in listening:
                assert await is_served(family, port)
                assert await is_served(family, port)
            await whole.run("nbd-server-stop")
            for family, port in listening:
                assert not await is_served(family, port)
        assert whole.supervisor.fatal is None


async def test_client_whose_network_failed_before_it_was_let_in_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accept(2) tells of what has happened to that client; it was taken for the listener's end."""
    errors = [errno.ECONNABORTED, errno.EPROTO, errno.EHOSTUNREACH, errno.EPERM]
    kind: Any = trio._socket._SocketType  # type: ignore[attr-defined]  # what all of trio's sockets are
    real = kind.accept

    async def accept(listener: Any) -> Any:
        if errors:
            raise OSError(errors.pop(), "of the client")
        return await real(listener)

    monkeypatch.setattr(kind, "accept", accept)
    async with whole_daemon(tmp_path) as whole:
        await whole.run("nbd-server-start", addr={"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}})
        ((family, port),) = ports(whole)
        assert await is_served(family, port)
        assert whole.supervisor.fatal is None
    assert not errors


async def test_descriptor_of_a_client_that_was_given_up_serves_the_next_at_once(tmp_path: Path) -> None:
    """Whoever got its number waited for it along with the negotiation that had not ended yet."""
    async with whole_daemon(tmp_path) as whole:
        await whole.run("nbd-server-start", addr={"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}})
        ((family, port),) = ports(whole)
        service = whole.actor("nbd server")
        assert isinstance(service, NbdService)
        with trio.socket.socket(family) as client:
            await client.connect(("127.0.0.1", port))
            assert await client.recv(8) == b"NBDMAGIC"
            await trio.testing.wait_all_tasks_blocked()
            (connection,) = service._connections
            number = connection._sock.fileno()
            connection.disconnect("given up")
            pair = socket.socketpair()
            assert number in [end.fileno() for end in pair]
            for end, other in (pair, pair[::-1]):
                other.send(b"x")
                await trio.lowlevel.wait_readable(end)
            for end in pair:
                end.close()
        await trio.testing.wait_all_tasks_blocked()
        assert not service._connections
        assert whole.supervisor.fatal is None


@pytest.mark.parametrize("turns", range(12))
async def test_client_that_is_just_let_in_when_the_server_stops_stops_nobody(
    turns: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its socket was closed before it began to negotiate, and the error ended the server, and the daemon."""
    async with whole_daemon(tmp_path) as whole:
        service = whole.actor("nbd server")
        assert isinstance(service, NbdService)
        for _ in range(10):
            await whole.run("nbd-server-start", addr={"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}})
            ((_family, port),) = ports(whole)
            with socket.create_connection(("127.0.0.1", port)):
                for _ in range(turns):
                    await trio.lowlevel.checkpoint()
                await whole.run("nbd-server-stop")
            await trio.testing.wait_all_tasks_blocked()
            assert not service._connections
        assert whole.supervisor.fatal is None
    assert not caplog.text
