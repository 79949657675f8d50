"""One connection to a monitor: greeting, negotiation, commands in the order they came, events in between.

Without out-of-band execution nothing is read while a command runs. With it up to ``QUEUE`` requests wait, and what
is said about an ``exec-oob`` request is said at once.

A client that leaves does not stop its command. While one runs for long, ``watch`` looks whether the client is still
there, so that the next one need not wait for the end.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import trio
from trio_util import AsyncBool, wait_any

from qsd import trace
from qsd.actors.events import Emitted, EventBus
from qsd.errors import ActorStopped, ErrorClass, QmpError, errno_text
from qsd.qapi.core import SCHEMA
from qsd.qapi.schema.control import QMPCapability
from qsd.qapi.visit import to_json
from qsd.servers.chardev.stream import Stream
from qsd.servers.monitor import envelope
from qsd.servers.monitor.envelope import Request
from qsd.servers.monitor.output import Output
from qsd.servers.monitor.version import VERSION
from qsd.wire.qmp_json import Parser, dumps, pieces

log = logging.getLogger("qsd.monitor")

QUEUE = 8
# Bytes parsed in one go: unusual JSON costs up to 3 us a byte, and the data plane waits for it.
PIECE = 8 << 10
# Seconds after which a command counts as long, and between looks at its client from then on.
LOOK_S = 0.25
# Seconds a client has to take what is left for it when the connection ends.
FLUSH_S = 1.0

_END = b"\r\n"

NEGOTIATE = "qmp_capabilities"

_COMMAND = trace.event("handle_qmp_command")
_RESPOND = trace.event("monitor_qmp_respond")

Dispatch = Callable[["Session", str, dict[str, Any]], Awaitable[Any]]


@attrs.define(eq=False)
class Gate:
    """Whether commands are taken; shut for good when the daemon stops. Sessions begin when it is ``up``."""

    stop_requested: trio.Event
    up: trio.Event | None = None
    shut: trio.Event = attrs.field(factory=trio.Event)

    @property
    def is_open(self) -> bool:
        """Read before every command."""
        return not self.shut.is_set() and not self.stop_requested.is_set()


class Session:
    """See the module. ``name`` is the id of the monitor; ``dispatch`` runs a command and returns JSON."""

    def __init__(
        self,
        name: str,
        stream: Stream,
        events: EventBus,
        dispatch: Dispatch,
        gate: Gate,
        *,
        pretty: bool,
        offers_oob: bool,
    ) -> None:
        self.name = name
        self.stream = stream
        self._events = events
        self._dispatch = dispatch
        self._gate = gate
        self.pretty = pretty
        self._offers_oob = offers_oob
        self.output = Output(stream, name)
        self.is_negotiated = False
        self._may_oob = False
        self._queue: trio.MemorySendChannel[Any] | None = None
        self._nursery: trio.Nursery | None = None
        self.commands = 0
        self._busy = AsyncBool()
        self._scope = trio.CancelScope()
        self._keeps_stream = True

    # -- life -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the connection until its client goes. Closes the stream, unless ``leave`` ended it."""
        subscription = self._events.subscribe(self._on_event)
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self.output.run, name=f"{self.name}: output")
                    nursery.start_soon(self._watch, name=f"{self.name}: is the client there?")
                    self._greet()
                    await self._read()
                    await self.wait_idle()
                    await self.flush()
                    nursery.cancel_scope.cancel()
        finally:
            subscription.close()
            if self._keeps_stream:
                self.stream.close()

    async def flush(self) -> None:
        """Give the client a moment to take what is left for it."""
        with trio.move_on_after(FLUSH_S):
            await self.output.flush()

    async def wait_idle(self) -> None:
        """Wait until no command runs and none waits in the queue."""
        await self._busy.wait_value(False)

    @property
    def is_busy(self) -> bool:
        """True while a command runs or waits in the queue."""
        return bool(self._busy.value)

    def leave(self) -> None:
        """End the session at once but leave the client connected: somebody else may come to serve it."""
        self._keeps_stream = False
        self._scope.cancel()

    def abort(self) -> None:
        """End the session at once, a running command included."""
        self._scope.cancel()

    async def _watch(self) -> None:
        while True:
            await self._busy.wait_value(True)
            await trio.sleep(LOOK_S)
            if self.is_busy and self.stream.is_gone:
                self.stream.close()

    # -- input ------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        parser = Parser()
        try:
            while data := await self.stream.receive_some():
                for start in range(0, len(data), PIECE):
                    for message in parser.feed(data[start : start + PIECE]):
                        await self._take(message)
                    await trio.lowlevel.checkpoint()
        except trio.ClosedResourceError:
            return

    async def _take(self, message: Any) -> None:
        if self._queue is None:
            self._busy.value = True
            try:
                await self._serve(message)
            finally:
                self._busy.value = False
            return
        if isinstance(message, dict) and "exec-oob" in message:
            await self._serve(message)
            return
        self._busy.value = True
        await self._queue.send(message)

    async def _serve_queue(self, queue: trio.MemoryReceiveChannel[Any]) -> None:
        async for message in queue:
            await self._serve(message)
            if not queue.statistics().current_buffer_used:
                self._busy.value = False

    # -- commands ---------------------------------------------------------------------------------------------

    async def _serve(self, message: Any) -> None:
        """Run one message's command and answer it; nothing once the daemon stops."""
        # Also the turn of everybody else between two of many pipelined commands.
        await trio.lowlevel.checkpoint()
        if not self.output.has_room:
            # Not once the gate is shut: a client that reads nothing must not hold up the daemon's end.
            await wait_any(self.output.wait_room, self._gate.shut.wait)
        if not self._gate.is_open or self.stream.closed.is_set():
            return
        request_id = envelope.id_of(message)
        try:
            request = envelope.read(message, may_oob=self._may_oob)
            self._admit(request)
            if _COMMAND.enabled:
                _COMMAND("mon {} req: {}", self.name, request.name)
            self.commands += 1
            result = await self._dispatch(self, request.name, request.arguments)
            answer = await self._written(envelope.success(result, request_id))
        except Exception as error:  # noqa: BLE001  # it becomes the reply
            self._say(envelope.failure(_as_qmp(error), request_id))
        else:
            self._put(answer)

    def _admit(self, request: Request) -> None:
        if not self.is_negotiated:
            if request.name != NEGOTIATE:
                raise QmpError(
                    f"Expecting capabilities negotiation with '{NEGOTIATE}'",
                    error_class=ErrorClass.COMMAND_NOT_FOUND,
                )
            return
        if request.is_oob and request.name in SCHEMA.commands:
            raise QmpError(f"The command {request.name} does not support OOB")

    def negotiate(self, enable: tuple[QMPCapability, ...]) -> None:
        """End the negotiation (the command ``qmp_capabilities``). Raises QmpError when it is over already."""
        if self.is_negotiated:
            raise QmpError(
                "Capabilities negotiation is already complete, command ignored",
                error_class=ErrorClass.COMMAND_NOT_FOUND,
            )
        self.is_negotiated = True
        if QMPCapability.OOB in enable:
            assert self._nursery is not None
            self._may_oob = True
            send, receive = trio.open_memory_channel[Any](QUEUE)
            self._queue = send
            self._nursery.start_soon(self._serve_queue, receive, name=f"{self.name}: commands")

    # -- output -----------------------------------------------------------------------------------------------

    def _greet(self) -> None:
        capabilities = [QMPCapability.OOB.value] if self._offers_oob else []
        self._say({"QMP": {"version": to_json(VERSION), "capabilities": capabilities}})

    async def _written(self, message: dict[str, Any]) -> bytearray:
        """What may be many megabytes: others run while it is put together."""
        data = bytearray()
        for piece in pieces(message, pretty=self.pretty):
            if data:
                await trio.lowlevel.checkpoint()
            data += _on_the_wire(piece)
        data += _END
        return data

    def _say(self, message: dict[str, Any]) -> None:
        self._put(self._encode(message))

    def _put(self, data: bytes | bytearray) -> None:
        if _RESPOND.enabled:
            _RESPOND("mon {} resp: {}", self.name, data.rstrip().decode())
        self.output.put(data)

    def _on_event(self, event: Emitted) -> None:
        if self.is_negotiated:
            self.output.put_unasked(self._encode(dict(event.message)))

    def _encode(self, message: dict[str, Any]) -> bytes:
        return _on_the_wire(dumps(message, pretty=self.pretty)) + _END


def _on_the_wire(text: str) -> bytes:
    # Line ends inside strings are escaped.
    return text.replace("\n", "\r\n").encode("ascii")


def _as_qmp(error: Exception) -> QmpError:
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, QmpError):
        return error
    if isinstance(error, MemoryError):
        return QmpError(errno_text(errno.ENOMEM))
    if not isinstance(error, ActorStopped):
        log.error("a command failed in a way nobody planned for", exc_info=error)
    return QmpError(f"{type(error).__name__}: {error}")
