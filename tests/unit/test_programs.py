"""Running the mount helper: what it inherits, what it says, and how long it may take."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from qsd.host import signals
from qsd.host.programs import run_program


def python(text: str, *, seconds: float = 600.0, fd: int | None = None) -> tuple[int, str]:
    return run_program([sys.executable, "-c", text], os.environ, seconds, fd)


def test_program_tells_how_it_ended() -> None:
    assert python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)") == (3, "err\n")
    assert python("") == (0, "")
    assert python("import os; os.kill(os.getpid(), 15)") == (-signal.SIGTERM, "")


def test_program_that_does_not_exist() -> None:
    with pytest.raises(FileNotFoundError):
        run_program(["/nonexistent/program"], {}, 600.0)


def test_program_that_does_not_end_is_killed() -> None:
    with pytest.raises(TimeoutError):
        python("import signal; signal.pause()", seconds=0.0)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_program_that_says_too_much_ends_all_the_same() -> None:
    text = "import os\ntry:\n  while True: os.write(2, b'x' * 4096)\nexcept BlockingIOError: pass"
    assert python(text) == (0, "x" * 65536)


def test_program_is_started_with_the_signals_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_inherited", None)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        signals.block([signal.SIGTERM])
        text = "import signal, sys; print(sorted(map(int, signal.pthread_sigmask(0, ()))), file=sys.stderr)"
        assert python(text) == (0, f"[{signal.SIGUSR2:d}]\n")
        # The interpreter ignores SIGPIPE itself: ask a program that does not.
        assert run_program(["/bin/sh", "-c", "kill -PIPE $$"], os.environ, 600.0) == (-signal.SIGPIPE, "")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_program_inherits_the_one_descriptor_it_is_given() -> None:
    reading, writing = os.pipe()
    try:
        assert python(f"import os; os.write({writing}, b'hello'); os.fstat({reading})", fd=writing)[0] == 1
        assert os.read(reading, 10) == b"hello"
        assert not os.get_inheritable(writing)
    finally:
        os.close(reading)
        os.close(writing)
