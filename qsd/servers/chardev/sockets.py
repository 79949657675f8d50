"""The ``socket`` chardev: a server that has one client at a time, or a client that may come back to its server.

While one client is served the next ones wait in the kernel's queue: they are connected, and hear nothing.
"""

from __future__ import annotations

import socket

import trio

from qsd.actors.faces import SocketChardevFace
from qsd.actors.qom import QomObject
from qsd.errors import QmpError
from qsd.host import sockets
from qsd.host.sockets import Listener
from qsd.qapi.schema.chardev import ChardevSocket
from qsd.qapi.schema.sockets import (
    AnySocketAddress,
    FdSocketAddress,
    InetSocketAddress,
    UnixSocketAddress,
    plain_address,
)
from qsd.qapi.visit import to_json
from qsd.servers.chardev import socket_name
from qsd.servers.chardev.base import Chardev, Origin, Surroundings, log
from qsd.servers.chardev.stream import SocketStream
from qsd.servers.chardev.telnet import GREETING_3270, TelnetStream
from qsd.servers.chardev.websocket import WebsocketStream, upgrade

_BACKLOG = 1
_RETRY_S = 1.0  # when accept fails for want of descriptors or memory


class SocketChardev(Chardev):
    """See the module. ``options`` are those of ``chardev-add``; ``server`` is on when absent."""

    def __init__(self, label: str, backend: str, options: ChardevSocket, surroundings: Surroundings) -> None:
        super().__init__(label, backend, options, surroundings)
        self._options = options
        self._address: AnySocketAddress = plain_address(options.addr)
        self._is_server = options.server is not False
        self._protocol = "telnet" if options.telnet else "websocket" if options.websocket else "tcp"
        self._listeners: list[Listener] = []

    async def open(self) -> None:
        self._check()
        if self._is_server:
            await self._open_server()
        elif self._reconnect_s > 0:
            self.spawn(self._keep_connected, name="connection")
        else:
            self.spawn(self._serve_once, await self._connect(), name="connection")

    def _check(self) -> None:
        options = self._options
        if self._is_server and options.reconnect_ms is not None:
            raise QmpError("'reconnect-ms' option is incompatible with socket in server listen mode")
        if not self._is_server and options.websocket:
            raise QmpError("Websocket client is not implemented")
        if not self._is_server and options.wait is not None:
            raise QmpError("'wait' option is incompatible with socket in client connect mode")
        if options.tls_creds is not None:
            raise QmpError(f"No TLS credentials with id '{options.tls_creds}'")
        if options.tls_authz is not None:
            raise QmpError("'tls_authz' option requires 'tls_creds' option")

    @property
    def _may_pass_fds(self) -> bool:
        return self.surroundings.origin is Origin.COMMAND_LINE

    def filename(self) -> str:
        if isinstance(self.stream, SocketStream):
            return socket_name.connected(self.stream.socket, self._protocol, is_server=self._is_server)
        return socket_name.disconnected(self._address, self._protocol, is_server=self._is_server)

    def face(self) -> QomObject:
        return SocketChardevFace(lambda: self.stream is not None, self._flat_address)

    def _flat_address(self) -> dict[str, object]:
        kind = {UnixSocketAddress: "unix", InetSocketAddress: "inet", FdSocketAddress: "fd"}
        return {"type": kind.get(type(self._address), "vsock"), **to_json(self._address)}

    def release(self) -> None:
        sockets.close_listeners(self._listeners)

    # -- server -----------------------------------------------------------------------------------------------

    async def _open_server(self) -> None:
        self._listeners = await sockets.listen(self._address, backlog=_BACKLOG, may_pass_fds=self._may_pass_fds)
        now = self._listeners[0].address
        if isinstance(now, FdSocketAddress):
            now = socket_name.own_address(self._listeners[0].socket) or now
        self._address = now
        first = None
        if self._options.wait:
            self.surroundings.inform(f"QEMU waiting for connection on: {self.filename()}")
            first = await self._next_client()
        self.spawn(self._serve_clients, first, name="clients")

    async def _serve_clients(self, sock: socket.socket | None) -> None:
        while True:
            await self._serve_socket(sock if sock is not None else await self._next_client())
            sock = None

    async def _next_client(self) -> socket.socket:
        found: list[socket.socket] = []

        async def wait(listener: Listener, scope: trio.CancelScope) -> None:
            while not found:
                await trio.lowlevel.wait_readable(listener.socket)
                try:
                    sock = None if found else sockets.accept_nowait(listener.socket)
                except OSError as error:
                    log.warning("%s: cannot accept a connection: %s", self.label, error.strerror)
                    await trio.sleep(_RETRY_S)
                    continue
                if sock is not None:
                    found.append(sock)
                    scope.cancel()

        if len(self._listeners) == 1:
            await wait(self._listeners[0], trio.CancelScope())
        else:
            async with trio.open_nursery() as nursery:
                for listener in self._listeners:
                    nursery.start_soon(
                        wait, listener, nursery.cancel_scope, name=f"{self.name}: listener {listener.address}"
                    )
        return found[0]

    async def _serve_socket(self, sock: socket.socket) -> None:
        if self._options.nodelay:
            sockets.set_no_delay(sock)
        try:
            stream = await self._greet(sock)
        except BaseException:
            sock.close()
            raise
        if stream is None:
            sock.close()
        else:
            await self.serve(stream)

    async def _greet(self, sock: socket.socket) -> SocketStream | None:
        """Begin the protocol the chardev speaks; None when the peer has gone, or does not speak it."""
        try:
            if self._options.websocket:
                rest = await upgrade(sock)
                return None if rest is None else WebsocketStream(sock, self.log, rest)
            if self._options.tn3270:
                sock.send(GREETING_3270)  # a new connection's buffer takes it
            elif self._options.telnet:
                return TelnetStream(sock, self.log)
        except OSError:
            return None
        return SocketStream(sock, self.log)

    # -- client -----------------------------------------------------------------------------------------------

    @property
    def _reconnect_s(self) -> float:
        return (self._options.reconnect_ms or 0) / 1000

    async def _connect(self) -> socket.socket:
        return await sockets.connect(self._address, may_pass_fds=self._may_pass_fds)

    async def _serve_once(self, sock: socket.socket) -> None:
        await self._serve_socket(sock)

    async def _keep_connected(self) -> None:
        is_failure_told = False
        while True:
            try:
                sock = await self._connect()
            except QmpError as error:
                if not is_failure_told:
                    log.warning("Unable to connect character device %s: %s", self.label, error.desc)
                is_failure_told = True
            else:
                is_failure_told = False
                await self._serve_socket(sock)
            await trio.sleep(self._reconnect_s)
