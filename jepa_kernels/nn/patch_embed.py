"""Patch embedding and the sine-cosine position tables."""

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jepa_kernels as jk
from jepa_kernels._core.check import fail
from jepa_kernels.packing import Packing

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of each channel, in 0..1


class PatchEmbed(nn.Module):
    """A convolution with stride = kernel, evaluated at the kept patches only.

    tubelet_size: frames of a video's patch; None: images. mean, std: of each channel, applied to pixels on the way in
    (see `embed_patches`); uint8 pixels need them.
    """

    def __init__(
        self,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        tubelet_size: int | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None):
            fail("PatchEmbed", "mean and std", "be given together", f"mean={mean}, std={std}", "pass both or neither")
        if mean is not None and std is not None and not len(mean) == len(std) == in_chans:
            wanted = f"hold {in_chans} numbers like the channels"
            fail("PatchEmbed", "mean and std", wanted, f"{len(mean)} and {len(std)}", "pass one for each channel")
        self.mean, self.std = (None if v is None else tuple(map(float, v)) for v in (mean, std))
        self.proj: nn.Conv2d | nn.Conv3d
        if tubelet_size is None:
            self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        else:
            sides = (tubelet_size, patch_size, patch_size)
            self.proj = nn.Conv3d(in_chans, embed_dim, sides, stride=sides)

    def forward(
        self,
        pixels: Tensor,
        ids: Tensor | None = None,
        packing: Packing | None = None,
        pos_embed: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """pixels [B, C, (T,) H, W], pos_embed [N, E] -> [B, N, E]; ids [M, K] -> [M, K, E]; ids [T] -> [T, E].

        shift [E]: added to every patch.
        """
        if not isinstance(self.proj, nn.Conv2d | nn.Conv3d) or "forward" in vars(self.proj):
            found, remedy = type(self.proj).__name__, "merge an adapter into its weights"
            fail("PatchEmbed", "proj", "be a plain convolution", found, remedy, TypeError)
        weight, bias = self.proj.weight, self.proj.bias
        if shift is not None and bias is not None:
            bias = bias + shift
        return jk.embed_patches(pixels, ids, weight, bias, pos_embed, packing=packing, mean=self.mean, std=self.std)


def sincos_1d(positions: np.ndarray, dim: int) -> np.ndarray:
    """positions [N] -> float64 [N, dim]: sin(p w_i) | cos(p w_i), w_i = 10000^(-i / (dim / 2))."""
    frequency = 10000.0 ** (-np.arange(dim // 2, dtype=np.float64) / (dim / 2))
    angle = np.outer(positions, frequency)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def sincos_2d(grid: tuple[int, int], dim: int) -> Tensor:
    """float32 [Gh * Gw, dim]: the first half of the channels encodes the column, the second the row (I-JEPA).

    V-JEPA's tables are not these: see `sincos_3d`.
    """
    row, column = np.divmod(np.arange(grid[0] * grid[1], dtype=np.float64), grid[1])
    table = np.concatenate([sincos_1d(column, dim // 2), sincos_1d(row, dim // 2)], axis=1)
    return torch.from_numpy(table.astype(np.float32))


def sincos_3d(grid: tuple[int, int, int], dim: int, *, uniform_power: bool = True) -> Tensor:
    """float32 [Gt * Gh * Gw, dim]: channels encode the frame, then the row, then the column (V-JEPA).

    uniform_power: each gets 2 ceil(dim / 6) channels, and the last columns' that are beyond dim fall away; False: the
        frame gets half of the channels, row and column a quarter each. Published models have True.
    """
    frame, place = np.divmod(np.arange(math.prod(grid), dtype=np.float64), grid[1] * grid[2])
    row, column = np.divmod(place, grid[2])
    widths = [2 * math.ceil(dim / 6)] * 3 if uniform_power else [dim // 2, dim // 4, dim // 4]
    parts = [sincos_1d(p, width) for p, width in zip((frame, row, column), widths, strict=True)]
    return torch.from_numpy(np.concatenate(parts, axis=1)[:, :dim].astype(np.float32))


def frozen_table(
    module: str, argument: str, grid: tuple[int, ...], dim: int, *, uniform_power: bool = True
) -> nn.Parameter:
    """[1, N, dim], of an image's (Gh, Gw) or a clip's (Gt, Gh, Gw): a parameter, as published, that is never trained.

    Raises ValueError, in the name of `module`, for a width that the axes can not share.
    """
    parts = 2 if len(grid) == 3 and uniform_power else 4 if len(grid) == 2 else 8
    if dim % parts:
        fail(module, argument, f"be a multiple of {parts}", dim, "each axis has sines and cosines in the table")
    table = nn.Parameter(torch.empty(1, math.prod(grid), dim, dtype=torch.float32), requires_grad=False)
    table.data.copy_(sincos(grid, dim, uniform_power)[None])
    return table


def resized(table: Tensor, grid: tuple[int, ...], wanted: tuple[int, ...]) -> Tensor:
    """A clip's table [N, dim] of `grid` spread over a clip of `wanted` patches: trilinear, patch centres on centres."""
    x = F.interpolate(table.T.unflatten(1, grid)[None], wanted, mode="trilinear")
    return x[0].flatten(1).T.contiguous()


def sincos(grid: tuple[int, ...], dim: int, uniform_power: bool) -> Tensor:
    """The table [N, dim] of an image's (Gh, Gw) or a clip's (Gt, Gh, Gw)."""
    if len(grid) == 2:
        return sincos_2d(grid, dim)
    return sincos_3d(cast(tuple[int, int, int], grid), dim, uniform_power=uniform_power)
