"""A whole daemon in the test's own process, without monitors: commands go straight to the dispatcher."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio
import trio.testing

from qsd.actors.core import Actor
from qsd.actors.supervisor import Supervisor
from qsd.commands.context import Context
from qsd.commands.dispatch import execute
from qsd.daemon import Daemon, build
from qsd.qapi.visit import to_json


@attrs.define(eq=False)
class Whole:
    """The daemon, and the events it has sent."""

    daemon: Daemon
    supervisor: Supervisor
    place: Path
    events: list[Any] = attrs.field(factory=list)

    async def run(self, name: str, /, **arguments: Any) -> Any:
        """Run a QMP command (underscores for dashes)."""
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        return to_json(await execute(Context(self.daemon.services), name, named))

    def actor(self, kind: str) -> Actor:
        """The one actor of a kind."""
        (found,) = [actor for actor in self.supervisor.actors() if actor.kind == kind]
        return found

    async def crash(self, kind: str) -> None:
        """Crash the one actor of a kind, and wait until it is over."""
        actor = self.actor(kind)
        actor.ref.tell(object())  # nobody receives that, and nobody waits for the answer
        with trio.fail_after(10):
            await actor.stopped.wait()
            await trio.testing.wait_all_tasks_blocked()


@asynccontextmanager
async def whole_daemon(place: Path) -> AsyncIterator[Whole]:
    """Build it; at the end its floors close."""
    async with Supervisor() as supervisor:
        daemon = await build(supervisor, is_background=False)
        whole = Whole(daemon, supervisor, place)
        daemon.services.events.subscribe(lambda event: whole.events.append(json.loads(json.dumps(event.message))))
        yield whole
