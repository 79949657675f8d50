"""The house rules that can be read off the source: imports look left, pure rooms stay pure, modules stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import qsd

ROOT = Path(qsd.__file__).parent

# From left to right. A room imports itself and what stands left of it.
ROOMS = [
    {"qsd"},
    {"errors", "units", "trace"},
    {"messages"},
    {"block"},
    {"wire"},
    {"qapi"},
    {"host"},
    {"drivers"},
    {"actors"},
    {"servers"},
    {"commands"},
    {"daemon", "life", "cli", "__main__"},
]
PURE = {"errors", "units", "trace", "messages", "block", "wire", "qapi"}
# What talks to the system or waits: not for pure rooms.
IMPURE = {
    *("trio", "trio_util", "asyncio", "os", "posix", "socket", "ssl", "select", "selectors", "time", "threading"),
    *("subprocess", "signal", "fcntl", "mmap", "ctypes", "pathlib", "shutil", "tempfile", "io", "multiprocessing"),
}
LINE_LIMIT = 500

MODULES = sorted(ROOT.rglob("*.py"))


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room a module of the package stands in; ``cli_options`` belongs to ``cli``."""
    first = [*module.split("."), ""][1]
    if not first:
        return "qsd"
    return "cli" if first.startswith("cli_") else first


def place(room: str) -> int:
    found = [index for index, rooms in enumerate(ROOMS) if room in rooms]
    assert found, f"{room} is no room of the house"
    return found[0]


def imports(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Yield line and full name of every import, wherever it stands (functions and TYPE_CHECKING included)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            if node.module == "qsd":
                yield from ((node.lineno, f"qsd.{alias.name}") for alias in node.names)
            elif node.module is not None:
                yield node.lineno, node.module


def violations(source: str, module: str) -> list[str]:
    room = room_of(module)
    found = []
    for line, name in imports(source, module):
        top = name.split(".")[0]
        if top == "qsd":
            other = room_of(name) if name != "qsd.__version__" else "qsd"
            if place(other) > place(room):
                found.append(f"{module}:{line} imports {name}, which stands right of it")
        elif room in PURE and top in IMPURE:
            found.append(f"{module}:{line} imports {top}, but {room} is pure")
    return found


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_look_left(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), dotted(path)) == []


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_module_is_small_and_says_what_it_is(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= LINE_LIMIT, "split it by duty"
    assert ast.get_docstring(ast.parse(source)), "the first line of a module says what it is"


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import qsd.daemon", "qsd.servers.x"),
        ("from qsd import cli_options", "qsd.commands.x"),
        ("def f():\n    from qsd.actors.core import Actor", "qsd.drivers.x"),
        ("import os", "qsd.wire.x"),
        ("from trio import Event", "qsd.trace"),
    ],
)
def test_rule_catches_what_it_forbids(source: str, module: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import qsd\nimport qsd.errors", "qsd.errors"),
        ("from qsd import __version__", "qsd.wire.x"),
        ("import os, trio", "qsd.host.x"),
        ("from qsd.daemon import Daemon", "qsd.cli_options"),
    ],
)
def test_rule_allows_the_rest(source: str, module: str) -> None:
    assert violations(source, module) == []
