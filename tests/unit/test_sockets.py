"""Addresses become sockets: names, errors in the reference's words, and nothing of others removed."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import trio

from qsd.errors import QmpError
from qsd.host.sockets import Listener, accept_nowait, close_listeners, connect, listen, unix_name
from qsd.qapi.schema.sockets import (
    FdSocketAddress,
    InetSocketAddress,
    SocketAddress,
    SocketAddressLegacy,
    UnixSocketAddress,
    VsockSocketAddress,
)
from qsd.qapi.visit import from_json


def unix(path: Path | str, **more: bool) -> UnixSocketAddress:
    return UnixSocketAddress(path=str(path), **more)


def inet(host: str, port: int | str, **more: object) -> InetSocketAddress:
    return InetSocketAddress(host=host, port=str(port), **more)


async def listen_one(address: object, **more: bool) -> Listener:
    (listener,) = await listen(address, backlog=5, **more)
    return listener


async def refusal(address: object, **more: bool) -> str:
    with pytest.raises(QmpError) as caught:
        await listen(address, backlog=5, **more)
    return caught.value.desc


async def check_pair(listener: Listener, address: object) -> None:
    client = await connect(address)
    server = accept_nowait(listener.socket)
    assert server is not None
    with client, server:
        assert not client.getblocking()
        assert not server.getblocking()
        client.send(b"x")
        await trio.lowlevel.wait_readable(server)
        assert server.recv(9) == b"x"
    assert accept_nowait(listener.socket) is None


async def test_unix_path_connects_and_is_removed(tmp_path: Path) -> None:
    address = unix(tmp_path / "s")
    listener = await listen_one(address)
    await check_pair(listener, address)
    listener.close()
    listener.close()
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("form", ["flat", "legacy"])
async def test_both_forms_of_an_address_are_taken(tmp_path: Path, form: str) -> None:
    path = str(tmp_path / "s")
    if form == "flat":
        address = from_json(SocketAddress, {"type": "unix", "path": path})
    else:
        address = from_json(SocketAddressLegacy, {"type": "unix", "data": {"path": path}})
    listener = await listen_one(address)
    await check_pair(listener, address)
    listener.close()


@pytest.mark.parametrize("what", ["file", "socket", "dangling link"])
async def test_unix_path_that_exists_is_replaced(tmp_path: Path, what: str) -> None:
    path = tmp_path / "s"
    old = None
    if what == "file":
        path.write_text("x")
    elif what == "socket":
        old = await listen_one(unix(path))
    else:
        path.symlink_to(tmp_path / "nowhere")
    listener = await listen_one(unix(path))
    await check_pair(listener, unix(path))
    if old is not None:
        old.close()  # must not take the new one's path away
    assert path.is_socket()
    listener.close()


async def test_unix_path_taken_over_by_another_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = await listen_one(unix(path))
    path.unlink()
    path.write_text("mine")
    listener.close()
    assert path.read_text() == "mine"


async def test_relative_unix_path_is_removed_after_the_working_directory_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    listener = await listen_one(unix("s"))
    monkeypatch.chdir("/")
    listener.close()
    assert not (tmp_path / "s").exists()


async def test_empty_unix_path_makes_up_a_name() -> None:
    listener = await listen_one(unix(""))
    path = Path(listener.address.path)
    assert path.is_socket()
    assert path.name.startswith("qemu-socket-")
    listener.close()
    assert not path.exists()


@pytest.mark.parametrize("tight", [None, True, False])
async def test_abstract_name(tight: bool | None) -> None:
    address = unix(f"qsd-test-{os.getpid()}", abstract=True, tight=tight)
    listener = await listen_one(address)
    name = listener.socket.getsockname()
    assert len(name) == (108 if tight is False else 1 + len(address.path))
    await check_pair(listener, address)
    assert "Address already in use" in await refusal(address)
    listener.close()


def test_unix_name_too_long() -> None:
    assert unix_name(unix("/" + "x" * 106)) == "/" + "x" * 106
    long = "/" + "x" * 107
    with pytest.raises(QmpError) as caught:
        unix_name(unix(long))
    assert caught.value.desc == f"UNIX socket path '{long}' is too long"
    assert caught.value.hint == "Path must be less than 108 bytes"
    with pytest.raises(QmpError) as caught:
        unix_name(unix(long, abstract=True))
    assert caught.value.hint == "Path must be less than 107 bytes"


async def test_unix_errors(tmp_path: Path) -> None:
    missing = tmp_path / "no" / "s"
    assert await refusal(unix(missing)) == f"Failed to bind socket to {missing}: No such file or directory"
    assert await refusal(unix(tmp_path)) == f"Failed to unlink socket {tmp_path}: Is a directory"
    for path, why in ((missing, "No such file or directory"), (tmp_path, "Connection refused")):
        with pytest.raises(QmpError) as caught:
            await connect(unix(path))
        assert caught.value.desc == f"Failed to connect to '{path}': {why}"


async def test_unix_connect_waits_while_the_backlog_is_full(tmp_path: Path) -> None:
    address = unix(tmp_path / "s")
    (listener,) = await listen(address, backlog=0)
    first = await connect(address)
    done = trio.Event()

    async def second() -> None:
        (await connect(address)).close()
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(second)
        await trio.testing.wait_all_tasks_blocked(0.001)
        assert not done.is_set()
        for _ in range(2):
            await trio.lowlevel.wait_readable(listener.socket)
            accepted = accept_nowait(listener.socket)
            assert accepted is not None
            accepted.close()
    first.close()
    listener.close()


async def test_inet_port_zero_tells_its_port() -> None:
    listener = await listen_one(inet("127.0.0.1", 0))
    assert int(listener.address.port) == listener.socket.getsockname()[1] != 0
    await check_pair(listener, inet("127.0.0.1", listener.address.port))
    listener.close()


async def test_empty_host_is_both_families_on_one_port() -> None:
    listeners = await listen(inet("", 0), backlog=5)
    assert {item.socket.family for item in listeners} == {socket.AF_INET, socket.AF_INET6}
    assert len({item.address.port for item in listeners}) == 1
    for host in ("127.0.0.1", "::1"):
        client = await connect(inet(host, listeners[0].address.port))
        client.close()
    close_listeners(listeners)


@pytest.mark.parametrize(("more", "family"), [({"ipv4": True}, socket.AF_INET), ({"ipv6": True}, socket.AF_INET6)])
async def test_empty_host_of_one_family(more: dict[str, bool], family: int) -> None:
    listener = await listen_one(inet("", 0, **more))
    assert listener.socket.family == family
    if family == socket.AF_INET6:
        assert listener.socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1
    listener.close()


async def test_port_range_takes_the_first_free_port() -> None:
    first = await listen_one(inet("127.0.0.1", 0))
    port = int(first.address.port)
    assert await refusal(inet("127.0.0.1", port)) == "Failed to find an available port: Address already in use"
    second = await listen_one(inet("127.0.0.1", port, to=min(port + 50, 65535)))
    assert int(second.address.port) > port
    first.close()
    second.close()


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (inet("8.8.8.8", 0), "Failed to bind socket: Cannot assign requested address"),
        (inet("127.0.0.1", 0, ipv4=False, ipv6=False), "Cannot disable IPv4 and IPv6 at same time"),
        (
            inet("127.0.0.1", 0, ipv4=False),
            "address resolution failed for 127.0.0.1:0: Address family for hostname not supported",
        ),
        (
            inet("127.0.0.1", "abc"),
            "address resolution failed for 127.0.0.1:abc: Servname not supported for ai_socktype",
        ),
        (
            inet("127.0.0.1", "http", numeric=True),
            "address resolution failed for 127.0.0.1:http: Name or service not known",
        ),
        (inet("a" * 70, 1), f"address resolution failed for {'a' * 70}:1: Name or service not known"),
        (VsockSocketAddress(cid="x", port="1"), "Failed to parse cid 'x'"),
        (VsockSocketAddress(cid="1", port="-1"), "Failed to parse port '-1'"),
        (FdSocketAddress(str="3"), "only QEMU supports file descriptor passing"),
    ],
)
async def test_refused_addresses(address: object, text: str) -> None:
    assert await refusal(address) == text


async def test_connect_to_nobody_and_to_no_host() -> None:
    listener = await listen_one(inet("127.0.0.1", 0))
    port = listener.address.port
    listener.close()
    with pytest.raises(QmpError) as caught:
        await connect(inet("127.0.0.1", port))
    assert caught.value.desc == f"Failed to connect to '127.0.0.1:{port}': Connection refused"
    with pytest.raises(QmpError) as caught:
        await connect(inet("", 1))
    assert caught.value.desc == "address resolution failed for :1: Name or service not known"


async def test_keep_alive_is_set() -> None:
    listener = await listen_one(inet("127.0.0.1", 0, keep_alive=True, keep_alive_count=3, keep_alive_idle=5))
    assert listener.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert listener.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3
    assert listener.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 5
    listener.close()


async def test_passed_descriptor_listens_and_its_path_goes_with_it(tmp_path: Path) -> None:
    inherited = socket.socket(socket.AF_UNIX)
    inherited.bind(str(tmp_path / "s"))
    inherited.listen(1)
    listener = await listen_one(FdSocketAddress(str=str(inherited.detach())), may_pass_fds=True)
    await check_pair(listener, unix(tmp_path / "s"))
    listener.close()
    assert not (tmp_path / "s").exists()


async def test_passed_descriptor_connected() -> None:
    ours, theirs = socket.socketpair()
    sock = await connect(FdSocketAddress(str=str(theirs.detach())), may_pass_fds=True)
    with ours, sock:
        assert not sock.getblocking()
        sock.send(b"hello")
        assert ours.recv(9) == b"hello"


async def test_passed_descriptor_errors(tmp_path: Path) -> None:
    for text in ("-1", "+999", " 999", "0999"):
        wanted = f"File descriptor '{text}' is not a socket"
        assert await refusal(FdSocketAddress(str=text), may_pass_fds=True) == wanted
    for text in ("99999999999", "9" * 5000):
        wanted = f"Unable to parse FD number {text}: Numerical result out of range"
        assert await refusal(FdSocketAddress(str=text), may_pass_fds=True) == wanted
    for text in ("zz", "", "0x1", "1x", "-"):
        assert await refusal(FdSocketAddress(str=text), may_pass_fds=True) == f"Unable to parse FD number {text}"
    with (tmp_path / "f").open("w") as file:
        fd = file.fileno()
        assert await refusal(FdSocketAddress(str=str(fd)), may_pass_fds=True) == (
            f"File descriptor '{fd}' is not a socket"
        )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        text = await refusal(FdSocketAddress(str=str(theirs.fileno())), may_pass_fds=True)
        assert text == "Failed to listen on fd socket: Invalid argument"
        assert theirs.fileno() >= 0


async def test_range_of_ports_without_a_port() -> None:
    assert await refusal(inet("127.0.0.1", 4000, to=3999)) == "Failed to create a socket"


async def test_nobody_is_at_an_empty_path() -> None:
    with pytest.raises(QmpError, match="Failed to connect to '': Connection refused"):
        await connect(unix(""))


@pytest.mark.parametrize("more", [{"ipv4": False}, {"ipv6": True}])
async def test_ipv4_address_is_reached_over_ipv6(more: dict[str, bool]) -> None:
    listener = await listen_one(inet("127.0.0.1", 0))
    port = listener.socket.getsockname()[1]
    client = await connect(inet("127.0.0.1", port, **more))
    with client:
        assert client.family == socket.AF_INET6
    listener.close()
