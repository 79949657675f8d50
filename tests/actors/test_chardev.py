"""Every character device carries a monitor, says where its bytes go, and leaves nothing behind."""

from __future__ import annotations

import fcntl
import os
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from qmp_house import Client, House, close_clients, open_house
from trio.testing import wait_all_tasks_blocked
from websocket_client import UPGRADE, frame

from qsd.errors import QmpError
from qsd.qapi.schema.control import MonitorOptions
from qsd.servers.chardev.base import Origin
from qsd.servers.chardev.table import Chardevs
from qsd.wire.websocket import binary_header


@pytest.fixture(autouse=True)
def no_client_stays() -> Iterator[None]:
    yield
    close_clients()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(tmp_path) as made:
        yield made


@pytest.fixture(autouse=True)
def no_descriptor_stays() -> Iterator[None]:
    """What a test opened in its daemon is closed when the house is."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    close_clients()
    left = set(os.listdir("/proc/self/fd")) - before
    names = [os.readlink(f"/proc/self/fd/{number}") for number in left if os.path.exists(f"/proc/self/fd/{number}")]
    assert not names, f"left open: {names}"


def unix(path: Path | str, **more: Any) -> dict[str, Any]:
    return {"type": "unix", "data": {"path": str(path), **more}}


def inet(host: str, port: int | str = 0, **more: Any) -> dict[str, Any]:
    return {"type": "inet", "data": {"host": host, "port": str(port), **more}}


async def name_of(house: House, label: str) -> str:
    (found,) = [info for info in await house.chardevs.query() if info.label == label]
    return found.filename


async def wait_name(house: House, label: str, name: str) -> None:
    """Wait until the chardev is called that: it hears of its peer's end in its own time."""
    with trio.fail_after(10):
        while await name_of(house, label) != name:
            await trio.sleep(0.001)


async def monitor_on(house: House, label: str) -> None:
    await house.monitors.add(MonitorOptions(chardev=label))


async def refusal(house: House, kind: str, **data: Any) -> str:
    with pytest.raises(QmpError) as caught:
        await house.chardev("c", kind, **data)
    assert await house.chardevs.query() == []
    return caught.value.desc


class Files:
    """A QMP client on plain descriptors, one to read from and one to write to."""

    def __init__(self, reading: int, writing: int) -> None:
        self.reading, self.writing = reading, writing
        self._held = b""

    async def line(self) -> bytes:
        with trio.fail_after(10):
            while b"\n" not in self._held:
                await trio.lowlevel.wait_readable(self.reading)
                self._held += os.read(self.reading, 4096)
        line, _, self._held = self._held.partition(b"\n")
        return line + b"\n"

    async def check(self) -> None:
        """A whole conversation."""
        assert (await self.line()).startswith(b'{"QMP": ')
        os.write(self.writing, b'{"execute": "qmp_capabilities"}')
        assert await self.line() == b'{"return": {}}\r\n'
        os.write(self.writing, b'{"execute": "query-version", "id": 1}')
        assert b'"id": 1' in await self.line()

    def close(self) -> None:
        for number in {self.reading, self.writing}:
            os.close(number)


# -- socket: servers --------------------------------------------------------------------------------------------


async def check_client(client: Client) -> None:
    """A whole conversation."""
    await client.negotiate()
    assert "qemu" in (await client.ask("query-version"))["return"]


async def test_unix_server(house: House) -> None:
    path = await house.socket_chardev("c")
    await monitor_on(house, "c")
    assert await name_of(house, "c") == f"disconnected:unix:{path},server=on"
    client = house.connect(path)
    await check_client(client)
    assert await name_of(house, "c") == f"unix:{path},server=on"


@pytest.mark.parametrize(
    ("tight", "size", "text"), [(None, 15, ",tight=on"), (True, 15, ",tight=on"), (False, 108, "")]
)
async def test_abstract_server(house: House, tight: bool | None, size: int, text: str) -> None:
    name = f"qsd-test-{os.getpid() % 100000:05}"
    more = {} if tight is None else {"tight": tight}
    await house.chardev("c", "socket", addr=unix(name, abstract=True, **more))
    await monitor_on(house, "c")
    assert await name_of(house, "c") == f"disconnected:unix:{name},abstract=on{text},server=on"
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(b"\0" + name.encode().ljust(size - 1, b"\0"))
    await check_client(house.client(sock))
    assert await name_of(house, "c") == f"unix:{name},abstract=on{text},server=on"


async def test_abstract_client(house: House) -> None:
    name = f"qsd-test-{os.getpid() % 100000:05}"
    await house.chardev("s", "socket", addr=unix(name, abstract=True))
    await house.chardev("c", "socket", addr=unix(name, abstract=True), server=False)
    with pytest.raises(QmpError, match="Address already in use"):
        await house.chardev("again", "socket", addr=unix(name, abstract=True))


def port_of(name: str) -> int:
    match = re.search(r":([0-9]+),server=on", name)
    assert match is not None
    return int(match[1])


@pytest.mark.parametrize(
    ("host", "more", "family", "shown"),
    [
        ("127.0.0.1", {}, socket.AF_INET, "127.0.0.1"),
        ("::1", {}, socket.AF_INET6, "[::1]"),
        ("localhost", {"ipv4": True}, socket.AF_INET, "127.0.0.1"),
        ("localhost", {"ipv6": False}, socket.AF_INET, "127.0.0.1"),
        ("", {"ipv4": True}, socket.AF_INET, "127.0.0.1"),
    ],
)
async def test_inet_server(
    house: House, host: str, more: dict[str, bool], family: socket.AddressFamily, shown: str
) -> None:
    await house.chardev("c", "socket", addr=inet(host, **more), nodelay=True)
    await monitor_on(house, "c")
    idle = await name_of(house, "c")
    assert idle.startswith("disconnected:tcp:")
    port = port_of(idle)
    sock = socket.socket(family)
    sock.connect(("::1" if family == socket.AF_INET6 else "127.0.0.1", port))
    await check_client(house.client(sock))
    mine = sock.getsockname()[1]
    assert await name_of(house, "c") == f"tcp:{shown}:{port},server=on <-> {shown}:{mine}"


async def test_inet_server_takes_the_first_free_port_of_a_range(house: House) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert await refusal(house, "socket", addr=inet("127.0.0.1", port)) == (
            "Failed to add chardev 'c': Failed to find an available port: Address already in use"
        )
        last = min(port + 50, 65535)
        await house.chardev("c", "socket", addr=inet("127.0.0.1", port, to=last))
        assert port < port_of(await name_of(house, "c")) <= last


async def test_passed_listening_descriptor_is_served(house: House) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(house.path("passed")))
    listener.listen()
    address = {"type": "fd", "data": {"str": str(listener.detach())}}
    await house.chardev("c", "socket", addr=address, origin=Origin.COMMAND_LINE)
    await monitor_on(house, "c")
    await check_client(house.connect(house.path("passed")))


async def test_passed_connected_descriptor_is_served_once(house: House) -> None:
    ours, theirs = socket.socketpair()
    address = {"type": "fd", "data": {"str": str(theirs.detach())}}
    await house.chardev("c", "socket", addr=address, server=False, origin=Origin.COMMAND_LINE)
    await monitor_on(house, "c")
    client = house.client(ours)
    await check_client(client)
    assert await name_of(house, "c") == "unix:"
    client.close()
    await wait_all_tasks_blocked()
    assert (await name_of(house, "c")).startswith("disconnected:fd:")


async def test_peer_nobody_uses_makes_room_for_the_next_when_it_goes(house: House) -> None:
    path = await house.socket_chardev("c")
    first = house.connect(path)
    await wait_all_tasks_blocked()
    assert not (await name_of(house, "c")).startswith("disconnected")
    first.close()
    second = house.connect(path)
    await wait_all_tasks_blocked()
    await monitor_on(house, "c")
    await check_client(second)


async def test_server_that_waits_says_so_and_returns_with_its_first_client(house: House) -> None:
    path = house.path("c")
    said: list[str] = []
    done = trio.Event()

    async def add() -> None:
        await add_socket(house.chardevs, path, said.append, wait=True)
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(add)
        await wait_all_tasks_blocked()
        assert said == [f"QEMU waiting for connection on: disconnected:unix:{path},server=on"]
        assert not done.is_set()
        client = house.connect(path)
        with trio.fail_after(10):
            await done.wait()
    await monitor_on(house, "c")
    await check_client(client)


async def test_wait_for_a_client_can_be_given_up(house: House) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(add_socket, house.chardevs, house.path("c"), lambda _text: None)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert await house.chardevs.query() == []
    assert not house.path("c").exists()
    await house.socket_chardev("c")  # the name is free again


async def add_socket(chardevs: Chardevs, path: Path, inform: Callable[[str], None], *, wait: bool = True) -> None:
    from qsd.qapi.schema.chardev import ChardevBackend
    from qsd.qapi.visit import from_json

    backend = from_json(ChardevBackend, {"type": "socket", "data": {"addr": unix(path), "wait": wait}})
    await chardevs.add("c", backend, inform=inform)


# -- socket: clients --------------------------------------------------------------------------------------------


@asynccontextmanager
async def listening(path: Path) -> AsyncIterator[trio.socket.SocketType]:
    with trio.socket.socket(socket.AF_UNIX) as listener:
        await listener.bind(str(path))
        listener.listen()
        yield listener
    path.unlink()


async def accepted(house: House, listener: trio.socket.SocketType) -> Client:
    with trio.fail_after(10):
        peer, _ = await listener.accept()
    return house.client(socket.socket(fileno=peer.detach()))


async def test_client_connects_once(house: House) -> None:
    path = house.path("theirs")
    async with listening(path) as listener:
        await house.chardev("c", "socket", addr=unix(path), server=False)
        await monitor_on(house, "c")
        await check_client(await accepted(house, listener))
        assert await name_of(house, "c") == f"unix:{path}"


async def test_client_without_its_server_is_refused(house: House) -> None:
    wanted = f"Failed to add chardev 'c': Failed to connect to '{house.path('x')}': No such file or directory"
    assert await refusal(house, "socket", addr=unix(house.path("x")), server=False) == wanted
    assert await refusal(house, "socket", addr=unix(""), server=False) == (
        "Failed to add chardev 'c': Failed to connect to '': Connection refused"
    )


async def test_client_comes_back_to_its_server(house: House, caplog: pytest.LogCaptureFixture) -> None:
    path = house.path("theirs")
    await house.chardev("c", "socket", addr=unix(path), server=False, reconnect_ms=1)
    await monitor_on(house, "c")
    with trio.fail_after(10):
        while "Unable to connect character device c" not in caplog.text:
            await trio.sleep(0.001)
    async with listening(path) as listener:
        for _ in range(3):
            client = await accepted(house, listener)
            await check_client(client)
            client.close()
    assert caplog.text.count("Unable to connect") <= 2  # told once per absence
    await wait_name(house, "c", f"disconnected:unix:{path}")


# -- socket: what is spoken on it -------------------------------------------------------------------------------


async def test_telnet(house: House) -> None:
    await house.chardev("c", "socket", addr=unix(house.path("c")), telnet=True)
    await monitor_on(house, "c")
    client = house.connect(house.path("c"))
    greeting = await client.line()
    assert greeting.startswith(bytes.fromhex("fffb01fffb03fffb00fffd00") + b'{"QMP"')
    await client.send(b"\xff\xfd\x01" + b'{"execute": "qmp_\xff\xfe\x22capabilities"}')
    assert await client.message() == {"return": {}}


async def test_tn3270(house: House) -> None:
    await house.chardev("c", "socket", addr=unix(house.path("c")), tn3270=True)
    await monitor_on(house, "c")
    greeting = await house.connect(house.path("c")).line()
    assert greeting.startswith(bytes.fromhex("fffd19fffb19fffd00fffb00fffd18fffa1801fff0") + b'{"QMP"')


async def test_websocket(house: House) -> None:
    await house.chardev("c", "socket", addr=inet("127.0.0.1"), websocket=True)
    await monitor_on(house, "c")
    name = await name_of(house, "c")
    assert name.startswith("disconnected:websocket:127.0.0.1:")
    sock = socket.socket()
    sock.connect(("127.0.0.1", port_of(name)))
    client = house.client(sock)
    # Request and first command in one packet.
    await client.send(UPGRADE + frame(2, b'{"execute": "qmp_capa', final=False))
    await client.send(frame(9, b"ping") + frame(0, b'bilities"}'))
    assert await client.line() == b"HTTP/1.1 101 Switching Protocols\r\n"
    while await client.line() != b"\r\n":
        pass
    greeting = await client.line()
    assert greeting[:2] == bytes([0x82, len(greeting) - 2])
    assert greeting[2:].startswith(b'{"QMP"')
    answer = b'{"return": {}}\r\n'
    assert await client.line() == b"\x8a\x04ping" + binary_header(len(answer)) + answer
    await client.send(frame(8, b"\x03\xe8"))
    assert await client.line() == b"\x88\x16\x03\xe8peer requested close"
    assert await client.message() is None


async def test_websocket_large_answers_to_a_slow_reader_come_whole(house: House) -> None:
    await house.chardev("c", "socket", addr=unix(house.path("c")), websocket=True)

    async def big(_session: Any, arguments: dict[str, Any]) -> Any:
        return {"text": "x" * 3_000_000, "number": arguments["n"]}

    house.commands["query-version"] = big
    await monitor_on(house, "c")
    client = house.connect(house.path("c"))
    await client.send(UPGRADE + frame(2, b'{"execute": "qmp_capabilities"}'))
    for number in range(2):
        command = b'{"execute": "query-version", "arguments": {"n": %d}}' % number
        await client.send(frame(2, command) + frame(9, b"?"))
    await wait_all_tasks_blocked()
    data = b""
    with trio.fail_after(10):
        while b'"number": 1}}\r\n' not in data[-100:]:
            data += await client.socket.recv(1 << 20)
    payload = unframed(data.partition(b"\r\n\r\n")[2])
    assert [len(line) for line in payload.split(b"\r\n")[2:4]] == [3_000_037] * 2


def unframed(data: bytes) -> bytes:
    """The payload of the server's binary frames; fails on anything but whole frames."""
    out = b""
    while data:
        op, size = data[0], data[1]
        at = {126: 4, 127: 10}.get(size, 2)
        length = int.from_bytes(data[2:at], "big") if at > 2 else size
        piece, data = data[at : at + length], data[at + length :]
        assert len(piece) == length
        if op == 0x82:
            out += piece
        else:
            assert op == 0x8A
    return out


@pytest.mark.parametrize(
    ("data", "answer"),
    [(b"GET / HTTP/1.0\r\n\r\n", b"HTTP/1.1 400 Bad Request\r\n"), (b"x" * 5000, b"HTTP/1.1 403 ")],
)
async def test_websocket_client_that_is_none_makes_room(house: House, data: bytes, answer: bytes) -> None:
    await house.chardev("c", "socket", addr=unix(house.path("c")), websocket=True)
    await monitor_on(house, "c")
    client = house.connect(house.path("c"))
    await client.send(data)
    assert (await client.line()).startswith(answer)
    second = house.connect(house.path("c"))
    await second.send(UPGRADE)
    assert await second.line() == b"HTTP/1.1 101 Switching Protocols\r\n"


# -- files ------------------------------------------------------------------------------------------------------


async def test_pipe_pair_stays_open_when_its_clients_come_and_go(house: House) -> None:
    for end in ("in", "out"):
        os.mkfifo(house.path(f"p.{end}"))
    await house.chardev("c", "pipe", device=str(house.path("p")))
    await monitor_on(house, "c")
    reading = os.open(house.path("p.out"), os.O_RDONLY | os.O_NONBLOCK)
    writing = os.open(house.path("p.in"), os.O_WRONLY)
    client = Files(reading, writing)
    await client.check()
    assert await name_of(house, "c") == "pipe"
    os.close(writing)
    client.writing = os.open(house.path("p.in"), os.O_WRONLY)
    os.write(client.writing, b'{"execute": "query-version", "id": 2}')
    assert b'"id": 2' in await client.line()
    client.close()


async def test_file_with_input_from_a_fifo(house: House) -> None:
    os.mkfifo(house.path("in"))
    await house.chardev("c", "file", out=str(house.path("out")), in_=str(house.path("in")))
    await monitor_on(house, "c")
    with open(house.path("in"), "wb", buffering=0) as writing:
        writing.write(b'{"execute": "qmp_capabilities"}')
        with trio.fail_after(10):
            while b"return" not in house.path("out").read_bytes():
                await trio.sleep(0.001)
    assert await name_of(house, "c") == "file"


@pytest.mark.parametrize(("append", "begins"), [(True, b'old{"QMP"'), (False, b'{"QMP"')])
async def test_file_is_appended_to_or_emptied(house: House, append: bool, begins: bytes) -> None:
    house.path("out").write_bytes(b"old")
    await house.chardev("c", "file", out=str(house.path("out")), append=append)
    await monitor_on(house, "c")
    await wait_all_tasks_blocked()
    assert house.path("out").read_bytes().startswith(begins)


async def test_output_nobody_takes_does_not_end_the_input(house: House) -> None:
    for end in ("in", "out"):
        os.mkfifo(house.path(end))
    with open(os.open(house.path("out"), os.O_RDONLY | os.O_NONBLOCK), "rb"):
        await house.chardev("c", "file", out=str(house.path("out")), in_=str(house.path("in")))
    await monitor_on(house, "c")
    with open(house.path("in"), "wb", buffering=0) as writing:
        writing.write(b'{"execute": "qmp_capabilities"} {"execute": "quit"}')
        with trio.fail_after(10):
            await house.supervisor.stop_requested.wait()


async def test_pty_serves_whoever_opens_it_and_its_link_goes_with_it(house: House) -> None:
    link = house.path("link")
    made = await house.chardev("c", "pty", path=str(link))
    await monitor_on(house, "c")
    assert await name_of(house, "c") == f"pty:{made.pty}"
    assert os.readlink(link) == made.pty
    for _ in range(2):
        terminal = os.open(link, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        client = Files(terminal, terminal)
        await client.check()
        client.close()
        with trio.fail_after(10):  # who opens it again sooner takes over the conversation
            while "peer=True" in house.supervisor.tree():
                await trio.sleep(0.001)
    await house.monitors.remove("compat_monitor0")
    await house.chardevs.remove("c")
    assert not link.is_symlink()


@pytest.mark.parametrize(
    ("path", "text"), [("nowhere/link", "No such file or directory"), ("", "No such file or directory")]
)
async def test_pty_link_that_cannot_be_made(house: House, path: str, text: str) -> None:
    path = path and str(house.path(path))
    assert await refusal(house, "pty", path=path) == (
        f"Failed to add chardev 'c': Failed to create PTY symlink: {text}"
    )


async def test_pty_link_of_somebody_else_stays(house: House) -> None:
    link = house.path("link")
    await house.chardev("c", "pty", path=str(link))
    link.unlink()
    link.symlink_to("elsewhere")
    await house.chardevs.remove("c")
    assert os.readlink(link) == "elsewhere"


# -- without a peer ---------------------------------------------------------------------------------------------


async def test_monitor_on_a_ring_buffer_is_read_there(house: House) -> None:
    await house.chardev("r", "ringbuf")
    await monitor_on(house, "r")
    client = await house.negotiated(await house.monitor())
    await wait_all_tasks_blocked()
    answer = await client.ask("ringbuf-read", {"device": "r", "size": 4096})
    assert answer["return"].startswith('{"QMP": ')
    assert '"capabilities": []' in answer["return"]
    assert answer["return"].endswith("\r\n")


async def test_monitor_on_null_says_nothing_to_nobody(house: House) -> None:
    await house.chardev("n", "null")
    await monitor_on(house, "n")
    assert await name_of(house, "n") == "null"


async def test_ring_keeps_the_newest_bytes(house: House) -> None:
    await house.chardev("r", "ringbuf", size=4)
    client = await house.negotiated(await house.monitor())

    async def read(size: int, **more: str) -> Any:
        answer = await client.ask("ringbuf-read", {"device": "r", "size": size, **more})
        return answer.get("return", answer.get("error", {}).get("desc"))

    async def write(data: str, **more: str) -> Any:
        answer = await client.ask("ringbuf-write", {"device": "r", "data": data, **more})
        return answer.get("error", {}).get("desc")

    await write("abcdefgh")
    assert await read(10) == "efgh"
    assert await read(10) == ""
    await write("ab")
    assert (await read(1), await read(1), await read(1)) == ("a", "b", "")
    await write("a\0b")  # a NUL is two bytes
    assert await read(10) == "a\0b"
    await write("YQBi", format="base64")  # a bare NUL ends a text
    assert await read(10) == "a"
    await write("/w==", format="base64")
    assert await read(10, format="base64") == "/w=="
    assert await write("!", format="base64") == "Base64 data contains invalid characters"
    assert await read(0) == "size must be greater than zero"


@pytest.mark.parametrize("size", [3, -4, 6])
async def test_ring_of_odd_size_is_refused(house: House, size: int) -> None:
    assert await refusal(house, "ringbuf", size=size) == (
        "Failed to add chardev 'c': size of ringbuf chardev must be power of two"
    )


async def test_large_ring_takes_memory_as_it_is_filled(house: House) -> None:
    await house.chardev("r", "ringbuf", size=1 << 40)  # the reference ends here
    await house.chardevs.write_ring("r", b"x" * 100)
    assert await house.chardevs.read_ring("r", 1 << 40) == b"x" * 100


# -- the log ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({}, rb'\{"QMP": [^\n]*\n\{"return": \{\}\}\r\n'),
        ({"logappend": True}, rb'old\{"QMP": [^\n]*\n\{"return": \{\}\}\r\n'),
        (
            {"logtimestamp": True},
            rb'(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z \{"(QMP|return)": [^\n]*\n){2}',
        ),
    ],
)
async def test_log_has_what_was_sent(house: House, options: dict[str, bool], pattern: bytes) -> None:
    house.path("log").write_bytes(b"old")
    path = await house.socket_chardev("c", logfile=str(house.path("log")), **options)
    await monitor_on(house, "c")
    await house.negotiated(path)
    assert re.fullmatch(pattern, house.path("log").read_bytes())


async def test_log_that_cannot_be_made_leaves_nothing(house: House) -> None:
    where = house.path("nowhere") / "log"
    wanted = f"Failed to add chardev 'c': Could not create '{where}': No such file or directory"
    assert await refusal(house, "socket", addr=unix(house.path("c")), logfile=str(where)) == wanted
    assert not house.path("c").exists()


async def test_log_that_nobody_reads_holds_up_nobody(house: House) -> None:
    """The daemon waited for a FIFO's reader, and only SIGKILL could end it."""
    log = house.path("log")
    os.mkfifo(log)
    wanted = f"Failed to add chardev 'c': Could not create '{log}': No such device or address"
    assert await refusal(house, "socket", addr=unix(house.path("c")), logfile=str(log)) == wanted
    reader = os.open(log, os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
        path = await house.socket_chardev("c", logfile=str(log))
        await monitor_on(house, "c")
        client = await house.negotiated(path)
        for _ in range(50):
            assert "return" in await client.ask("query-version")
        assert os.read(reader, 1 << 16).startswith(b'{"QMP"')
    finally:
        os.close(reader)


# -- names, removal ---------------------------------------------------------------------------------------------


async def test_removal_is_refused_while_used_and_closes_everything(house: House) -> None:
    path = await house.monitor("c")
    with pytest.raises(QmpError, match="Chardev 'c' is busy"):
        await house.chardevs.remove("c")
    client = await house.negotiated(path)
    await house.monitors.remove("compat_monitor0")
    await house.chardevs.remove("c")
    assert await client.message() is None
    assert not path.exists()
    with pytest.raises(QmpError, match="Chardev 'c' not found"):
        await house.chardevs.remove("c")


async def test_name_is_taken_while_a_chardev_is_being_made(house: House) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(add_socket, house.chardevs, house.path("c"), lambda _text: None)
        await wait_all_tasks_blocked()
        with pytest.raises(QmpError, match="Chardev with id 'c' already exists"):
            await house.chardev("c", "null")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kind", ["stdio", "stdio of a background daemon"])
async def test_standard_descriptors_have_one_user(tmp_path: Path, kind: str) -> None:
    async with open_house(tmp_path) as house:
        if kind == "stdio":
            await house.chardev("a", "stdio")
            with pytest.raises(QmpError, match="cannot use stdio by multiple character devices"):
                await house.chardev("b", "stdio")
            await house.chardevs.remove("a")
            await house.chardev("b", "stdio")
        else:
            chardevs = Chardevs(house.supervisor, is_background=True)
            from qsd.qapi.schema.chardev import ChardevBackend
            from qsd.qapi.visit import from_json

            with pytest.raises(QmpError, match="cannot use stdio with -daemonize"):
                await chardevs.add("a", from_json(ChardevBackend, {"type": "stdio", "data": {}}))
