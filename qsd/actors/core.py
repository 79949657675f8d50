"""The actor core: one owner of state, one memory channel, one name.

Laws held here (tests/actors/test_core.py has one test for each):

- others hold a ``Ref`` and say ``await ref.ask(message)`` or ``ref.tell(message)``;
- cancellation stops at the mailbox: an asker that goes away abandons the reply, never the work;
- messages are served one at a time, in the order they came;
- every envelope is answered on every path: an actor that stops turns away what it did not serve.

The mailbox has no bound of its own: every ``ask`` is bounded by its waiting asker, and ``tell`` is for the few
control messages that the data plane must never lose. Backpressure for I/O lives at the edges.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, TypeVar

import attrs
import outcome
import trio

from qsd.errors import ActorStopped
from qsd.host.shield import Shields

log = logging.getLogger("qsd.actor")

T = TypeVar("T")
# Seconds an actor whose task has crashed may take to let go.
CRASH_GRACE = 30.0


@attrs.frozen
class Stop:
    """Ends the mailbox loop after what came before it was served. Sent by the supervisor only."""


class Promise:
    """A reply slot: set once, waited for by at most one asker, who may have gone away."""

    __slots__ = ("_event", "_outcome")

    def __init__(self) -> None:
        self._event = trio.Event()
        self._outcome: outcome.Value[Any] | outcome.Error | None = None

    def set(self, result: outcome.Value[Any] | outcome.Error) -> None:
        """Answer; a second answer is a bug."""
        assert self._outcome is None, "an envelope is answered exactly once"
        self._outcome = result
        self._event.set()

    async def wait(self) -> Any:
        """Wait for the answer and unwrap it."""
        await self._event.wait()
        assert self._outcome is not None
        return self._outcome.unwrap()


@attrs.frozen(eq=False)
class Envelope:
    """A message and where its answer goes (None for ``tell``)."""

    message: Any
    promise: Promise | None

    def answer(self, result: outcome.Value[Any] | outcome.Error) -> None:
        """Give the outcome to the asker, if there is one."""
        if self.promise is not None:
            self.promise.set(result)


class Ref:
    """The address of an actor: all that others may hold of it."""

    __slots__ = ("_send", "name")

    def __init__(self, name: str, send: trio.MemorySendChannel[Envelope]) -> None:
        self.name = name
        self._send = send

    async def ask(self, message: Any) -> Any:
        """Send ``message`` and wait for its answer; raises what the actor answered with, or ``ActorStopped``.

        Cancelling the wait abandons the reply; the actor still does the work.
        """
        promise = Promise()
        self._post(Envelope(message, promise))
        return await promise.wait()

    def tell(self, message: Any) -> None:
        """Send ``message`` and forget; raises ``ActorStopped`` when nobody will ever read it."""
        self._post(Envelope(message, None))

    def _post(self, envelope: Envelope) -> None:
        try:
            self._send.send_nowait(envelope)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise ActorStopped(f"{self.name} has stopped") from None

    def __repr__(self) -> str:
        return f"<Ref {self.name}>"


Handler = Callable[[Any, Any], Awaitable[Any]]


def receives(message_type: type) -> Callable[[T], T]:
    """Mark the method that serves messages of ``message_type``."""

    def mark(method: T) -> T:
        method.__receives__ = message_type  # type: ignore[attr-defined]  # read back by __init_subclass__
        return method

    return mark


class Actor:
    """Base of everything that lives. Subclasses mark async methods with ``@receives(MessageType)``.

    ``started`` runs once before the first message, with the nursery in which the actor may keep tasks of its own
    (they end with it); ``stopping`` runs once after the last, shielded from cancellation by the supervisor's
    deadline, and its own tasks are cancelled after it.
    """

    kind: ClassVar[str] = "actor"
    _handlers: ClassVar[dict[type, Handler]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        table = dict(cls._handlers)
        for member in vars(cls).values():
            message_type = getattr(member, "__receives__", None)
            if message_type is not None:
                table[message_type] = member
        cls._handlers = table

    def __init__(self, name: str) -> None:
        self.name = name
        send, self._receive = trio.open_memory_channel[Envelope](math.inf)
        self.ref = Ref(name, send)
        self._send = send
        self.served = 0
        self.nursery: trio.Nursery | None = None
        self.stopped = trio.Event()
        self._shutting: trio.CancelScope | None = None
        self._grace = math.inf
        self.shields = Shields()

    async def started(self) -> None:
        """Prepare; ``self.nursery`` is open. An exception here is the actor's crash."""

    async def stopping(self) -> None:
        """Let go of what is held. Runs on every path that reached ``started``, crashes included."""

    def statistics(self) -> dict[str, Any]:
        """Facts about the actor, for the tree print and for tests."""
        mailbox = self._receive.statistics()
        return {"served": self.served, "queued": mailbox.current_buffer_used}

    def spawn(self, function: Callable[..., Awaitable[Any]], *args: Any, name: str) -> None:
        """Start a task of this actor's own; ``name`` says what it does."""
        if self.nursery is None:
            raise ActorStopped(f"{self.name} is not running")
        self.nursery.start_soon(self._watched, function, args, name, name=f"{self.name}: {name}")

    async def _watched(self, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...], name: str) -> None:
        # Who starts the task may be another actor.
        self.shields.use()
        try:
            await function(*args)
        except Exception as error:
            # What it has left undone may never end, and letting go waits for that: tell at once, wait for a while.
            log.error("%s: %s failed: %r", self.name, name, error)
            self.hurry(min(self._grace, CRASH_GRACE))
            raise

    async def live(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve messages until ``Stop``. Called by the supervisor; ends by returning or by raising the crash."""
        self.shields.use()
        try:
            async with trio.open_nursery() as nursery:
                self.nursery = nursery
                try:
                    await self.started()
                    task_status.started()
                    await self._serve()
                finally:
                    await self._shut()
                    nursery.cancel_scope.cancel()
        finally:
            self.conclude()

    def conclude(self) -> None:
        """Be over: whoever asks, or has asked, is turned away."""
        self.nursery = None
        self.turn_away()
        self.stopped.set()

    def hurry(self, grace: float) -> None:
        """Give ``stopping`` ``grace`` seconds, from now or from when it begins. The supervisor's last word."""
        self._grace = grace
        if self._shutting is not None:
            self._shutting.deadline = trio.current_time() + grace

    async def _shut(self) -> None:
        # Shielded: letting go must happen on a cancelled path as well. How long it may take is up to the floor's
        # deadline, after which the supervisor says ``hurry``.
        with trio.CancelScope(shield=True, deadline=trio.current_time() + self._grace) as scope:
            self._shutting = scope
            await self.stopping()

    async def _serve(self) -> None:
        async for envelope in self._receive:
            if isinstance(envelope.message, Stop):
                envelope.answer(outcome.Value(None))
                return
            await self._serve_one(envelope)

    async def _serve_one(self, envelope: Envelope) -> None:
        self.served += 1
        # The one place of an actor where every exception is caught: it becomes the reply. A message nobody
        # waits for has no reply to carry it, so there it is the actor's crash.
        try:
            handler = self._handlers.get(type(envelope.message))
            if handler is None:
                raise TypeError(f"{self.name} does not receive {type(envelope.message).__name__}")
            result = await handler(self, envelope.message)
        except Exception as error:
            if envelope.promise is None:
                raise
            envelope.answer(outcome.Error(error))
        except BaseException:
            envelope.answer(outcome.Error(ActorStopped(f"{self.name} stopped before it could answer")))
            raise
        else:
            envelope.answer(outcome.Value(result))

    def turn_away(self) -> None:
        """Close the mailbox and answer ``ActorStopped`` to everything still in it."""
        self._send.close()
        while True:
            try:
                envelope = self._receive.receive_nowait()
            except (trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
                break
            if isinstance(envelope.message, Stop):
                envelope.answer(outcome.Value(None))
            else:
                envelope.answer(outcome.Error(ActorStopped(f"{self.name} has stopped")))
        self._receive.close()
