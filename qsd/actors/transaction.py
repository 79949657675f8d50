"""All or nothing: actions are prepared in order, then all committed, or those prepared aborted in reverse.

Cleaning comes last on every path and undoes what was only needed meanwhile, in reverse. Every change of the graph
runs as one transaction; QMP's ``transaction`` does too.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from qsd.host.shield import shield


class Action:
    """One step. ``prepare`` may await and raise; what it raises from leaves nothing behind of its own."""

    async def prepare(self) -> None:
        """Do everything that can fail."""

    def commit(self) -> None:
        """Make it so. Must not raise."""

    def abort(self) -> None:
        """Undo ``prepare``. Must not raise."""

    async def clean(self) -> None:
        """Let go of what was only needed until now. Must not raise."""


@attrs.define(eq=False)
class Wrapper(Action):
    """Another action; a subclass does a step of it otherwise."""

    action: Action

    async def prepare(self) -> None:
        """As the other."""
        await self.action.prepare()

    def commit(self) -> None:
        """As the other."""
        self.action.commit()

    def abort(self) -> None:
        """As the other."""
        self.action.abort()

    async def clean(self) -> None:
        """As the other."""
        await self.action.clean()


class CommitFailed(Exception):
    """Something raised after the point of no return: state nobody planned for. Ends the owner of that state."""


class Group(Action):
    """Several actions as one."""

    def __init__(self, actions: Iterable[Action]) -> None:
        self._actions = actions
        self._prepared: list[Action] = []

    async def prepare(self) -> None:
        """Prepare all in order, or none."""
        try:
            await _prepare(self._actions, self._prepared)
        except BaseException:
            with shield():
                await self.clean()
            raise

    def commit(self) -> None:
        """Commit all."""
        for action in self._prepared:
            try:
                action.commit()
            except Exception as error:
                raise CommitFailed(f"{action!r} could not be committed") from error

    def abort(self) -> None:
        """Undo all, in reverse."""
        _abort(self._prepared)

    async def clean(self) -> None:
        """Clean all, in reverse: one that cannot be must not leave the others' nodes held."""
        failure: CommitFailed | None = None
        while self._prepared:
            action = self._prepared.pop()
            try:
                await action.clean()
            except Exception as error:  # noqa: BLE001  # raised below
                failure = CommitFailed(f"{action!r} could not be cleaned up after")
                failure.__cause__ = error
        if failure is not None:
            raise failure


async def run(actions: Iterable[Action]) -> None:
    """Carry ``actions`` out, or raise what the first failing one raised with everything as it was before."""
    group = Group(actions)
    await group.prepare()
    try:
        group.commit()
    finally:
        with shield():
            await group.clean()


async def _prepare(actions: Iterable[Action], prepared: list[Action]) -> None:
    try:
        for action in actions:
            await action.prepare()
            prepared.append(action)
    except BaseException:
        # Cancelled included: an abandoned change must not stay half made.
        _abort(prepared)
        raise


def _abort(prepared: list[Action]) -> None:
    for action in reversed(prepared):
        try:
            action.abort()
        except Exception as error:
            raise CommitFailed(f"{action!r} could not be undone") from error
