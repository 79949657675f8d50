"""Runs workloads: a calibration that finds the reference's best aio mode, then both daemons in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from bench import clients, images, procfs
from bench.clients import ClientError, Clients, Load
from bench.daemons import Daemon, DaemonError, Placement, Setup, Side, prefix_of, running
from bench.images import KINDS
from bench.stats import median
from bench.workloads import Workload

# Rounds of calibration. With one, a single bad run would hand the reference its second-best mode.
CALIBRATIONS = 2


@attrs.frozen
class Series:
    """What one daemon reached in one workload and placement: a figure per repetition, or why there is none."""

    mode: str | None
    samples: tuple[float, ...] = ()
    error: str | None = None

    @property
    def median(self) -> float | None:
        return median(self.samples)


@attrs.frozen
class Row:
    """A workload's outcome in one placement. ``modes`` maps the reference's aio modes to their calibration."""

    workload: Workload
    placement: Placement
    ours: Series
    reference: Series
    modes: dict[str, float]


@attrs.frozen
class Plan:
    """How long and how often: seconds a repetition, a calibration run and warming up; image size in bytes."""

    seconds: float
    calibration: float
    ramp: float
    reps: int
    size: int

    @property
    def load(self) -> Load:
        return Load(self.seconds, self.ramp, self.size)

    @property
    def calibration_load(self) -> Load:
        return Load(self.calibration, self.ramp, self.size)


class Bench:
    """Everything a run needs: both sides, programs, plan, a room with the images. Keeps the peaks of memory."""

    def __init__(
        self, ours: Side, reference: Side, programs: Clients, plan: Plan, room: Path, say: Callable[[str], None]
    ) -> None:
        self.ours = ours
        self.reference = reference
        self.programs = programs
        self.plan = plan
        self.room = room
        self.say = say
        self.peaks: dict[str, float] = {}

    def image(self, kind: str, *, direct: bool = False) -> Path:
        """Return the image, made when first asked for: in the page cache, or not at all there for O_DIRECT.

        One of a fresh kind is made anew each time.
        """
        path = self.room / f"{'direct' if direct else 'cached'}.{kind}"
        recipe = KINDS[kind]
        if recipe.fresh:
            path.unlink(missing_ok=True)
        if not path.exists():
            below = tuple(self.image(each) for each in recipe.below)
            recipe.make(images.Request(path, self.plan.size * recipe.scale, below, self.programs))
            if direct:
                images.forget(path)
            else:
                images.warm(path)
        return path

    def setup(self, side: Side, mode: str | None, placement: Placement, workload: Workload) -> Setup:
        """Return how to run one side for a workload."""
        kind = KINDS[workload.image]
        image = self.image(workload.image, direct=workload.direct)
        below = tuple(self.image(each) for each in kind.below)
        return Setup(side, image, workload.direct, mode, placement, workload.export, kind, below)

    @contextmanager
    def daemon(self, setup: Setup) -> Iterator[Daemon]:
        """Run a daemon, ready to serve, and note its peak memory at the end. Raises DaemonError."""
        with running(setup, self.room) as daemon:
            daemon.wait_ready()
            yield daemon
            peak = procfs.memory_mib(daemon.pid, "VmHWM")
            self.peaks[setup.side.name] = max(peak, self.peaks.get(setup.side.name, 0.0))

    def once(self, workload: Workload, setup: Setup, load: Load) -> float:
        """Run a workload once on a fresh daemon and return its figure. Raises ClientError, DaemonError."""
        load = attrs.evolve(load, size=load.size * setup.kind.scale)
        with self.daemon(setup) as daemon:
            if setup.kind.fresh:
                images.have_memory(2 * self.plan.size)
            figure = clients.measure(self.programs, workload, load, daemon.target, prefix_of(setup.placement))
        if workload.is_writing and not setup.kind.fresh:
            images.settle(setup.image)
        return figure

    def calibrate(self, workload: Workload, placement: Placement) -> tuple[dict[str, float], str | None]:
        """Return the reference's best figure in each aio mode that works, and an error if none does."""
        figures: dict[str, float] = {}
        broken: dict[str, str] = {}
        for _ in range(CALIBRATIONS):
            for mode in workload.modes:
                if mode in broken:
                    continue
                setup = self.setup(self.reference, mode, placement, workload)
                try:
                    figure = self.once(workload, setup, self.plan.calibration_load)
                except (ClientError, DaemonError) as problem:
                    broken[mode] = str(problem)
                    figures.pop(mode, None)
                    self.say(f"  reference with aio={mode}: {problem}")
                else:
                    figures[mode] = max(figure, figures.get(mode, 0.0))
        return figures, None if figures else "; ".join(broken.values())

    def compare(self, workload: Workload, placement: Placement) -> Row:
        """Calibrate, then let both daemons run in turns. A side that fails is not run again; its row says why."""
        modes, trouble = self.calibrate(workload, placement)
        best = max(modes, key=lambda mode: modes[mode]) if modes else None
        sides = {
            self.ours: Series(None),
            self.reference: Series(best, error=trouble),
        }
        for _ in range(self.plan.reps):
            for side, series in sides.items():
                if series.error is not None:
                    continue
                setup = self.setup(side, series.mode, placement, workload)
                try:
                    figure = self.once(workload, setup, self.plan.load)
                except (ClientError, DaemonError) as problem:
                    sides[side] = attrs.evolve(series, error=str(problem))
                    self.say(f"  {side.name}: {problem}")
                else:
                    sides[side] = attrs.evolve(series, samples=(*series.samples, figure))
        return Row(workload, placement, sides[self.ours], sides[self.reference], modes)
