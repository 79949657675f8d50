"""The report as text and as plain data. Pure: rows in, a string or a dictionary out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.daemons import Placement
from bench.measures import Measure
from bench.runner import Row, Series
from bench.stats import Verdict, ratio, spread, verdict
from bench.workloads import Unit, Workload

MISSING = "-"


def columns(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Align rows of words in columns, the first ``left`` of them to the left. The first row is the heading."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [
            word.ljust(width) if index < left else word.rjust(width)
            for index, (word, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return [line(rows[0]), "  ".join("-" * width for width in widths), *map(line, rows[1:])]


def amount(value: float | None, unit: Unit) -> str:
    """Write a throughput with three or four figures: ``186.2 k`` IOPS or extents, ``1950`` MB/s."""
    if value is None:
        return MISSING
    return f"{value:.0f}" if unit is Unit.MBPS else f"{value / 1000:.1f} k"


def number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def per_cent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.0f} %"


def row_ratio(row: Row) -> float | None:
    """Return ours / reference of the medians."""
    return ratio(row.ours.median, row.reference.median)


def row_verdict(row: Row) -> Verdict:
    """Judge a row; a side that failed has no verdict, and its error is printed."""
    if row.ours.error or row.reference.error:
        return Verdict.NONE
    return verdict(row_ratio(row), row.workload.must, row.workload.aim)


def grouped(rows: Iterable[Row]) -> dict[Workload, dict[Placement, Row]]:
    """Return rows by workload, then placement, in the order they came."""
    found: dict[Workload, dict[Placement, Row]] = {}
    for row in rows:
        found.setdefault(row.workload, {})[row.placement] = row
    return found


def ratio_table(rows: Sequence[Row]) -> list[str]:
    """The main table: a line per workload, the placements side by side."""
    placements = [each for each in Placement if any(row.placement is each for row in rows)]
    lines = [["workload", "must", "aim", *["|", "ours", "reference", "mode", "ratio", "verdict"] * len(placements)]]
    for workload, by_placement in grouped(rows).items():
        found = [by_placement.get(placement) for placement in placements]
        line = [workload.title, number(workload.must, 1), number(workload.aim, 1)]
        for row in found:
            line.append("|")
            if row is None:
                line += [MISSING] * 5
                continue
            line += [amount(row.ours.median, workload.unit), amount(row.reference.median, workload.unit)]
            line += [row.reference.mode or MISSING, number(row_ratio(row), 2), row_verdict(row).value]
        lines.append(line)
    table = columns(lines)
    bars = [index for index, letter in enumerate(table[0]) if letter == "|"]
    above = ""
    for bar, placement in zip(bars, placements, strict=True):
        above = above.ljust(bar) + f"| {placement.value}"
    return [above, *table]


def detail_table(rows: Sequence[Row]) -> list[str]:
    """All the figures behind the medians, and each aio mode's calibration."""
    lines = [["workload", "placement", "ours min..max", "spread", "ref min..max", "spread", "reps", "calibration"]]
    for row in rows:
        line = [row.workload.title, row.placement.value]
        for series in (row.ours, row.reference):
            unit = row.workload.unit
            ends = (
                f"{amount(min(series.samples), unit)}..{amount(max(series.samples), unit)}"
                if series.samples
                else ""
            )
            line += [ends or MISSING, per_cent(spread(series.samples))]
        line.append(str(len(row.ours.samples)))
        line.append(", ".join(f"{mode} {amount(value, row.workload.unit)}" for mode, value in row.modes.items()))
        lines.append(line)
    return columns(lines, left=2)


def measure_table(measures: Sequence[Measure]) -> list[str]:
    """The figures that are not throughput."""
    lines = [["measure", "ours", "reference", "must be below", "verdict"]]
    words = {True: "kept", False: "BROKEN", None: MISSING}
    for each in measures:
        limit = MISSING if each.below is None else f"{each.below:g}"
        ours, reference = number(each.ours, each.digits), number(each.reference, each.digits)
        lines.append([each.title, ours, reference, limit, words[each.is_kept]])
    return columns(lines)


def errors(rows: Sequence[Row]) -> list[str]:
    """What failed, a line each."""
    return [
        f"{row.workload.name}, {row.placement.value}, {name}: {series.error}"
        for row in rows
        for name, series in (("ours", row.ours), ("reference", row.reference))
        if series.error
    ]


def text_report(facts: Mapping[str, str], rows: Sequence[Row], measures: Sequence[Measure]) -> str:
    """Return the whole report."""
    width = max(map(len, facts), default=0)
    parts = [
        ["qsd beside the reference: medians, ratio = ours / reference"],
        [f"{name.ljust(width)}  {value}" for name, value in facts.items()],
        ratio_table(rows) if rows else [],
        measure_table(measures) if measures else [],
        ["Spread is (max - min) / median.", "", *detail_table(rows)] if rows else [],
        ["Failed:", *errors(rows)] if errors(rows) else [],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def series_data(series: Series) -> dict[str, Any]:
    return {"mode": series.mode, "median": series.median, "samples": list(series.samples), "error": series.error}


def data_report(facts: Mapping[str, str], rows: Sequence[Row], measures: Sequence[Measure]) -> dict[str, Any]:
    """Return the same as values that JSON can hold; throughput in IOPS or MB/s."""
    return {
        "facts": dict(facts),
        "workloads": [
            {
                "name": row.workload.name,
                "unit": row.workload.unit.value,
                "placement": row.placement.value,
                "ours": series_data(row.ours),
                "reference": series_data(row.reference),
                "calibration": row.modes,
                "ratio": row_ratio(row),
                "must": row.workload.must,
                "aim": row.workload.aim,
                "verdict": row_verdict(row).value,
            }
            for row in rows
        ],
        "measures": [
            {
                "title": each.title,
                "ours": each.ours,
                "reference": each.reference,
                "below": each.below,
                "kept": each.is_kept,
            }
            for each in measures
        ],
    }
