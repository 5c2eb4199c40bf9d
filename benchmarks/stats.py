"""Statistics of interleaved times: quantiles, the ratio of medians, and its interval."""

import numpy as np


def quantiles(seconds: np.ndarray) -> dict[str, float]:
    """Tenth, fiftieth and ninetieth percentile in microseconds."""
    return {name: float(np.percentile(seconds, p) * 1e6) for name, p in (("p10", 10), ("p50", 50), ("p90", 90))}


def ratio(ours: np.ndarray, baseline: np.ndarray) -> float:
    """How many times faster we are: the baseline's median over ours."""
    return float(np.median(baseline) / np.median(ours))


def ratio_ci95(ours: np.ndarray, baseline: np.ndarray, resamples: int = 1000) -> list[float]:
    """Bootstrap interval of `ratio`; whole rounds are drawn, since both times of a round share its noise."""
    draw = np.random.default_rng(0).integers(0, len(ours), (resamples, len(ours)))
    ratios = np.median(baseline[draw], axis=1) / np.median(ours[draw], axis=1)
    return [float(x) for x in np.percentile(ratios, [2.5, 97.5])]
