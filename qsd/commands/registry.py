"""The table of command implementations: name -> coroutine function, filled by ``@command``.

An implementation takes a ``Context`` and the visited arguments (an instance of the command's argument type, or
None) and returns a value the visitor can print (a qapi object, or plain JSON values in the declared shape), or
None. It raises ``QmpError``. What is declared in ``qsd.qapi.schema`` and not implemented here fails a test.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import attrs


@attrs.frozen
class Ready:
    """An answer that is JSON already: looking through a long one once more would take long."""

    value: Any


Implementation = Callable[[Any, Any], Awaitable[Any]]

COMMANDS: dict[str, Implementation] = {}


def command(name: str) -> Callable[[Implementation], Implementation]:
    """Register the decorated coroutine function as the implementation of QMP command ``name``."""

    def register(implementation: Implementation) -> Implementation:
        assert name not in COMMANDS, f"{name} is implemented twice"
        COMMANDS[name] = implementation
        return implementation

    return register
