"""The daemon as a process: options, messages, exit codes, signals, pid file, going into the background."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import PROGRAM, QmpFailure, RunningDaemon, run

Start = Callable[..., RunningDaemon]

# Some of the lines of tests/differential, as processes of their own: first words, pid file, background.
REFUSED = [
    ["--bogus"],
    ["x"],
    ["--blockdev", "null-co,node-name=a,9=2"],
    ["--object", "iothread,id=1"],
    ["--nbd-server", "addr.type=unix,addr.path=nbd.sock", "--nbd-server", "addr.type=unix,addr.path=nbd.sock"],
    ["--pidfile", "/nonexistent/x"],
    ["--pidfile", "first.pid", "--pidfile", "/nonexistent/x"],
    ["--daemonize", "--object", ""],
    ["--daemonize", "--chardev", "stdio,id=a"],
    ["--daemonize", "--pidfile", "/nonexistent/x"],
    ["-T", "nope", "--object", ""],
]


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_refused_as_the_reference_does(arguments: list[str], reference: Path, tmp_path: Path) -> None:
    theirs = run(*arguments, program=(str(reference),), cwd=tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    ours = run(*arguments, cwd=tmp_path)
    assert ours.stderr == theirs.stderr.replace("qemu-storage-daemon", "qsd")
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout) == (1, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [["--object", "iothread,help"], ["--object", "iothread,id=a,?"], ["--object", "secret,help"]],
    ids=" ".join,
)
def test_help_of_an_object_type_as_the_reference_gives_it(arguments: list[str], reference: Path) -> None:
    theirs = run(*arguments, program=(str(reference),))
    ours = run(*arguments)
    assert (ours.stdout, ours.stderr, ours.returncode) == (theirs.stdout, theirs.stderr, theirs.returncode)


@pytest.mark.parametrize("arguments", [["--object", "help"], ["--object", "?"], ["--object", "nope,help"]])
def test_help_lists_the_types_that_work(arguments: list[str]) -> None:
    ours = run(*arguments)
    assert ours.stdout == "List of user creatable objects:\n  iothread\n  qsd-view\n  secret\n"
    assert (ours.stderr, ours.returncode) == ("", 0)


@pytest.mark.parametrize("arguments", [["--version"], ["-V"], ["--vers"], ["x", "-V"], ["--blockdev", "bad", "-V"]])
def test_version_wins_over_what_is_not_looked_at(arguments: list[str]) -> None:
    ours = run(*arguments)
    assert ours.stdout.startswith("qsd version ")
    assert "qemu-storage-daemon 11" in ours.stdout
    assert (ours.stderr, ours.returncode) == ("", 0)


def test_help_covers_every_option() -> None:
    ours = run("--help")
    for option in (
        *("--help", "--version", "--trace", "--blockdev", "--chardev", "--export", "--monitor", "--nbd-server"),
        *("--object", "--pidfile", "--daemonize"),
    ):
        assert option in ours.stdout
    assert (ours.stderr, ours.returncode) == ("", 0)


def test_trace_help_lists_events() -> None:
    ours = run("--trace", "help")
    names = ours.stdout.split()
    assert names == sorted(names)
    assert (ours.stderr, ours.returncode) == ("", 0)


def test_option_processing_is_in_order(tmp_path: Path) -> None:
    ours = run("--monitor", "c", "--chardev", "null,id=c", cwd=tmp_path)
    assert ours.stderr == 'qsd: --monitor c: chardev "c" not found\n'


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_shuts_down_cleanly(daemon: Start, tmp_path: Path, number: signal.Signals) -> None:
    running = daemon(
        *("--blockdev", "null-co,node-name=n", "--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
        *("--export", "nbd,id=e,node-name=n", "--pidfile", "qsd.pid"),
    )
    assert (tmp_path / "nbd.sock").exists()
    assert running.terminate(number) == 0
    assert list(tmp_path.iterdir()) == []


FLOOD = """
import collections, itertools, os, signal, sys
pidfd = os.pidfd_open(int(sys.argv[1]))
print(flush=True)
# No instruction of Python between two of them.
send = map(signal.pidfd_send_signal, itertools.repeat(pidfd), itertools.cycle(map(int, sys.argv[2:])))
try:
    collections.deque(send, maxlen=0)
except ProcessLookupError:
    pass
"""


@contextlib.contextmanager
def flood(pid: int, *numbers: signal.Signals) -> Iterator[None]:
    """Processes that send ``pid`` signals as fast as the kernel takes them, until it has ended."""
    words = [sys.executable, "-c", FLOOD, str(pid), *(str(int(number)) for number in numbers)]
    senders = [subprocess.Popen(words, stdout=subprocess.PIPE) for _ in range(3)]
    try:
        for sender in senders:
            assert sender.stdout is not None
            assert sender.stdout.read(1)
        yield
    finally:
        for sender in senders:
            sender.kill()
            sender.communicate()


def test_flood_of_signals_is_as_one(daemon: Start, tmp_path: Path) -> None:
    """Python's handlers nest: it died of its stack's end, or of the signal when the handlers were gone."""
    for _ in range(5):
        running = daemon("--pidfile", "qsd.pid")
        with flood(running.pid, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            assert running.wait() == 0
        running.finish()
        assert not (tmp_path / "qsd.pid").exists()


def test_flood_of_signals_during_start_up(daemon: Start, tmp_path: Path) -> None:
    for number in range(5):
        fifo = tmp_path / f"secret{number}"
        os.mkfifo(fifo)
        running = daemon("--pidfile", "qsd.pid", "--object", f"secret,id=s,file={fifo}", wait=False)
        with fifo.open("wb"), flood(running.pid, signal.SIGTERM):
            assert running.wait() == 0
        running.finish()


def test_signals_are_blocked_in_every_thread(daemon: Start, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    running = daemon("--object", f"secret,id=s,file={tmp_path}/secret")  # it is read on a thread
    blocked = [
        int(next(line for line in status.read_text().splitlines() if line.startswith("SigBlk:")).split()[1], 16)
        for status in Path(f"/proc/{running.pid}/task").glob("*/status")
    ]
    wanted = sum(1 << number - 1 for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1))
    assert [mask & wanted for mask in blocked] == [wanted] * len(blocked)
    assert len(blocked) > 1


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_signals_that_were_blocked_or_ignored_before_are_obeyed(number: signal.Signals, tmp_path: Path) -> None:
    words = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN);"
    words += "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); os.execv(sys.executable, sys.argv[1:])"
    running = RunningDaemon(tmp_path, [], program=(sys.executable, "-c", words, *PROGRAM))
    try:
        running.wait_ready()
        assert running.terminate(number) == 0
    finally:
        running.finish()


def test_background_daemon_whose_parent_was_killed_ends_in_order(tmp_path: Path) -> None:
    """Nobody was told that it is up: it would keep images that whoever started it believes to be free."""
    fifo = tmp_path / "secret"
    os.mkfifo(fifo)
    reading, writing = os.pipe()
    words = ["--daemonize", "--pidfile", "qsd.pid", "--object", f"secret,id=s,file={fifo}"]
    parent = subprocess.Popen([*PROGRAM, *words], cwd=tmp_path, pass_fds=(writing,))
    os.close(writing)
    with fifo.open("wb"):
        # It waits for the daemon, which has begun to come up.
        parent.terminate()
        assert parent.wait(30) == -signal.SIGTERM
    assert os.read(reading, 1) == b""  # all who had it have ended
    os.close(reading)
    assert list(tmp_path.iterdir()) == [fifo]


def test_signal_during_start_up(daemon: Start, tmp_path: Path) -> None:
    fifo = tmp_path / "secret"
    os.mkfifo(fifo)
    running = daemon("--pidfile", "qsd.pid", "--object", f"secret,id=s,file={fifo}", wait=False)
    # Opening it for writing returns once the daemon has opened it for reading.
    with fifo.open("wb"):
        assert running.terminate() == 0
    assert not (tmp_path / "qsd.pid").exists()


def test_quit_answers_and_ends(daemon: Start, tmp_path: Path) -> None:
    running = daemon("--pidfile", "qsd.pid")
    monitor = running.qmp()
    assert monitor.command("quit") == {"return": {}}
    assert all("event" in message for message in monitor.rest())
    assert running.wait() == 0
    assert list(tmp_path.iterdir()) == []


def test_sigusr1_prints_the_tree(daemon: Start) -> None:
    running = daemon("--blockdev", "null-co,node-name=disk0")
    running.expected_stderr.append(r"^\w+/$|^ +\S")
    monitor = running.qmp()
    running.process.send_signal(signal.SIGUSR1)
    # A signal is handled soon, not at once: commands pass the time until it was.
    while "monitors/" not in running.stderr():
        monitor.execute("query-version")
    assert "disk0" in running.stderr()


@pytest.mark.parametrize("arguments", [["--bogus"], ["--export", "nbd,id=e,node-name=none"]])
def test_standard_error_that_nobody_reads_holds_up_nobody(arguments: list[str]) -> None:
    """The daemon waited until somebody did, and only SIGKILL could end it."""
    reading, writing = os.pipe()
    try:
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, bytes(4096))
        os.set_blocking(writing, True)
        ours = subprocess.run(
            [*PROGRAM, *arguments], stderr=writing, stdin=subprocess.DEVNULL, timeout=60, check=False
        )
    finally:
        os.close(reading)
        os.close(writing)
    assert ours.returncode == 1


def test_sigpipe_is_ignored(daemon: Start) -> None:
    running = daemon()
    running.process.send_signal(signal.SIGPIPE)
    running.qmp().execute("query-version")


def test_pidfile_is_written_last_and_removed(daemon: Start, tmp_path: Path) -> None:
    running = daemon("--pidfile", "qsd.pid")
    path = tmp_path / "qsd.pid"
    assert path.read_text() == f"{running.pid}\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert running.terminate() == 0
    assert not path.exists()


def test_pidfile_refuses_a_second_instance(daemon: Start, tmp_path: Path) -> None:
    running = daemon("--pidfile", "qsd.pid")
    second = run("--pidfile", "qsd.pid", cwd=tmp_path)
    assert second.stderr == (
        "qsd: cannot create PID file: Cannot lock pid file: Resource temporarily unavailable\n"
    )
    assert second.returncode == 1
    assert (tmp_path / "qsd.pid").read_text() == f"{running.pid}\n"


def test_pidfile_locks_out_the_reference(daemon: Start, any_reference: Path, tmp_path: Path) -> None:
    daemon("--pidfile", "qsd.pid")
    second = run("--pidfile", "qsd.pid", program=(str(any_reference),), cwd=tmp_path)
    assert "Cannot lock pid file" in second.stderr
    assert second.returncode == 1


@pytest.fixture
def background(tmp_path: Path) -> object:
    """Starts ``--daemonize`` and returns the pid from the pid file; ends it after the test."""
    pids: list[int] = []

    def start(*arguments: str) -> int:
        parent = run("--daemonize", "--pidfile", "qsd.pid", *arguments, cwd=tmp_path)
        assert (parent.returncode, parent.stdout, parent.stderr) == (0, "", "")
        pids.append(int((tmp_path / "qsd.pid").read_text()))
        return pids[-1]

    yield start
    for pid in pids:
        try:
            ended = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        os.kill(pid, signal.SIGTERM)
        # Not our child: its end shows by the pid file's disappearance and the pidfd becoming readable.
        assert select.select([ended], [], [], 30)[0], "the background daemon did not end"
        os.close(ended)
    assert not (tmp_path / "qsd.pid").exists()


def test_daemonize_detaches(background: Callable[..., int], tmp_path: Path) -> None:
    pid = background("--blockdev", "null-co,node-name=n")
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert [os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)] == ["/dev/null"] * 3
    assert os.getsid(pid) != os.getsid(0)
    assert os.getsid(pid) != pid  # no session leader: it can never get a terminal


def test_daemonize_takes_relative_names_from_the_callers_directory(
    background: Callable[..., int], tmp_path: Path
) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    background(
        *("--blockdev", "file,node-name=f,filename=disk"),
        *("--chardev", "socket,id=c,path=qmp.sock,server=on,wait=off", "--monitor", "c"),
    )
    from harness import Qmp

    monitor = Qmp(tmp_path / "qmp.sock")
    names = [node["node-name"] for node in monitor.execute("query-named-block-nodes")]
    assert names == ["f"]
    with pytest.raises(QmpFailure, match="No such file or directory"):
        monitor.execute_raw("blockdev-add", {"driver": "file", "node-name": "g", "filename": "disk"})
    monitor.close()


@pytest.mark.parametrize(
    "arguments", [["--object", ""], ["--pidfile", "/nonexistent/x"], ["--chardev", "stdio,id=a"]]
)
def test_daemonize_says_in_the_foreground_what_went_wrong(arguments: list[str], tmp_path: Path) -> None:
    ours = run("--daemonize", *arguments, cwd=tmp_path)
    assert ours.returncode == 1
    assert ours.stderr.startswith("qsd: ")
    assert ours.stderr.count("\n") == 1


def test_ready_is_announced_to_the_manager(daemon: Start) -> None:
    # The fixture waits for exactly this message; without it the test would fail there.
    daemon().qmp().execute("query-version")


def test_monitor_on_stdio(tmp_path: Path) -> None:
    ours = subprocess.run(
        [*PROGRAM, "--chardev", "stdio,id=c", "--monitor", "c"],
        input='{"execute": "qmp_capabilities"} {"execute": "quit"}\n',
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd=tmp_path,
    )
    assert (ours.returncode, ours.stderr) == (0, "")
    assert ours.stdout.count('{"return": {}}\n') == 2


def test_socket_passed_as_file_descriptor(daemon: Start, tmp_path: Path) -> None:
    # The manual page's way: the socket listens before the daemon exists, so nobody has to wait for it.
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "passed.sock"))
        listener.listen()
        number = listener.fileno()
        running = daemon(
            *("--chardev", f"socket,fd={number},server=on,wait=off,id=c", "--monitor", "chardev=c"),
            monitor=False,
            pass_fds=(number,),
        )
        running.qmp("passed.sock").execute("query-version")


def test_manual_page_s_example_of_a_passed_socket(tmp_path: Path) -> None:
    # As it stands there: the server waits for its first client, and the client connects before the daemon is up.
    path = str(tmp_path / "qmp.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listen_sock:
        listen_sock.bind(path)
        listen_sock.listen()
        fd = listen_sock.fileno()
        process = subprocess.Popen(
            [*PROGRAM, "--chardev", f"socket,fd={fd},server=on,id=char1", "--monitor", "chardev=char1"],
            pass_fds=[fd],
            stderr=subprocess.PIPE,
            text=True,
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as qmp_sock:
        qmp_sock.connect(path)
        qmp_sock.sendall(b'{"execute": "qmp_capabilities"} {"execute": "quit"}')
        answers = qmp_sock.makefile().readlines()
    assert [sorted(json.loads(line)) for line in answers] == [["QMP"], ["return"], ["return"]]
    assert process.communicate(timeout=30)[1] == (
        f"qsd: --chardev socket,fd={fd},server=on,id=char1: info: QEMU waiting for connection on: "
        f"disconnected:unix:{path},server=on\n"
    )
    assert process.returncode == 0
    assert not os.path.exists(path)


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["-T", "help"], ["--object", "help"], ["--bogus"]])
def test_texts_nobody_takes_do_not_upset_it(words: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        ended = subprocess.run([*PROGRAM, *words], stdout=full, stderr=full, timeout=30, check=False)
    assert ended.returncode == 1


def test_closed_standard_descriptors_are_not_given_to_anything_else(tmp_path: Path) -> None:
    script = (
        f"exec {' '.join(PROGRAM)} --pidfile qsd.pid --blockdev null-co,node-name=n --chardev socket,id=c,path=s,"
    )
    script += "server=on --monitor c <&- >&- 2>&-"
    process = subprocess.Popen(["sh", "-c", script], cwd=tmp_path)
    pidfd = os.pidfd_open(process.pid)
    from harness import Qmp

    while not (tmp_path / "s").exists():
        assert not select.select([pidfd], [], [], 0.01)[0], "it has ended"
    os.close(pidfd)
    monitor = Qmp(tmp_path / "s")
    names = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
    assert names == ["/dev/null"] * 3
    monitor.execute("quit")
    monitor.close()
    assert process.wait(30) == 0
    assert list(tmp_path.iterdir()) == []


def test_two_monitors_at_once(daemon: Start) -> None:
    running = daemon("--chardev", "socket,id=second,path=second.sock,server=on,wait=off", "--monitor", "second")
    first, second = running.qmp(), running.qmp("second.sock")
    first.execute_raw("object-add", {"qom-type": "iothread", "id": "io0"})
    assert second.execute("qom-get", path="/objects/io0", property="poll-max-ns") == 32768
    second.execute("object-del", id="io0")


def test_monitors_are_objects(daemon: Start) -> None:
    monitor = daemon().qmp()
    listed = monitor.execute("qom-list", path="/objects")
    assert {"name": "compat_monitor0", "type": "child<monitor-qmp>"} in listed
    assert monitor.execute("qom-get", path="/objects/compat_monitor0", property="chardev") == "qmp"
    assert monitor.refusal("object-del", id="compat_monitor0") == "Cannot delete the current QMP monitor"
    listed = monitor.execute("qom-list", path="/chardevs")
    assert {"name": "qmp", "type": "child<chardev-socket>"} in listed


def test_trace_goes_to_the_file(daemon: Start, tmp_path: Path) -> None:
    running = daemon("-T", "handle_qmp_command,file=log")
    running.qmp().execute("query-version")
    assert running.terminate() == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines
    assert all(line.startswith("handle_qmp_command ") for line in lines)
    (tmp_path / "log").unlink()
