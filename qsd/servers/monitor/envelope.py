"""The envelope of a QMP message: which command is meant, and everything that may be wrong with the wrapping."""

from __future__ import annotations

from typing import Any, Final

import attrs

from qsd.errors import QmpError
from qsd.wire.qmp_json import JsonError

_MEMBERS = frozenset({"execute", "exec-oob", "arguments", "id"})


class NoId:
    """The type of ``NO_ID``: a JSON null is an id like any other."""


NO_ID: Final = NoId()


@attrs.frozen
class Request:
    """A message that is shaped like a command."""

    name: str
    arguments: dict[str, Any]
    is_oob: bool


def id_of(message: Any) -> Any:
    """The id a message is answered with, or ``NO_ID``."""
    return message.get("id", NO_ID) if isinstance(message, dict) else NO_ID


def read(message: Any, *, may_oob: bool) -> Request:
    """Take what the parser gave for a command. Raises QmpError for the first thing wrong, in the reference's words.

    ``may_oob``: the client has enabled out-of-band execution, so ``exec-oob`` is a member.
    """
    if isinstance(message, JsonError):
        raise QmpError(message.desc)
    if not isinstance(message, dict):
        raise QmpError("QMP input must be a JSON object")
    for key in message:
        if key not in _MEMBERS or (key == "exec-oob" and not may_oob):
            raise QmpError(f"QMP input member '{key}' is unexpected")
    for key in ("exec-oob", "execute"):
        if key in message and not isinstance(message[key], str):
            raise QmpError(f"QMP input member '{key}' must be a string")
    if "execute" in message and "exec-oob" in message:
        raise QmpError("QMP input member 'execute' clashes with 'exec-oob'")
    arguments = message.get("arguments", {})
    if not isinstance(arguments, dict):
        raise QmpError("QMP input member 'arguments' must be an object")
    if "exec-oob" in message:
        return Request(message["exec-oob"], arguments, is_oob=True)
    if "execute" not in message:
        raise QmpError("QMP input lacks member 'execute'")
    return Request(message["execute"], arguments, is_oob=False)


def success(value: Any, request_id: Any) -> dict[str, Any]:
    """The answer of a command that did its work."""
    answer = {"return": value}
    if request_id is not NO_ID:
        answer["id"] = request_id
    return answer


def failure(error: QmpError, request_id: Any) -> dict[str, Any]:
    """The answer of one that did not."""
    body = {"class": error.error_class.value, "desc": error.desc}
    return {"error": body} if request_id is NO_ID else {"id": request_id, "error": body}
