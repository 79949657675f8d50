"""The object registry and its commands, against what the reference answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio

import qsd.commands.objects  # noqa: F401  # fills the table
from qsd.actors.faces import ChardevFace, MonitorFace, SocketChardevFace
from qsd.actors.objects import Objects, creatable_types
from qsd.commands.registry import COMMANDS
from qsd.errors import ErrorClass, QmpError
from qsd.qapi.core import SCHEMA
from qsd.qapi.visit import from_json, to_json

IOTHREAD_PROPERTIES = [
    {"name": "type", "type": "string"},
    {"name": "thread-pool-min", "type": "int"},
    {"name": "aio-max-batch", "type": "int"},
    {"name": "thread-pool-max", "type": "int"},
    {"name": "poll-max-ns", "type": "int"},
    {"name": "poll-weight", "type": "int"},
    {"name": "poll-grow", "type": "int"},
    {"name": "poll-shrink", "type": "int"},
]


class Daemon:
    """As much of a daemon as the object commands need."""

    def __init__(self) -> None:
        self.objects = Objects()
        self.session: Any = None

    async def __call__(self, name: str, **arguments: Any) -> Any:
        arguments = {key.replace("__", "-"): value for key, value in arguments.items()}
        declared = SCHEMA.commands[name]
        context: Any = SimpleNamespace(services=SimpleNamespace(objects=self.objects), session=self.session)
        return to_json(await COMMANDS[name](context, from_json(declared.args, arguments)))

    async def refusal(self, name: str, **arguments: Any) -> str:
        with pytest.raises(QmpError) as caught:
            await self(name, **arguments)
        if caught.value.error_class is not ErrorClass.GENERIC:
            return f"{caught.value.error_class.value}: {caught.value.desc}"
        return caught.value.desc

    async def iothread(self, name: str, **properties: int) -> None:
        await self("object-add", qom__type="iothread", id=name, **properties)


@pytest.fixture
def daemon() -> Daemon:
    return Daemon()


async def nothing() -> None:
    """A monitor that has nothing to end."""


async def test_root_has_the_references_containers(daemon: Daemon) -> None:
    assert await daemon("qom-list", path="/") == [
        {"name": "type", "type": "string"},
        {"name": "backend", "type": "child<container>"},
        {"name": "objects", "type": "child<container>"},
        {"name": "chardevs", "type": "child<container>"},
        {"name": "audiodevs", "type": "child<container>"},
    ]


@pytest.mark.parametrize("path", ["/objects/io0", "io0", "objects/io0", "//objects//io0/"])
async def test_paths_absolute_and_partial(daemon: Daemon, path: str) -> None:
    await daemon.iothread("io0")
    assert await daemon("qom-list", path=path) == IOTHREAD_PROPERTIES


@pytest.mark.parametrize("path", ["/nope", "nope", "/objects/io0/type", "objects/..", ".", " "])
async def test_paths_to_nothing(daemon: Daemon, path: str) -> None:
    await daemon.iothread("io0")
    assert await daemon.refusal("qom-list", path=path) == f"DeviceNotFound: Device '{path}' not found"


async def test_partial_path_that_means_two_things(daemon: Daemon) -> None:
    await daemon.iothread("io")
    daemon.objects.publish("chardevs", "io", ChardevFace("null"))
    assert await daemon.refusal("qom-list", path="io") == "Path 'io' is ambiguous"
    assert await daemon.refusal("qom-list", path="") == "Path '' is ambiguous"


async def test_iothread_defaults(daemon: Daemon) -> None:
    await daemon.iothread("io0")
    (listed,) = await daemon("qom-list-get", paths=["/objects/io0"])
    assert {row["name"]: row["value"] for row in listed["properties"]} == {
        "type": "iothread",
        "thread-pool-min": 0,
        "aio-max-batch": 0,
        "thread-pool-max": 64,
        "poll-max-ns": 32768,
        "poll-weight": 3,
        "poll-grow": 2,
        "poll-shrink": 2,
    }


@pytest.mark.parametrize(
    ("properties", "desc"),
    [
        ({"poll__max__ns": -1}, "poll-max-ns value must be in range [0, 9223372036854775807]"),
        ({"poll__weight": 64}, "poll-weight value must be in range [0, 63]"),
        ({"poll__grow": -1}, "poll-grow value must be in range [0, 9223372036854775807]"),
        ({"thread__pool__max": 0}, "bad thread-pool-min/thread-pool-max values"),
        ({"thread__pool__min": 65}, "bad thread-pool-min/thread-pool-max values"),
        ({"thread__pool__max": 2**31}, "bad thread-pool-min/thread-pool-max values"),
        (
            {"thread__pool__min": 65, "poll__max__ns": -1},
            "poll-max-ns value must be in range [0, 9223372036854775807]",
        ),
        ({"poll__max__ns": 2**63}, "Invalid parameter type for 'poll-max-ns', expected: integer"),
    ],
)
async def test_iothread_out_of_range(daemon: Daemon, properties: dict[str, int], desc: str) -> None:
    arguments = {"qom-type": "iothread", "id": "io0", **properties}
    assert await daemon.refusal("object-add", **arguments) == desc
    assert daemon.objects.user == {}


async def test_iothread_policy_follows_qom_set(daemon: Daemon) -> None:
    await daemon.iothread("io0")
    await daemon("qom-set", path="io0", property="poll-max-ns", value=5)
    assert daemon.objects.iothreads.get("io0").policy.max_ns == 5


@pytest.mark.parametrize(
    ("name", "value", "desc"),
    [
        ("poll-max-ns", "abc", "Invalid parameter type for 'poll-max-ns', expected: integer"),
        ("poll-max-ns", None, "Invalid parameter type for 'poll-max-ns', expected: integer"),
        ("poll-max-ns", True, "Invalid parameter type for 'poll-max-ns', expected: integer"),
        ("poll-max-ns", -1, "poll-max-ns value must be in range [0, 9223372036854775807]"),
        ("thread-pool-min", 100, "bad thread-pool-min/thread-pool-max values"),
        ("type", "x", "Property 'iothread.type' is not writable"),
        ("nope", "x", "Property 'iothread.nope' not found"),
    ],
)
async def test_qom_set_refused_changes_nothing(daemon: Daemon, name: str, value: Any, desc: str) -> None:
    await daemon.iothread("io0")
    before = await daemon("qom-list-get", paths=["io0"])
    assert await daemon.refusal("qom-set", path="io0", property=name, value=value) == desc
    assert await daemon("qom-list-get", paths=["io0"]) == before


async def test_children_are_properties(daemon: Daemon) -> None:
    await daemon.iothread("io0")
    assert await daemon("qom-get", path="/", property="objects") == "/objects"
    assert await daemon("qom-get", path="/objects", property="io0") == "/objects/io0"
    refusal = await daemon.refusal("qom-set", path="/objects", property="io0", value="x")
    assert refusal == "Property 'container.io0' is not writable"


async def test_qom_get_refusals(daemon: Daemon) -> None:
    await daemon.iothread("io0")
    assert await daemon.refusal("qom-get", path="io0", property="nope") == "Property 'iothread.nope' not found"
    assert await daemon.refusal("qom-get", path="zz", property="type") == "DeviceNotFound: Device 'zz' not found"


async def test_qom_list_get_fails_as_a_whole(daemon: Daemon) -> None:
    assert await daemon("qom-list-get", paths=[]) == []
    assert await daemon.refusal("qom-list-get", paths=["/", "/nope"]) == "DeviceNotFound: Device '/nope' not found"


@pytest.mark.parametrize("name", ["1", "", "a b", "ä", "a/b", "-a"])
async def test_object_add_wants_an_identifier(daemon: Daemon, name: str) -> None:
    with pytest.raises(QmpError) as caught:
        await daemon.iothread(name)
    assert caught.value.desc == "Parameter 'id' expects an identifier"
    assert caught.value.hint == "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."


async def test_object_add_twice(daemon: Daemon) -> None:
    await daemon.iothread("io0")
    refusal = await daemon.refusal("object-add", qom__type="secret", id="io0")
    assert refusal == "attempt to add duplicate property 'io0' to object (type 'container')"


async def test_object_being_made_keeps_its_id(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = trio.Event()

    async def slow(path: str) -> bytes:
        await gate.wait()
        return b"late"

    monkeypatch.setattr("qsd.actors.secret._read", slow)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: daemon("object-add", qom__type="secret", id="s", file="/x"))
        await trio.testing.wait_all_tasks_blocked()
        assert "duplicate" in await daemon.refusal("object-add", qom__type="secret", id="s", data="a")
        assert await daemon.refusal("object-del", id="s") == "object 's' not found"
        gate.set()
    assert daemon.objects.secrets.get("s") == b"late"


async def test_object_del(daemon: Daemon) -> None:
    await daemon.iothread("io0")
    assert await daemon("object-del", id="io0") is None
    for gone in ("io0", "", "objects"):
        assert await daemon.refusal("object-del", id=gone) == f"object '{gone}' not found"


async def test_object_del_of_the_monitor_that_asks(daemon: Daemon) -> None:
    daemon.objects.publish("objects", "compat_monitor0", MonitorFace(nothing, "c0", False, lambda _pretty: None))
    daemon.session = SimpleNamespace(name="compat_monitor0")
    assert await daemon.refusal("object-del", id="compat_monitor0") == "Cannot delete the current QMP monitor"


async def test_object_del_of_another_monitor_ends_it(daemon: Daemon) -> None:
    ended = trio.Event()

    async def remove() -> None:
        ended.set()

    daemon.objects.publish("objects", "m", MonitorFace(remove, "c0", False, lambda _pretty: None))
    daemon.session = SimpleNamespace(name="compat_monitor0")
    await daemon("object-del", id="m")
    assert ended.is_set()
    assert await daemon("qom-list", path="/objects") == [{"name": "type", "type": "string"}]


async def test_monitor_takes_its_id_from_users(daemon: Daemon) -> None:
    daemon.objects.publish("objects", "compat_monitor0", MonitorFace(nothing, "c0", False, lambda _pretty: None))
    assert "duplicate property 'compat_monitor0'" in await daemon.refusal(
        "object-add", qom__type="iothread", id="compat_monitor0"
    )
    (listed,) = await daemon("qom-list-get", paths=["compat_monitor0"])
    assert listed["properties"][1:] == [
        {"name": "chardev", "type": "string", "value": "c0"},
        {"name": "pretty", "type": "bool", "value": False},
        {"name": "close-action", "type": "MonitorQMPCloseAction", "value": "none"},
    ]


async def test_chardevs_are_shown_as_they_are_now(daemon: Daemon) -> None:
    address = {"type": "unix", "path": "/run/x"}
    chardevs = {"sk": SocketChardevFace(lambda: False, lambda: address), "a/b": ChardevFace("null")}
    daemon.objects.mount("chardevs", lambda: chardevs)
    assert await daemon("qom-list", path="/chardevs") == [
        {"name": "type", "type": "string"},
        {"name": "sk", "type": "child<chardev-socket>"},
        {"name": "a/b", "type": "child<chardev-null>"},
    ]
    assert await daemon("qom-get", path="sk", property="addr") == address
    refusal = await daemon.refusal("qom-set", path="sk", property="connected", value=True)
    assert refusal == "Property 'chardev-socket.connected' is not writable"
    del chardevs["sk"]
    assert await daemon.refusal("qom-list", path="sk") == "DeviceNotFound: Device 'sk' not found"


async def test_types_listed_are_those_that_work(daemon: Daemon) -> None:
    creatable = [row["name"] for row in await daemon("qom-list-types", implements="user-creatable")]
    # Types declared by rooms this test does not need may be there as well, when another test has loaded them.
    assert sorted(creatable) == creatable_types()
    assert {"iothread", "secret"} <= set(creatable)
    assert await daemon("qom-list-types", implements="iothread") == [
        {"name": "iothread", "parent": "event-loop-base"}
    ]
    assert await daemon("qom-list-types", implements="nope") == []
    plain = {row["name"] for row in await daemon("qom-list-types")}
    everything = {row["name"] for row in await daemon("qom-list-types", abstract=True)}
    assert {"object", "chardev", "secret_common"} <= everything - plain
    assert {"name": "object", "abstract": True} in await daemon("qom-list-types", abstract=True)


async def test_properties_of_a_type(daemon: Daemon) -> None:
    assert await daemon("qom-list-properties", typename="iothread") == IOTHREAD_PROPERTIES
    names = [row["name"] for row in await daemon("qom-list-properties", typename="secret")]
    assert names == ["type", "iv", "keyid", "format", "file", "data"]
    refusal = await daemon.refusal("qom-list-properties", typename="nope")
    assert refusal == "DeviceNotFound: Class 'nope' not found"
    refusal = await daemon.refusal("qom-list-properties", typename="user-creatable")
    assert refusal == "Parameter 'typename' expects a QOM type"


async def test_secret_properties_can_be_set_and_change_nothing_in_use(daemon: Daemon) -> None:
    await daemon("object-add", qom__type="secret", id="s", data="abc")
    await daemon("qom-set", path="s", property="data", value="new")
    await daemon("qom-set", path="s", property="format", value="base64")
    assert await daemon("qom-get", path="s", property="data") == "new"
    assert await daemon("qom-get", path="s", property="format") == "base64"
    assert daemon.objects.secrets.get("s") == b"abc"
    refusal = await daemon.refusal("qom-set", path="s", property="format", value="hex")
    assert refusal == "Parameter 'format' does not accept value 'hex'"


async def test_unknown_iothread(daemon: Daemon) -> None:
    with pytest.raises(QmpError, match='iothread "x" not found'):
        daemon.objects.iothreads.get("x")
