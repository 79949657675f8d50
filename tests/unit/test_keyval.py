"""The command line's option syntaxes, down to the types: what the reference says to good and bad arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsd.errors import QmpError
from qsd.qapi.core import Size, struct
from qsd.qapi.schema.block import BlockdevOptions
from qsd.qapi.schema.chardev_options import CHARDEV_OPTIONS
from qsd.qapi.schema.control import MonitorOptions
from qsd.qapi.schema.exports import BlockExportOptions, NbdServerOptions
from qsd.qapi.schema.objects import ObjectOptions
from qsd.qapi.visit import from_json, from_keyval
from qsd.wire import keyval, qemuopts
from qsd.wire.qmp_json import parse_one

_REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "cli_syntax_reference.json").read_text())["rows"]


@struct("test-sized")
class _Sized:
    size: Size


_OPTIONS: dict[str, tuple[Any, str | None]] = {
    "--blockdev": (BlockdevOptions, "driver"),
    "--export": (BlockExportOptions, "type"),
    "--monitor": (MonitorOptions, "chardev"),
    "--nbd-server": (NbdServerOptions, None),
    "--object": (ObjectOptions, "qom-type"),
}


def _read(option: str, argument: str) -> tuple[str, str]:
    """Read an argument as the daemon does: the outcome, and the text if it is an error."""
    try:
        if option == "size":
            from_keyval(_Sized, {"size": argument})
            return "accepted", ""
        if option == "--chardev":
            parsed = qemuopts.parse(argument, CHARDEV_OPTIONS, lambda _text: None)
            wants_help = parsed.wants_help or parsed.text("backend") in ("help", "?")
            return ("help" if wants_help else "accepted"), ""
        wanted, implied = _OPTIONS[option]
        if argument.startswith("{"):
            from_json(wanted, parse_one(argument))
            return "accepted", ""
        arguments = keyval.parse(argument, implied)
        if arguments.wants_help:
            return "help", ""
        from_keyval(wanted, arguments.tree)
        return "accepted", ""
    except QmpError as error:
        return "error", error.desc + (f"\n{error.hint}" if error.hint else "")


@pytest.mark.parametrize("option", [*_OPTIONS, "--chardev", "size"])
def test_arguments_get_the_answers_of_the_reference(option: str) -> None:
    rows = [row for row in _REFERENCE if row[0] == option]
    assert len(rows) > 15
    for _, argument, outcome, text in rows:
        assert _read(option, argument) == (outcome, text), argument


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("", {}),
        ("raw,node-name=a,", {"driver": "raw", "node-name": "a"}),
        ("raw,file.driver=null-co,file.size=1", {"driver": "raw", "file": {"driver": "null-co", "size": "1"}}),
        ("a=x,,y,b=,c==", {"a": "x,y", "b": "", "c": "="}),
        ("a=1,a=2", {"a": "2"}),
        ("l.1=b,l.0=a,l.02=c", {"l": ["a", "b", "c"]}),
        ("l.0.x=1,l.0.y.0=2", {"l": [{"x": "1", "y": ["2"]}]}),
        ("__org.example_a-b.0=1", {"__org.example_a-b": ["1"]}),
        ("a=1=2", {"a": "1=2"}),
    ],
)
def test_parse_makes_a_tree(text: str, tree: dict[str, Any]) -> None:
    assert keyval.parse(text, "driver") == keyval.Keyval(tree, wants_help=False)


@pytest.mark.parametrize("text", ["help", "?", "raw,help", "raw,?,a=1", "help,"])
def test_parse_notices_that_help_is_wanted(text: str) -> None:
    assert keyval.parse(text, "driver").wants_help


def test_parse_copes_with_very_long_paths() -> None:
    found = keyval.parse("a." * 20_000 + "b=1")
    assert list(found.tree) == ["a"]
    with pytest.raises(QmpError, match="'a' is unexpected"):
        from_keyval(_Sized, {"size": "1", **found.tree})


_words = st.text(st.sampled_from("ab019.,=-_?é \0"), max_size=12)
_arguments = st.lists(
    _words | st.sampled_from(["help", "id=a", "size=1k", "server", "nowait", "a.0=1"]), max_size=6
)


@settings(max_examples=300, deadline=None)
@given(words=_arguments, implied=st.sampled_from([None, "driver"]))
def test_parse_raises_nothing_but_its_errors(words: list[str], implied: str | None) -> None:
    text = ",".join(words)
    try:
        tree = keyval.parse(text, implied).tree
        assert all(isinstance(value, (str, dict, list)) for value in tree.values())
        from_keyval(BlockdevOptions, tree)
    except QmpError as error:
        assert error.desc  # noqa: PT017 - most inputs are refused; the point is that nothing else is raised
    try:
        qemuopts.parse(text, CHARDEV_OPTIONS, lambda _text: None)
    except QmpError as error:
        assert error.desc  # noqa: PT017


@settings(max_examples=200, deadline=None)
@given(
    values=st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9-]{0,5}(\.[a-z]{1,3})?", fullmatch=True), st.text(max_size=10), max_size=5
    )
)
def test_parse_reads_back_what_is_quoted(values: dict[str, str]) -> None:
    whole = {key: value for key, value in values.items() if "." not in key}
    text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in whole.items())
    assert keyval.parse(text).tree == whole


def test_chardev_options_short_forms_warn_before_an_error() -> None:
    warnings: list[str] = []
    with pytest.raises(QmpError, match="Invalid parameter 'zz'"):
        qemuopts.parse("socket,id=a,server,nowait,nozz", CHARDEV_OPTIONS, warnings.append)
    assert warnings == [
        "short-form boolean option 'server' deprecated\nPlease use server=on instead",
        "short-form boolean option 'nowait' deprecated\nPlease use wait=off instead",
        "short-form boolean option 'nozz' deprecated\nPlease use zz=off instead",
    ]


@pytest.mark.parametrize(
    ("word", "means"),
    [("nodelay", "on"), ("delay", "off"), ("nonodelay", "off")],
)
def test_chardev_options_delay_is_the_opposite_of_nodelay(word: str, means: str) -> None:
    warnings: list[str] = []
    parsed = qemuopts.parse(f"null,id=a,{word}", CHARDEV_OPTIONS, warnings.append)
    assert parsed.text("nodelay") == means
    assert warnings == [f"short-form boolean option '{word}' deprecated\nPlease use nodelay={means} instead"]


def test_chardev_options_are_read_by_kind() -> None:
    parsed = qemuopts.parse(
        "ringbuf,id=a,size=1.5k,to=-1,server=on,wait=n,path=a,,b,path=c,,d,id=1",
        CHARDEV_OPTIONS,
        lambda _text: None,
    )
    assert (parsed.id, parsed.text("backend"), parsed.text("path")) == ("a", "ringbuf", "c,d")
    assert (parsed.size("size"), parsed.number("to")) == (1536, (1 << 64) - 1)
    assert (parsed.flag("server"), parsed.flag("wait"), parsed.flag("telnet")) == (True, False, None)


def test_chardev_options_help_ends_the_reading() -> None:
    parsed = qemuopts.parse("null,help,zz=1", CHARDEV_OPTIONS, lambda _text: None)
    assert parsed.wants_help
    assert CHARDEV_OPTIONS.help().splitlines()[:2] == ["  abstract=<bool (on/off)>", "  append=<bool (on/off)>"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("1k", 1024),
        ("1.5K", 1536),
        ("0x10", 16),
        ("010", 10),
        (".5M", 1 << 19),
        ("1E", 1 << 60),
        ("2b", 2),
    ],
)
def test_sizes_take_units(text: str, size: int) -> None:
    assert from_keyval(_Sized, {"size": text}).size == size
