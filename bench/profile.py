"""Where qsd's time goes: runs one workload under py-spy and writes a flame graph (or raw stacks) to the results.

    python -m bench.profile "randread 4k QD32" [--native] [--raw] [--pinned]

py-spy looks at the daemon from outside and attaches to it, which takes root or a permissive ptrace_scope.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench import clients
from bench.__main__ import FULL, RESULTS, default_daemon, default_reference, find_clients, make_side
from bench.clients import ClientError, Load
from bench.daemons import DaemonError, Placement, prefix_of, running
from bench.runner import Bench
from bench.workloads import GROUPS, Workload, find_workloads

# py-spy needs this long to attach and to write its result.
MARGIN = 30.0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__.partition("\n")[0])
    parser.add_argument("workload", help="a workload's name, or enough of it")
    parser.add_argument(
        "--daemon", metavar="COMMAND", default=default_daemon(), help="what to profile (%(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="how long (%(default)s)")
    parser.add_argument("--rate", type=int, default=500, help="samples a second (%(default)s)")
    parser.add_argument("--native", action="store_true", help="show C functions too (slower, and slows the daemon)")
    parser.add_argument("--raw", action="store_true", help="write collapsed stacks with counts instead of an SVG")
    parser.add_argument("--pinned", action="store_true", help="daemon and client on one CPU under SCHED_RR")
    parser.add_argument("--out", metavar="DIR", type=Path, default=RESULTS)
    parser.add_argument(
        "--data", metavar="DIR", default="/var/tmp", help="a directory on a real disk (%(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        options.workload = find_workloads(options.workload, sum(GROUPS.values(), ()))[0]
    except ValueError as error:
        parser.error(str(error))
    return options


def find_py_spy() -> str:
    """Return py-spy's path: beside this interpreter, or on PATH. Exits if there is none."""
    beside = Path(sys.executable).with_name("py-spy")
    found = str(beside) if beside.exists() else shutil.which("py-spy")
    return found or sys.exit("py-spy is not installed: python -m pip install py-spy")


def target(options: argparse.Namespace, workload: Workload) -> Path:
    """Return the file to write, named after the workload."""
    words = re.sub(r"[^a-z0-9]+", "-", workload.name.lower()).strip("-")
    parts = [words, *(["pinned"] if options.pinned else []), *(["native"] if options.native else [])]
    return Path(options.out) / f"profile-{'-'.join(parts)}.{'txt' if options.raw else 'svg'}"


def profile(options: argparse.Namespace, room: Path) -> tuple[float, Path]:
    """Run the workload under py-spy; return its figure and the file written. Raises ClientError, DaemonError."""
    workload: Workload = options.workload
    placement = Placement.PINNED if options.pinned else Placement.ANY
    side = make_side("ours", options.daemon)
    bench = Bench(side, side, find_clients(default_reference()), FULL, room, print)
    setup = bench.setup(side, None, placement, workload)
    out = target(options, workload)
    out.parent.mkdir(parents=True, exist_ok=True)
    with running(setup, room) as daemon:
        daemon.wait_ready()
        recorder = subprocess.Popen(
            [
                *(find_py_spy(), "record", "--pid", str(daemon.pid), "--output", str(out)),
                *("--format", "raw" if options.raw else "flamegraph", "--rate", str(options.rate)),
                *("--duration", str(max(1, int(options.seconds))), *(["--native"] if options.native else [])),
            ],
            stdin=subprocess.DEVNULL,
        )
        try:
            # The load outlasts the recording, so that no idle time is in the picture.
            load = Load(options.seconds + 1, 0, FULL.size * setup.kind.scale)
            figure = clients.measure(bench.programs, workload, load, daemon.target, prefix_of(placement))
            recorder.wait(options.seconds + MARGIN)
        finally:
            if recorder.poll() is None:
                recorder.kill()
                recorder.wait()
    if recorder.returncode:
        sys.exit(f"py-spy ended with {recorder.returncode}")
    return figure, out


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="qsd-bench-", dir=options.data) as room:
        try:
            figure, out = profile(options, Path(room))
        except (ClientError, DaemonError) as error:
            sys.exit(f"bench.profile: {error}")
    print(f"{options.workload.title}: {figure:.0f} while profiled; written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
