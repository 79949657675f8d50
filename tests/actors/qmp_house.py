"""A house for monitor tests: supervisor, bus, objects, chardevs and monitors in this process, and a QMP client."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import trio

import qsd.commands.chardev
import qsd.commands.control
import qsd.commands.objects  # noqa: F401  # each fills the table of commands
from qsd.actors.events import EventActor, EventBus
from qsd.actors.objects import Objects
from qsd.actors.supervisor import Floor, Supervisor
from qsd.commands.context import Context
from qsd.commands.dispatch import execute
from qsd.qapi.schema.chardev import ChardevBackend
from qsd.qapi.schema.control import MonitorOptions
from qsd.qapi.visit import from_json
from qsd.servers.chardev.base import Origin
from qsd.servers.chardev.table import Chardevs
from qsd.servers.monitor.session import Session
from qsd.servers.monitor.table import Monitors

TIMEOUT = 10  # seconds; only a failing test waits for it


class Client:
    """A QMP client: raw bytes out, lines in."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.raw = sock
        self.socket = trio.socket.from_stdlib_socket(sock)
        self._held = b""

    async def send(self, data: bytes | str) -> None:
        view = memoryview(data.encode() if isinstance(data, str) else data)
        while view:
            view = view[await self.socket.send(view) :]

    async def line(self) -> bytes:
        """The next line with its end; what is left at EOF (``b""`` in the end)."""
        with trio.fail_after(TIMEOUT):
            while b"\r\n" not in self._held:
                try:
                    data = await self.socket.recv(65536)
                except ConnectionResetError:
                    data = b""
                if not data:
                    rest, self._held = self._held, b""
                    return rest
                self._held += data
        line, _, self._held = self._held.partition(b"\r\n")
        return line + b"\r\n"

    async def message(self) -> Any:
        """The next line as JSON; None at EOF."""
        line = await self.line()
        return json.loads(line) if line else None

    async def ask(self, name: str, arguments: dict[str, Any] | None = None, **envelope: Any) -> Any:
        """Run a command and return the whole answer; events on the way are dropped."""
        body = {"execute": name, **envelope}
        if arguments is not None:
            body["arguments"] = arguments
        await self.send(json.dumps(body))
        while True:
            answer = await self.message()
            if answer is None or "event" not in answer:
                return answer

    async def negotiate(self, *capabilities: str) -> None:
        assert "QMP" in await self.message()
        answer = await self.ask("qmp_capabilities", {"enable": list(capabilities)})
        assert answer == {"return": {}}

    def nothing_came(self) -> bool:
        """Whether nothing is there to be read now."""
        if self._held:
            return False
        with socket.socket(fileno=socket.dup(self.socket.fileno())) as copy:
            copy.setblocking(False)
            try:
                copy.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                return True
            return False

    def close(self) -> None:
        self.socket.close()


Command = Callable[[Session, dict[str, Any]], Awaitable[Any]]


class House:
    """See the module. ``commands`` adds commands for a test, by name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.supervisor = Supervisor()
        self.events = EventBus()
        self.objects = Objects()
        self.chardevs = Chardevs(self.supervisor)
        self.commands: dict[str, Command] = {}
        self.monitors = Monitors(self.supervisor, self.chardevs, self.objects, self.events, self._dispatch)
        self.services: Any = SimpleNamespace(
            supervisor=self.supervisor, events=self.events, objects=self.objects, chardevs=self.chardevs
        )
        self.objects.mount("chardevs", self.chardevs.faces)

    async def _dispatch(self, session: Session, name: str, arguments: dict[str, Any]) -> Any:
        if name in self.commands:
            return await self.commands[name](session, arguments)
        return await execute(Context(self.services, session), name, arguments)

    async def chardev(self, label: str, kind: str, *, origin: Origin = Origin.QMP, **data: Any) -> Any:
        """Make a chardev from the JSON of its options (underscores for dashes, ``in_`` for ``in``)."""
        body = {key.rstrip("_").replace("_", "-"): value for key, value in data.items()}
        backend = from_json(ChardevBackend, {"type": kind, "data": body})
        return await self.chardevs.add(label, backend, origin=origin)

    def path(self, label: str) -> Path:
        return self.directory / label

    async def socket_chardev(self, label: str, **data: Any) -> Path:
        """A unix server socket; returns its path."""
        path = self.path(label)
        await self.chardev(label, "socket", addr={"type": "unix", "data": {"path": str(path)}}, **data)
        return path

    async def monitor(self, label: str = "mon", **options: Any) -> Path:
        """A monitor on a unix server socket; returns the socket's path."""
        path = await self.socket_chardev(label)
        await self.monitors.add(MonitorOptions(chardev=label, **options))
        return path

    def connect(self, path: Path) -> Client:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        return self.client(sock)

    def client(self, sock: socket.socket) -> Client:
        client = Client(sock)
        _OPEN.append(client)
        return client

    async def negotiated(self, path: Path, *capabilities: str) -> Client:
        client = self.connect(path)
        await client.negotiate(*capabilities)
        return client


@asynccontextmanager
async def open_house(directory: Path) -> AsyncIterator[House]:
    house = House(directory)
    async with house.supervisor:
        await house.supervisor.start(EventActor(house.events), Floor.CORE)
        await house.monitors.start()
        yield house


_OPEN: list[Client] = []


def close_clients() -> None:
    """Close every client a test has made: they may outlive their house, to see how it ends."""
    while _OPEN:
        _OPEN.pop().raw.close()
