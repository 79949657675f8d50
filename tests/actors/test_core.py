"""The laws of an actor (qsd/actors/core.py), one by one, with actors that do nothing but keep them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qsd.actors.core import Actor, Promise, Ref, Stop, receives
from qsd.errors import ActorStopped


@attrs.frozen
class Add:
    """Append a word to what the actor has heard; answers how many there are."""

    word: str


@attrs.frozen
class Wait:
    """Be busy until ``gate`` opens; then append ``done``."""

    gate: trio.Event


@attrs.frozen
class Fail:
    """Raise an error."""

    error: Exception


@attrs.frozen
class Unknown:
    """Nobody receives this."""


class Listener(Actor):
    """Remembers what it heard, and its own beginning and end."""

    def __init__(self, name: str = "listener") -> None:
        super().__init__(name)
        self.heard: list[str] = []
        self.end_gate: trio.Event | None = None

    async def started(self) -> None:
        self.heard.append("started")

    async def stopping(self) -> None:
        self.heard.append("stopping")
        if self.end_gate is not None:
            await self.end_gate.wait()
        self.heard.append("let go")

    @receives(Add)
    async def add(self, message: Add) -> int:
        self.heard.append(message.word)
        return len(self.heard)

    @receives(Wait)
    async def wait(self, message: Wait) -> str:
        await message.gate.wait()
        self.heard.append("done")
        return "done"

    @receives(Fail)
    async def fail(self, message: Fail) -> None:
        raise message.error


@asynccontextmanager
async def living(actor: Actor) -> AsyncIterator[Ref]:
    """The actor's life without a supervisor: stopped at the end, after what was sent before."""
    async with trio.open_nursery() as nursery:
        await nursery.start(actor.live)
        yield actor.ref
        if not actor.stopped.is_set():
            actor.ref.tell(Stop())


async def asked(ref: Ref, message: Any, answers: list[Any]) -> None:
    """Ask and keep the answer, an error included."""
    try:
        answers.append(await ref.ask(message))
    except Exception as error:  # noqa: BLE001  # the test looks at it
        answers.append(error)


# -- messages ---------------------------------------------------------------------------------------------------


async def test_ask_returns_the_answer_and_tell_does_not_wait() -> None:
    actor = Listener()
    async with living(actor) as ref:
        ref.tell(Add("a"))
        assert await ref.ask(Add("b")) == 3
    assert actor.heard == ["started", "a", "b", "stopping", "let go"]


async def test_messages_are_served_one_at_a_time_in_their_order() -> None:
    actor = Listener()
    gate = trio.Event()
    answers: list[Any] = []
    async with living(actor) as ref, trio.open_nursery() as nursery:
        ref.tell(Wait(gate))
        for word in "abc":
            nursery.start_soon(asked, ref, Add(word), answers)
            await wait_all_tasks_blocked()
        assert actor.heard == ["started"]
        assert actor.statistics()["queued"] == 3
        gate.set()
    assert actor.heard[:5] == ["started", "done", "a", "b", "c"]
    assert answers == [3, 4, 5]


async def test_failing_message_is_an_answer_and_the_actor_goes_on() -> None:
    async with living(Listener()) as ref:
        with pytest.raises(ValueError, match="bad"):
            await ref.ask(Fail(ValueError("bad")))
        assert await ref.ask(Add("a")) == 2


async def test_message_nobody_receives_is_refused() -> None:
    async with living(Listener("ear")) as ref:
        with pytest.raises(TypeError, match="ear does not receive Unknown"):
            await ref.ask(Unknown())


async def test_subclass_inherits_and_overrides_what_it_receives() -> None:
    class Louder(Listener):
        @receives(Add)
        async def add(self, message: Add) -> int:
            return await super().add(Add(message.word.upper()))

    actor = Louder()
    async with living(actor) as ref:
        await ref.ask(Add("a"))
        with pytest.raises(ValueError, match="bad"):
            await ref.ask(Fail(ValueError("bad")))
    assert "A" in actor.heard


# -- a caller that is cancelled ---------------------------------------------------------------------------------


async def test_cancelled_caller_abandons_the_reply_but_not_the_work() -> None:
    actor = Listener()
    gate = trio.Event()
    async with living(actor) as ref:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ref.ask, Wait(gate))
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert actor.heard == ["started"]
        gate.set()
        assert await ref.ask(Add("next")) == 3
    assert actor.heard[1:3] == ["done", "next"]


async def test_caller_cancelled_while_its_message_waits_does_not_take_it_back() -> None:
    actor = Listener()
    gate = trio.Event()
    async with living(actor) as ref:
        ref.tell(Wait(gate))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ref.ask, Add("abandoned"))
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        gate.set()
    assert actor.heard[:3] == ["started", "done", "abandoned"]


async def test_failure_nobody_waits_for_any_more_is_no_crash() -> None:
    actor = Listener()
    gate = trio.Event()
    async with living(actor) as ref:
        ref.tell(Wait(gate))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ref.ask, Fail(ValueError("late")))
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        gate.set()
        assert await ref.ask(Add("a")) == 3


# -- an actor that crashes --------------------------------------------------------------------------------------


class _Unasked(Exception):
    """What a crash is made of."""


async def crash_by_message(actor: Listener) -> None:
    """Nobody waits for the answer that would carry the error."""
    actor.ref.tell(Fail(_Unasked()))


async def crash_by_unknown_message(actor: Listener) -> None:
    """A message nobody receives, and no asker to tell that to."""
    actor.ref.tell(Unknown())


async def crash_by_task(actor: Listener) -> None:
    """A task of the actor's own fails, once the actor is busy and others wait for it."""

    async def fail() -> None:
        await wait_all_tasks_blocked()
        raise _Unasked

    actor.spawn(fail, name="bad task")


Crash = Callable[[Listener], Awaitable[None]]


@pytest.mark.parametrize(
    ("crash", "error"),
    [(crash_by_message, _Unasked), (crash_by_unknown_message, TypeError), (crash_by_task, _Unasked)],
)
async def test_crash_lets_go_turns_everybody_away_and_says_why(crash: Crash, error: type[Exception]) -> None:
    actor = Listener("victim")
    answers: list[Any] = []
    async with trio.open_nursery() as callers:
        with pytest.RaisesGroup(error, flatten_subgroups=True):
            async with trio.open_nursery() as nursery:
                await nursery.start(actor.live)
                await crash(actor)
                for _ in range(2):  # one is served for ever, one waits behind it
                    callers.start_soon(asked, actor.ref, Wait(trio.Event()), answers)
    assert [type(answer) for answer in answers] == [ActorStopped, ActorStopped]
    assert actor.heard == ["started", "stopping", "let go"]
    assert actor.stopped.is_set()
    with pytest.raises(ActorStopped, match="victim has stopped"):
        await actor.ref.ask(Add("b"))
    with pytest.raises(ActorStopped, match="victim has stopped"):
        actor.ref.tell(Add("b"))


async def test_actor_that_cannot_start_still_lets_go_and_turns_away() -> None:
    class Unable(Listener):
        async def started(self) -> None:
            await super().started()
            raise ValueError("no")

    actor = Unable()
    answers: list[Any] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(asked, actor.ref, Add("a"), answers)
        await wait_all_tasks_blocked()
        with pytest.RaisesGroup(ValueError, flatten_subgroups=True):
            await actor.live()
    assert isinstance(answers[0], ActorStopped)
    assert actor.heard == ["started", "stopping", "let go"]


async def test_tasks_of_an_actor_end_with_it() -> None:
    actor = Listener()
    ended: list[str] = []

    async def task() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append("task")

    async with living(actor):
        actor.spawn(task, name="forever")
        await wait_all_tasks_blocked()
        assert ended == []
    assert ended == ["task"]
    with pytest.raises(ActorStopped, match="not running"):
        actor.spawn(task, name="too late")


# -- a mailbox that is closed with messages in it ---------------------------------------------------------------


async def test_messages_before_the_stop_are_served_and_those_behind_it_turned_away() -> None:
    actor = Listener()
    gate = trio.Event()
    answers: list[Any] = []
    async with living(actor) as ref, trio.open_nursery() as nursery:
        ref.tell(Wait(gate))
        nursery.start_soon(asked, ref, Add("before"), answers)
        await wait_all_tasks_blocked()
        ref.tell(Stop())
        nursery.start_soon(asked, ref, Add("behind"), answers)
        ref.tell(Add("told behind"))
        await wait_all_tasks_blocked()
        gate.set()
    assert actor.heard == ["started", "done", "before", "stopping", "let go"]
    assert answers[0] == 3
    assert isinstance(answers[1], ActorStopped)


async def test_messages_that_come_while_it_lets_go_are_turned_away() -> None:
    actor = Listener()
    actor.end_gate = trio.Event()
    answers: list[Any] = []
    async with living(actor) as ref, trio.open_nursery() as nursery:
        ref.tell(Stop())
        await wait_all_tasks_blocked()
        nursery.start_soon(asked, ref, Add("late"), answers)
        nursery.start_soon(asked, ref, Stop(), answers)
        await wait_all_tasks_blocked()
        assert answers == []
        actor.end_gate.set()
    assert sorted(map(str, answers)) == ["None", "listener has stopped"]


async def test_cancelled_actor_answers_the_message_it_was_serving() -> None:
    actor = Listener()
    answers: list[Any] = []
    async with trio.open_nursery() as callers, trio.open_nursery() as nursery:
        await nursery.start(actor.live)
        callers.start_soon(asked, actor.ref, Wait(trio.Event()), answers)
        await wait_all_tasks_blocked()
        callers.start_soon(asked, actor.ref, Add("next"), answers)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert [type(answer) for answer in answers] == [ActorStopped, ActorStopped]
    assert actor.heard == ["started", "stopping", "let go"]


# -- letting go in time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before it lets go", "while it lets go"])
async def test_hurry_bounds_the_letting_go(when: str, autojump_clock: trio.testing.MockClock) -> None:
    actor = Listener()
    actor.end_gate = trio.Event()  # never opens
    begin = trio.current_time()
    async with trio.open_nursery() as nursery:
        await nursery.start(actor.live)
        if when == "before it lets go":
            actor.hurry(2.0)
            nursery.cancel_scope.cancel()
        else:
            actor.ref.tell(Stop())
            await wait_all_tasks_blocked()
            actor.hurry(2.0)
    assert trio.current_time() - begin == pytest.approx(2.0)
    assert actor.heard == ["started", "stopping"]
    assert actor.stopped.is_set()


async def test_promise_is_kept_once() -> None:
    import outcome

    promise = Promise()
    promise.set(outcome.Value(1))
    with pytest.raises(AssertionError):
        promise.set(outcome.Value(2))
    assert await promise.wait() == 1
