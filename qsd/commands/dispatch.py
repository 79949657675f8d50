"""From a command's name and JSON arguments to its JSON answer: the one way commands are called."""

from __future__ import annotations

from typing import Any

from qsd.commands.context import Context
from qsd.commands.registry import COMMANDS, Implementation, Ready
from qsd.errors import ErrorClass, QmpError
from qsd.qapi.core import SCHEMA
from qsd.qapi.visit import to_json, visit_arguments


async def execute(context: Context, name: str, arguments: dict[str, Any]) -> Any:
    """Run a command with JSON arguments; its JSON answer, ``{}`` when it has none. Raises QmpError."""
    declared = SCHEMA.commands.get(name)
    implementation = _implementation(name)
    if declared is None:
        raise _not_found(name)
    result = await implementation(context, visit_arguments(declared, arguments))
    if isinstance(result, Ready):
        return result.value
    return {} if result is None else to_json(result)


async def run(context: Context, name: str, arguments: Any) -> Any:
    """Run a command with visited arguments (the command line has them already); its own answer. Raises QmpError."""
    return await _implementation(name)(context, arguments)


def _implementation(name: str) -> Implementation:
    found = COMMANDS.get(name)
    if found is None:
        raise _not_found(name)
    return found


def _not_found(name: str) -> QmpError:
    return QmpError(f"The command {name} has not been found", error_class=ErrorClass.COMMAND_NOT_FOUND)
