"""The supervisor's laws: floors that close from the inside within their deadlines, and what a crash means."""

from __future__ import annotations

import contextlib
import logging

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from qsd.actors import supervisor as module
from qsd.actors.core import Actor, receives
from qsd.actors.supervisor import DEADLINES, GRACE, Floor, Supervisor
from qsd.errors import ActorStopped
from qsd.host.shield import shield


@attrs.frozen
class Boom:
    """Crashes the actor (it is only told)."""


@attrs.frozen
class Hang:
    """Is served for ever."""


@attrs.frozen
class Ping:
    """Answers the actor's name."""


class Member(Actor):
    """Writes its end into a log it shares with others; may refuse to end in several ways."""

    kind = "member"

    def __init__(self, name: str, log: list[str], *, kind: str = "member", stuck: bool = False) -> None:
        super().__init__(name)
        self.kind = kind  # type: ignore[misc]  # what the failure table goes by
        self.log = log
        self.stuck = stuck

    async def stopping(self) -> None:
        if self.stuck:
            await trio.sleep_forever()
        self.log.append(self.name)

    @receives(Boom)
    async def boom(self, message: Boom) -> None:
        raise RuntimeError("boom")

    @receives(Hang)
    async def hang(self, message: Hang) -> None:
        await trio.sleep_forever()

    @receives(Ping)
    async def ping(self, message: Ping) -> str:
        return self.name


async def test_floors_close_from_the_inside_and_the_newest_of_a_floor_first() -> None:
    log: list[str] = []
    async with Supervisor() as supervisor:
        for floor in (Floor.EXPORTS, Floor.CORE, Floor.MONITORS, Floor.NODES):
            await supervisor.start(Member(f"{floor.name} a", log), floor)
            await supervisor.start(Member(f"{floor.name} b", log), floor)
    assert [line.split()[0] for line in log] == [
        *("EXPORTS", "EXPORTS", "NODES", "NODES", "MONITORS", "MONITORS", "CORE", "CORE")
    ]


async def test_floors_close_when_the_body_fails_and_its_error_is_told() -> None:
    log: list[str] = []

    async def body() -> None:
        async with Supervisor() as supervisor:
            await supervisor.start(Member("a", log), Floor.CORE)
            raise ValueError("body")

    with pytest.raises(ValueError, match="body"):
        await body()
    assert log == ["a"]


async def test_floors_close_when_the_body_is_cancelled() -> None:
    log: list[str] = []
    with trio.CancelScope() as scope:
        async with Supervisor() as supervisor:
            await supervisor.start(Member("a", log), Floor.CORE)
            scope.cancel()
            await trio.sleep_forever()
    assert log == ["a"]


@pytest.mark.parametrize("hangs_in", ["message", "stopping", "both", "own task"])
async def test_stuck_actor_costs_its_floor_the_deadline_and_no_more(
    hangs_in: str, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    log: list[str] = []

    async def shielded() -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(GRACE / 2)

    supervisor = Supervisor()
    async with supervisor:
        stuck = Member("stuck", log, stuck=hangs_in in ("stopping", "both"))
        await supervisor.start(stuck, Floor.EXPORTS)
        await supervisor.start(Member("good", log), Floor.EXPORTS)
        await supervisor.start(Member("below", log), Floor.NODES)
        if hangs_in in ("message", "both"):
            stuck.ref.tell(Hang())
        if hangs_in == "own task":
            stuck.spawn(shielded, name="slow to end")
        await wait_all_tasks_blocked()
        begin = trio.current_time()
    taken = trio.current_time() - begin
    assert taken <= DEADLINES[Floor.EXPORTS] + GRACE
    assert "good" in log[:-1]
    assert log[-1] == "below"
    assert stuck.stopped.is_set()
    assert ("stuck did not stop within" in caplog.text) == (hangs_in != "own task")


async def test_shields_hold_until_the_daemon_ends(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of a change is none for those who go on; at the end it is what kill -9 leaves."""
    log: list[str] = []

    async def hang() -> None:
        try:
            with shield():
                await trio.sleep_forever()
        finally:
            log.append("cut off")
            with shield():
                await trio.sleep_forever()

    async def hang_later(other: Member) -> None:
        other.spawn(hang, name="storage that hangs")

    async with trio.open_nursery() as nursery:
        async with Supervisor() as supervisor:
            stuck, starter = Member("stuck", log), Member("starter", log)
            await supervisor.start(stuck, Floor.JOBS)
            await supervisor.start(starter, Floor.JOBS)
            starter.spawn(hang_later, stuck, name="start")
            await wait_all_tasks_blocked()
            nursery.start_soon(supervisor.stop, stuck, 1.0)
            await trio.sleep(1000)
            assert log == ["stuck"]
            await supervisor.stop(starter)
            begin = trio.current_time()
        assert trio.current_time() - begin <= DEADLINES[Floor.JOBS] + 2 * GRACE
    assert log == ["stuck", "starter", "cut off"]
    assert "stuck waits for storage that hangs: cut off" in caplog.text


async def test_forced_actor_that_does_let_go_has_time_for_it(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    class Slow(Member):
        async def stopping(self) -> None:
            await trio.sleep(GRACE / 2)
            await super().stopping()

    log: list[str] = []
    async with Supervisor() as supervisor:
        slow = Slow("slow", log)
        await supervisor.start(slow, Floor.EXPORTS)
        slow.ref.tell(Hang())
    assert log == ["slow"]
    assert "slow did not stop" in caplog.text


async def test_crash_means_what_the_table_says(caplog: pytest.LogCaptureFixture) -> None:
    log: list[str] = []
    crashed: list[tuple[str, str]] = []
    async with Supervisor({"guest": lambda actor, error: crashed.append((actor.name, str(error)))}) as supervisor:
        victim = Member("victim", log, kind="guest")
        await supervisor.start(victim, Floor.EXPORTS)
        other = Member("other", log)
        await supervisor.start(other, Floor.EXPORTS)
        victim.ref.tell(Boom())
        await victim.stopped.wait()
        await wait_all_tasks_blocked()
        assert crashed == [("victim", "boom")]
        assert log == ["victim"]
        assert await other.ref.ask(Ping()) == "other"
        assert not supervisor.stop_requested.is_set()
        assert supervisor.actors() == [other]
    assert "victim crashed" in caplog.text
    assert "in boom" in caplog.text  # where it happened


async def test_crash_nobody_planned_for_stops_the_daemon(caplog: pytest.LogCaptureFixture) -> None:
    async with Supervisor() as supervisor:
        victim = Member("victim", [])
        await supervisor.start(victim, Floor.CORE)
        victim.ref.tell(Boom())
        with trio.fail_after(5):
            await supervisor.stop_requested.wait()
    assert isinstance(supervisor.fatal, RuntimeError)
    assert "victim crashed" in caplog.text


async def test_failing_start_is_the_starters_error_and_no_crash(caplog: pytest.LogCaptureFixture) -> None:
    class Unable(Member):
        async def started(self) -> None:
            raise ValueError("cannot")

    log: list[str] = []
    async with Supervisor() as supervisor:
        unable = Unable("unable", log)
        with pytest.raises(ValueError, match="cannot"):
            await supervisor.start(unable, Floor.CORE)
        assert supervisor.actors() == []
        assert log == ["unable"]
        assert not supervisor.stop_requested.is_set()
    assert caplog.text == ""


async def test_cancelled_start_leaves_nobody() -> None:
    class Slow(Member):
        async def started(self) -> None:
            await trio.sleep_forever()

    log: list[str] = []
    async with Supervisor() as supervisor:
        slow = Slow("slow", log)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.start, slow, Floor.CORE)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert supervisor.actors() == []
        assert log == ["slow"]


async def test_crash_in_a_cancelled_start_is_the_actors_and_not_the_starters(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """trio leaves a child whose start was cancelled with the starter, who got its error too."""

    class Crashing(Member):
        async def started(self) -> None:
            nursery.cancel_scope.cancel()
            self.spawn(self.boom, Boom(), name="boom")

    crashes: list[Actor] = []
    async with Supervisor({"member": lambda actor, _error: crashes.append(actor)}) as supervisor:
        crashing = Crashing("crashing", [])
        async with trio.open_nursery() as nursery:
            await supervisor.start(crashing, Floor.CORE)
        assert nursery.cancel_scope.cancelled_caught
        assert crashes == [crashing]
        assert supervisor.actors() == []
        assert not supervisor.stop_requested.is_set()
    assert "crashing crashed" in caplog.text


async def test_nobody_starts_on_a_closing_floor() -> None:
    log: list[str] = []

    class Opener(Member):
        """Tries to bring somebody in while its own floor closes."""

        async def stopping(self) -> None:
            with pytest.raises(ActorStopped, match="late comes too late"):
                await supervisor.start(late, Floor.EXPORTS)
            await supervisor.start(Member("below", log), Floor.NODES)  # that one is still open
            await super().stopping()

    late = Member("late", log)
    async with Supervisor() as supervisor:
        await supervisor.start(Opener("opener", log), Floor.EXPORTS)
    assert log == ["opener", "below"]
    with pytest.raises(ActorStopped):
        await late.ref.ask(Ping())


async def test_actor_that_is_just_starting_when_its_floor_closes_is_stopped_too() -> None:
    log: list[str] = []
    async with Supervisor() as supervisor, trio.open_nursery() as nursery:

        async def start() -> None:
            with contextlib.suppress(ActorStopped):
                await supervisor.start(Member("new", log), Floor.EXPORTS)

        nursery.start_soon(start)
        nursery.start_soon(supervisor.close_floor, Floor.EXPORTS)
    assert log in (["new"], [])  # whoever of the two came first; the floor is empty either way
    assert supervisor.actors() == []


async def test_stop_is_idempotent_and_serves_what_came_before() -> None:
    log: list[str] = []
    async with Supervisor() as supervisor:
        actor = Member("a", log)
        await supervisor.start(actor, Floor.CORE)
        answers: list[str] = []

        async def ask() -> None:
            answers.append(await actor.ref.ask(Ping()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.lowlevel.checkpoint()
            nursery.start_soon(supervisor.stop, actor)
            nursery.start_soon(supervisor.stop, actor)
        await supervisor.stop(actor)
        supervisor.stop_soon(actor)
        assert answers == ["a"]
    assert log == ["a"]


async def test_tree_shows_floors_parents_and_statistics() -> None:
    async with Supervisor() as supervisor:
        server = Member("server", [])
        await supervisor.start(server, Floor.EXPORTS)
        await supervisor.start(Member("client 1", []), Floor.EXPORTS, parent=server)
        await server.ref.ask(Ping())
        tree = supervisor.tree()
    assert "exports/\n  server [member] served=1 queued=0\n    client 1 [member] served=0 queued=0\n" in tree
    assert [line for line in tree.splitlines() if line.endswith("/")] == [f"{f.name.lower()}/" for f in Floor]


def test_every_floor_has_a_deadline() -> None:
    assert set(DEADLINES) == set(Floor)
    assert all(0 < seconds <= 60 for seconds in DEADLINES.values())
    assert module.GRACE <= 1.0


@pytest.fixture(autouse=True)
def log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
