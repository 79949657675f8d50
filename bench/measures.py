"""What is measured beside throughput: start, idleness, memory, and QMP's answers while an export is saturated."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import attrs

from bench import clients, images, procfs
from bench.clients import ClientError, Load
from bench.daemons import DaemonError, Placement, Setup, Side, prefix_of, running
from bench.images import KINDS
from bench.qmp import QmpClient
from bench.runner import Bench
from bench.stats import median, percentile
from bench.workloads import WORKLOADS, Workload

# The workload that saturates an NBD export.
SATURATING = WORKLOADS[0]
SMALL, ENORMOUS = 1 << 30, 64 << 40
QUESTIONS = ("query-version", "query-block-exports")
PAUSE = 0.003

T = TypeVar("T")


@attrs.frozen
class Measure:
    """One figure of both daemons. ``below`` is what ours must stay under (None: no limit); ``digits`` decimals."""

    title: str
    ours: float | None
    reference: float | None
    below: float | None = None
    digits: int = 1

    @property
    def is_kept(self) -> bool | None:
        """Whether ours, as printed, stays under its limit; None if there is no limit or no figure."""
        if self.below is None or self.ours is None:
            return None
        return round(self.ours, self.digits) < self.below


def start_seconds(bench: Bench, setup: Setup) -> float:
    """Return the seconds from making the process to the answer to the first QMP command. Raises DaemonError."""
    with running(setup, bench.room) as daemon:
        client = QmpClient(daemon.connect(daemon.qmp))
        seconds = time.monotonic() - daemon.started
        client.close()
    return seconds


def idle(bench: Bench, setup: Setup, seconds: float) -> tuple[float, float]:
    """Return (resident MiB once ready, per cent of a CPU used while idle after a load).

    The pause between is long enough for anything that polls to have stopped. Raises ClientError, DaemonError.
    """
    with bench.daemon(setup) as daemon:
        resident = procfs.memory_mib(daemon.pid, "VmRSS")
        brief = Load(min(0.5, bench.plan.seconds), 0, bench.plan.size)
        clients.measure(bench.programs, SATURATING, brief, daemon.target, prefix_of(setup.placement))
        time.sleep(0.3)
        before, begin = procfs.cpu_seconds(daemon.pid), time.monotonic()
        time.sleep(seconds)
        used = procfs.cpu_seconds(daemon.pid) - before
        return resident, 100 * used / (time.monotonic() - begin)


def qmp_latencies(bench: Bench, setup: Setup, seconds: float, workload: Workload) -> list[float]:
    """Return the seconds each QMP command took while ``workload`` ran. Raises ClientError, DaemonError."""
    outcome: list[Exception] = []
    with bench.daemon(setup) as daemon:
        client = QmpClient(daemon.connect(daemon.qmp))
        load = Load(seconds, 0, bench.plan.size)

        def saturate() -> None:
            try:
                clients.measure(bench.programs, workload, load, daemon.target, prefix_of(setup.placement))
            except ClientError as error:
                outcome.append(error)

        thread = threading.Thread(target=saturate, name="load")
        thread.start()
        latencies: list[float] = []
        # The client's own start and end, when nothing is saturated, are left out.
        quiet = time.monotonic() + 0.3
        while thread.is_alive():
            question = QUESTIONS[len(latencies) % len(QUESTIONS)]
            begin = time.monotonic()
            took = client.ask(question)
            if quiet < begin < quiet + seconds - 0.2:
                latencies.append(took)
            thread.join(PAUSE)
        client.close()
    if outcome:
        raise outcome[0]
    return latencies


def attempt(bench: Bench, what: str, work: Callable[[Setup], T], setup: Setup) -> T | None:
    """Return what ``work`` returns, or say what went wrong and return None: one bad figure does not end the run."""
    try:
        return work(setup)
    except (ClientError, DaemonError, OSError, ValueError) as error:
        bench.say(f"  {what}: {error}")
        return None


def pair(
    bench: Bench, what: str, work: Callable[[Setup], T], placement: Placement, workload: Workload = SATURATING
) -> list[T | None]:
    """Do the same with ours and the reference."""
    setups = [
        bench.setup(bench.ours, None, placement, workload),
        bench.setup(bench.reference, workload.modes[0], placement, workload),
    ]
    return [attempt(bench, f"{what}, {setup.side.name}", work, setup) for setup in setups]


def measure_start(bench: Bench) -> Measure:
    """Measure starting, in turns."""
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(bench.plan.reps):
        both = pair(bench, "start", lambda setup: start_seconds(bench, setup), Placement.ANY)
        for samples, seconds in zip(taken, both, strict=True):
            samples.extend([] if seconds is None else [seconds * 1000])
    return Measure("start to first QMP answer, ms", median(taken[0]), median(taken[1]), 300, 0)


def measure_idle(bench: Bench, seconds: float) -> list[Measure]:
    """Measure a daemon that has nothing to do."""
    both = pair(bench, "idle", lambda setup: idle(bench, setup, seconds), Placement.ANY)
    resident, used = ([None if each is None else each[index] for each in both] for index in (0, 1))
    return [
        # Zero, within what the kernel's clock tick can tell apart.
        Measure("processor time while idle, % of a CPU", used[0], used[1], 0.5, 1),
        Measure("resident memory once ready, MiB", resident[0], resident[1], 60, 1),
    ]


def measure_qmp(
    bench: Bench, placement: Placement, seconds: float, workload: Workload = SATURATING
) -> list[Measure]:
    """Measure how fast QMP answers while ``workload`` saturates the export."""

    def work(setup: Setup) -> list[float]:
        return qmp_latencies(bench, setup, seconds, workload)

    both = pair(bench, "QMP under load", work, placement, workload)
    figures = {
        percent: [None if each is None or not each else 1000 * (percentile(each, percent) or 0) for each in both]
        for percent in (50, 99)
    }
    return [
        Measure(f"QMP latency under load ({placement.value}), p{percent}, ms", ours, reference, limit, 2)
        for percent, limit in ((50, None), (99, 50))
        for ours, reference in [figures[percent]]
    ]


def opening_peak(bench: Bench, side: Side, size: int) -> float:
    """Return the largest resident size in MiB of a daemon that has opened an empty image of ``size`` bytes and
    serves it. Raises DaemonError.
    """
    path = bench.room / "opened"
    path.unlink(missing_ok=True)
    kind = KINDS["fresh"]
    kind.make(images.Request(path, size, (), bench.programs))
    with running(Setup(side, path, kind=kind), bench.room) as daemon:
        daemon.wait_ready()
        return procfs.memory_mib(daemon.pid, "VmHWM")


def measure_opening(bench: Bench) -> list[Measure]:
    """Measure what opening a small and an enormous image takes: no more for the enormous one, but for its L1 table
    (1 MiB) and its copy.
    """
    sides = (bench.ours, bench.reference)
    figures = [[opening_peak(bench, side, size) for side in sides] for size in (SMALL, ENORMOUS)]
    small, enormous = figures
    return [
        Measure("peak memory, 1 GiB qcow2 open, MiB", small[0], small[1]),
        Measure("peak memory, 64 TiB qcow2 open, MiB", enormous[0], enormous[1], small[0] + 4),
    ]


def measure_peaks(bench: Bench) -> Measure:
    """Return the largest resident size seen over everything run so far, so call it last."""
    peaks = [bench.peaks.get(side.name) for side in (bench.ours, bench.reference)]
    return Measure("resident memory under load, peak, MiB", peaks[0], peaks[1])
