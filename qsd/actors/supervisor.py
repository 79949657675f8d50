"""The supervisor: starts actors on floors, says what a crash means, closes floors from the inside.

Floors nest in the order of ``Floor``: what an actor uses stands on the same floor or on one below, so closing
goes from the last floor to the first. One table (``FAILURES``) says what the end of an actor by an exception means.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from enum import IntEnum
from typing import Any

import attrs
import trio

from qsd.actors.core import Actor, Stop
from qsd.errors import ActorStopped

log = logging.getLogger("qsd.supervisor")


class Floor(IntEnum):
    """Nesting order: a floor outlives those with a higher number."""

    CORE = 0
    OBJECTS = 1
    CHARDEVS = 2
    MONITORS = 3  # below what they command: clients hear how exports and jobs end
    NODES = 4
    GRAPH = 5
    JOBS = 6
    EXPORTS = 7
    COMMANDS = 8  # first to close: no command runs while the daemon comes apart


# Seconds a floor has to close before it is cut off. Jobs and exports wait for in-flight I/O, hence the longest.
DEADLINES: dict[Floor, float] = {
    Floor.CORE: 2.0,
    Floor.OBJECTS: 2.0,
    Floor.CHARDEVS: 2.0,
    Floor.MONITORS: 2.0,
    Floor.NODES: 30.0,
    Floor.GRAPH: 60.0,
    Floor.JOBS: 30.0,
    Floor.EXPORTS: 30.0,
    Floor.COMMANDS: 2.0,
}

# Seconds an actor that is stopped by force has to let go of what it holds.
GRACE = 1.0

# The most that ``Supervisor.close`` takes, unless a thread waits for storage that hangs.
LONGEST_CLOSE = sum(DEADLINES.values()) + 2 * GRACE * len(Floor)

CrashHandler = Callable[[Actor, BaseException], None]


@attrs.define(eq=False)
class _Place:
    """An actor on its floor."""

    actor: Actor
    floor: Floor
    parent: Actor | None
    scope: trio.CancelScope


class Supervisor:
    """Owner of the nursery tree. Use as ``async with Supervisor() as supervisor``.

    ``failures`` maps ``Actor.kind`` to what a crash means; a kind that is not in it stops the daemon, because a
    state nobody planned for is no state to go on in.
    """

    def __init__(self, failures: dict[str, CrashHandler] | None = None) -> None:
        self.failures: dict[str, CrashHandler] = dict(failures or {})
        self._places: dict[Actor, _Place] = {}
        self._closed: set[Floor] = set()
        self._nurseries: dict[Floor, trio.Nursery] = {}
        self.fatal: BaseException | None = None
        self.stop_requested = trio.Event()
        self._stack: list[AbstractAsyncContextManager[trio.Nursery]] = []

    async def __aenter__(self) -> Supervisor:
        for floor in Floor:
            manager = trio.open_nursery()
            self._nurseries[floor] = await manager.__aenter__()
            self._stack.append(manager)
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        error = exc_info[1]
        with trio.CancelScope(shield=True):
            await self.close()
        for manager in reversed(self._stack):
            await manager.__aexit__(None, None, None)
        if error is not None:
            raise error

    async def start(self, actor: Actor, floor: Floor, parent: Actor | None = None) -> None:
        """Start ``actor`` and return once its ``started`` has run; raises what ``started`` raised.

        On a floor that closes, or has closed, nobody starts any more: raises ``ActorStopped``.
        """
        place = _Place(actor, floor, parent, trio.CancelScope())
        if floor in self._closed:
            actor.conclude()
            raise ActorStopped(f"{actor.name} comes too late: its floor is closing")
        self._places[actor] = place  # before anything waits, so that a closing floor finds it
        failure: list[Exception] = []

        async def live(*, task_status: trio.TaskStatus[None]) -> None:
            up = False

            class _Status:
                def started(self, value: None = None) -> None:
                    nonlocal up
                    up = True
                    task_status.started()

            def failed(error: Exception) -> None:
                if up:
                    self._crashed(actor, error)
                else:
                    failure.append(_only(error))
                    task_status.started()

            try:
                with place.scope:
                    await actor.live(task_status=_Status())
            except Exception as error:  # noqa: BLE001  # the supervisor is where crashes are caught
                failed(error)
            except BaseExceptionGroup as group:
                # Who starts it has been cancelled, and the actor, still a child of theirs, has crashed at that.
                errors, others = group.split(Exception)
                if errors is not None:
                    failed(errors)
                if others is not None:
                    raise others from None
            finally:
                del self._places[actor]

        await self._nurseries[floor].start(live, name=actor.name)
        if failure:
            raise failure[0]

    def _crashed(self, actor: Actor, error: Exception) -> None:
        error = _only(error)
        log.error("%s crashed: %s", actor.name, "".join(traceback.format_exception(error)).rstrip())
        handler = self.failures.get(actor.kind)
        if handler is None:
            self.stop_daemon(error)
        else:
            handler(actor, error)

    def stop_daemon(self, error: BaseException | None = None) -> None:
        """Ask the daemon to stop; with ``error`` it ends as a failure."""
        if error is not None and self.fatal is None:
            self.fatal = error
        self.stop_requested.set()

    async def stop(self, actor: Actor, deadline: float = 30.0) -> None:
        """Stop one actor after what it was sent before; by force after ``deadline`` seconds. Idempotent."""
        if actor.stopped.is_set() or actor not in self._places:
            return
        with trio.move_on_after(deadline):
            with contextlib.suppress(ActorStopped):
                actor.ref.tell(Stop())
            await actor.stopped.wait()
            return
        log.warning("%s did not stop within %g s: forced", actor.name, deadline)
        await self._force(actor)

    def stop_soon(self, actor: Actor) -> None:
        """Stop one actor without waiting for it: the way for an actor, or a task of its own, to end itself."""
        with contextlib.suppress(ActorStopped):
            actor.ref.tell(Stop())

    async def _force(self, actor: Actor) -> None:
        place = self._places.get(actor)
        if place is None:
            return
        actor.hurry(GRACE)
        place.scope.cancel()
        if place.floor in self._closed:
            with trio.move_on_after(2 * GRACE):
                await actor.stopped.wait()
                return
            log.warning("%s waits for storage that hangs: cut off", actor.name)
            actor.shields.drop()
        await actor.stopped.wait()

    def actors(self, floor: Floor | None = None) -> list[Actor]:
        """Who lives (on ``floor``), in order of arrival."""
        return [p.actor for p in self._places.values() if floor is None or p.floor is floor]

    async def close(self) -> None:
        """Close every floor from the inside, each with its deadline, then by force."""
        for floor in sorted(Floor, reverse=True):
            await self.close_floor(floor)

    async def close_floor(self, floor: Floor) -> None:
        """Stop the actors of one floor together, newest first, within the floor's deadline; nobody comes after."""
        self._closed.add(floor)
        async with trio.open_nursery() as nursery:
            for actor in reversed(self.actors(floor)):
                nursery.start_soon(self.stop, actor, DEADLINES[floor])

    def tree(self) -> str:
        """The nursery tree as text: floors, actors by parent, each with its statistics."""
        lines: list[str] = []
        for floor in Floor:
            here = [p for p in self._places.values() if p.floor is floor]
            lines.append(f"{floor.name.lower()}/")
            self._branch(lines, here, None, "  ", {p.actor for p in here})
        return "\n".join(lines) + "\n"

    def _branch(
        self, lines: list[str], places: list[_Place], parent: Actor | None, indent: str, here: set[Actor]
    ) -> None:
        for place in places:
            is_root = place.parent is None or place.parent not in here
            if place.parent is parent or (parent is None and is_root):
                facts = " ".join(f"{k}={v}" for k, v in place.actor.statistics().items())
                lines.append(f"{indent}{place.actor.name} [{place.actor.kind}] {facts}")
                self._branch(lines, places, place.actor, indent + "  ", here)


def _only(error: Exception) -> Exception:
    """Unwrap exception groups that hold a single exception, as actors' nurseries make them."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
