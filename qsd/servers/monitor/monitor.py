"""The monitor actor: serves QMP to whoever comes on its character device, one client after the other."""

from __future__ import annotations

from typing import Any

import attrs
import trio

from qsd.actors.core import Actor, receives
from qsd.actors.events import EventBus
from qsd.servers.chardev.stream import Stream
from qsd.servers.monitor.session import Dispatch, Gate, Session


@attrs.frozen
class MonitorInfo:
    """What is known of a monitor: its id, the chardev it is on, whether it writes for human eyes."""

    id: str
    chardev: str
    pretty: bool


@attrs.frozen(eq=False)
class Opened:
    """A client has come; the stream is the monitor's."""

    stream: Stream


@attrs.frozen
class Leave:
    """The monitor is about to be removed: a client that is there stays connected to the chardev."""


class Monitor(Actor):
    """See the module. ``offers_oob`` is set once the chardev is known."""

    kind = "monitor"

    def __init__(self, info: MonitorInfo, events: EventBus, dispatch: Dispatch, gate: Gate) -> None:
        super().__init__(f"monitor {info.id}")
        self.info = info
        self.offers_oob = True
        self.pretty = info.pretty
        self._events = events
        self._dispatch = dispatch
        self._gate = gate
        self._sessions: list[Session] = []
        self._commands = 0

    def statistics(self) -> dict[str, Any]:
        return {
            **super().statistics(),
            "chardev": self.info.chardev,
            "commands": self._commands + sum(session.commands for session in self._sessions),
            "negotiated": any(session.is_negotiated for session in self._sessions),
            "unsent": sum(session.output.held for session in self._sessions),
        }

    def opened(self, stream: Stream) -> None:
        """The chardev has a peer for us. Raises ActorStopped."""
        self.ref.tell(Opened(stream))

    @receives(Opened)
    async def open_session(self, message: Opened) -> None:
        session = Session(
            self.info.id,
            message.stream,
            self._events,
            self._dispatch,
            self._gate,
            pretty=self.pretty,
            offers_oob=self.offers_oob,
        )
        self._sessions.append(session)
        self.spawn(self._run_session, session, name="session")

    async def _run_session(self, session: Session) -> None:
        try:
            if self._gate.up is not None:
                await self._gate.up.wait()
            await session.run()
        finally:
            self._commands += session.commands
            self._sessions.remove(session)

    @receives(Leave)
    async def leave(self, _message: Leave) -> None:
        for session in list(self._sessions):
            session.leave()

    def set_pretty(self, pretty: bool) -> None:
        """Write for human eyes, or not, from the next message on."""
        self.pretty = pretty
        for session in self._sessions:
            session.pretty = pretty

    async def wait_idle(self) -> None:
        """Wait until no command runs."""
        for session in list(self._sessions):
            await session.wait_idle()

    def abort_commands(self) -> None:
        """End the sessions whose command does not end."""
        for session in self._sessions:
            if session.is_busy:
                session.abort()

    async def stopping(self) -> None:
        async with trio.open_nursery() as nursery:
            for session in list(self._sessions):
                nursery.start_soon(session.flush)
