"""Draws docs/masks.png: masks on a photo, and how often each patch is context and target, of both modes.

`python -m benchmarks.masks_picture` needs matplotlib and scikit-image.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jepa_kernels.data import load_photo
from jepa_kernels.masks import MaskBatch, MultiBlock2d

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "masks.png"
GRID, PATCH, BATCH, BATCHES = 16, 14, 128, 100
COLOURS = ("#e4572e", "#f3a712", "#29a3a3", "#a05cc2")
MODES = {
    "default: every patch can be chosen,\nevery chosen patch is kept": MultiBlock2d(GRID),
    "upstream=True: cut to the shortest of 128,\nlast row and column out of reach": MultiBlock2d(GRID, upstream=True),
}


def image() -> np.ndarray:
    """The middle of a photo, [H, W, 3] in 0..1."""
    photo = load_photo("chelsea")
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    cut = photo.crop((left, top, left + side, top + side)).resize((GRID * PATCH, GRID * PATCH))
    return np.asarray(cut) / 255


def masks(sampler: MultiBlock2d, step: int) -> MaskBatch:
    generator = torch.Generator().manual_seed(step) if sampler.upstream else None
    return sampler(BATCH, step=step, generator=generator)


def row(ids: np.ndarray, lengths: np.ndarray, i: int) -> np.ndarray:
    return np.split(ids.reshape(-1), np.cumsum(lengths)[:-1])[i]


def draw_masks(axis: Any, photo: np.ndarray, drawn: MaskBatch) -> None:
    """The context at full brightness, targets outlined."""
    kept = np.zeros(GRID * GRID)
    kept[row(drawn.context_ids, drawn.context_lengths, 0)] = 1
    shown = np.kron(kept.reshape(GRID, GRID), np.ones((PATCH, PATCH)))[..., None]
    axis.imshow(photo * shown + (0.25 * photo + 0.72) * (1 - shown))
    for mask, colour in enumerate(COLOURS):
        y, x = np.divmod(row(drawn.target_ids, drawn.target_lengths, mask * BATCH), GRID)
        corner, size = (x[0] * PATCH - 0.5, y[0] * PATCH - 0.5), (np.ptp(x) + 1, np.ptp(y) + 1)
        axis.add_patch(Rectangle(corner, size[0] * PATCH, size[1] * PATCH, fill=False, edgecolor=colour, linewidth=2))


def coverage(sampler: MultiBlock2d) -> tuple[np.ndarray, np.ndarray]:
    """Share of images whose context holds a patch, and share of targets that do; [G, G] each."""
    context, target = np.zeros(GRID * GRID), np.zeros(GRID * GRID)
    for step in range(BATCHES):
        drawn = masks(sampler, step)
        context += np.bincount(drawn.context_ids.ravel(), minlength=len(context))
        target += np.bincount(drawn.target_ids.ravel(), minlength=len(target))
    images = BATCHES * BATCH
    return context.reshape(GRID, GRID) / images, target.reshape(GRID, GRID) / images / len(COLOURS)


def draw() -> Figure:
    figure = Figure(figsize=(9.6, 6.2), dpi=96, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    photo = image()
    for (title, sampler), (left, *maps) in zip(MODES.items(), axes, strict=True):
        draw_masks(left, photo, masks(sampler, 3))
        left.set_ylabel(title, fontsize=9)
        for axis, share, most in zip(maps, coverage(sampler), (1.0, 0.5), strict=True):
            drawn = axis.imshow(share, vmin=0, vmax=most, cmap="viridis")
            axis.text(0, GRID + 0.3, f"{share.min():.3f} to {share.max():.3f}", fontsize=8, va="center")
            figure.colorbar(drawn, ax=axis, shrink=0.8)
    for axis, title in zip(axes[0], ("context, and 4 targets outlined", "a patch is context", "a patch is in a target"),
                           strict=True):  # fmt: skip
        axis.set_title(title, fontsize=10)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    draw().savefig(PICTURE)
