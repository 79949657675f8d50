"""The ratios as a picture: a bar per placement of each workload, with ticks where it must be and where it aims.

Pure: rows in, SVG text out. The scale is logarithmic, so that half and double are equally far from 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from bench.daemons import Placement
from bench.report import amount, grouped, row_ratio
from bench.runner import Row
from bench.workloads import Workload

WIDTH = 960
LEFT, RIGHT = 262, 150
TOP, BOTTOM = 104, 64
GROUP, BAR, GAP = 50, 15, 3
MARKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
COLOURS = {Placement.ANY: "#3b6ea5", Placement.PINNED: "#e08a3c"}
MUST, AIM, INK, PALE = "#b3261e", "#2e7d32", "#222", "#ddd"


class Scale:
    """Maps ratios to x positions. Values outside are drawn at the edge."""

    def __init__(self, values: Sequence[float]) -> None:
        """Cover all ``values`` (positive) and 1, out to the next marks."""
        low, high = min([*values, 0.9]), max([*values, 1.1])
        self.low = max([mark for mark in MARKS if mark <= low], default=MARKS[0])
        self.high = min([mark for mark in MARKS if mark >= high], default=MARKS[-1])

    def x(self, value: float) -> float:
        """Return the position of a ratio in pixels."""
        inside = min(max(value, self.low), self.high)
        part = math.log(inside / self.low) / math.log(self.high / self.low)
        return LEFT + part * (WIDTH - LEFT - RIGHT)

    @property
    def marks(self) -> list[float]:
        return [mark for mark in MARKS if self.low <= mark <= self.high]


def text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 13, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{more}>{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1.0) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width:g}"/>'


def box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def draw_group(scale: Scale, workload: Workload, rows: Mapping[Placement, Row], y: float) -> list[str]:
    """Draw one workload in the strip of GROUP pixels that begins at ``y``."""
    out = [text(LEFT - 12, y + GROUP / 2 + 5, workload.title, anchor="end")]
    bars = [(placement, rows[placement]) for placement in Placement if placement in rows]
    height = len(bars) * BAR + (len(bars) - 1) * GAP
    bar_y = y + (GROUP - height) / 2
    for placement, row in bars:
        value = row_ratio(row)
        if value is None:
            out.append(text(scale.x(1) + 6, bar_y + BAR - 3, "no figure", size=11, more=f' fill="{MUST}"'))
        else:
            start, end = sorted((scale.x(1), scale.x(value)))
            out.append(box(start, bar_y, max(end - start, 1), BAR, COLOURS[placement]))
            pair = f"{amount(row.ours.median, workload.unit)} / {amount(row.reference.median, workload.unit)}"
            out.append(
                text(WIDTH - RIGHT + 14, bar_y + BAR - 3, f"{value:.2f}", size=12, more=' font-weight="bold"')
            )
            out.append(text(WIDTH - RIGHT + 50, bar_y + BAR - 3, pair, size=11))
        bar_y += BAR + GAP
    for value, colour in ((workload.must, MUST), (workload.aim, AIM)):
        out.append(line(scale.x(value), y + 4, scale.x(value), y + GROUP - 4, colour, 3))
    return out


def draw_legend(placements: Sequence[Placement], y: float) -> list[str]:
    """Draw what the colours mean, in one line."""
    out, x = [], float(LEFT)
    for placement in placements:
        out += [box(x, y - 11, 22, 12, COLOURS[placement]), text(x + 28, y, placement.value)]
        x += 120
    for words, colour in (("must", MUST), ("aim", AIM)):
        out += [line(x + 4, y - 12, x + 4, y + 2, colour, 3), text(x + 12, y, words)]
        x += 80
    return out


def ratio_plot(facts: Mapping[str, str], rows: Sequence[Row]) -> str:
    """Return the whole picture."""
    groups = grouped(rows)
    ratios = [value for row in rows if (value := row_ratio(row)) is not None and value > 0]
    scale = Scale([*ratios, *(each for workload in groups for each in (workload.must, workload.aim))])
    bottom = TOP + GROUP * len(groups)
    height = bottom + BOTTOM
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="DejaVu Sans, Verdana, sans-serif" fill="{INK}">',
        box(0, 0, WIDTH, height, "#fff"),
        text(20, 30, "qsd beside the reference daemon", size=18, more=' font-weight="bold"'),
        text(20, 52, f"{facts.get('ours', '')}  /  {facts.get('reference', '')}", size=12),
        *draw_legend([each for each in Placement if any(row.placement is each for row in rows)], 80),
        text(WIDTH - RIGHT + 14, 80, "ratio", size=11),
        text(WIDTH - RIGHT + 50, 80, "ours / reference", size=11),
    ]
    out += [box(0, TOP + GROUP * index, WIDTH, GROUP, "#f6f6f6") for index in range(0, len(groups), 2)]
    for mark in scale.marks:
        strong = mark == 1
        out.append(line(scale.x(mark), TOP, scale.x(mark), bottom, INK if strong else PALE, 1.5 if strong else 1))
        out.append(text(scale.x(mark), bottom + 18, f"{mark:g}", anchor="middle", size=12))
    for index, (workload, by_placement) in enumerate(groups.items()):
        out += draw_group(scale, workload, by_placement, TOP + GROUP * index)
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(
        text(middle, bottom + 38, "ours / reference (logarithmic; more is better)", anchor="middle", size=12)
    )
    out.append(
        text(20, height - 10, " · ".join(facts.get(key, "") for key in ("date", "kernel", "processor")), size=10)
    )
    return "\n".join([*out, "</svg>", ""])
