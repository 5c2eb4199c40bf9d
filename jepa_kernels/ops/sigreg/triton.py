"""Triton `sigreg`: projections in tiles that never leave the registers forward; backward writes their derivative.

Products are three of halves of eleven bits in fp16, as exact as fp32, on operands padded to whole tiles with zeros. A
tile holds slices by rows of z, so that sums over rows stay inside a warp; those of the tiles are added in a fixed
order, in fp64.
"""

import torch
import triton
from torch import Tensor

from jepa_kernels._core.triton import device_of
from jepa_kernels.ops.sigreg.triton_kernels import (
    _sigreg_backward_kernel,
    _sigreg_derivative_kernel,
    _sigreg_directions_kernel,
    _sigreg_factors_kernel,
    _sigreg_forward_kernel,
    _sigreg_halves_kernel,
    _sigreg_moments_kernel,
    _sigreg_sum_kernel,
)

SALT = 0x53494752 << 32  # apart from the numbers that masks are drawn from
SLICES, ROWS, FEATURES = 128, 128, 32  # a tile of projections, and a step of its products; halves fill whole tiles
WIDE, STEP = 128, 32  # features of a tile of dz, and slices of a step of its products
BATCH, DRAWN = 8, 128  # slices, and blocks of four of their numbers, at a time
LANES = 256  # slices of the kernels between products
SIDE = 1 << 15  # programs of a second axis; it may have 65535


def directions(like: Tensor, slices: int, step: Tensor, seed: int) -> Tensor:
    """Unit vectors fp32 [slices, E] on the device of `like` [.., E]: the bits of the reference."""
    out = like.new_empty((slices, like.shape[-1]), dtype=torch.float32)
    _draw(out, slices, slices, like.shape[-1], step, seed)
    return out


def _draw(out: Tensor, slices: int, padded: int, width: int, step: Tensor, seed: int) -> None:
    """Directions, or halves of them where `out` is in fp16, padded with zeros."""
    if step.device != out.device:
        step = torch.full((), int(step), dtype=torch.int64, device=out.device)
    stride = out.shape[-1]
    block = min(triton.next_power_of_2(triton.cdiv(stride, 4)), DRAWN)
    with device_of(out):
        # The numbers are defined by their roundings.
        _sigreg_directions_kernel[(triton.cdiv(padded, BATCH),)](
            out, step, seed ^ SALT, slices, padded, width, stride, HALVES=out.dtype == torch.float16,
            BATCH=BATCH, BLOCK=block, ONE_BLOCK=stride <= 4 * block, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip


def _halves(z: Tensor, slices: int, step: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of z fp16 [2, V rows, E], with a scale a row, and of directions fp16 [2, slices, E], in whole tiles."""
    views, rows, width = z.shape
    padded, stride = _up(rows, ROWS), _up(width, FEATURES)
    x = z.new_empty((2, views * padded, stride), dtype=torch.float16)
    scales = z.new_empty(views * padded, dtype=torch.float32)
    a = z.new_empty((2, _up(slices, SLICES), stride), dtype=torch.float16)
    _draw(a, slices, a.shape[1], width, step, seed)
    with device_of(z):
        _sigreg_halves_kernel[(views * padded,)](
            z, x, scales, rows, padded, width, stride, *z.stride(),
            BLOCK=min(triton.next_power_of_2(stride), 1024), num_warps=1,
        )  # fmt: skip
    return x, scales, a


def _up(size: int, tile: int) -> int:
    return triton.cdiv(size, tile) * tile


def _grid(a: Tensor, tiles: int) -> tuple[int, int, int]:
    """Tiles of slices, side by side for each tile of rows."""
    return a.shape[1] // SLICES, min(tiles, SIDE), triton.cdiv(tiles, SIDE)


def moments(
    z: Tensor, slices: int, knots: int, t_max: float, step: Tensor, seed: int, keep: bool
) -> tuple[Tensor, Tensor]:
    """Sums of cosines less their expectation, and of sines, over the rows: fp32 [V, 2, knots, slices].

    Those at the first knot are 0; in their place stands the number of rows. Nothing else is kept.
    """
    views, rows, _ = z.shape
    blocks, delta = triton.cdiv(rows, ROWS), t_max / (knots - 1)
    out = z.new_empty((views, 2, knots, slices), dtype=torch.float32)
    kept = out.new_empty(0)
    if views == 0:
        return out, kept
    parts = z.new_empty((views * blocks * 2, 2, knots, slices), dtype=torch.float32)
    if rows:
        x, scales, a = _halves(z, slices, step, seed)
        with device_of(z):
            _sigreg_moments_kernel[_grid(a, views * blocks)](
                x, scales, a, parts, x.shape[1], rows, blocks, *a.shape[1:], slices, knots, delta,
                SLICES=SLICES, ROWS=ROWS, FEATURES=FEATURES, num_warps=8, num_stages=3,
            )  # fmt: skip
    with device_of(z):
        _sigreg_sum_kernel[(triton.cdiv(slices, 32) * knots * views,)](
            parts, out, rows, blocks * 2, slices, knots, delta, BLOCKS=16, LANES=32, num_warps=4
        )
    return out, kept


def forward(z: Tensor, moments: Tensor, t_max: float, step: Tensor, seed: int, world: int, kept: Tensor) -> Tensor:
    """The statistic, from the moments alone."""
    views, _, knots, slices = moments.shape
    loss, block = moments.new_empty(()), max(triton.next_power_of_2(knots), 16)
    with device_of(z):
        _sigreg_forward_kernel[(1,)](
            moments, loss, views, slices, knots, t_max / (knots - 1), KNOTS=block, LANES=max(4096 // block, 16),
            num_warps=16,
        )  # fmt: skip
    return loss


def backward(
    grad: Tensor, z: Tensor, moments: Tensor, t_max: float, step: Tensor, seed: int, world: int, kept: Tensor
) -> Tensor:
    """dz: projections again, halves of their derivative [2, slices, V rows], and back along the directions."""
    (views, rows, width), (_, _, knots, slices) = z.shape, moments.shape
    blocks, delta = triton.cdiv(rows, ROWS), t_max / (knots - 1)
    dz = z.new_empty(z.shape)
    if dz.numel() == 0:
        return dz
    x, scales, a = _halves(z, slices, step, seed)
    (_, padded, stride), factors = a.shape, torch.empty_like(moments)
    dy = a.new_empty((2, padded, x.shape[1]))
    with device_of(z):
        _sigreg_factors_kernel[(triton.cdiv(slices, LANES) * knots * views,)](
            moments, factors, slices, knots, delta, LANES=LANES, num_warps=4
        )
        _sigreg_derivative_kernel[_grid(a, views * blocks)](
            x, scales, a, factors, dy, x.shape[1], rows, blocks, padded, stride, slices, knots, delta,
            SLICES=SLICES, ROWS=ROWS, FEATURES=FEATURES, num_warps=8, num_stages=3,
        )  # fmt: skip
        _sigreg_backward_kernel[(views * blocks, triton.cdiv(width, WIDE))](
            dy, a, grad, dz, rows, blocks, views, padded, width, stride, slices, world,
            ROWS=ROWS, FEATURES=WIDE, SLICES=STEP, num_warps=8, num_stages=4,
        )  # fmt: skip
    return dz
