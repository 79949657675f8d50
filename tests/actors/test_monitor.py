"""The QMP monitor on the wire: greeting, negotiation, envelopes, order, events, clients that come and go."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qmp_house import House, close_clients, open_house

from qsd import __version__
from qsd.actors.core import Actor
from qsd.actors.supervisor import Floor
from qsd.errors import QmpError
from qsd.qapi.rows import Rows
from qsd.qapi.schema.control import MonitorMode, MonitorOptions
from qsd.servers.monitor import output, session
from qsd.wire.qmp_json_lexer import Lexer

VERSION = f'{{"qemu": {{"major": 11, "minor": 1, "micro": 3}}, "package": "qsd {__version__}"}}'


@pytest.fixture(autouse=True)
def no_client_stays() -> Iterator[None]:
    yield
    close_clients()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(tmp_path) as made:
        yield made


async def test_greeting_and_negotiation_to_the_byte(house: House) -> None:
    client = house.connect(await house.monitor())
    assert await client.line() == f'{{"QMP": {{"version": {VERSION}, "capabilities": ["oob"]}}}}\r\n'.encode()
    await client.send('{"execute":"qmp_capabilities"}')
    assert await client.line() == b'{"return": {}}\r\n'
    await client.send("{'execute': 'query-version', 'id': [1, null]}")
    assert await client.line() == f'{{"return": {VERSION}, "id": [1, null]}}\r\n'.encode()


async def test_pretty_monitor_writes_for_eyes(house: House) -> None:
    client = house.connect(await house.monitor(pretty=True))
    greeting = [
        "{",
        '    "QMP": {',
        '        "version": {',
        '            "qemu": {',
        '                "major": 11,',
        '                "minor": 1,',
        '                "micro": 3',
        "            },",
        f'            "package": "qsd {__version__}"',
        "        },",
        '        "capabilities": [',
        '            "oob"',
        "        ]",
        "    }",
        "}",
    ]
    assert [await client.line() for _ in greeting] == [f"{line}\r\n".encode() for line in greeting]
    await client.send('{"execute":"qmp_capabilities","id":[]}')
    answer = ["{", '    "return": {', "    },", '    "id": [', "    ]", "}"]
    assert [await client.line() for _ in answer] == [f"{line}\r\n".encode() for line in answer]


GENERIC, NOT_FOUND = "GenericError", "CommandNotFound"
EXPECTING = "Expecting capabilities negotiation with 'qmp_capabilities'"
COMPLETE = "Capabilities negotiation is already complete, command ignored"

# What the reference answered, in one session each: input, class, text (None: it succeeds), rest of the answer.
TRANSCRIPT: list[tuple[str, str | None, str, dict[str, Any]]] = [
    ('{"exec-oob":"query-version"}', GENERIC, "QMP input member 'exec-oob' is unexpected", {}),
    ('{"execute":"nonsense"}', NOT_FOUND, EXPECTING, {}),
    ('{"execute":"nonsense","id":4}', NOT_FOUND, EXPECTING, {"id": 4}),
    (
        '{"execute":"qmp_capabilities","arguments":{"x":3},"id":4}',
        GENERIC,
        "Parameter 'x' is unexpected",
        {"id": 4},
    ),
    (
        '{"execute":"qmp_capabilities","arguments":{"enable":["x"]}}',
        GENERIC,
        "Parameter 'null' does not accept value 'x'",
        {},
    ),
    ('{"execute":"qmp_capabilities","arguments":{"enable":["oob","oob"]},"id":4}', None, "", {"id": 4}),
    ('{"execute":"qmp_capabilities","arguments":{"enable":["oob"]},"id":4}', NOT_FOUND, COMPLETE, {"id": 4}),
    ('{"exec-oob":"query-version"}', GENERIC, "The command query-version does not support OOB", {}),
    ('{"exec-oob":"nonsense"}', NOT_FOUND, "The command nonsense has not been found", {}),
    ('{"exec-oob":"qmp_capabilities"}', GENERIC, "The command qmp_capabilities does not support OOB", {}),
    ('{"exec-oob":3}', GENERIC, "QMP input member 'exec-oob' must be a string", {}),
    ('{"exec-oob":"quit","execute":"quit"}', GENERIC, "QMP input member 'execute' clashes with 'exec-oob'", {}),
    ('{"execute":"quit","exec-oob":"quit"}', GENERIC, "QMP input member 'execute' clashes with 'exec-oob'", {}),
    ('{"execute":3,"exec-oob":3}', GENERIC, "QMP input member 'exec-oob' must be a string", {}),
    ('{"execute":3}', GENERIC, "QMP input member 'execute' must be a string", {}),
    ('{"execute":"quit","arguments":[]}', GENERIC, "QMP input member 'arguments' must be an object", {}),
    ('{"execute":"quit","arguments":null}', GENERIC, "QMP input member 'arguments' must be an object", {}),
    (
        '{"execute":"quit","arguments":[],"id":null}',
        GENERIC,
        "QMP input member 'arguments' must be an object",
        {"id": None},
    ),
    (
        '{"execute":"query-version","arguments":{"x":1},"id":{"a":[1,"é"]}}',
        GENERIC,
        "Parameter 'x' is unexpected",
        {"id": {"a": [1, "é"]}},
    ),
    ('{"id":3}', GENERIC, "QMP input lacks member 'execute'", {"id": 3}),
    ("{}", GENERIC, "QMP input lacks member 'execute'", {}),
    ('{"id":3,"foo":1}', GENERIC, "QMP input member 'foo' is unexpected", {"id": 3}),
    ('{"execute":3,"y":1}', GENERIC, "QMP input member 'y' is unexpected", {}),
    ('{"execute":"quit","x":1,"id":[3]}', GENERIC, "QMP input member 'x' is unexpected", {"id": [3]}),
    ("[]", GENERIC, "QMP input must be a JSON object", {}),
    ("3 ", GENERIC, "QMP input must be a JSON object", {}),
    ('"abc"', GENERIC, "QMP input must be a JSON object", {}),
    ('{"execute":"","id":3}', NOT_FOUND, "The command  has not been found", {"id": 3}),
    ('{"execute":"a%sb\\u0000c"}', NOT_FOUND, "The command a%sb\0c has not been found", {}),
    ('{"execute":"query-version","control":1}', GENERIC, "QMP input member 'control' is unexpected", {}),
    ("garbage\n", GENERIC, "1:895: JSON parse error, invalid keyword 'garbage'", {}),
    ('{"execute": }', GENERIC, "2:13: JSON parse error, expecting value", {}),
    ('{"execute":"qmp_capabilities"}', NOT_FOUND, COMPLETE, {}),
    # What is wrong with the arguments is told first.
    ('{"execute":"qmp_capabilities","arguments":{"x":1}}', GENERIC, "Parameter 'x' is unexpected", {}),
    (
        '{"execute":"qmp_capabilities","arguments":{"enable":["x"]}}',
        GENERIC,
        "Parameter 'null' does not accept value 'x'",
        {},
    ),
]


async def test_transcript_of_the_reference(house: House) -> None:
    client = house.connect(await house.monitor())
    await client.message()
    for sent, error_class, desc, rest in TRANSCRIPT:
        await client.send(sent)
        body = {"return": {}} if error_class is None else {"error": {"class": error_class, "desc": desc}}
        assert await client.message() == body | rest, sent


async def test_commands_are_answered_in_order_however_many_come_at_once(house: House) -> None:
    client = await house.negotiated(await house.monitor())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            client.send, "".join(f'{{"execute":"query-version","id":{number}}}' for number in range(500))
        )
        for number in range(500):
            assert (await client.message())["id"] == number


async def test_nothing_is_read_while_a_command_runs(house: House) -> None:
    started, release = trio.Event(), trio.Event()

    async def slow(_session: Any, _arguments: Any) -> dict[str, Any]:
        started.set()
        await release.wait()
        return {}

    house.commands["slow"] = slow
    client = await house.negotiated(await house.monitor())
    await client.send('{"execute":"slow","id":1}{"execute":"query-version","id":2}')
    await started.wait()
    await trio.testing.wait_all_tasks_blocked()
    assert client.nothing_came()
    release.set()
    assert [(await client.message())["id"] for _ in range(2)] == [1, 2]


async def test_failing_command_in_an_unplanned_way_is_answered_and_logged(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(_session: Any, _arguments: Any) -> None:
        raise ZeroDivisionError("oops")

    async def grouped(_session: Any, _arguments: Any) -> None:
        raise ExceptionGroup("", [ExceptionGroup("", [QmpError("inner")])])

    house.commands.update(broken=broken, grouped=grouped)
    client = await house.negotiated(await house.monitor())
    answer = await client.ask("broken", id=1)
    assert answer == {"id": 1, "error": {"class": GENERIC, "desc": "ZeroDivisionError: oops"}}
    assert "nobody planned for" in caplog.text
    assert (await client.ask("grouped"))["error"]["desc"] == "inner"
    assert "return" in await client.ask("query-version")


# -- events ---------------------------------------------------------------------------------------------------


async def test_events_reach_every_negotiated_monitor(house: House) -> None:
    first = await house.negotiated(await house.monitor("a"))
    second = await house.negotiated(await house.monitor("b", pretty=False))
    third = house.connect(await house.monitor("c"))
    await third.message()
    house.events.emit("JOB_STATUS_CHANGE", {"id": "j", "status": "null"})
    house.events.emit("PLAIN")
    for client in (first, second):
        event = await client.message()
        assert list(event) == ["timestamp", "event", "data"]
        assert event["data"] == {"id": "j", "status": "null"}
        assert set(event["timestamp"]) == {"seconds", "microseconds"}
        assert list(await client.message()) == ["timestamp", "event"]
    assert third.nothing_came()
    assert await third.ask("qmp_capabilities") == {"return": {}}


# -- clients that come and go ---------------------------------------------------------------------------------


async def test_second_client_waits_and_starts_afresh(house: House) -> None:
    path = await house.monitor()
    first = await house.negotiated(path)
    second = house.connect(path)
    await second.send('{"execute":"query-version"}')
    assert "return" in await first.ask("query-version")
    await trio.testing.wait_all_tasks_blocked()
    assert second.nothing_came()
    first.close()
    assert "QMP" in await second.message()
    assert (await second.message())["error"]["desc"] == EXPECTING
    assert await second.ask("qmp_capabilities") == {"return": {}}


async def test_parser_starts_afresh_for_the_next_client(house: House) -> None:
    path = await house.monitor()
    first = house.connect(path)
    await first.message()
    await first.send('\n\n{"execute": "query-')
    first.close()
    second = house.connect(path)
    await second.message()
    await second.send("x")
    await second.send("\n")
    assert (await second.message())["error"]["desc"] == "1:1: JSON parse error, invalid keyword 'x'"


async def test_half_closed_client_gets_its_answers_then_the_end(house: House) -> None:
    client = await house.negotiated(await house.monitor())
    await client.send('{"execute":"query-version","id":1}{"execute":"query-version","id":2}')
    client.socket.shutdown(trio.socket.SHUT_WR)
    assert [(await client.message())["id"] for _ in range(2)] == [1, 2]
    assert await client.message() is None


async def test_client_that_leaves_does_not_stop_its_command_nor_keep_the_next_one_out(
    house: House, autojump_clock: trio.testing.MockClock
) -> None:
    started, release, finished = trio.Event(), trio.Event(), trio.Event()

    async def slow(_session: Any, _arguments: Any) -> dict[str, Any]:
        started.set()
        await release.wait()
        finished.set()
        return {}

    house.commands["slow"] = slow
    path = await house.monitor()
    first = await house.negotiated(path)
    # More behind the command: it is not run for a client that is not there.
    await first.send('{"execute":"slow"}{"execute":"quit"}')
    await started.wait()
    first.close()
    second = house.connect(path)
    await second.negotiate()
    assert not finished.is_set()
    release.set()
    await finished.wait()
    assert "return" in await second.ask("query-version")
    assert second.nothing_came()
    assert not house.supervisor.stop_requested.is_set()


# -- slow readers ---------------------------------------------------------------------------------------------


async def test_client_that_never_reads_costs_bounded_memory_and_hurts_nobody(house: House) -> None:
    big = "x" * 100_000

    async def echo(_session: Any, _arguments: Any) -> str:
        return big

    house.commands["echo"] = echo
    stuck = await house.negotiated(await house.monitor("a"))
    good = await house.negotiated(await house.monitor("b"))
    await stuck.send("".join(f'{{"execute":"echo","id":{number}}}' for number in range(100)))
    await trio.testing.wait_all_tasks_blocked()
    (monitor,) = [actor for actor in house.monitors.actors() if actor.info.chardev == "a"]
    facts = monitor.statistics()
    assert 0 < facts["unsent"] < output.SOFT_LIMIT + 2 * len(big)
    assert facts["commands"] < 100
    assert "return" in await good.ask("query-version")
    # It can still come back: everything is there, in order.
    for number in range(100):
        answer = await stuck.message()
        assert (answer["id"], len(answer["return"])) == (number, len(big))


async def test_client_that_does_not_read_its_events_is_disconnected(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(output, "HARD_LIMIT", 1 << 20)
    path = await house.monitor("a")
    stuck = await house.negotiated(path)
    good = await house.negotiated(await house.monitor("b"))
    for number in range(3000):
        house.events.emit("FLOOD", {"n": number, "x": "x" * 1000})
        if number % 50 == 0:
            for _ in range(50 if number else 1):
                await good.message()
    assert caplog.text.count("does not read its events: disconnected") == 1
    while await stuck.message() is not None:
        pass
    assert "return" in await good.ask("query-version")
    stuck.close()
    await house.negotiated(path)


# -- the end --------------------------------------------------------------------------------------------------


async def test_quit_is_answered_and_what_came_behind_it_is_not(tmp_path: Path) -> None:
    async with open_house(tmp_path) as house:
        other = await house.negotiated(await house.monitor("b"))
        client = await house.negotiated(await house.monitor("a"))
        await client.send('{"execute":"query-version"}{"execute":"quit","id":7}{"execute":"query-version"}')
        assert "return" in await client.message()
        assert await client.message() == {"return": {}, "id": 7}
        assert house.supervisor.stop_requested.is_set()
        await other.send('{"execute":"query-version"}')
    assert await client.message() is None
    assert await other.message() is None
    assert not house.path("a").exists()


async def test_events_of_the_shutdown_reach_the_clients(tmp_path: Path) -> None:
    class Export(Actor):
        kind = "export"

        async def stopping(self) -> None:
            house.events.emit("BLOCK_EXPORT_DELETED", {"id": "e"})

    async with open_house(tmp_path) as house:
        client = await house.negotiated(await house.monitor())
        await house.supervisor.start(Export("export e"), Floor.EXPORTS)
    assert (await client.message())["data"] == {"id": "e"}
    assert await client.message() is None


async def test_shutdown_waits_for_a_running_command(tmp_path: Path) -> None:
    async with open_house(tmp_path) as house:
        started = trio.Event()

        async def slow(_session: Any, _arguments: Any) -> dict[str, Any]:
            started.set()
            await trio.sleep(0.05)
            return {"done": True}

        house.commands["slow"] = slow
        client = await house.negotiated(await house.monitor())
        await client.send('{"execute":"slow"}')
        await started.wait()
    assert await client.message() == {"return": {"done": True}}
    assert await client.message() is None


async def test_shutdown_is_not_kept_by_a_command_that_never_ends_or_a_client_that_never_reads(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_house(tmp_path) as house:

        async def forever(_session: Any, _arguments: Any) -> None:
            await trio.sleep_forever()

        async def much(_session: Any, _arguments: Any) -> str:
            return "x" * 3_000_000

        house.commands.update(forever=forever, much=much)
        first = await house.negotiated(await house.monitor("a"))
        await first.send('{"execute":"forever"}')
        second = await house.negotiated(await house.monitor("b"))
        await second.send('{"execute":"much"}')
        await trio.testing.wait_all_tasks_blocked()
        before = trio.current_time()
    assert trio.current_time() - before < 5
    assert await first.message() is None
    assert "command gate did not stop within 2 s: forced" in caplog.text


async def test_shutdown_is_not_kept_by_commands_behind_answers_nobody_reads(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_house(tmp_path) as house:
        client = await house.negotiated(await house.monitor())
        for _ in range(50):  # some run, the others wait for room for their answers
            await client.send('{"execute":"query-qmp-schema"}')
        await trio.testing.wait_all_tasks_blocked()
        before = trio.current_time()
    assert trio.current_time() - before <= 1.1  # the moment a client is given for what is left for it
    assert caplog.text == ""


# -- out of band ----------------------------------------------------------------------------------------------


async def test_out_of_band_request_is_answered_while_a_command_runs(house: House) -> None:
    release = trio.Event()

    async def slow(_session: Any, _arguments: Any) -> dict[str, Any]:
        await release.wait()
        return {}

    house.commands["slow"] = slow
    client = await house.negotiated(await house.monitor(), "oob")
    await client.send('{"execute":"slow","id":1}{"execute":"query-version","id":2}')
    await client.send('{"exec-oob":"query-version","id":3}')
    assert await client.message() == {
        "id": 3,
        "error": {"class": GENERIC, "desc": "The command query-version does not support OOB"},
    }
    release.set()
    assert [(await client.message())["id"] for _ in range(2)] == [1, 2]


async def test_out_of_band_queue_is_bounded_and_keeps_order(house: House) -> None:
    release = trio.Event()

    async def slow(_session: Any, _arguments: Any) -> dict[str, Any]:
        await release.wait()
        return {}

    house.commands["slow"] = slow
    client = await house.negotiated(await house.monitor(), "oob")
    await client.send('{"execute":"slow","id":-1}')
    await client.send("".join(f'{{"execute":"query-version","id":{number}}}' for number in range(50)))
    # Behind a full queue even this one has to wait.
    await client.send('{"exec-oob":"query-version","id":"oob"}')
    await trio.testing.wait_all_tasks_blocked()
    assert client.nothing_came()
    release.set()
    ids = [(await client.message())["id"] for _ in range(52)]
    assert [number for number in ids if number != "oob"] == list(range(-1, 50))
    client.socket.shutdown(trio.socket.SHUT_WR)
    assert await client.message() is None


# -- the table ------------------------------------------------------------------------------------------------


async def test_refused_monitors_leave_nothing(house: House) -> None:
    await house.chardev("c", "null")
    await house.monitors.add(MonitorOptions(chardev="c", id="taken"))
    refused = [
        (MonitorOptions(chardev="b"), 'chardev "b" not found'),
        (MonitorOptions(chardev="b", id="m"), 'chardev "b" not found'),
        (MonitorOptions(chardev="c"), "chardev 'c' is already in use"),
        (MonitorOptions(chardev="c", mode=MonitorMode.READLINE), "Only QMP is supported"),
        (MonitorOptions(chardev="c", id="1"), "Parameter 'id' expects an identifier"),
        (
            MonitorOptions(chardev="c", id="taken"),
            "attempt to add duplicate property 'taken' to object (type 'container')",
        ),
    ]
    for options, text in refused:
        with pytest.raises(QmpError) as caught:
            await house.monitors.add(options)
        assert caught.value.desc == text
    assert [info.id for info in house.monitors.infos()] == ["taken"]
    assert set(house.objects.user) == {"taken"}
    assert len(house.supervisor.actors(Floor.MONITORS)) == 1


async def test_pretty_is_switched_through_the_object(house: House) -> None:
    client = await house.negotiated(await house.monitor("a"))
    body = {"path": "/objects/compat_monitor0", "property": "pretty"}
    assert (await client.ask("qom-get", body))["return"] is False
    await client.send(json.dumps({"execute": "qom-set", "arguments": {**body, "value": True}}))
    assert [await client.line() for _ in range(4)] == [b"{\r\n", b'    "return": {\r\n', b"    }\r\n", b"}\r\n"]
    await client.send(json.dumps({"execute": "qom-set", "arguments": {**body, "value": False}}))
    assert await client.message() == {"return": {}}
    answer = await client.ask("qom-set", {**body, "value": 1})
    assert answer["error"]["desc"] == "Invalid parameter type for 'pretty', expected: boolean"


async def test_monitors_are_objects_and_cannot_delete_themselves(house: House) -> None:
    client = await house.negotiated(await house.monitor("a"))
    other_path = await house.monitor("b", id="second", pretty=True)
    other = house.connect(other_path)
    assert await other.line() == b"{\r\n"
    answer = await client.ask("qom-list", {"path": "/objects"})
    assert {(row["name"], row["type"]) for row in answer["return"]} >= {
        ("compat_monitor0", "child<monitor-qmp>"),
        ("second", "child<monitor-qmp>"),
    }
    assert (await client.ask("qom-get", {"path": "/objects/second", "property": "chardev"}))["return"] == "b"
    answer = await client.ask("object-del", {"id": "compat_monitor0"})
    assert answer["error"]["desc"] == "Cannot delete the current QMP monitor"
    assert await client.ask("object-del", {"id": "second"}) == {"return": {}}
    assert [info.id for info in house.monitors.infos()] == ["compat_monitor0"]
    # The client of the deleted monitor stays connected, to a chardev that may now go.
    facts = (await client.ask("query-chardev"))["return"]
    assert facts[1] == {
        "label": "b",
        "filename": f"unix:{other_path},server=on",
        "frontend-open": False,
    }
    assert await client.ask("chardev-remove", {"id": "b"}) == {"return": {}}
    while await other.line():
        pass


async def test_crashed_monitor_frees_its_chardev_and_its_name(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = await house.monitor("a", id="m")
    good = await house.negotiated(await house.monitor("b"))
    client = house.connect(path)
    await client.message()
    with monkeypatch.context() as patch:
        patch.setattr("qsd.servers.monitor.session.Session._take", None)
        await client.send("{}")
        assert await client.message() is None
        await trio.testing.wait_all_tasks_blocked()
    assert "monitor m crashed" in caplog.text
    caplog.clear()
    await house.monitors.add(MonitorOptions(chardev="a", id="m"))
    await house.negotiated(path)
    assert "return" in await good.ask("query-version")


async def test_want_of_memory_ends_neither_the_session_nor_the_monitor(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For a command, for its answer, and for what came. All but the first were the end of the monitor."""

    def fail(*_args: Any, **_more: Any) -> Any:
        raise MemoryError

    async def greedy(_session: Any, _arguments: Any) -> None:
        raise MemoryError

    house.commands["greedy"] = greedy
    refusal = {"class": "GenericError", "desc": "Cannot allocate memory"}
    client = await house.negotiated(await house.monitor())
    assert await client.ask("greedy", id=1) == {"id": 1, "error": refusal}
    with monkeypatch.context() as patch:
        patch.setattr(session, "pieces", fail)
        assert await client.ask("query-version", id=2) == {"id": 2, "error": refusal}
    with monkeypatch.context() as patch:
        patch.setattr(Lexer, "feed", fail)
        await client.send("'")
        assert await client.message() == {
            "error": {"class": "GenericError", "desc": "JSON parse error, out of memory"}
        }
    assert "return" in await client.ask("query-version")
    assert not caplog.text


class FullStream:
    """Takes half of what is sent."""

    def __init__(self) -> None:
        self.closed = trio.Event()
        self.close = self.closed.set

    def send_nowait(self, data: memoryview) -> int:
        return len(data) // 2


async def test_client_whose_answer_cannot_be_kept_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the half of it, and could make nothing of what came next."""

    class Greedy(bytearray):
        def __init__(self, _data: bytes) -> None:
            raise MemoryError

    stream: Any = FullStream()
    made = output.Output(stream, "m")
    with monkeypatch.context() as patch:
        patch.setattr(output, "bytearray", Greedy, raising=False)
        made.put(b"more than it takes")
    assert stream.closed.is_set()
    assert made.held == 0


# -- hostile and torn input -----------------------------------------------------------------------------------

SESSION = (
    b'{"execute":"qmp_capabilities"}\r\n{"execute":"query-version","id":"\xc3\xa9"}'
    b'{\'execute\':\'query-chardev\'}  \n garbage \xff{"execute":"nonsense","id":{"a":[1,{}]}}'
    b'{"execute":"query-chardev-backends","arguments":{}}[1]"s"{"id":1e3}'
    b'{"execute":"query-version","id":"the end"}'
)


async def talk(house: House, path: Path, pieces: list[bytes]) -> list[bytes]:
    client = house.connect(path)
    answers = []
    for piece in pieces:
        await client.send(piece)
        await trio.lowlevel.checkpoint()
    while True:
        answers.append(await client.line())
        if b"the end" in answers[-1]:
            client.close()
            return answers


def test_session_is_the_same_however_it_is_split(tmp_path: Path) -> None:
    seen: list[list[bytes]] = []

    @given(st.lists(st.integers(0, len(SESSION)), max_size=30))
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def check(cuts: list[int]) -> None:
        edges = [0, *sorted(cuts), len(SESSION)]
        pieces = [SESSION[start:end] for start, end in itertools.pairwise(edges) if start < end]
        trio.run(one, pieces)

    async def one(pieces: list[bytes]) -> None:
        async with open_house(tmp_path) as house:
            seen.append(await talk(house, await house.monitor("m"), pieces))

    trio.run(one, [bytes([byte]) for byte in SESSION])
    check()
    assert len(seen) > 10
    assert all(answers == seen[0] for answers in seen)
    assert len(seen[0]) == 12


def test_junk_never_ends_the_monitor(tmp_path: Path) -> None:
    junk = st.one_of(
        st.binary(max_size=200),
        st.text(alphabet='{}[]",:\\ab01 \n', max_size=200).map(str.encode),
    )

    @given(st.lists(junk, max_size=10))
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def check(pieces: list[bytes]) -> None:
        trio.run(one, pieces)

    async def one(pieces: list[bytes]) -> None:
        async with open_house(tmp_path) as house:
            path = await house.monitor("m")
            client = house.connect(path)
            for piece in pieces:
                await client.send(piece)
            client.close()
            again = await house.negotiated(path)
            assert "return" in await again.ask("query-version")

    check()


@pytest.mark.parametrize(
    ("attack", "text"),
    [
        (b'{"a":' * 2000 + b"1" + b"}" * 2000, "JSON nesting depth limit exceeded"),
        (b"[" * 1025 + b"]" * 1025, "JSON nesting depth limit exceeded"),
        (b'{"execute":"' + b"x" * 300_000 + b'"}', "The command " + "x" * 300_000 + " has not been found"),
        (b"\xff", "stray"),
        (b"\x00" * 3, "stray"),
    ],
    ids=["objects", "arrays", "long name", "ff", "nul"],
)
async def test_attack_is_answered_and_survived(house: House, attack: bytes, text: str) -> None:
    client = await house.negotiated(await house.monitor())
    await client.send(attack)
    assert text in (await client.message())["error"]["desc"]
    await client.send('{"execute":"query-version","id":"after"}')
    while (await client.message()).get("id") != "after":
        pass


async def test_long_input_lets_others_have_their_turn(house: House) -> None:
    """Odd JSON is slow to parse; between two pieces of it other monitors are served."""
    odd = await house.negotiated(await house.monitor("a"))
    good = await house.negotiated(await house.monitor("b"))
    body = b'{"execute":"x","arguments":{"a":"' + b"\\ud83d\\ude00" * 8000 + b'"}}'
    async with trio.open_nursery() as nursery:
        nursery.start_soon(odd.send, body)
        answered = 0
        while odd.nothing_came():
            assert "return" in await good.ask("query-version")
            answered += 1
    assert answered > 3
    assert (await odd.message())["error"]["class"] == NOT_FOUND


async def test_long_answer_lets_others_have_their_turn(house: House) -> None:
    """An image may have 65535 snapshots; events come before such an answer or after it, never inside."""

    async def long(_session: Any, _arguments: Any) -> dict[str, Any]:
        return {"rows": Rows(range(20000), lambda number: {"number": number})}

    house.commands["long"] = long
    one = await house.negotiated(await house.monitor("a"))
    other = await house.negotiated(await house.monitor("b"))
    await one.send('{"execute":"long"}')
    answered = 0
    while answered < 5 and one.nothing_came():
        assert "return" in await other.ask("query-version")
        answered += 1
    assert answered == 5
    house.events.emit("PLAIN")
    event, answer = await one.message(), await one.message()
    assert event["event"] == "PLAIN"
    assert [row["number"] for row in answer["return"]["rows"]] == list(range(20000))


def test_quiet_log(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    async def main() -> None:
        async with open_house(tmp_path) as house:
            client = await house.negotiated(await house.monitor())
            await client.ask("query-version")

    with caplog.at_level(logging.WARNING):
        trio.run(main)
    assert caplog.text == ""
