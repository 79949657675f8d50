"""The socket backend: a server with one client at a time, or a client that may come back."""

from __future__ import annotations

import socket as stdlib_socket
from typing import Any

import trio

from qsd.actors.faces import ChardevFace, SocketChardevFace
from qsd.errors import QmpError
from qsd.host import sockets
from qsd.qapi.schema.sockets import FdSocketAddress, InetSocketAddress, UnixSocketAddress, plain_address
from qsd.qapi.visit import to_json
from qsd.servers.chardev.base import Chardev
from qsd.servers.chardev.streams import SocketStream

# Options this build has no use for; asking for one is an error, not a promise.
_REFUSED = ("tls_creds", "tls_authz", "telnet", "tn3270", "websocket")


def address_text(address: Any) -> str:
    """``unix:PATH``, ``tcp:HOST:PORT``, ``fd:N``, as names of chardevs show an address."""
    if isinstance(address, UnixSocketAddress):
        abstract = ",abstract=on" if address.abstract else ""
        tight = ",tight=on" if address.abstract and address.tight is not False else ""
        return f"unix:{address.path}{abstract}{tight}"
    if isinstance(address, InetSocketAddress):
        host = f"[{address.host}]" if ":" in address.host else address.host
        return f"tcp:{host}:{address.port}"
    if isinstance(address, FdSocketAddress):
        return f"fd:{address.str}"
    return f"vsock:{address.cid}:{address.port}"


class SocketChardev(Chardev):
    """``may_pass_fds``: the address may be a descriptor number (command line only)."""

    may_pass_fds = False

    async def prepare(self) -> None:
        """Listen, or connect."""
        data = self.data
        for member in _REFUSED:
            if getattr(data, member):
                raise QmpError(f"'{member.replace('_', '-')}' is not supported for socket chardevs")
        self.address = plain_address(data.addr)
        self.is_server = data.server is not False
        self._reconnect = (data.reconnect_ms or 0) / 1000
        self._listeners: list[sockets.Listener] = []
        self._pending: trio.socket.SocketType | None = None
        if self.is_server:
            if self._reconnect:
                raise QmpError("'reconnect-ms' option is incompatible with socket in server listen mode")
            self._listeners = await sockets.listen(data.addr, backlog=1, may_pass_fds=self.may_pass_fds)
            self.address = self._listeners[0].address
            self._accepter = trio.socket.from_stdlib_socket(self._listeners[0].socket)
        else:
            if data.wait:
                raise QmpError("'wait' option is incompatible with socket in client connect mode")
            if not self._reconnect:
                self._pending = await self._connect()

    async def _connect(self) -> trio.socket.SocketType:
        sock = await sockets.connect(self.data.addr, may_pass_fds=self.may_pass_fds)
        return self._adopt(trio.socket.from_stdlib_socket(sock))

    def _adopt(self, sock: trio.socket.SocketType) -> trio.socket.SocketType:
        if self.data.nodelay and sock.family in (stdlib_socket.AF_INET, stdlib_socket.AF_INET6):
            sock.setsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_NODELAY, 1)
        return sock

    def filename(self) -> str:
        """The address, with the role, and whether a peer is there."""
        role = ",server=on" if self.is_server else ""
        prefix = "" if self.is_connected or self._pending is not None else "disconnected:"
        return f"{prefix}{address_text(self.address)}{role}"

    async def wait_client(self) -> None:
        """Take the first client before anything else goes on."""
        if self.is_server and self._pending is None:
            self._pending = await self._accept()

    async def _accept(self) -> trio.socket.SocketType:
        sock, _peer = await self._accepter.accept()
        return self._adopt(sock)

    async def run(self) -> None:
        """Serve connections one after the other."""
        while True:
            sock = await self._next()
            if sock is None:
                return
            await self.connected(SocketStream(sock))

    async def _next(self) -> trio.socket.SocketType | None:
        if self._pending is not None:
            sock, self._pending = self._pending, None
            return sock
        if self.is_server:
            return await self._accept()
        while self._reconnect:
            try:
                return await self._connect()
            except QmpError:
                await trio.sleep(self._reconnect)
        return None

    def let_go(self) -> None:
        """Close everything; a path that is ours goes away."""
        sockets.close_listeners(self._listeners)
        if self._pending is not None:
            self._pending.close()


def face(chardev: Chardev) -> ChardevFace | SocketChardevFace:
    """The chardev as an object of the QOM tree."""
    if isinstance(chardev, SocketChardev):
        return SocketChardevFace(lambda: chardev.is_connected, lambda: to_json(chardev.address))
    return ChardevFace(chardev.backend)
