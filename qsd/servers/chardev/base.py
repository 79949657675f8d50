"""What every character device is: an actor with at most one peer, and at most one user who is given that peer."""

from __future__ import annotations

import contextlib
import logging
from abc import abstractmethod
from collections.abc import Callable
from enum import Enum
from typing import Any, Protocol

import attrs
import trio

from qsd import trace
from qsd.actors.core import Actor, receives
from qsd.actors.faces import ChardevFace
from qsd.actors.qom import QomObject
from qsd.errors import ActorStopped
from qsd.qapi.schema.chardev import ChardevCommon
from qsd.servers.chardev.logfile import LogFile
from qsd.servers.chardev.stream import Stream

log = logging.getLogger("qsd.chardev")

_OPENED = trace.event("chardev_opened")
_CLOSED = trace.event("chardev_closed")


class Origin(Enum):
    """Who asks for a chardev: decides whether descriptor numbers mean anything, and some texts."""

    QMP = "qmp"
    COMMAND_LINE = "command line"


class Frontend(Protocol):
    """The user of a chardev."""

    def opened(self, stream: Stream) -> None:
        """A peer is there; it is the front end's until it closes it. Must neither wait nor raise (but for
        ``ActorStopped``)."""


@attrs.frozen
class Surroundings:
    """What a chardev needs to know of the daemon it is made in.

    ``inform`` prints a line for the user; ``is_background``: the standard descriptors will go away.
    """

    origin: Origin
    inform: Callable[[str], None]
    is_background: bool


@attrs.frozen(eq=False)
class Attach:
    """Give the peer, now or when it comes, to ``frontend``."""

    frontend: Frontend


@attrs.frozen
class Detach:
    """The user goes; a peer it has not closed stays."""


@attrs.frozen
class Describe:
    """Answer ``Facts``."""


@attrs.frozen
class Facts:
    """``filename`` is the reference's text for where the bytes go."""

    filename: str
    has_frontend: bool
    pty: str | None = None


class Chardev(Actor):
    """Base of all backends. A subclass opens itself in ``open`` and calls ``serve`` for each peer it gets.

    ``carries_oob``: whether a monitor offers out-of-band execution on it, as the reference does where a chardev
    can be served by another thread.
    """

    kind = "chardev"
    carries_oob: bool = True

    def __init__(self, label: str, backend: str, options: ChardevCommon, surroundings: Surroundings) -> None:
        super().__init__(f"chardev {label}")
        self.label = label
        self.backend = backend
        self.surroundings = surroundings
        self._common = options
        self._log: LogFile | None = None
        self._frontend: Frontend | None = None
        self.stream: Stream | None = None
        self._watch: trio.CancelScope | None = None

    async def started(self) -> None:
        if self._common.logfile is not None:
            self._log = LogFile(
                self._common.logfile,
                append=bool(self._common.logappend),
                timestamps=bool(self._common.logtimestamp),
            )
        await self.open()

    async def stopping(self) -> None:
        if self.nursery is not None:
            self.nursery.cancel_scope.cancel()  # nobody may wait on what is closed now
        if self.stream is not None:
            self.stream.close()
        self.release()
        if self._log is not None:
            self._log.close()
            self._log = None

    @abstractmethod
    async def open(self) -> None:
        """Get ready; spawn what waits for peers. Raises QmpError."""

    def release(self) -> None:
        """Let go of what ``open`` got; called even when that failed half-way."""

    @abstractmethod
    def filename(self) -> str:
        """The reference's text for where the bytes go."""

    def face(self) -> QomObject:
        """What stands under ``/chardevs``."""
        return ChardevFace(self.backend)

    def statistics(self) -> dict[str, Any]:
        return {**super().statistics(), "filename": self.filename(), "peer": self.stream is not None}

    @property
    def log(self) -> LogFile | None:
        """Where a peer's stream records what is sent."""
        return self._log

    async def serve(self, stream: Stream) -> None:
        """Be connected to ``stream`` until its owner, or whoever watches it, closes it."""
        self.stream = stream
        if _OPENED.enabled:
            _OPENED("{}", self.label)
        try:
            self._hand_over()
            await stream.closed.wait()
        finally:
            if self._watch is not None:
                self._watch.cancel()
            stream.close()
            self.stream = None
            if _CLOSED.enabled:
                _CLOSED("{}", self.label)

    def _hand_over(self) -> None:
        if self.stream is None:
            return
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._frontend is None:
            self._watch = trio.CancelScope()
            self.spawn(self._wait_hangup, self.stream, self._watch, name="unused peer")
            return
        with contextlib.suppress(ActorStopped):
            self._frontend.opened(self.stream)

    async def _wait_hangup(self, stream: Stream, scope: trio.CancelScope) -> None:
        # Nobody reads this peer; it must not keep the place of the next one when it goes.
        with scope, contextlib.suppress(trio.ClosedResourceError):
            await stream.wait_hangup()
            if stream.is_hung_up:
                stream.close()

    @receives(Attach)
    async def attach(self, message: Attach) -> None:
        assert self._frontend is None, "the table gives a chardev to one user only"
        self._frontend = message.frontend
        self._hand_over()

    @receives(Detach)
    async def detach(self, _message: Detach) -> None:
        self._frontend = None
        self._hand_over()

    @receives(Describe)
    async def describe(self, _message: Describe) -> Facts:
        return Facts(self.filename(), self._frontend is not None)
