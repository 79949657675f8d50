"""The event bus: order, time stamps, and floods held to one a second."""

from __future__ import annotations

import time

import pytest
import trio
import trio.testing

from qsd.actors.events import Emitted, EventBus


@pytest.fixture
def heard() -> list[tuple[str, object]]:
    return []


def listener(heard: list[tuple[str, object]]):
    def hear(event: Emitted) -> None:
        heard.append((event.name, event.message.get("data")))

    return hear


def test_events_reach_every_subscriber_in_order(heard) -> None:
    bus = EventBus()
    other: list[tuple[str, object]] = []
    bus.subscribe(listener(heard))
    subscription = bus.subscribe(listener(other))
    bus.emit("A", {"id": "x"})
    bus.emit("B")
    subscription.close()
    subscription.close()
    bus.emit("C")
    assert heard == [("A", {"id": "x"}), ("B", None), ("C", None)]
    assert other == heard[:2]


def test_event_carries_the_time_and_data_only_if_it_has_some() -> None:
    bus = EventBus()
    seen: list[Emitted] = []
    bus.subscribe(seen.append)
    before = time.time_ns() // 1000
    bus.emit("A")
    bus.emit("B", {})
    after = time.time_ns() // 1000
    stamp = seen[0].message["timestamp"]
    assert before <= stamp["seconds"] * 1_000_000 + stamp["microseconds"] <= after
    assert list(seen[0].message) == ["timestamp", "event"]
    assert seen[1].message["data"] == {}


def test_subscriber_that_leaves_during_an_event_hurts_nobody(heard) -> None:
    bus = EventBus()
    first = bus.subscribe(lambda _event: first.close())
    bus.subscribe(listener(heard))
    bus.emit("A")
    bus.emit("B")
    assert [name for name, _ in heard] == ["A", "B"]


async def test_flood_is_held_to_one_a_second_and_the_latest_wins(
    heard, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bus = EventBus({"FLOOD": lambda data: data["key"]})
    bus.subscribe(listener(heard))
    nursery.start_soon(bus.run)
    for number in range(5):
        bus.emit("FLOOD", {"key": "a", "n": number})
    bus.emit("FLOOD", {"key": "b", "n": 9})
    bus.emit("OTHER")
    bus.emit("OTHER")
    assert [data and data["n"] for _, data in heard] == [0, 9, None, None]
    await trio.sleep(0.99)
    assert len(heard) == 4
    await trio.sleep(0.02)
    assert heard[4:] == [("FLOOD", {"key": "a", "n": 4})]
    # The event sent late opens the next second; the quiet key is free again.
    bus.emit("FLOOD", {"key": "a", "n": 5})
    bus.emit("FLOOD", {"key": "b", "n": 6})
    assert [data["n"] for _, data in heard[5:]] == [6]
    await trio.sleep(1)
    assert [data["n"] for _, data in heard[6:]] == [5]
    await trio.sleep(5)
    assert len(heard) == 7


async def test_limited_events_of_the_reference_are_limited_by_their_key(
    heard, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bus = EventBus()
    bus.subscribe(listener(heard))
    nursery.start_soon(bus.run)
    for node in ("q1", "q2", "q1"):
        bus.emit("QUORUM_REPORT_BAD", {"node-name": node})
    for _ in range(2):
        bus.emit("QUORUM_FAILURE", {"reference": "x"})
    assert len(heard) == 3
    await trio.sleep(1.5)
    assert len(heard) == 5
