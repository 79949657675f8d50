"""Trace events: patterns, what they cost when off, and where they go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qsd import cli_trace
from qsd.errors import QmpError
from qsd.trace import TraceRegistry


@pytest.fixture
def registry() -> TraceRegistry:
    made = TraceRegistry()
    for name in ("nbd_negotiate_begin", "nbd_client_loop", "handle_qmp_command"):
        made.event(name)
    return made


def enabled(registry: TraceRegistry) -> set[str]:
    return {name for name, event in registry.events.items() if event.enabled}


def test_events_start_off_and_print_nothing(registry: TraceRegistry) -> None:
    lines: list[str] = []
    registry.sink = lines.append
    registry.events["nbd_client_loop"]("x")
    assert not enabled(registry)
    assert lines == []


@pytest.mark.parametrize(
    ("patterns", "on"),
    [
        (["nbd_client_loop"], {"nbd_client_loop"}),
        (["nbd*"], {"nbd_client_loop", "nbd_negotiate_begin"}),
        (["*_*_*"], {"nbd_client_loop", "nbd_negotiate_begin", "handle_qmp_command"}),
        (["*", "-nbd_*"], {"handle_qmp_command"}),
        (["*", "-*", "*qmp*"], {"handle_qmp_command"}),
        (["nbd"], set()),
    ],
)
def test_patterns(registry: TraceRegistry, patterns: list[str], on: set[str]) -> None:
    for pattern in patterns:
        registry.apply(pattern)
    assert enabled(registry) == on


@pytest.mark.parametrize(
    ("pattern", "unknown"),
    [
        ("nope", "nope"),
        ("-nope", "nope"),
        ("no?pe", "no?pe"),
        ("*nope*", None),
        ("nbd_client_loop", None),
        ("", ""),
        ("-", ""),
    ],
)
def test_unknown_names_are_told(registry: TraceRegistry, pattern: str, unknown: str | None) -> None:
    assert registry.apply(pattern) == unknown


def test_pattern_holds_for_events_declared_later(registry: TraceRegistry) -> None:
    registry.apply("late*")
    assert registry.event("late_event").enabled


def test_line_has_the_name_and_the_values(registry: TraceRegistry) -> None:
    lines: list[str] = []
    registry.sink = lines.append
    registry.apply("*")
    registry.events["nbd_client_loop"]("from {} in {}", "unix:1", 7)
    registry.events["handle_qmp_command"]()
    assert lines == ["nbd_client_loop from unix:1 in 7", "handle_qmp_command"]


@pytest.fixture
def option(registry: TraceRegistry, monkeypatch: pytest.MonkeyPatch) -> TraceRegistry:
    """``--trace`` on a registry of its own."""
    monkeypatch.setattr(cli_trace, "REGISTRY", registry)
    monkeypatch.setattr(cli_trace, "load_all_events", lambda: None)
    return registry


class Warnings:
    def __init__(self) -> None:
        self.about_option: list[str] = []
        self.about_file: list[str] = []

    def apply(self, text: str) -> bool:
        return cli_trace.apply(text, self.about_option.append, self.about_file.append)


def test_option_with_events_file(option: TraceRegistry, tmp_path: Path) -> None:
    path = tmp_path / "events"
    path.write_text("nope1\n# comment\n\nnbd_*\n-nope2\n-nbd_client_loop\n")
    warnings = Warnings()
    assert not warnings.apply(f"foo,events={path}")
    assert warnings.about_option == ["trace event 'foo' does not exist"]
    assert warnings.about_file == [
        f"{path}:1: warning: trace event 'nope1' does not exist",
        f"{path}:5: warning: trace event 'nope2' does not exist",
    ]
    assert enabled(option) == {"nbd_negotiate_begin"}


def test_option_with_output_file(option: TraceRegistry, tmp_path: Path) -> None:
    Warnings().apply(f"nbd*,file={tmp_path}/log")
    option.events["nbd_client_loop"]("x")
    assert (tmp_path / "log").read_text() == "nbd_client_loop x\n"
    assert isinstance(option.sink, cli_trace.FileSink)
    option.sink.close()


def test_output_file_that_nobody_reads_holds_up_nobody(option: TraceRegistry, tmp_path: Path) -> None:
    path = tmp_path / "log"
    os.mkfifo(path)
    with pytest.raises(QmpError, match="No such device or address"):
        Warnings().apply(f"nbd*,file={path}")
    reader = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    Warnings().apply(f"nbd*,file={path}")
    for _ in range(2):
        option.events["nbd_client_loop"]("x" * (1 << 20))
    assert os.read(reader, 100).startswith(b"nbd_client_loop xxx")
    os.close(reader)
    assert isinstance(option.sink, cli_trace.FileSink)
    option.sink.close()


@pytest.mark.parametrize("text", ["help", "?", "enable=help"])
def test_option_asks_for_the_list(option: TraceRegistry, text: str) -> None:
    assert Warnings().apply(text)


@pytest.mark.parametrize(
    ("text", "desc"),
    [
        ("a,foo=1", "Invalid parameter 'foo'"),
        ("file=/nonexistent/x", "Error opening logfile /nonexistent/x: No such file or directory"),
        ("file=/tmp/x%y", "Bad logfile template: /tmp/x%y"),
    ],
)
def test_option_refused(option: TraceRegistry, text: str, desc: str) -> None:
    with pytest.raises(QmpError) as caught:
        Warnings().apply(text)
    assert caught.value.desc == desc


def test_option_with_missing_events_file(option: TraceRegistry) -> None:
    with pytest.raises(cli_trace.EventsFileError, match="/nonexistent: No such file or directory"):
        Warnings().apply("events=/nonexistent")
