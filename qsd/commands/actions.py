"""The table of what can be part of a transaction, filled by ``@action``; most of it is also a command of its own.

What is registered makes the action of the services and the visited arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qsd.actors.graph_actions import GraphAction
from qsd.commands.context import Context, Services
from qsd.commands.registry import command

MakeAction = Callable[[Services, Any], GraphAction]

ACTIONS: dict[str, MakeAction] = {}


def action(name: str, *, is_command: bool = True) -> Callable[[MakeAction], MakeAction]:
    """Register the decorated function as what makes the action ``name``, and as the command of that name."""

    def register(make: MakeAction) -> MakeAction:
        assert name not in ACTIONS, f"{name} is made twice"
        ACTIONS[name] = make
        if is_command:

            @command(name)
            async def run_alone(context: Context, args: Any) -> None:
                await context.services.graph.transact([make(context.services, args)])

        return make

    return register
