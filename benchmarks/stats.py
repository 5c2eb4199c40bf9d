"""Statistics of interleaved times: quantiles, the ratio of medians, and its interval."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000
ENOUGH = 6  # rounds: the span of n times holds their median with 1 - 2^(1 - n), of five not with 95 %
Row = dict[str, Any]


def quantiles(seconds: np.ndarray) -> dict[str, float]:
    """Tenth, fiftieth and ninetieth percentile in microseconds."""
    return {name: float(np.percentile(seconds, p) * 1e6) for name, p in (("p10", 10), ("p50", 50), ("p90", 90))}


def ratio(ours: np.ndarray, baseline: np.ndarray) -> float:
    """How many times faster we are: the baseline's median over ours."""
    return float(np.median(baseline) / np.median(ours))


def ratio_ci95(ours: np.ndarray, baseline: np.ndarray) -> list[float]:
    """Bootstrap interval of `ratio`; whole rounds are drawn, since both times of a round share its noise.

    Of fewer rounds than ENOUGH it is no 95 % interval but about the span of what was seen: whoever shows it says so.
    """
    draw = np.random.default_rng(0).integers(0, len(ours), (RESAMPLES, len(ours)))
    ratios = np.median(baseline[draw], axis=1) / np.median(ours[draw], axis=1)
    return [float(x) for x in np.percentile(ratios, [2.5, 97.5])]


def change(before: Sequence[Row], after: Sequence[Row]) -> tuple[float, list[float]]:
    """Our time after / before, over the same of the rivals (their geometric mean), and its 95 % interval.

    before, after: rows of one run, of the same rivals in order. What slows a machine down slows all that is timed in
    turns. Rounds are drawn again where all rows keep their samples; else the interval comes from the rows' own, as if
    errors of rivals went together: none is too narrow for that.
    """
    sides = before, after
    logs = [-np.mean([math.log(row["ratio"]) for row in side]) for side in sides]
    found = math.exp(logs[1] - logs[0])
    if all("samples_us" in row for side in sides for row in side):
        first, last = (_drawn(side, seed) for seed, side in enumerate(sides))
        return found, [float(x) for x in np.exp(np.percentile(last - first, [2.5, 97.5]))]
    far = math.hypot(*(np.mean([math.log(row["ci95"][1] / row["ci95"][0]) / 2 for row in side]) for side in sides))
    return found, [found * math.exp(-far), found * math.exp(far)]


def _drawn(side: Sequence[Row], seed: int) -> np.ndarray:
    """Logarithms of our median over the rivals', of rounds drawn again: one draw for all, as they were timed."""
    ours, *rivals = (np.array(x) for x in (side[0]["samples_us"]["ours"], *(r["samples_us"]["baseline"] for r in side)))
    draw = np.random.default_rng(seed).integers(0, len(ours), (RESAMPLES, len(ours)))
    medians = [np.log(np.median(x[draw], axis=1)) for x in (ours, *rivals)]
    return medians[0] - np.mean(medians[1:], axis=0)
