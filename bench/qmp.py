"""A QMP client of a few lines: one command at a time, one line a reply, and the time it took."""

from __future__ import annotations

import json
import socket
import time
from typing import Any


class QmpClient:
    """Speaks QMP over a connected socket; reads the greeting and negotiates at once. Raises OSError, ValueError."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("rb")
        self._next()
        self.ask("qmp_capabilities")

    def _next(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise ConnectionError("the monitor hung up")
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise ValueError(f"not a QMP message: {answer!r}")
        return answer

    def ask(self, command: str) -> float:
        """Run a command without arguments; return the seconds until its answer. Events between are passed over."""
        begin = time.monotonic()
        self._connection.sendall(json.dumps({"execute": command}).encode() + b"\n")
        while True:
            answer = self._next()
            if "error" in answer:
                raise ValueError(f"{command}: {answer['error']}")
            if "return" in answer:
                return time.monotonic() - begin

    def close(self) -> None:
        self._lines.close()
        self._connection.close()
