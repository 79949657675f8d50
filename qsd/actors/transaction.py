"""All or nothing: actions are prepared in order, then all committed, or those prepared aborted in reverse.

Cleaning comes last on every path and undoes what was only needed meanwhile, in reverse. Every change of the graph
runs as one transaction; QMP's ``transaction`` does too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import trio


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


class CommitFailed(Exception):
    """Something raised after the point of no return: state nobody planned for. Ends the owner of that state."""


async def run(actions: Sequence[Action]) -> None:
    """Carry ``actions`` out, or raise what the first failing one raised with everything as it was before."""
    prepared: list[Action] = []
    try:
        await _prepare(actions, prepared)
        _finish(prepared)
    finally:
        with trio.CancelScope(shield=True):
            for action in reversed(prepared):
                await action.clean()


async def _prepare(actions: Iterable[Action], prepared: list[Action]) -> None:
    try:
        for action in actions:
            await action.prepare()
            prepared.append(action)
    except BaseException as reason:
        # Cancelled included: an abandoned change must not stay half made.
        for action in reversed(prepared):
            try:
                action.abort()
            except Exception as error:
                raise CommitFailed(f"{action!r} could not be undone after: {reason}") from error
        raise


def _finish(prepared: list[Action]) -> None:
    for action in prepared:
        try:
            action.commit()
        except Exception as error:
            raise CommitFailed(f"{action!r} could not be committed") from error
