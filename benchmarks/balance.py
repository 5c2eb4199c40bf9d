"""How long processes wait for the one with the most to do: masks of published sizes, without and with balancing.

Masks are not truncated; published ones are cut to the shortest of a GPU's images.

`python -m benchmarks.balance` draws the masks of many steps and counts, with no model: tokens of context encoder and
predictor, and the FLOPs of a whole training step. Idle: mean over steps of 1 - mean load / max load of 64 processes.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
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
WAYS = "in_order", "balanced", "balanced_by_tokens"


@dataclass(frozen=True)
class Run:
    """Published training: `flops` of a step with these networks and masks; images or clips on each of 64 processes."""

    name: str
    model: Any
    sampler: Sampler
    flops: Callable[[Any, MaskBatch], float]
    each: int


HUGE, LARGE = ijepa.vit_huge_14(), vjepa2.vit_large()
CLIPS = MultiBlock3d(bench_vjepa2.grid_of(LARGE))
RUNS = (
    Run("I-JEPA ViT-H/14", HUGE, MultiBlock2d(16), bench_ijepa.step_flops, 32),
    Run("V-JEPA 2 ViT-L, 16 frames", LARGE, CLIPS, bench_vjepa2.step_flops, 24),
    Run("V-JEPA 2 ViT-L, 16 frames", LARGE, CLIPS, bench_vjepa2.step_flops, 48),
)


def idle(loads: np.ndarray) -> float:
    """Share of the processes' time that is waited for the last, of loads [ranks]."""
    return float(1 - loads.mean() / loads.max())


def tokens(masks: MaskBatch) -> np.ndarray:
    """Of each image in the context encoder and, of every [context | target], in the predictor: [B]."""
    context, target = (x.reshape(-1, masks.batch) for x in (masks.context_lengths, masks.target_lengths))
    return context.sum(0) * (1 + len(target) // len(context)) + target.sum(0)


def one_step(run: Run, step: int, ranks: int = RANKS) -> np.ndarray:
    """[units, ways]: idle in tokens and in FLOPs; images in order, balanced, balanced by tokens alone."""
    masks = run.sampler(ranks * run.each, step=step)
    flops = np.array([run.flops(run.model, masks.part([image], masks.batch)) for image in range(masks.batch)])
    counts = tokens(masks)
    ways = [balance.balanced(cost, ranks) for cost in (balance.costs(masks, run.model), counts)]
    ways.insert(0, balance.in_order(masks.batch, ranks))
    return np.array([[idle(load[images].sum(1)) for images in ways] for load in (counts, flops)])


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
