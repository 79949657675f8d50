"""The command: ``python -m bench [GROUP]`` measures a group and writes the table, the plot and the raw figures."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.clients import Clients
from bench.daemons import Placement, Side, pinned_prefix, version_of
from bench.machine import facts
from bench.measures import Measure, measure_idle, measure_opening, measure_peaks, measure_qmp, measure_start
from bench.report import data_report, number, row_ratio, row_verdict, text_report
from bench.runner import Bench, Plan, Row
from bench.svg import ratio_plot
from bench.workloads import GROUPS, MIB, find_workloads

RESULTS = Path(__file__).parent / "results"
NEWEST = Path("/opt/qsd-reference/bin")
FULL = Plan(seconds=1.0, calibration=0.5, ramp=0.2, reps=5, size=1024 * MIB)
QUICK = Plan(seconds=0.4, calibration=0.25, ramp=0.1, reps=1, size=256 * MIB)


def say(words: str) -> None:
    print(words, flush=True)


def default_daemon() -> str:
    """Return the command that starts this checkout's daemon with this interpreter."""
    return shlex.join([sys.executable, "-m", "qsd"])


def default_reference() -> str:
    """Return the newest reference known: the environment's, the one beside the system's, or the system's."""
    newest = NEWEST / "qemu-storage-daemon"
    return os.environ.get("QSD_REFERENCE") or (str(newest) if newest.exists() else "qemu-storage-daemon")


def find_beside(reference: str, program: str) -> str:
    """Return the program of that name that lies beside the reference, else the system's."""
    beside = Path(shlex.split(reference)[0]).parent / program
    return str(beside) if beside.is_absolute() and beside.exists() else program


def find_clients(reference: str) -> Clients:
    """Return the programs that make load and images, the reference's own where it brings them."""
    names = ("nbdcopy", "nbdinfo", "qemu-img", "qemu-io")
    return Clients(**{name.replace("-", "_"): find_beside(reference, name) for name in names})


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure qsd beside a reference daemon.")
    parser.add_argument(
        "group", nargs="?", choices=tuple(GROUPS), default="nbd", help="which exports to measure (%(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one short repetition, a 256 MiB image: does it all run?"
    )
    parser.add_argument(
        "--only", metavar="NAME", help="only workloads whose name contains NAME, and no other measures"
    )
    parser.add_argument(
        "--cpus", choices=("any", "one", "both"), default="both", help="where daemon and client run (%(default)s)"
    )
    parser.add_argument("--reps", type=int, metavar="N", help="repetitions (5)")
    parser.add_argument(
        "--daemon", metavar="COMMAND", default=default_daemon(), help="what starts ours (%(default)s)"
    )
    parser.add_argument("--reference", metavar="COMMAND", default=default_reference(), help="(%(default)s)")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=RESULTS, help="where the results go (%(default)s)"
    )
    parser.add_argument(
        "--data", metavar="DIR", default="/var/tmp", help="a directory on a real disk (%(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.reps is not None and options.reps < 1:
        parser.error("--reps must be at least 1")
    try:
        options.workloads = find_workloads(options.only, GROUPS[options.group])
    except ValueError as error:
        parser.error(str(error))
    return options


def make_side(name: str, words: str) -> Side:
    """Return a side from its command line; refuse a program that is not there."""
    command = tuple(shlex.split(words))
    if not command or not shutil.which(command[0]):
        sys.exit(f"bench: {name}: {words!r} is no program; see --{'daemon' if name == 'ours' else name}")
    return Side(name, command, version_of(command))


def compare_all(bench: Bench, options: argparse.Namespace, placements: Sequence[Placement]) -> list[Row]:
    """Run every workload in every placement."""
    rows = []
    for placement in placements:
        for workload in options.workloads:
            row = bench.compare(workload, placement)
            rows.append(row)
            outcome = f"{number(row_ratio(row), 2)} ({row_verdict(row).value})"
            say(f"{time.strftime('%H:%M:%S')}  {placement.value}: {workload.title}: {outcome}")
    return rows


def measure_all(bench: Bench, options: argparse.Namespace, placements: Sequence[Placement]) -> list[Measure]:
    """Take the measures that are not throughput."""
    if options.only:
        return [measure_peaks(bench)]
    seconds = 1.0 if options.quick else 3.0
    if options.group != "nbd":
        saturating = max(options.workloads, key=lambda workload: workload.depth)
        under_load = [measure for place in placements for measure in measure_qmp(bench, place, seconds, saturating)]
        opening = measure_opening(bench) if options.group == "qcow2" else []
        return [measure_peaks(bench), *opening, *under_load]
    found = [measure_start(bench), *measure_idle(bench, seconds), measure_peaks(bench)]
    for placement in placements:
        found += measure_qmp(bench, placement, seconds)
    return found


def write_results(place: Path, stem: str, text: str, data: object, plot: str) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for ending, content in (("txt", text), ("json", json.dumps(data, indent=1) + "\n"), ("svg", plot)):
        (place / f"{stem}.{ending}").write_text(content)


def main(arguments: Sequence[str]) -> int:
    """Run it all; return 1 if something could not be measured."""
    options = parse(arguments)
    plan = QUICK if options.quick else FULL
    if options.reps:
        plan = Plan(plan.seconds, plan.calibration, plan.ramp, options.reps, plan.size)
    ours, reference = make_side("ours", options.daemon), make_side("reference", options.reference)
    programs = find_clients(options.reference)
    wanted = {"any": [Placement.ANY], "one": [Placement.PINNED], "both": list(Placement)}[options.cpus]
    placements = wanted if pinned_prefix() else [Placement.ANY]
    about = facts(ours=ours.version, reference=reference.version, fio=programs.fio, nbdcopy=programs.nbdcopy)
    about["image"] = f"{plan.size // MIB} MiB; {plan.reps} repetitions of {plan.seconds:g} s"
    if placements != wanted:
        about["one CPU"] = "not measured: taskset or SCHED_RR is not to be had here"
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qsd-bench-", dir=options.data) as room:
        bench = Bench(ours, reference, programs, plan, Path(room), say)
        rows = compare_all(bench, options, placements)
        measures = measure_all(bench, options, placements)
    about["took"] = f"{time.monotonic() - begin:.0f} s"
    text = text_report(about, rows, measures)
    # Only a whole run may call itself the latest.
    latest = "latest" if options.group == "nbd" else f"latest-{options.group}"
    stem = "partial" if options.quick or options.only or options.cpus != "both" else latest
    write_results(options.out, stem, text, data_report(about, rows, measures), ratio_plot(about, rows))
    say(f"\n{text}\nWritten to {options.out / stem}.txt, .json and .svg")
    return 1 if any(row.ours.error or row.reference.error for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
