"""Draws the pictures of the op pages from what the ops return: `python -m docs.pictures.draw` writes them beside it."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.transforms import Affine2D

import jepa_kernels as jk

FOLDER = pathlib.Path(__file__).resolve().parent
COLOURS = ("#0a7ea4", "#d1642b", "#3f8f4f", "#8a5cc2")
GREY, LINE = "#d8dee4", "#57606a"
matplotlib.rcParams.update({
    "svg.fonttype": "none", "svg.hashsalt": "jepa_kernels", "font.family": "sans-serif", "font.size": 9,
    "text.color": "#1f2328", "axes.labelcolor": "#1f2328", "axes.edgecolor": LINE, "xtick.color": LINE,
    "ytick.color": LINE, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9,
})  # fmt: skip


def axes(count: int = 1, width: float = 7.0, height: float = 2.6) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    found = figure.subplots(1, count, squeeze=False)[0]
    for axis in found:
        axis.patch.set_alpha(0)
    figure.patch.set_alpha(0)
    return figure, list(found)


def cells(axis: Any, shown: np.ndarray, title: str, colours: tuple[str, ...] = (GREY, *COLOURS)) -> None:
    """A matrix of small whole numbers as squares, each number in its colour."""
    for value in np.unique(shown):
        squares = [Path.unit_rectangle().transformed(Affine2D().scale(0.92).translate(j, i))
                   for i, j in np.argwhere(shown == value)]  # fmt: skip
        axis.add_patch(PathPatch(Path.make_compound_path(*squares), color=colours[value], lw=0))
    axis.set(xlim=(-0.3, shown.shape[1] + 0.3), ylim=(shown.shape[0] + 0.3, -0.3), aspect="equal", title=title)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)


def visible(**options: Any) -> np.ndarray:
    """Which keys each query sees, read from the op: the weights of one-hot values."""
    q, k = torch.zeros(1, 1, 12, 8), torch.zeros(1, 1, 12, 8)
    seen = [jk.masked_attention(q, k, torch.eye(12)[None, None, :, part], backend="reference", **options)
            for part in (slice(0, 8), slice(4, 12))]  # fmt: skip
    return (torch.cat([seen[0][0, 0, :, :4], seen[1][0, 0]], 1) > 0).int().numpy()


def masked_attention() -> Figure:
    figure, (packed, frames, ranges) = axes(3)
    sequences = jk.Packing.from_lengths([3, 5, 4]).sequence_of_token()
    same = (sequences[:, None] == sequences) * (sequences[:, None] + 1)
    cells(packed, same.numpy(), "a packing of 3, 5 and 4 tokens")
    cells(frames, visible(frame_size=4), "frame_size=4")
    i = torch.arange(12)
    spans = torch.stack([(i - 2).clamp(min=0), (i + 3).clamp(max=12)], -1).int()
    cells(ranges, visible(key_ranges=spans), "key_ranges: two before, two after")
    packed.set_ylabel("query")
    for axis in (packed, frames, ranges):
        axis.set_xlabel("key")
    return figure


def embed_patches() -> Figure:
    figure, (image, rows) = axes(2, height=2.2)
    ids = [1, 2, 5, 6, 9, 14]
    grid = np.zeros(16, int)
    grid[ids] = 1
    cells(image, grid.reshape(4, 4), "pixels in a grid of patches: six are kept")
    for n in ids:
        image.text(n % 4 + 0.46, n // 4 + 0.5, str(n), ha="center", va="center", color="white")
    cells(rows, np.ones((6, 6), int), "their tokens, [K, E]", (GREY, COLOURS[0]))
    for row, n in enumerate(ids):
        rows.text(-0.5, row + 0.5, str(n), ha="right", va="center")
    rows.set_xlim(-1.5, 6.3)
    return figure


def assemble_tokens() -> Figure:
    figure, (axis,) = axes(1, height=1.9)
    for i, (context, target, mask) in enumerate([(5, 4, 0), (3, 6, 0), (5, 7, 1), (3, 3, 1)]):
        for n in range(context + target):
            colour = COLOURS[0] if n < context else COLOURS[1 + mask]
            axis.add_patch(Rectangle((n, i), 0.92, 0.8, color=colour))
        axis.text(-0.4, i + 0.4, f"image {i % 2}, mask {mask}", ha="right", va="center")
    axis.text(0, 4.45, "context + position", color=COLOURS[0])
    axis.text(5, 4.45, "mask token 0 + position", color=COLOURS[1])
    axis.text(10.2, 4.45, "mask token 1 + position", color=COLOURS[2])
    axis.set(xlim=(-4, 16), ylim=(4.7, -0.2))
    axis.set_axis_off()
    return figure


def rope() -> Figure:
    figure, (interleaved, tiled) = axes(2)
    positions = torch.arange(0, 40, 0.1)[:, None]
    x = torch.tensor([1.0, 0.0] * 4).expand(len(positions), 1, 8)
    for axis, pairing in ((interleaved, "interleaved"), (tiled, "tiled")):
        turned = jk.rope(x, positions, pairing=pairing, backend="reference")[:, 0]
        axis.plot(turned[:, 0], turned[:, 1], color=COLOURS[0], lw=1)
        axis.set(aspect="equal", title=f'pairing="{pairing}"', xlabel="channel 0", ylabel="channel 1")
    return figure


def latent_loss() -> Figure:
    figure, (value, slope) = axes(2)
    kinds = {"smooth_l1": {}, "l1": {"kind": "l1"}, "l1, power=1.5": {"kind": "l1", "power": 1.5}, "l2": {"kind": "l2"}}
    raw, zero = dict(normalize=False, backend="reference"), torch.zeros(1, 1, 1)
    for (label, options), colour in zip(kinds.items(), COLOURS, strict=True):
        d = torch.linspace(-2, 2, 161)[:, None, None].requires_grad_()
        losses = [jk.latent_loss(one[None], zero, **raw, **options) for one in d]
        (grad,) = torch.autograd.grad(sum(losses), d)
        x = d.detach()[:, 0, 0]
        value.plot(x, torch.stack(losses).detach(), color=colour, label=label)
        slope.plot(x, grad[:, 0, 0], color=colour)
    value.set(xlabel="d = pred - t", title="distance", ylim=(0, 3))
    slope.set(xlabel="d", title="its gradient", ylim=(-3, 3))
    value.legend(frameon=False, fontsize=8)
    return figure


def distance_weights() -> Figure:
    figure, (axis,) = axes(1, width=4.2, height=2.8)
    rows, columns = 10, 14
    target = [r * columns + c for r in range(3, 7) for c in range(5, 9)]
    context = [n for n in range(rows * columns) if n not in target]
    ids = torch.tensor([context]), torch.tensor([target])
    shown = torch.full((rows * columns,), float("nan"))
    shown[context] = jk.distance_weights(*ids, (1, rows, columns), backend="reference")[0]
    drawn = axis.imshow(shown.view(rows, columns), cmap="viridis", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[], title="weights of context patches around one target")
    figure.colorbar(drawn, ax=axis, shrink=0.8)
    return figure


def info_nce() -> Figure:
    figure, (scores, kept) = axes(2)
    torch.manual_seed(0)
    y = torch.nn.functional.normalize(torch.randn(12, 8), dim=-1)
    x = torch.nn.functional.normalize(y + 0.3 * torch.randn(12, 8), dim=-1)
    scores.imshow(x @ y.T, cmap="viridis")
    scores.set(xticks=[], yticks=[], title="S: pairs on the diagonal", xlabel="y", ylabel="x")
    which = np.full((12, 12), 1)
    which[np.diag_indices(12)] = 2
    which[2, 7] = which[7, 2] = 0
    cells(kept, which, "duplicates: 2 and 7 are one item", (GREY, COLOURS[0], COLOURS[1]))
    return figure


def sigreg() -> Figure:
    figure, (axis,) = axes(1, width=5)
    torch.manual_seed(0)
    t = torch.linspace(0, 3, 17)
    z = torch.randn(256)
    for (label, y), colour in zip(
        {"from N(0, 1)": z, "half as wide": z / 2, "collapsed": 0 * z}.items(), COLOURS, strict=False
    ):
        axis.plot(t, (t[:, None] * y).cos().mean(1), "o-", ms=3, color=colour, label=label, lw=1)
    axis.plot(t, (-t * t / 2).exp(), "--", color=LINE, label="exp(-t²/2)")
    axis.set(xlabel="t, at 17 knots", title="mean cos(t y) along one direction")
    axis.legend(frameon=False, fontsize=8)
    return figure


def collapse_stats() -> Figure:
    figure, (axis,) = axes(1, width=5)
    torch.manual_seed(0)
    kept = range(1, 33)
    ranks = [jk.collapse_stats(torch.randn(4096, 32) * (torch.arange(32) < n), backend="reference").rank for n in kept]
    axis.plot(kept, [float(r) for r in ranks], "o", ms=3, color=COLOURS[0])
    axis.plot(kept, kept, "--", color=LINE, lw=1)
    axis.set(xlabel="of 32 features, those that are not constant", title="effective rank")
    return figure


PICTURES: tuple[Callable[[], Figure], ...] = (
    masked_attention, embed_patches, assemble_tokens, rope, latent_loss, distance_weights, info_nce, sigreg,
    collapse_stats,
)  # fmt: skip

if __name__ == "__main__":
    for picture in PICTURES:
        picture().savefig(FOLDER / f"{picture.__name__}.svg", metadata={"Date": None})
