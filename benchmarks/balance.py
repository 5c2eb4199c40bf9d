"""How long processes wait for the one with the most to do: masks of published configs, without and with balancing.

`python -m benchmarks.balance` draws the masks of many steps and counts, with no model: tokens of context encoder and
predictor (what is balanced), and the FLOPs of a whole training step. Idle: mean over steps of 1 - mean load / max load
of 64 processes.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import rows
from benchmarks.models import bench_ijepa, bench_vjepa2
from jepa_kernels import report
from jepa_kernels.masks import MaskBatch, MultiBlock2d, MultiBlock3d
from jepa_kernels.masks.sampler import Sampler
from jepa_kernels.models import ijepa, vjepa2
from jepa_kernels.training import balance

RANKS = 64
RESAMPLES = 2000
UNITS = "tokens", "FLOPs"
WAYS = "in_order", "balanced", "balanced_by_flops"


@dataclass(frozen=True)
class Run:
    """Published training: `flops` of a batch's step; images or clips on each of 64 processes."""

    name: str
    sampler: Sampler
    flops: Callable[[MaskBatch], float]
    each: int


HUGE, LARGE = ijepa.vit_huge_14(), vjepa2.vit_large()
CLIPS = MultiBlock3d(bench_vjepa2.grid_of(LARGE))
RUNS = (
    Run("I-JEPA ViT-H/14", MultiBlock2d(16), partial(bench_ijepa.step_flops, HUGE), 32),
    Run("V-JEPA 2 ViT-L, 16 frames", CLIPS, partial(bench_vjepa2.step_flops, LARGE), 24),
    Run("V-JEPA 2 ViT-L, 16 frames", CLIPS, partial(bench_vjepa2.step_flops, LARGE), 48),
)


def idle(loads: np.ndarray) -> float:
    """Share of the processes' time that is waited for the last, of loads [ranks]."""
    return float(1 - loads.mean() / loads.max())


def one_step(run: Run, step: int, ranks: int = RANKS) -> np.ndarray:
    """[units, ways]: idle in tokens and in FLOPs; images in order, balanced by tokens, balanced by FLOPs."""
    masks = run.sampler(ranks * run.each, step=step)
    flops = np.array([run.flops(masks.part([image], masks.batch)) for image in range(masks.batch)])
    costs = balance.costs(masks), flops
    ways = balance.in_order(masks.batch, ranks), *(balance.balanced(cost.astype(np.int64), ranks) for cost in costs)
    return np.array([[idle(cost[images].sum(1)) for images in ways] for cost in costs])


def measured(run: Run, steps: int, ranks: int = RANKS) -> list[dict[str, Any]]:
    """A row for tokens, one for FLOPs; intervals from drawing steps again."""
    found = np.array([one_step(run, step, ranks) for step in range(steps)])
    drawn = found[np.random.default_rng(0).integers(0, steps, (RESAMPLES, steps))].mean(1)
    common = {"name": run.name, "each": run.each, "ranks": ranks, "steps": steps}
    table = []
    for u, unit in enumerate(UNITS):
        idles = {name: _estimate(found[:, u, w].mean(), drawn[:, u, w]) for w, name in enumerate(WAYS)}
        mean = found[:, u].mean(0)
        idles["cut"] = _estimate(1 - mean[1] / mean[0], 1 - drawn[:, u, 1] / drawn[:, u, 0])
        table.append({**common, "unit": unit, **idles})
    return table


def _estimate(mean: float, drawn: np.ndarray) -> dict[str, Any]:
    return {"mean": float(mean), "ci95": [float(x) for x in np.percentile(drawn, [2.5, 97.5])]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.balance", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("bench-results/balance.json"))
    args = parser.parse_args(argv)
    table = []
    for run in RUNS:
        found = measured(run, args.steps)
        table += found
        for row in found:
            idles = ", ".join(f"{name} {row[name]['mean']:.3%}" for name in WAYS)
            print(f"{row['name']}, {row['each']} on each of {row['ranks']}, idle in {row['unit']}: {idles}")
    rows.write(args.out, {"simulation": "balance", "commit": report.commit(), "rows": table})
    return 0


if __name__ == "__main__":
    sys.exit(main())
