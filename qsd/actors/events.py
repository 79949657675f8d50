"""The event bus: whoever has news emits it, every monitor past its negotiation hears it.

Emitting is a plain call, so the data plane may do it. Some events may come in floods (a broken disk reports every
request): ``LIMITS`` names those; of each key the first passes at once, and when its second has passed the latest of
the rest follows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import trio

from qsd.actors.core import Actor

RATE_SECONDS = 1.0

Key = Callable[[dict[str, Any]], Any]


def _whole_event(_data: dict[str, Any]) -> Any:
    return None


def _by(member: str) -> Key:
    return lambda data: data.get(member)


# The reference's limited events, and which of their members tells one flood from another.
LIMITS: dict[str, Key] = {
    "QUORUM_FAILURE": _whole_event,
    "QUORUM_REPORT_BAD": _by("node-name"),
    "VSERPORT_CHANGE": _by("id"),
    "BLOCK_IO_ERROR": _by("qom-path"),
}


@attrs.frozen(eq=False)
class Emitted:
    """One event as monitors send it; ``message`` is shared by all of them and must not be changed."""

    name: str
    message: Mapping[str, Any]


Callback = Callable[[Emitted], None]


class Subscription:
    """A listener's place on the bus; ``close`` gives it up."""

    __slots__ = ("_bus", "callback")

    def __init__(self, bus: EventBus, callback: Callback) -> None:
        self._bus = bus
        self.callback = callback

    def close(self) -> None:
        """Hear nothing more. Idempotent."""
        self._bus.forget(self)


class EventBus:
    """See the module. ``run`` is the task that sends what was held back; events without a limit do not need it."""

    def __init__(self, limits: Mapping[str, Key] | None = None) -> None:
        self._limits = LIMITS if limits is None else limits
        self._subscriptions: list[Subscription] = []
        # For each key whose second runs: when it ends (trio's clock), and the latest event held back.
        self._windows: dict[tuple[str, Any], tuple[float, Emitted | None]] = {}
        self._wake = trio.Event()
        self.emitted = 0

    def subscribe(self, callback: Callback) -> Subscription:
        """Call ``callback`` with every event from now on. It must neither wait nor raise."""
        subscription = Subscription(self, callback)
        self._subscriptions.append(subscription)
        return subscription

    def forget(self, subscription: Subscription) -> None:
        """Drop a subscription (``Subscription.close``)."""
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)

    def emit(self, name: str, data: dict[str, Any] | None = None) -> None:
        """Tell everybody, with the time of now. ``data`` holds plain JSON values; None for an event without."""
        seconds, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
        message: dict[str, Any] = {
            "timestamp": {"seconds": seconds, "microseconds": microseconds},
            "event": name,
        }
        if data is not None:
            message["data"] = data
        event = Emitted(name, message)
        limit = self._limits.get(name)
        if limit is None:
            self._publish(event)
            return
        key = name, limit(data or {})
        window = self._windows.get(key)
        if window is not None:
            self._windows[key] = window[0], event
            return
        self._windows[key] = trio.current_time() + RATE_SECONDS, None
        self._wake.set()
        self._publish(event)

    def _publish(self, event: Emitted) -> None:
        self.emitted += 1
        for subscription in list(self._subscriptions):
            subscription.callback(event)

    async def run(self) -> None:
        """Send what was held back, each when its second ends. Runs until cancelled."""
        while True:
            if not self._windows:
                self._wake = trio.Event()
                await self._wake.wait()
            # All windows are equally long, so the first to be opened is the first to end.
            key, (end, _) = next(iter(self._windows.items()))
            await trio.sleep_until(end)
            _, held = self._windows.pop(key)
            if held is not None:
                self._windows[key] = trio.current_time() + RATE_SECONDS, None
                self._publish(held)


class EventActor(Actor):
    """Keeps the bus running."""

    kind = "events"

    def __init__(self, bus: EventBus) -> None:
        super().__init__("events")
        self._bus = bus

    async def started(self) -> None:
        self.spawn(self._bus.run, name="what was held back")

    def statistics(self) -> dict[str, Any]:
        return {**super().statistics(), "emitted": self._bus.emitted}
