"""The data plane's own readiness loop: one nested epoll inside the trio loop.

Sockets and completion rings of the data plane are registered here, not with trio: everything that is ready is
served in one round of plain calls, and trio pays for one wake-up per round instead of one per socket. After a
round the loop polls a little before it sleeps (``PollPolicy``), because waking up costs more than the client needs
to send its next request; it gives trio a turn every millisecond, and an idle daemon sleeps and uses no CPU.

What a round brings may be what a task waits for (metadata that is written back, for one): then it is trio's turn at
once. Tasks that are ready for any other reason wait for the end of the slice.

A client with one request at a time sends the next as soon as it has its answer: its handler says so (``ready``
returns True) and is called again without asking the kernel whether it is ready, which would cost as much as finding
out (``_linger``).

A handler that raises ends itself, not the loop: its ``crashed`` is told, as the supervisor is told of an actor's.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from typing import Protocol

import attrs
import trio

EPOLLIN = select.EPOLLIN
EPOLLOUT = select.EPOLLOUT
EPOLLERR = select.EPOLLERR
EPOLLHUP = select.EPOLLHUP

# Longest time the reactor keeps trio waiting, in nanoseconds: bounds the latency of QMP under full load.
SLICE_NS = 1_000_000
# First polling window when polling starts to pay (the reference starts with the same).
FIRST_WINDOW_NS = 4_000
MAX_EVENTS = 64
# How long a lonely client's handler is called again and again, and how long in vain.
LINGER_NS = 200_000
PATIENCE_NS = 20_000


@attrs.frozen
class PollPolicy:
    """How long to poll before sleeping, as the properties of an iothread object say it. 0 switches polling off."""

    max_ns: int = 100_000
    grow: int = 2
    shrink: int = 2


@attrs.define(eq=False)
class Registration:
    """One descriptor of the data plane. ``ready(events)`` returns True when it has served a lonely client whole."""

    fd: int
    ready: Callable[[int], bool | None]
    crashed: Callable[[Exception], None]
    events: int


class Mailbox(Protocol):
    """What other threads put results into. While it ``is_watched`` they need not wake up the loop."""

    is_watched: bool

    @property
    def has_news(self) -> bool:
        """Whether there is something to deliver."""

    def deliver(self) -> None:
        """Deliver it."""


class Reactor(trio.abc.Instrument):
    """See the module. ``run`` is the task; everything else may be called from any task of the same thread.

    As an instrument of trio's it is told which tasks are ready.
    """

    def __init__(self, policy: PollPolicy | None = None) -> None:
        self._epoll = select.epoll()
        self._registrations: dict[int, Registration] = {}
        self._deferred: list[tuple[Callable[[], None], Callable[[Exception], None]]] = []
        self._in_round = False
        # Events of the last round there was no time for. They come first: the kernel would report all anew.
        self._left: list[tuple[int, int]] = []
        self._default_policy = policy or PollPolicy()
        self.policy = self._default_policy
        self._policies: dict[object, PollPolicy] = {}
        self._window = 0
        self._last_event = 0
        self._mail: Mailbox | None = None
        # Tasks that something in a round has made ready, and that have not run since.
        self._awaited: set[trio.lowlevel.Task] = set()
        self.rounds = 0
        self.events = 0
        self.sleeps = 0

    def close(self) -> None:
        """Close the epoll descriptor."""
        self._epoll.close()

    def statistics(self) -> dict[str, int]:
        """Rounds served, events seen, times slept, the present polling window."""
        return {
            "descriptors": len(self._registrations),
            "rounds": self.rounds,
            "events": self.events,
            "sleeps": self.sleeps,
            "window_ns": self._window,
        }

    def use_policy(self, owner: object, policy: PollPolicy | None) -> None:
        """Poll as ``policy`` says while ``owner`` keeps it; None gives it up. Of several the longest rules."""
        self._policies.pop(owner, None)
        if policy is not None:
            self._policies[owner] = policy
        self.policy = max(self._policies.values(), key=lambda one: one.max_ns, default=self._default_policy)
        self._window = min(self._window, self.policy.max_ns)

    def watch(self, mail: Mailbox) -> None:
        """Look into this while awake."""
        self._mail = mail

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        """A task is ready (trio's instruments)."""
        if self._in_round:
            self._awaited.add(task)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """A task is about to run (trio's instruments)."""
        self._awaited.discard(task)

    # -- registration -----------------------------------------------------------------------------------------

    def register(
        self,
        fd: int,
        ready: Callable[[int], bool | None],
        crashed: Callable[[Exception], None],
        events: int = EPOLLIN,
    ) -> Registration:
        """Call ``ready(events)`` while ``fd`` is ready for ``events`` (level triggered).

        It may be called when it is no longer ready.
        """
        registration = Registration(fd, ready, crashed, events)
        self._epoll.register(fd, events)
        self._registrations[fd] = registration
        return registration

    def set_events(self, registration: Registration, events: int) -> None:
        """Change what a registered descriptor waits for; 0 waits for errors and hang-up only."""
        if events != registration.events:
            registration.events = events
            self._epoll.modify(registration.fd, events)

    def unregister(self, registration: Registration) -> None:
        """Forget a descriptor; call before closing it. Idempotent."""
        if self._registrations.get(registration.fd) is registration:
            del self._registrations[registration.fd]
            self._epoll.unregister(registration.fd)

    def defer(self, function: Callable[[], None], crashed: Callable[[Exception], None]) -> None:
        """Run ``function`` when the present round's completions have been collected; at once outside a round."""
        if self._in_round:
            self._deferred.append((function, crashed))
        else:
            _guarded(function, crashed)

    # -- the loop ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve for ever."""
        trio.lowlevel.add_instrument(self)
        try:
            await self._run()
        finally:
            trio.lowlevel.remove_instrument(self)

    async def _run(self) -> None:
        clock = time.perf_counter_ns
        while True:
            if self._serve_slice():
                await trio.lowlevel.checkpoint()
                continue
            mail = self._mail
            if mail is not None:
                mail.is_watched = False
                if mail.has_news:
                    mail.is_watched = True
                    continue
            asleep = clock()
            self.sleeps += 1
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            if mail is not None:
                mail.is_watched = True
            now = clock()
            self._adapt(now - asleep)
            self._last_event = now

    def _adapt(self, slept: int) -> None:
        policy = self.policy
        if slept > policy.max_ns:
            self._window = self._window // policy.shrink if policy.shrink else 0
            if self._window < FIRST_WINDOW_NS:
                self._window = 0
        elif self._window < policy.max_ns:
            grown = self._window * (policy.grow or 2) if self._window else FIRST_WINDOW_NS
            self._window = min(policy.max_ns, grown)

    def _serve_slice(self) -> bool:
        """Serve rounds until trio's turn (True) or until nothing came for the polling window (False)."""
        awaited = self._awaited
        clock = time.perf_counter_ns
        poll = self._epoll.poll
        mail = self._mail
        end = clock() + SLICE_NS
        while True:
            events = self._left or poll(0, MAX_EVENTS)
            now = clock()
            if mail is not None and mail.has_news:
                self._in_round = True
                mail.deliver()
                self._end_round()
                self._last_event = now
            if events:
                if self._round(events, end) and len(events) == 1 and self._window:
                    self._linger(events[0][0])
                now = clock()
                self._last_event = now
            elif not awaited:
                if now - self._last_event >= self._window:
                    return False
                # The client may live on this very CPU: let it run.
                os.sched_yield()
            if now >= end or awaited:
                return True

    def _linger(self, fd: int) -> None:
        """Call a handler again for as long as it is worth it; everything else waits ``LINGER_NS`` at most."""
        clock = time.perf_counter_ns
        now = served = clock()
        end = now + LINGER_NS
        while now < end and now - served < PATIENCE_NS and not self._awaited:
            registration = self._registrations.get(fd)
            if registration is None or registration.events != EPOLLIN:
                return
            # The client may live on this very CPU.
            os.sched_yield()
            self._in_round = True
            is_served = self._call(registration, EPOLLIN)
            self._end_round()
            now = clock()
            if is_served:
                served = now

    def _round(self, events: list[tuple[int, int]], end: int) -> bool:
        """Call the handlers until it is ``end``; whether one of them has a lonely client."""
        self.rounds += 1
        clock = time.perf_counter_ns
        registrations = self._registrations
        self._in_round = True
        self._left = []
        is_lonely = False
        for number, (fd, mask) in enumerate(events, 1):
            registration = registrations.get(fd)
            if registration is not None:  # not unregistered by an earlier handler
                is_lonely |= self._call(registration, mask)
            if clock() >= end:
                self._left = events[number:]
                break
        self.events += number
        self._end_round()
        return is_lonely

    def _call(self, registration: Registration, mask: int) -> bool:
        try:
            return registration.ready(mask) is True
        except Exception as error:  # noqa: BLE001  # a crash of this handler's owner, told to it
            self.unregister(registration)
            registration.crashed(error)
            return False

    def _end_round(self) -> None:
        while self._deferred:
            deferred, self._deferred = self._deferred, []
            for function, crashed in deferred:
                _guarded(function, crashed)
        self._in_round = False


def _guarded(function: Callable[[], None], crashed: Callable[[Exception], None]) -> None:
    try:
        function()
    except Exception as error:  # noqa: BLE001  # a crash of the function's owner, told to it
        crashed(error)
