"""Arithmetic of measurements: medians, spreads, percentiles, and what a ratio is worth."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from enum import Enum


class Verdict(Enum):
    """What a ratio says about a workload."""

    AIM = "aim"
    MUST = "must"
    BELOW = "BELOW"
    NONE = "-"


def median(samples: Sequence[float]) -> float | None:
    """Return the median, or None of nothing."""
    return statistics.median(samples) if samples else None


def spread(samples: Sequence[float]) -> float | None:
    """Return (largest - smallest) / median: 0.1 is a spread of 10 %. None if that says nothing."""
    if len(samples) < 2:
        return None
    middle = statistics.median(samples)
    return (max(samples) - min(samples)) / middle if middle else None


def percentile(samples: Sequence[float], percent: float) -> float | None:
    """Return the smallest sample that at least ``percent`` of all samples do not exceed (nearest rank)."""
    if not samples:
        return None
    ordered = sorted(samples)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(int(rank), 1) - 1]


def ratio(ours: float | None, reference: float | None) -> float | None:
    """Return ours / reference; None where one is missing or the reference did nothing."""
    return ours / reference if ours is not None and reference else None


def verdict(value: float | None, must: float, aim: float) -> Verdict:
    """Judge a ratio as printed, with two decimals: 1.796 is 1.80."""
    if value is None:
        return Verdict.NONE
    rounded = round(value, 2)
    if rounded >= aim:
        return Verdict.AIM
    return Verdict.MUST if rounded >= must else Verdict.BELOW
