"""``--chardev`` arguments as ``chardev-add`` would have them."""

from __future__ import annotations

from typing import Any

import pytest

from qsd.cli_chardev import Help, NewChardev, read
from qsd.errors import QmpError
from qsd.qapi.schema.chardev import ChardevBackend, ChardevBackendKind
from qsd.qapi.visit import from_json, to_json


def backend(text: str) -> Any:
    made = read(text, lambda _warning: None)
    assert isinstance(made, NewChardev)
    assert made.id == "a"
    return to_json(made.backend)


def unix(path: str, **more: bool) -> dict[str, Any]:
    return {"type": "unix", "data": {"path": path, **more}}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("null,id=a", {"type": "null", "data": {}}),
        ("backend=null,id=a,", {"type": "null", "data": {}}),
        ("null,id=a,id=b", {"type": "null", "data": {}}),
        ("stdio,id=a,signal=off", {"type": "stdio", "data": {"signal": False}}),
        ("pty,id=a,path=p", {"type": "pty", "data": {"path": "p"}}),
        ("ringbuf,id=a,size=64K", {"type": "ringbuf", "data": {"size": 65536}}),
        ("memory,id=a", {"type": "memory", "data": {}}),
        ("pipe,id=a,path=p", {"type": "pipe", "data": {"device": "p"}}),
        ("file,id=a,path=f,,1,append=on", {"type": "file", "data": {"out": "f,1", "append": True}}),
        ("file,id=a,path=f,input-path=g", {"type": "file", "data": {"out": "f", "in": "g"}}),
        ("null,id=a,logfile=l,logappend=on", {"type": "null", "data": {"logfile": "l", "logappend": True}}),
        (
            "socket,id=a,path=p,server=on",
            {"type": "socket", "data": {"addr": unix("p"), "server": True, "wait": True}},
        ),
        (
            "socket,id=a,path=p,server=on,wait=off,telnet=on",
            {"type": "socket", "data": {"addr": unix("p"), "server": True, "wait": False, "telnet": True}},
        ),
        (
            "socket,id=a,path=p,abstract=on,tight=off,reconnect-ms=5",
            {
                "type": "socket",
                "data": {"addr": unix("p", abstract=True, tight=False), "server": False, "reconnect-ms": 5},
            },
        ),
        (
            "socket,id=a,host=h,port=1,to=9,ipv6=on,nodelay",
            {
                "type": "socket",
                "data": {
                    "addr": {"type": "inet", "data": {"host": "h", "port": "1", "to": 9, "ipv6": True}},
                    "server": False,
                    "nodelay": True,
                },
            },
        ),
        (
            "socket,id=a,fd=7",
            {"type": "socket", "data": {"addr": {"type": "fd", "data": {"str": "7"}}, "server": False}},
        ),
        (
            "socket,id=a,port=7",
            {"type": "socket", "data": {"addr": {"type": "fd", "data": {"str": ""}}, "server": False}},
        ),
    ],
)
def test_becomes_what_chardev_add_takes(text: str, wanted: dict[str, Any]) -> None:
    assert backend(text) == wanted
    assert to_json(from_json(ChardevBackend, wanted)) == wanted


@pytest.mark.parametrize(
    ("text", "desc"),
    [
        ("", "chardev: no id specified"),
        ("null", "chardev: no id specified"),
        ("id=a", 'chardev: "a" missing backend'),
        ("nope,id=a", "'nope' is not a valid char driver name"),
        ("null,id=1", "Parameter 'id' expects an identifier"),
        ("file,id=a", "chardev: file: no filename given"),
        ("pipe,id=a", "chardev: pipe: no device path given"),
        ("socket,id=a,host=h", "chardev: socket: no port given"),
        ("socket,id=a,host=h,path=p", "None or one of 'path', 'fd' or 'host' option required."),
        ("null,id=a,foo=1", "Invalid parameter 'foo'"),
        ("stdio,id=a,signal=1", "Parameter 'signal' expects 'on' or 'off'"),
    ],
)
def test_refused_in_the_references_words(text: str, desc: str) -> None:
    with pytest.raises(QmpError) as caught:
        backend(text)
    assert caught.value.desc == desc


def test_short_forms_warn() -> None:
    warnings: list[str] = []
    read("socket,id=a,path=p,server,nowait", warnings.append)
    assert warnings == [
        "short-form boolean option 'server' deprecated\nPlease use server=on instead",
        "short-form boolean option 'nowait' deprecated\nPlease use wait=off instead",
    ]


@pytest.mark.parametrize("text", ["help", "?", "help,id=a"])
def test_help_lists_the_backends(text: str) -> None:
    found = read(text, lambda _warning: None)
    assert isinstance(found, Help)
    assert found.text.splitlines()[0] == "Available chardev backend types: "
    assert sorted(found.text.split()[4:]) == sorted(item.value for item in ChardevBackendKind)
    assert found.code == 0


def test_help_of_a_backend_lists_the_options() -> None:
    found = read("socket,help", lambda _warning: None)
    assert isinstance(found, Help)
    assert found.text.startswith("chardev options:\n  abstract=<bool (on/off)>\n")
    assert found.code == 1
