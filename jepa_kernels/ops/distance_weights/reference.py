"""Specification of `distance_weights`: every squared distance, the least of each row, its weight."""

import torch
from torch import Tensor

from jepa_kernels.packing import Packing

FAR = 2**40  # beyond every squared distance


def forward(
    context_ids: Tensor,
    target_ids: Tensor,
    grid: tuple[int, int, int],
    *,
    packing: Packing | None = None,
    target_packing: Packing | None = None,
    scale: float = 1.0,
) -> Tensor:
    """1 / sqrt(distance / scale) in fp32; 0 where a sequence has no targets."""
    if packing is None or target_packing is None:
        return _weights(context_ids, target_ids, grid, scale)
    padded = _weights(packing.pad(context_ids), target_packing.pad(target_ids, value=-1), grid, scale)
    return packing.unpad(padded)


def _weights(context: Tensor, target: Tensor, grid: tuple[int, int, int], scale: float) -> Tensor:
    """[S, K] ids and [S, L] ids, -1 where there is none."""
    squares = context.new_zeros(*context.shape, target.shape[1])
    for own, other in zip(_place(context, grid), _place(target, grid), strict=True):
        squares += (own[:, :, None] - other[:, None, :]) ** 2
    squares = torch.where(target[:, None, :] < 0, FAR, squares)
    nearest = torch.cat([squares, squares.new_full((*context.shape, 1), FAR)], -1).amin(-1)
    weights = 1.0 / (nearest.float().sqrt() / scale).sqrt()
    return torch.where(nearest < FAR, weights, 0.0)


def _place(ids: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    frame, inside = ids // (grid[1] * grid[2]), ids % (grid[1] * grid[2])
    return frame, inside // grid[2], inside % grid[2]
