"""Samplers of context and target patches. Numpy in and out, so that data-loader workers hold no tensors."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.utils.data
from torch import Tensor

from jepa_kernels._core.check import fail
from jepa_kernels.packing import Packing
from jepa_kernels.pairs import Pairs

MAX_TRIES = 20
MAX_ASPECT = 1000.0  # far beyond any grid

Range = tuple[float, float]


@dataclass(frozen=True)
class Masks:
    """Masks of B images on a device, mask-major (sequence s = mask * B + image).

    context_ids, target_ids: int64, packed [T] with a Packing beside them, or rectangular [M, K] with None.
    pairs: the predictor's sequences [context | target]; None when rectangular.
    """

    batch: int
    context_ids: Tensor
    target_ids: Tensor
    context_packing: Packing | None = None
    target_packing: Packing | None = None
    pairs: Pairs | None = None


@dataclass(frozen=True)
class MaskBatch:
    """Masks of B images on the host, mask-major.

    context_ids, target_ids: int64, sorted in each row: packed [T], or rectangular [M, K] (`truncate=True`).
    context_lengths [B], target_lengths [masks * B]: int64, patches per row.
    """

    batch: int
    context_ids: np.ndarray
    context_lengths: np.ndarray
    target_ids: np.ndarray
    target_lengths: np.ndarray

    @property
    def packed(self) -> bool:
        return self.context_ids.ndim == 1

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Masks:
        """Copy to `device`: ids and, when packed, the Packings that every layer and both passes share."""
        context_ids, target_ids = (
            torch.from_numpy(ids).to(device, non_blocking=non_blocking) for ids in (self.context_ids, self.target_ids)
        )
        if not self.packed:
            return Masks(self.batch, context_ids, target_ids)
        context, target = self.context_lengths.tolist(), self.target_lengths.tolist()
        return Masks(
            self.batch,
            context_ids,
            target_ids,
            Packing.from_lengths(context, device=device),
            Packing.from_lengths(target, device=device),
            Pairs.from_lengths(context, target, device=device),
        )

    def pin_memory(self) -> MaskBatch:
        """The same in page-locked memory (what DataLoader(pin_memory=True) calls)."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "batch"}
        pinned = {name: torch.from_numpy(a).pin_memory().numpy() for name, a in arrays.items()}
        return MaskBatch(self.batch, **pinned)


class MultiBlock2d:
    """Sample I-JEPA's multi-block masks: per image one large context block minus `num_targets` target blocks.

    A block covers a share of the grid and has an aspect ratio (height / width), both drawn with one uniform
    number. One target block size and one context block size hold for the whole batch; places are drawn per
    image. Context patches inside a target are dropped. If `min_keep` or fewer remain, the context is drawn
    again, and after every 20 tries one more target (the last first) is allowed to overlap it.

    Every patch can be chosen and every chosen patch is kept: rows differ in length, ids are packed.

    grid: patches per side, G or (Gh, Gw).
    target_scale, context_scale: (least, most) share of the grid, in 0..1.
    target_aspect_ratio: (least, most) height / width; a context block has that of the grid.
    truncate: cut the context of every image to the shortest in the batch, in raster order, as the published
        code does: rectangular ids, but the bottom rows are rarely seen.
    seed: masks depend on (seed, step) alone. `step` counts calls; in the workers of a DataLoader with one
        call per batch it is the batch's number, whatever the number of workers. Set it to resume.

    Source: Assran et al., Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture
    (arXiv:2301.08243), section 3 and appendix A.
    """

    def __init__(
        self,
        grid: int | tuple[int, int],
        *,
        target_scale: Range = (0.15, 0.2),
        target_aspect_ratio: Range = (0.75, 1.5),
        context_scale: Range = (0.85, 1.0),
        num_targets: int = 4,
        min_keep: int = 10,
        truncate: bool = False,
        seed: int = 0,
    ) -> None:
        self.grid = _sides(grid)
        if min(self.grid) < 2:
            fail("MultiBlock2d", "grid", "have at least 2 patches per side", self.grid, "use a larger image")
        _check_range("target_scale", target_scale, 1.0, "pass shares of the grid")
        _check_range("context_scale", context_scale, 1.0, "pass shares of the grid")
        _check_range("target_aspect_ratio", target_aspect_ratio, MAX_ASPECT, "pass height / width")
        _check_count("num_targets", num_targets, 1, "the published value is 4")
        _check_count("min_keep", min_keep, 0, "the published value is 10")
        _check_count("seed", seed, 0, "pass any such number")
        self.target_scale, self.target_aspect_ratio = target_scale, target_aspect_ratio
        self.context_scale = context_scale
        self.num_targets, self.min_keep, self.truncate, self.seed = num_targets, min_keep, truncate, seed
        self.step = 0
        height, width = self._context_size(0.0)
        if height * width <= min_keep:
            fail(
                "MultiBlock2d",
                "min_keep",
                f"be less than the smallest context block, {height} x {width} patches",
                min_keep,
                "lower it, or raise context_scale or the image size",
            )

    def __call__(self, batch: int, *, step: int | None = None) -> MaskBatch:
        """Masks for `batch` images. `step` overrides, and does not advance, the count of calls."""
        _check_count("batch", batch, 1, "pass the number of images")
        step = self._next_step() if step is None else step
        _check_count("step", step, 0, "leave it out to count calls")
        rng = np.random.default_rng([self.seed, step])
        size = self._block_size(rng.random(), self.target_scale, self.target_aspect_ratio)
        context_size = self._context_size(rng.random())
        corners = self._corners(rng, size, (self.num_targets, batch))
        context = self._context(rng, context_size, self._blocks(corners, size))
        lengths = context.sum(1)
        if self.truncate:
            shortest = int(lengths.min())
            context &= np.cumsum(context, axis=1) <= shortest
            lengths = np.full(batch, shortest)
        context_ids, target_ids = np.flatnonzero(context) % context.shape[1], self._block_ids(corners, size)
        target_lengths = np.full(len(target_ids), size[0] * size[1])
        shapes = ((batch, -1), target_ids.shape) if self.truncate else ((-1,), (-1,))
        return MaskBatch(batch, context_ids.reshape(shapes[0]), lengths, target_ids.reshape(shapes[1]), target_lengths)

    def _next_step(self) -> int:
        worker = torch.utils.data.get_worker_info()
        step = self.step if worker is None else self.step + worker.id
        self.step += 1 if worker is None else worker.num_workers
        return step

    def _context_size(self, u: float) -> tuple[int, int]:
        return self._block_size(u, self.context_scale, (self.grid[0] / self.grid[1],) * 2)

    def _block_size(self, u: float, scale: Range, ratio: Range) -> tuple[int, int]:
        """Height and width of a block in patches, less than the grid on either side."""
        patches = int(self.grid[0] * self.grid[1] * (scale[0] + u * (scale[1] - scale[0])))
        aspect = ratio[0] + u * (ratio[1] - ratio[0])
        height, width = round(math.sqrt(patches * aspect)), round(math.sqrt(patches / aspect))
        return max(1, min(height, self.grid[0] - 1)), max(1, min(width, self.grid[1] - 1))

    def _corners(self, rng: np.random.Generator, size: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
        """Top left corners [2, *shape], every place equally likely."""
        tops, lefts = (rng.integers(0, side - n + 1, shape) for side, n in zip(self.grid, size, strict=True))
        return np.stack([tops, lefts])

    def _blocks(self, corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Corners [2, ...] -> bool [..., N], True inside the block."""
        inside = [
            (np.arange(side) >= start[..., None]) & (np.arange(side) < start[..., None] + n)
            for start, side, n in zip(corners, self.grid, size, strict=True)
        ]
        return (inside[0][..., :, None] & inside[1][..., None, :]).reshape(*corners.shape[1:], -1)

    def _block_ids(self, corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Corners [2, masks, B] -> ids int64 [masks * B, K], sorted."""
        offsets = (np.arange(size[0])[:, None] * self.grid[1] + np.arange(size[1])).reshape(-1)
        return (corners[0] * self.grid[1] + corners[1]).reshape(-1, 1) + offsets

    def _context(self, rng: np.random.Generator, size: tuple[int, int], targets: np.ndarray) -> np.ndarray:
        """Targets bool [masks, B, N] -> context bool [B, N]: a block of `size` outside the targets."""
        masks, batch, patches = targets.shape
        context = np.empty((batch, patches), dtype=bool)
        pending = np.arange(batch)
        for respected in range(masks, -1, -1):
            blocked: np.ndarray = np.any(targets[:respected], axis=0)
            for _ in range(MAX_TRIES):
                drawn = self._blocks(self._corners(rng, size, (len(pending),)), size) & ~blocked[pending]
                context[pending] = drawn
                pending = pending[drawn.sum(1) <= self.min_keep]
                if not len(pending):
                    return context
        return context


def _sides(grid: Any) -> tuple[int, int]:
    sides = tuple(grid) if isinstance(grid, tuple | list) else (grid, grid)
    if len(sides) != 2 or not all(map(_whole, sides)):
        fail("MultiBlock2d", "grid", "be patches per side, G or (Gh, Gw)", repr(grid), "pass integers", TypeError)
    return int(sides[0]), int(sides[1])


def _whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check_count(argument: str, value: Any, least: int, remedy: str) -> None:
    if not _whole(value):
        fail("MultiBlock2d", argument, "be an int", repr(value), remedy, TypeError)
    if value < least:
        fail("MultiBlock2d", argument, f"be at least {least}", value, remedy)


def _check_range(argument: str, bounds: Any, limit: float, remedy: str) -> None:
    pair = isinstance(bounds, tuple | list) and len(bounds) == 2
    if not (pair and all(isinstance(b, numbers.Real) for b in bounds)):
        fail("MultiBlock2d", argument, "be two numbers (least, most)", repr(bounds), remedy, TypeError)
    if not 0 < bounds[0] <= bounds[1] <= limit:
        fail("MultiBlock2d", argument, f"satisfy 0 < least <= most <= {limit:g}", bounds, remedy)
