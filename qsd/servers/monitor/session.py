"""One client of a monitor: greeting, negotiation, commands one at a time, events."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import trio

from qsd import trace
from qsd.actors.events import Emitted, EventBus
from qsd.errors import ErrorClass, QmpError
from qsd.qapi.core import SCHEMA
from qsd.qapi.schema.control import QmpCapabilitiesArgs
from qsd.qapi.visit import from_json
from qsd.servers.chardev.streams import Stream
from qsd.servers.monitor.envelope import Call, error_answer, read_envelope
from qsd.wire.qmp_json import JsonError, Parser, dumps

log = logging.getLogger("qsd.monitor")

HANDLE_QMP_COMMAND = trace.event("handle_qmp_command")

# Bytes read at a time: parsing this much takes under a millisecond.
READ_SIZE = 16 << 10
# A client that lets this much pile up unread is cut off.
OUTPUT_LIMIT = 16 << 20
# While this much is unread, no further command of the client is taken.
OUTPUT_HIGH = 1 << 20

Execute = Callable[["MonitorSession", str, dict[str, Any]], Awaitable[Any]]


class MonitorFacts(Protocol):
    """What a session needs to know of its monitor."""

    object_id: str
    is_pretty: bool


class MonitorSession:
    """See the module. ``name`` is the monitor's object id."""

    def __init__(
        self, stream: Stream, monitor: MonitorFacts, events: EventBus, greeting: dict[str, Any], execute: Execute
    ) -> None:
        self.name = monitor.object_id
        self._stream = stream
        self._is_pretty = monitor.is_pretty
        self._events = events
        self._execute = execute
        self._output: list[bytes] = []
        self._size = 0
        self._changed = trio.Event()
        self._is_negotiated = False
        self._is_oob = False
        self.is_quitting = False
        self._scope = trio.CancelScope()
        self._write(greeting)

    async def run(self) -> None:
        """Serve until the client goes away or has asked the daemon to quit."""
        subscription = self._events.subscribe(self._on_event)
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                nursery.start_soon(self._send, name="monitor output")
                await self._receive()
                if self.is_quitting:
                    await self.flushed()
                nursery.cancel_scope.cancel()
        finally:
            subscription.close()

    async def flushed(self) -> None:
        """Return when everything said so far has been sent."""
        while self._size:
            await self._changed.wait()

    # -- output -----------------------------------------------------------------------------------------------

    def _write(self, message: Any) -> None:
        data = dumps(message, self._is_pretty).encode() + b"\r\n"
        self._output.append(data)
        self._size += len(data)
        if self._size > OUTPUT_LIMIT:
            log.warning("monitor %s: the client does not read its answers: disconnected", self.name)
            self._scope.cancel()
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _send(self) -> None:
        try:
            while True:
                while not self._output:
                    await self._changed.wait()
                data = b"".join(self._output)
                self._output.clear()
                await self._stream.send_all(data)
                self._size -= len(data)
                self._wake()
        except trio.BrokenResourceError:
            self._scope.cancel()

    def _on_event(self, event: Emitted) -> None:
        if self._is_negotiated:
            self._write(event.message)

    # -- input ------------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        parser = Parser()
        while not self.is_quitting:
            data = await self._stream.receive_some(READ_SIZE)
            if not data:
                return
            for item in parser.feed(data):
                while self._size > OUTPUT_HIGH:
                    await self._changed.wait()
                # The command goes on when the client vanishes: only its answer is lost.
                await self._answer(item)
                if self.is_quitting:
                    return

    async def _answer(self, item: Any) -> None:
        if isinstance(item, JsonError):
            self._write(error_answer(QmpError(item.desc)))
            return
        identity = {"id": item["id"]} if isinstance(item, dict) and "id" in item else {}
        try:
            call = read_envelope(item, is_oob_enabled=self._is_oob)
            result = await self._call(call)
        except QmpError as error:
            self._write(identity | error_answer(error))
        else:
            self._write({"return": result} | identity)

    async def _call(self, call: Call) -> Any:
        if HANDLE_QMP_COMMAND.enabled:
            HANDLE_QMP_COMMAND("mon {} req: {}", self.name, call.name)
        if not self._is_negotiated:
            if call.name != "qmp_capabilities":
                raise QmpError(
                    "Expecting capabilities negotiation with 'qmp_capabilities'",
                    error_class=ErrorClass.COMMAND_NOT_FOUND,
                )
            args = from_json(QmpCapabilitiesArgs, call.arguments)
            self._is_oob = any(item.value == "oob" for item in args.enable or ())
            self._is_negotiated = True
            return {}
        if call.name == "qmp_capabilities":
            raise QmpError(
                "Capabilities negotiation is already complete, command ignored",
                error_class=ErrorClass.COMMAND_NOT_FOUND,
            )
        if call.is_oob and call.name in SCHEMA.commands:
            raise QmpError(f"The command {call.name} does not support OOB")
        return await self._execute(self, call.name, call.arguments)
