"""The envelope of a QMP message, checked in the reference's order. Pure."""

from __future__ import annotations

from typing import Any

import attrs

from qsd.errors import QmpError


@attrs.frozen
class Call:
    """A well-formed command message."""

    name: str
    arguments: dict[str, Any]
    is_oob: bool


def read_envelope(message: Any, *, is_oob_enabled: bool) -> Call:
    """Check the shape of one message. Raises QmpError in the reference's words."""
    if not isinstance(message, dict):
        raise QmpError("QMP input must be a JSON object")
    name: str | None = None
    key_used = ""
    arguments: dict[str, Any] = {}
    for key, value in message.items():
        if key == "id":
            continue
        if key == "execute" or (key == "exec-oob" and is_oob_enabled):
            if not isinstance(value, str):
                raise QmpError(f"QMP input member '{key}' must be a string")
            if name is not None:
                raise QmpError("QMP input member 'execute' clashes with 'exec-oob'")
            name, key_used = value, key
        elif key == "arguments":
            if not isinstance(value, dict):
                raise QmpError("QMP input member 'arguments' must be an object")
            arguments = value
        else:
            raise QmpError(f"QMP input member '{key}' is unexpected")
    if name is None:
        raise QmpError("QMP input lacks member 'execute'")
    return Call(name, arguments, key_used == "exec-oob")


def error_answer(error: QmpError) -> dict[str, Any]:
    """The ``error`` member's message, without an id."""
    return {"error": {"class": error.error_class.value, "desc": error.desc}}
