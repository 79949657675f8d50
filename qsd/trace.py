"""Trace events: named points of the daemon that print a line when someone asked for them.

This module is pure and stands beside ``errors``, so that every room can emit. An event is declared where it is
emitted, and asked before its arguments are worked out; a hot path asks once per batch::

    NBD_NEGOTIATE_BEGIN = trace.event("nbd_negotiate_begin")
    ...
    if NBD_NEGOTIATE_BEGIN.enabled:
        NBD_NEGOTIATE_BEGIN("from {}", peer)

Names are in the reference's style (the reference's own where the event means the same).
"""

from __future__ import annotations

import re
from collections.abc import Callable

Sink = Callable[[str], None]


def nowhere(line: str) -> None:
    """Where lines go until the command line says where."""


class TraceEvent:
    """One event; ``enabled`` is a plain bool for callers to check."""

    __slots__ = ("_registry", "enabled", "name")

    def __init__(self, name: str, registry: TraceRegistry) -> None:
        self.name = name
        self.enabled = False
        self._registry = registry

    def __call__(self, text: str = "", *values: object) -> None:
        """Print the event with ``text.format(*values)`` behind its name. Ask ``enabled`` first."""
        if self.enabled:
            self._registry.sink(f"{self.name} {text.format(*values)}".rstrip())


class TraceRegistry:
    """All events, and which of them are on. Patterns also hold for events declared after they were given."""

    def __init__(self) -> None:
        self.events: dict[str, TraceEvent] = {}
        self.sink: Sink = nowhere
        self._patterns: list[tuple[re.Pattern[str], bool]] = []

    def event(self, name: str) -> TraceEvent:
        """Declare an event; declaring it again gives the same one."""
        found = self.events.get(name)
        if found is None:
            found = self.events[name] = TraceEvent(name, self)
            for pattern, on in self._patterns:
                if pattern.fullmatch(name):
                    found.enabled = on
        return found

    def apply(self, text: str) -> str | None:
        """Follow one pattern: a name or a glob with ``*``; a leading ``-`` turns off.

        Returns the name when it is no glob and no such event exists, else None.
        """
        on = not text.startswith("-")
        name = text if on else text[1:]
        pattern = re.compile(".*".join(re.escape(part) for part in name.split("*")), re.DOTALL)
        self._patterns.append((pattern, on))
        hit = False
        for event in self.events.values():
            if pattern.fullmatch(event.name):
                event.enabled = on
                hit = True
        return name if not hit and "*" not in name else None


REGISTRY = TraceRegistry()
event = REGISTRY.event
