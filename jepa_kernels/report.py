"""What a finished training run leaves: curves, a table of scores, and where they were measured."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from jepa_kernels.data import extra


def plot(metrics: Path, picture: Path) -> None:
    """Loss, feature std, effective rank and learning rate over steps, as a PNG."""
    extra("matplotlib").use("Agg")
    pyplot = extra("matplotlib.pyplot")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, axes = pyplot.subplots(1, 4, figsize=(14, 3), layout="constrained")
    names = {"loss": "loss", "std": "target feature std", "rank": "effective rank", "lr": "learning rate"}
    for axis, (key, title) in zip(axes, names.items(), strict=True):
        axis.plot([r["step"] for r in rows], [r[key] for r in rows])
        axis.set(title=title, xlabel="step")
        axis.set_ylim(bottom=0)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu, known = platform.processor(), Path("/proc/cpuinfo")
    if known.exists():
        cpu = next(
            (line.split(": ")[1] for line in known.read_text().splitlines() if line.startswith("model name")), cpu
        )
    return {"cpu": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__}


def commit() -> str | None:
    """The commit of a source checkout; None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def show(scores: dict[str, Any]) -> None:
    """Print the probe's scores as a table."""
    rich = extra("rich.table")
    table = rich.Table(title="Which photo is this held-out grey crop from?", caption=f"chance: {scores['chance']:.3f}")
    for column in ("probe", "features", "accuracy", "95 % interval"):
        table.add_column(column)
    for probe, rows in scores.items():
        if isinstance(rows, dict):
            for name, score in rows.items():
                low, high = score["ci95"]
                table.add_row(probe, name.replace("_", " "), f"{score['mean']:.3f}", f"{low:.3f} to {high:.3f}")
    extra("rich").print(table)
