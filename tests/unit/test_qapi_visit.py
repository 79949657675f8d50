"""Visiting: JSON to declared values and back, with the reference's words for whatever is wrong."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qsd.qapi.schema
from qsd.errors import QmpError
from qsd.qapi.core import (
    NULL,
    SCHEMA,
    Alternate,
    Int8,
    NullType,
    Size,
    Uint8,
    Uint64,
    branch,
    enum,
    resolve,
    struct,
    union,
)
from qsd.qapi.schema import block, block_info, chardev, control, exports, sockets
from qsd.qapi.visit import from_json, from_keyval, to_json, visit_arguments

_REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "qmp_arguments_reference.json").read_text())["rows"]


def _refusal(wanted: Any, value: Any, path: str = "") -> str:
    with pytest.raises(QmpError) as caught:
        from_json(wanted, value, path)
    return caught.value.desc


def test_arguments_get_the_answers_of_the_reference() -> None:
    assert len(_REFERENCE) > 150
    for command, arguments, text in _REFERENCE:
        try:
            visit_arguments(SCHEMA.commands[command], arguments)
            found = ""
        except QmpError as error:
            found = error.desc
        assert found == text, (command, arguments)


def test_flat_union_gives_one_value_with_base_and_branch() -> None:
    options = from_json(
        block.BlockdevOptions,
        {"driver": "file", "node-name": "n", "filename": "x", "cache": {"no-flush": True}, "aio": "io_uring"},
    )
    assert isinstance(options, block.BlockdevOptionsFile)
    assert (options.driver, options.node_name, options.filename) == (block.BlockdevDriver.FILE, "n", "x")
    assert options.cache == block.BlockdevCacheOptions(no_flush=True)
    assert options.aio is block.BlockdevAioOptions.IO_URING
    assert options.read_only is None
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        options.filename = "y"  # type: ignore[misc] # that it cannot be assigned is the point


def test_flat_address_is_an_instance_of_the_plain_one() -> None:
    options = from_keyval(
        exports.NbdServerOptions, {"addr": {"type": "inet", "host": "h", "port": "1", "to": "0x10"}}
    )
    assert isinstance(options.addr, sockets.InetSocketAddress)
    assert isinstance(options.addr, sockets.SocketAddress)
    assert (options.addr.host, options.addr.to) == ("h", 16)
    assert sockets.plain_address(options.addr) is options.addr


def test_legacy_union_holds_its_data() -> None:
    args = from_json(exports.NbdServerOptionsLegacy, {"addr": {"type": "unix", "data": {"path": "p"}}})
    assert args.addr.data == sockets.UnixSocketAddress(path="p")
    assert sockets.plain_address(args.addr) is args.addr.data
    backend = from_json(chardev.ChardevBackend, {"type": "file", "data": {"out": "o", "in": "i"}})
    assert isinstance(backend.data, chardev.ChardevFile)
    assert (backend.data.out, backend.data.in_) == ("o", "i")


@pytest.mark.parametrize("given_value", ["a", ["a", "b"], None])
def test_alternate_of_string_and_list(given_value: Any) -> None:
    message = {"type": "nbd", "id": "e", "node-name": "n"} | ({"iothread": given_value} if given_value else {})
    options = from_json(exports.BlockExportOptions, message)
    assert options.iothread == (tuple(given_value) if isinstance(given_value, list) else given_value)


def test_alternate_with_null_tells_null_from_absent() -> None:
    @struct("test-nullable")
    class Nullable:
        ref: Annotated[str | NullType, Alternate("StrOrNull")] | None = None

    globals_free = from_json(Nullable, {"ref": None})
    assert globals_free.ref is NULL
    assert from_json(Nullable, {}).ref is None
    assert to_json(globals_free) == {"ref": None}
    assert _refusal(Nullable, {"ref": 1}) == "Invalid parameter type for 'ref', expected: StrOrNull"


@enum("TestKind")
class _Kind(str, Enum):
    PLAIN = "plain"
    RICH = "rich"


@union("TestUnion", tag="kind", default=_Kind.RICH)
class _Union:
    kind: _Kind | None = None


@branch(_Union, _Kind.RICH, name="TestUnionRich")
class _Rich(_Union):
    tiny: Int8 | None = None
    byte: Uint8 | None = None
    wide: Uint64 | None = None
    size: Size | None = None
    number: float | None = None
    anything: Any | None = None


def test_union_without_its_tag_takes_the_default() -> None:
    assert from_json(_Union, {"byte": 3}) == _Rich(byte=3)
    assert type(from_json(_Union, {"kind": "plain"})) is _Union
    assert _refusal(_Union, {"kind": "plain", "byte": 3}) == "Parameter 'byte' is unexpected"


@pytest.mark.parametrize(
    ("member", "value", "text"),
    [
        ("tiny", 128, "Parameter 'tiny' expects int8_t"),
        ("tiny", -129, "Parameter 'tiny' expects int8_t"),
        ("tiny", 1 << 63, "Invalid parameter type for 'at.tiny', expected: integer"),
        ("byte", 256, "Parameter 'byte' expects uint8_t"),
        ("byte", -1, "Parameter 'byte' expects uint8_t"),
        ("byte", True, "Parameter 'at.byte' expects uint64"),
        ("wide", 1 << 64, "Parameter 'at.wide' expects uint64"),
        ("wide", 1.0, "Parameter 'at.wide' expects uint64"),
        ("size", "1k", "Parameter 'at.size' expects uint64"),
        ("number", "1", "Invalid parameter type for 'at.number', expected: number"),
        ("number", True, "Invalid parameter type for 'at.number', expected: number"),
        ("kind", "odd", "Parameter 'kind' does not accept value 'odd'"),
    ],
)
def test_scalars_are_refused_with_path_or_name(member: str, value: Any, text: str) -> None:
    assert _refusal(_Union, {member: value}, "at") == text


def test_scalars_are_taken() -> None:
    found = from_json(_Union, {"tiny": -128, "byte": 255, "wide": -1, "number": 2, "anything": [None, {"x": 1}]})
    assert found == _Rich(tiny=-128, byte=255, wide=(1 << 64) - 1, number=2.0, anything=[None, {"x": 1}])
    found = from_keyval(_Union, {"tiny": "-0x80", "byte": "0377", "wide": "-1", "size": "1.5k", "number": "2.5"})
    assert found == _Rich(tiny=-128, byte=255, wide=(1 << 64) - 1, size=1536, number=2.5)


@pytest.mark.parametrize("depth", [200, 1000])
def test_deep_nesting_is_answered_whatever_the_depth(depth: int) -> None:
    value: Any = {"driver": "null-co"}
    for _ in range(depth):
        value = {"driver": "raw", "file": value}
    try:
        found = from_json(block.BlockdevOptions, value)
    except QmpError as error:
        assert error.desc == "JSON nesting depth limit exceeded"  # noqa: PT017 - either answer is right; no crash is
    else:
        assert found.driver is block.BlockdevDriver.RAW


def test_command_without_arguments_refuses_them() -> None:
    assert visit_arguments(SCHEMA.commands["quit"], {}) is None
    with pytest.raises(QmpError, match=r"^Parameter 'x' is unexpected$"):
        visit_arguments(SCHEMA.commands["quit"], {"x": 1})


def test_to_json_leaves_absent_members_out() -> None:
    node = block_info.XDbgBlockGraph(
        nodes=(block_info.XDbgBlockGraphNode(id=1, type=block_info.XDbgBlockGraphNodeType.BLOCK_DRIVER, name="n"),),
        edges=(),
    )
    assert to_json(node) == {"nodes": [{"id": 1, "type": "block-driver", "name": "n"}], "edges": []}
    info = block_info.ImageInfo(filename="f", format="raw", virtual_size=512)
    assert to_json([info]) == [{"filename": "f", "format": "raw", "virtual-size": 512}]
    assert to_json({"version": control.VersionTriple(major=1, minor=2, micro=3)}) == {
        "version": {"major": 1, "minor": 2, "micro": 3}
    }


def test_underscored_members_keep_their_spelling() -> None:
    cache = block_info.BlockdevCacheInfo(writeback=True, direct=False, no_flush=False)
    off = block.BlockdevDetectZeroesOptions.OFF
    image = block_info.ImageInfo(filename="f", format="raw", virtual_size=0)
    info = block_info.BlockDeviceInfo(
        file="f",
        node_name="n",
        ro=False,
        drv="raw",
        backing_file_depth=0,
        children=(),
        active=True,
        encrypted=False,
        detect_zeroes=off,
        bps=0,
        bps_rd=0,
        bps_wr=0,
        iops=0,
        iops_rd=0,
        iops_wr=0,
        image=image,
        cache=cache,
        write_threshold=0,
        dirty_bitmaps=(),
    )
    names = set(to_json(info))
    assert {"node-name", "dirty-bitmaps", "backing_file_depth", "detect_zeroes", "write_threshold"} <= names
    assert to_json(info)["cache"] == {"writeback": True, "direct": False, "no-flush": False}


_EXAMPLES: list[tuple[str, dict[str, Any]]] = [
    ("blockdev-add", {"driver": "raw", "node-name": "r", "file": {"driver": "null-co", "size": 1}, "offset": 512}),
    ("blockdev-reopen", {"options": [{"driver": "file", "filename": "f", "x-check-cache-dropped": True}]}),
    ("nbd-server-start", {"addr": {"type": "inet", "data": {"host": "h", "port": "1", "keep-alive-idle": 9}}}),
    (
        "block-export-add",
        {"type": "nbd", "id": "e", "node-name": "n", "bitmaps": ["b", {"node": "m", "name": "c"}]},
    ),
    ("chardev-add", {"id": "c", "backend": {"type": "null", "data": {}}}),
    ("object-add", {"qom-type": "iothread", "id": "i", "poll-max-ns": 0}),
    ("qom-set", {"path": "p", "property": "q", "value": {"any": [1, None]}}),
    ("qmp_capabilities", {"enable": ["oob"]}),
]


@pytest.mark.parametrize(("command", "arguments"), _EXAMPLES)
def test_to_json_gives_back_what_was_visited(command: str, arguments: dict[str, Any]) -> None:
    assert to_json(visit_arguments(SCHEMA.commands[command], arguments)) == arguments


_KEYS = [
    "driver",
    "file",
    "filename",
    "node-name",
    "type",
    "id",
    "addr",
    "data",
    "options",
    "backend",
    "qom-type",
    "zz",
]
_WORDS = ["file", "raw", "null-co", "nbd", "unix", "inet", "socket", "secret", "iothread", "", "x"]
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(_WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=5),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEMA.commands)),
    arguments=st.dictionaries(st.sampled_from(_KEYS), _json, max_size=6),
)
def test_visiting_raises_nothing_but_its_errors(name: str, arguments: dict[str, Any]) -> None:
    command = SCHEMA.commands[name]
    try:
        found = visit_arguments(command, arguments)
    except QmpError as error:
        assert error.desc.startswith(("Parameter", "Invalid parameter type"))  # noqa: PT017 - most are refused
        return
    if command.args is not None:
        assert visit_arguments(command, to_json(found)) == found


def test_every_declaration_resolves() -> None:
    assert qsd.qapi.schema.__all__
    for command in SCHEMA.commands.values():
        for annotation in (command.args, command.returns):
            if annotation is not None:
                resolve(annotation)


def test_what_is_not_a_qapi_type_is_refused_when_declared() -> None:
    with pytest.raises(TypeError, match="not a QAPI type"):
        resolve(bytes)
