"""From a command's name and JSON arguments to its JSON answer: the one way commands are called over QMP."""

from __future__ import annotations

from typing import Any

from qsd.commands.context import Context
from qsd.commands.registry import COMMANDS
from qsd.errors import ErrorClass, QmpError
from qsd.qapi.core import SCHEMA
from qsd.qapi.visit import to_json, visit_arguments


async def execute(context: Context, name: str, arguments: dict[str, Any]) -> Any:
    """Run a command; ``{}`` when it answers nothing. Raises QmpError."""
    declared = SCHEMA.commands.get(name)
    implementation = COMMANDS.get(name)
    if declared is None or implementation is None:
        raise QmpError(f"The command {name} has not been found", error_class=ErrorClass.COMMAND_NOT_FOUND)
    result = await implementation(context, visit_arguments(declared, arguments))
    return {} if result is None else to_json(result)
