"""The NBD server: one listener set, and its connections."""

from __future__ import annotations

import errno
import logging
import math
import socket
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import trio
from trio_util import RepeatedEvent

from qsd import trace
from qsd.actors.core import Actor, Stop, receives
from qsd.actors.edges import Edge
from qsd.actors.supervisor import Floor, Supervisor
from qsd.block.permissions import Perm
from qsd.drivers.base import Limits
from qsd.errors import ActorStopped, QmpError
from qsd.host import sockets
from qsd.host.reactor import Reactor
from qsd.servers.exports import Exports, Kind
from qsd.servers.nbd.buffers import Pool
from qsd.servers.nbd.export import NbdExport
from qsd.servers.nbd.replies import Encoder
from qsd.servers.nbd.transmission import Transmission
from qsd.wire import modified_utf8
from qsd.wire.nbd import constants as c
from qsd.wire.nbd.handshake import (
    ExportInfo,
    Negotiated,
    ServerHandshake,
)

log = logging.getLogger("qsd.nbd")

NEGOTIATE_BEGIN = trace.event("nbd_negotiate_begin")
NEGOTIATE_SUCCESS = trace.event("nbd_negotiate_success")

DEFAULT_MAX_CONNECTIONS = 100
DEFAULT_HANDSHAKE_SECONDS = 10
# Room for replies in the kernel: one send takes a whole burst of them.
SEND_BUFFER = 2 << 20
HANDSHAKE_READ = 64 << 10
# Clients beyond max-connections wait here.
BACKLOG = 128
# How long a client may take to choose an export when others cannot come in because of it.
PATIENCE_S = 0.5


class NbdConnection(Actor):
    """One client: negotiation in a task of its own, then the transmission on the reactor."""

    kind = "connection"

    def __init__(self, service: NbdService, sock: socket.socket, number: int) -> None:
        super().__init__(f"nbd client {number}")
        self._service = service
        self._sock = sock
        self._export: NbdExport | None = None
        self._transmission: Transmission | None = None
        self._reason = ""
        self.since = trio.current_time()

    @property
    def is_negotiating(self) -> bool:
        """True until it has an export."""
        return self._transmission is None

    def give_up(self) -> None:
        """Drop a client that has not chosen an export yet."""
        self._complain("given up for a client that waits")
        self.disconnect("given up")

    async def started(self) -> None:
        """Begin to negotiate."""
        self.spawn(self._negotiate, name="negotiation")

    def statistics(self) -> dict[str, Any]:
        """The actor's facts and the transmission's."""
        facts = super().statistics()
        if self._transmission is not None:
            facts |= attrs.asdict(self._transmission.stats) | {"in_flight": self._transmission.in_flight}
        return facts

    async def _negotiate(self) -> None:
        seconds = self._service.handshake_seconds
        result: Negotiated | None = None
        with trio.move_on_after(seconds or float("inf")) as scope:
            result = await self._shake_hands()
        if scope.cancelled_caught:
            self._complain("handshake timed out")
        if result is None:
            self._finish("negotiation failed")
            return
        export = result.export.token
        assert isinstance(export, NbdExport)
        if NEGOTIATE_SUCCESS.enabled:
            NEGOTIATE_SUCCESS("{} export {!r}", self.name, export.export_name)
        self._begin(export, result)

    async def _shake_hands(self) -> Negotiated | None:
        if self._sock.fileno() < 0:  # disconnected before it could begin
            return None
        stream = trio.socket.from_stdlib_socket(self._sock)
        handshake = ServerHandshake(self._service)
        if NEGOTIATE_BEGIN.enabled:
            NEGOTIATE_BEGIN("{}", self.name)
        while_sending = False
        try:
            while True:
                while_sending = True
                await _send_all(stream, handshake.take_output())
                if handshake.is_over:
                    break
                if handshake.has_more:
                    handshake.receive(b"")
                    continue
                while_sending = False
                data = await stream.recv(HANDSHAKE_READ)
                if not data:
                    raise OSError(0, "Unexpected end-of-file before all data were read")
                handshake.receive(data)
        except trio.ClosedResourceError:  # disconnected
            return None
        except OSError as error:
            complaint = handshake.complaint_of_loss(error.strerror or str(error), while_sending=while_sending)
            if complaint is not None:
                self._complain(complaint)
            return None
        if handshake.failure:
            self._complain(handshake.failure)
        return handshake.result

    def _complain(self, text: str) -> None:
        self._service.warn(f"qsd: option negotiation failed: {text}")

    def _begin(self, export: NbdExport, result: Negotiated) -> None:
        if export not in self._service.exports_alive() or self._sock.fileno() < 0:
            self._finish("export is going away")
            return
        transmission = Transmission(
            self._sock,
            self._service.reactor,
            export.edge,
            Encoder(result, writethrough=export.writethrough, bitmaps=export.bitmaps),
            self._service.pool,
            alignment=_buffer_alignment(export.edge.limits),
            leftover=result.leftover,
            ended=self._finish,
            crashed=self._crashed,
        )
        # From here on it is the transmission that tells when the client is gone.
        self._export, self._transmission = export, transmission
        export.joined(self)
        transmission.start()

    def _crashed(self, error: Exception) -> None:
        log.exception("%s crashed", self.name, exc_info=error)
        self.disconnect("internal error")

    def _finish(self, reason: str) -> None:
        """The client is gone and nothing is in flight."""
        self._reason = reason
        if self._export is not None:
            self._export.left(self)
        self._service.left(self)
        try:
            self.ref.tell(Stop())
        except ActorStopped:
            return

    def disconnect(self, reason: str) -> None:
        """Drop the client now."""
        if self._transmission is not None:
            self._transmission.disconnect(reason)
        else:
            self._close()
            self.ref.tell(Stop())

    def _close(self) -> None:
        # Wakes the negotiation: somebody else may get the descriptor's number before it has been cancelled.
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()

    async def stopping(self) -> None:
        """Let go of the socket."""
        if self._transmission is not None:
            self._transmission.disconnect("server is shutting down")
        self._close()
        self._service.left(self)


def _buffer_alignment(limits: Limits) -> int:
    """Where replies' data is laid out: a driver that needs alignment at all is best served with whole pages."""
    return limits.opt_mem_alignment if limits.min_mem_alignment > 1 else 1


async def _send_all(stream: trio.socket.SocketType, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[await stream.send(view) :]


@attrs.frozen
class _Start:
    addr: Any
    handshake_seconds: int
    max_connections: int
    allow_fd: bool


@attrs.frozen
class _End:
    pass


class NbdService(Actor):
    """The server, of which there is at most one at a time. Clients that come before ``up`` wait in the backlog."""

    kind = "nbd server"

    def __init__(
        self,
        supervisor: Supervisor,
        reactor: Reactor,
        exports: Exports,
        warn: Callable[[str], None],
        up: trio.Event | None = None,
    ) -> None:
        super().__init__("nbd server")
        self._supervisor = supervisor
        self.reactor = reactor
        self.warn = warn
        self._up = up
        self.pool = Pool()
        self.handshake_seconds = DEFAULT_HANDSHAKE_SECONDS
        self._exports = exports
        self._listeners: list[sockets.Listener] = []
        self._accepting: list[trio.CancelScope] = []  # one for each listener
        self.max_connections = DEFAULT_MAX_CONNECTIONS
        self._connections: set[NbdConnection] = set()
        self._room = RepeatedEvent()
        self._count = 0
        exports.kinds["nbd"] = Kind(self._check, self._make, unshared=Perm.RESIZE)

    # -- exports (wire.nbd.handshake.ExportDirectory) ---------------------------------------------------------

    def exports_alive(self, *, with_coming: bool = False) -> list[NbdExport]:
        """NBD exports that are not going away, oldest first; with those that are being added if so wanted."""
        entries = self._exports.of_type(NbdExport.type_name)
        alive = [entry.export for entry in entries if not entry.is_shutting_down and (entry.is_up or with_coming)]
        return [export for export in reversed(alive) if isinstance(export, NbdExport)]

    def lookup(self, name: str) -> ExportInfo | None:
        """The export a client names."""
        for export in self.exports_alive():
            if export.export_name == name:
                return export.describe()
        return None

    def list(self) -> Sequence[ExportInfo]:
        """What a client may list."""
        return [export.describe() for export in self.exports_alive()]

    def _check(self, options: Any) -> None:
        if not self._listeners:
            raise QmpError("NBD server not running")
        name = options.node_name if options.name is None else options.name
        if len(modified_utf8.encode(name)) > c.MAX_STRING:
            raise QmpError(f"export name '{name}' too long")
        if options.description is not None and len(modified_utf8.encode(options.description)) > c.MAX_STRING:
            raise QmpError(f"description '{options.description}' too long")
        if any(export.export_name == name for export in self.exports_alive(with_coming=True)):
            raise QmpError(f"NBD server already has export named '{name}'")

    async def _make(self, identifier: str, options: Any, edge: Edge) -> NbdExport:
        bitmaps = self._exports.bitmaps_of(options, edge)
        return NbdExport(identifier, options, edge, bitmaps, self, self._exports)

    # -- listening --------------------------------------------------------------------------------------------

    async def start(self, options: Any, *, allow_fd: bool) -> None:
        """nbd-server-start and --nbd-server. Raises QmpError."""
        if options.tls_creds is not None:
            raise QmpError(f"No TLS credentials with id '{options.tls_creds}'")
        seconds = options.handshake_max_seconds
        limit = options.max_connections
        await self.ref.ask(
            _Start(
                options.addr,
                DEFAULT_HANDSHAKE_SECONDS if seconds is None else seconds,
                DEFAULT_MAX_CONNECTIONS if limit is None else limit,
                allow_fd,
            )
        )

    async def stop(self) -> None:
        """nbd-server-stop: no more clients; returns when every NBD export has ended. Raises QmpError."""
        await self.ref.ask(_End())
        await self._exports.wait_gone("nbd")

    @receives(_Start)
    async def _start(self, message: _Start) -> None:
        if self._listeners:
            raise QmpError("NBD server already running")
        self._listeners = await sockets.listen(message.addr, backlog=BACKLOG, may_pass_fds=message.allow_fd)
        self.handshake_seconds = message.handshake_seconds
        self.max_connections = message.max_connections
        for listener in self._listeners:
            scope = trio.CancelScope()
            self._accepting.append(scope)
            self.spawn(self._accept, listener.socket, scope, name="accept")

    @receives(_End)
    async def _end(self, message: _End) -> None:
        if not self._listeners:
            raise QmpError("NBD server not running")
        self._close_listeners()
        self._exports.delete_all("nbd")
        for connection in [one for one in self._connections if one._export is None]:
            connection.disconnect("server is shutting down")

    def _close_listeners(self) -> None:
        for scope in self._accepting:
            scope.cancel()
        self._accepting = []
        sockets.close_listeners(self._listeners)
        self._listeners = []

    async def stopping(self) -> None:
        """Close the listeners; exports and clients stand on the same floor and stop themselves."""
        self._close_listeners()

    async def _accept(self, listener: socket.socket, scope: trio.CancelScope) -> None:
        with scope:
            try:
                await self._let_in(listener)
            except OSError:
                # Stopped just when a client came: the task was awake already, and the listener is closed.
                if not scope.cancel_called:
                    raise

    async def _let_in(self, listener: socket.socket) -> None:
        stream = trio.socket.from_stdlib_socket(listener)
        if self._up is not None:
            await self._up.wait()
        while True:
            await self._wait_for_room(stream)
            try:
                accepted, _peer = await stream.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    # Out of descriptors: wait until one may be free, instead of spinning on the backlog.
                    log.error("cannot accept NBD clients: %s", error.strerror)
                    await trio.sleep(0.1)
                    continue
                if error.errno in sockets.CLIENT_LOST:
                    continue
                raise
            await self._welcome(accepted)

    async def _wait_for_room(self, listener: trio.socket.SocketType) -> None:
        """Return when one more client may come. For one that waits, the oldest half-open connection is given up.

        Without that, ``max_connections`` clients that say nothing would keep everybody out for as long as a
        handshake may last.
        """
        while self.max_connections and len(self._connections) >= self.max_connections:
            await trio.lowlevel.wait_readable(listener)
            half_open = [one for one in self._connections if one.is_negotiating]
            oldest = min(half_open, key=lambda one: one.since, default=None)
            left = math.inf if oldest is None else oldest.since + PATIENCE_S - trio.current_time()
            if oldest is not None and left <= 0:
                oldest.give_up()
                left = math.inf
            with trio.move_on_after(left):
                await self._room.wait()

    async def _welcome(self, accepted: trio.socket.SocketType) -> None:
        sock = socket.socket(fileno=accepted.detach())
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._count += 1
        connection = NbdConnection(self, sock, self._count)
        self._connections.add(connection)
        try:
            await self._supervisor.start(connection, Floor.EXPORTS, parent=self)
        except ActorStopped:  # the daemon is shutting down
            sock.close()
            self.left(connection)

    def left(self, connection: NbdConnection) -> None:
        """A client has gone."""
        if connection in self._connections:
            self._connections.discard(connection)
            self._room.set()

    def statistics(self) -> dict[str, Any]:
        """The actor's facts, and its clients."""
        return super().statistics() | {"listeners": len(self._listeners), "clients": len(self._connections)}
