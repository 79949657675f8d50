"""The reactor stays with a lonely client for a while, and never longer than it may."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import trio

from qsd.host import reactor as module
from qsd.host.reactor import EPOLLIN, LINGER_NS, PATIENCE_NS, PollPolicy, Reactor
from qsd.host.threads import ThreadPool

STEP = 1_000


class Clock:
    """Each look at it takes a microsecond."""

    def __init__(self) -> None:
        self.now = 0

    def perf_counter_ns(self) -> int:
        self.now += STEP
        return self.now


class Client:
    """One byte is one request; ``ready`` returns what ``answers`` say, then False."""

    def __init__(self, reactor: Reactor, answers: list[Any]) -> None:
        self.theirs, self.ours = socket.socketpair()
        self.reactor = reactor
        self.answers = answers
        self.calls = 0
        self.crashes: list[Exception] = []
        self.registration = reactor.register(self.ours.fileno(), self.ready, self.crashes.append)

    def ready(self, _events: int) -> bool:
        self.calls += 1
        answer = self.answers.pop(0) if self.answers else False
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            answer()
            return True
        return bool(answer)

    def close(self) -> None:
        self.reactor.unregister(self.registration)
        self.theirs.close()
        self.ours.close()


@pytest.fixture
def reactor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reactor]:
    monkeypatch.setattr(module, "time", Clock())
    monkeypatch.setattr(os, "sched_yield", lambda: None)
    made = Reactor()
    made._window = PATIENCE_NS
    yield made
    made.close()


@pytest.fixture
def client(reactor: Reactor) -> Iterator[Callable[..., Client]]:
    made: list[Client] = []

    def make(*answers: Any) -> Client:
        made.append(Client(reactor, list(answers)))
        made[-1].theirs.send(b"x")
        return made[-1]

    yield make
    for one in made:
        one.close()


def serve(reactor: Reactor, client: Client) -> None:
    """One slice of the loop, in which the socket is found ready once."""
    events = reactor._epoll.poll(0, 8)
    assert (client.ours.fileno(), EPOLLIN) in events
    if reactor._round(events, sys.maxsize) and len(events) == 1 and reactor._window:
        reactor._linger(events[0][0])


def test_a_lonely_client_is_served_again_until_it_stays_away(
    reactor: Reactor, client: Callable[..., Client]
) -> None:
    one = client(True, True, False, True)
    serve(reactor, one)
    assert one.calls == 4 + PATIENCE_NS // STEP
    assert reactor.rounds == 1


def test_it_is_left_for_others_in_time(reactor: Reactor, client: Callable[..., Client]) -> None:
    one = client(*[True] * 10 * (LINGER_NS // STEP))
    serve(reactor, one)
    assert one.calls == 1 + LINGER_NS // STEP


@pytest.mark.parametrize("window", [0, PATIENCE_NS])
def test_nobody_is_waited_for_without_polling_or_when_not_lonely(
    reactor: Reactor, client: Callable[..., Client], window: int
) -> None:
    reactor.use_policy(None, PollPolicy(max_ns=window))
    one = client(not window, True)
    serve(reactor, one)
    assert one.calls == 1


def test_nobody_is_waited_for_while_others_are_ready(reactor: Reactor, client: Callable[..., Client]) -> None:
    one, other = client(True, True), client(False)
    serve(reactor, one)
    assert (one.calls, other.calls) == (1, 1)


def test_who_ends_meanwhile_is_not_called_again(reactor: Reactor, client: Callable[..., Client]) -> None:
    one = client(True)
    one.answers.append(lambda: reactor.unregister(one.registration))
    serve(reactor, one)
    assert one.calls == 2


def test_who_wants_no_events_is_not_called_again(reactor: Reactor, client: Callable[..., Client]) -> None:
    one = client(True)
    one.answers.append(lambda: reactor.set_events(one.registration, 0))
    serve(reactor, one)
    assert one.calls == 2


def test_a_crash_is_told_once_and_what_was_put_off_runs(reactor: Reactor, client: Callable[..., Client]) -> None:
    ran = []
    one = client(True, ValueError("x"), True)
    one.answers.insert(1, lambda: reactor.defer(lambda: ran.append(one.calls), one.crashes.append))
    serve(reactor, one)
    assert ran == [2]
    assert one.calls == 3
    assert [str(error) for error in one.crashes] == ["x"]


def test_slow_handlers_have_their_turns_one_after_the_other_with_trio_between_them(
    reactor: Reactor, client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLICE_NS", 0)
    three = [client(*[False] * 9) for _ in range(3)]
    seen = []
    for _ in range(6):
        assert reactor._serve_slice()
        seen.append([one.calls for one in three])
    assert sorted(seen[2]) == [1, 1, 1]
    assert sorted(seen[5]) == [2, 2, 2]


def test_what_there_was_no_time_for_and_has_ended_meanwhile_is_not_called(
    reactor: Reactor, client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLICE_NS", 0)
    two = [client(False) for _ in range(2)]
    assert reactor._serve_slice()
    (waiting,) = [one for one in two if not one.calls]
    reactor.unregister(waiting.registration)
    assert reactor._serve_slice()
    assert not waiting.calls


class Mail:
    """Work that others have put in: a piece is delivered at a time."""

    def __init__(self, *work: Callable[[], object]) -> None:
        self.is_watched = False
        self.work = list(work)

    @property
    def has_news(self) -> bool:
        return bool(self.work)

    def deliver(self) -> None:
        self.work.pop(0)()


def fail(error: Exception) -> None:
    raise error


def test_mail_is_delivered_while_awake_and_what_it_defers_follows(reactor: Reactor) -> None:
    seen: list[str] = []

    def first() -> None:
        reactor.defer(lambda: seen.append("deferred"), fail)
        seen.append("first")

    reactor.watch(Mail(first, lambda: seen.append("second")))
    reactor._serve_slice()
    assert seen == ["first", "deferred", "second"]


async def test_mail_put_in_just_before_the_loop_sleeps_is_delivered(reactor: Reactor) -> None:
    class Late(Mail):
        @property
        def has_news(self) -> bool:
            if self.is_watched is False and not seen:
                self.work.append(lambda: seen.append("late"))
            return bool(self.work)

    seen: list[str] = []
    late = Late()
    late.is_watched = True
    reactor._window = 0
    reactor.watch(late)
    with trio.move_on_after(0):
        await reactor.run()
    assert seen == ["late"]


async def test_other_threads_wake_up_a_loop_that_sleeps(reactor: Reactor) -> None:
    pool = ThreadPool()
    reactor.register(pool.fileno(), pool.reap, fail)
    reactor.watch(pool)
    done = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reactor.run)
        while not reactor.sleeps:
            await trio.lowlevel.checkpoint()
        await trio.to_thread.run_sync(pool.soon, done.set)
        await done.wait()
        nursery.cancel_scope.cancel()
    pool.close()


async def test_a_task_that_waits_for_what_a_round_brings_runs_next(
    reactor: Reactor, client: Callable[..., Client]
) -> None:
    """It waited for the end of the slice: a flush that writes tables back waits for one thing after the other."""
    brought = trio.Event()
    one = client(brought.set, *[True] * (LINGER_NS // STEP))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reactor.run)
        await brought.wait()
        # trio may let the reactor have one more round first.
        assert one.calls <= 2
        nursery.cancel_scope.cancel()


async def test_a_task_that_is_ready_anyway_waits_for_the_end_of_the_slice(
    reactor: Reactor, client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLICE_NS", 100 * STEP)
    seen = []
    one = client()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reactor.run)
        for _ in range(6):
            await trio.lowlevel.checkpoint()
            seen.append(one.calls)
        nursery.cancel_scope.cancel()
    assert all(later - earlier > 10 for earlier, later in pairwise(seen) if later > earlier)
    assert seen[-1] > 30
