"""Triton `sigreg`: projections in tiles that never leave the registers forward; backward writes their derivative.

Products are three of TF32, as exact as fp32. A tile holds slices by rows of z, so that sums over rows stay inside a
warp; those of the tiles are added in a fixed order, in fp64.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jepa_kernels._core.triton import device_of
from jepa_kernels.ops.sigreg.triton_tiles import (
    knot_weight,
    normals,
    project,
    turn,
    turn_by,
)

SALT = 0x53494752 << 32  # apart from the numbers that masks are drawn from
SLICES, ROWS, FEATURES, WARPS = 128, 64, 32, 8  # of a tile of projections
BATCH, DRAWN = 8, 128  # slices, and blocks of four of their numbers, at a time
LANES = 256  # slices of the kernels between products
LENGTHS = ["rows", "blocks", "views", "total", "knots", "slices"]


@triton.jit(do_not_specialize=["key", "slices"])
def _sigreg_directions_kernel(
    out, step, key, slices, width, BATCH: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr
):
    s = tl.program_id(0) * BATCH + tl.arange(0, BATCH)[:, None]
    at = tl.load(step)
    e = tl.arange(0, 4 * BLOCK)[None, :]
    out += s.to(tl.int64) * width
    squares = tl.zeros([BATCH, 4 * BLOCK], tl.int64)
    grid = tl.zeros([BATCH, 4 * BLOCK], tl.int32)
    for start in range(0, width, 4 * BLOCK):
        grid = normals(start, s, at, key, BATCH, BLOCK)
        wide = tl.where(start + e < width, grid, 0).to(tl.int64)
        squares += wide * wide
    scale = (1.0 / tl.sqrt(tl.sum(squares, 1).to(tl.float64))).to(tl.float32)[:, None]
    if ONE_BLOCK:
        tl.store(out + e, grid.to(tl.float32) * scale, mask=(s < slices) & (e < width))
    else:
        for start in range(0, width, 4 * BLOCK):
            grid = normals(start, s, at, key, BATCH, BLOCK)
            tl.store(out + start + e, grid.to(tl.float32) * scale, mask=(s < slices) & (start + e < width))


@triton.jit(do_not_specialize=LENGTHS)
def _sigreg_moments_kernel(
    z, directions, parts, rows, blocks, width, slices, knots, delta, z_view, z_row, z_feature,
    SLICES: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    s = tl.program_id(0) * SLICES + tl.arange(0, SLICES)
    n = tile % blocks * ROWS + tl.arange(0, ROWS)
    z += (tile // blocks).to(tl.int64) * z_view
    y = project(z, directions, s, n, rows, width, slices, z_row, z_feature, SLICES, ROWS, FEATURES)
    versine, sine = turn_by(y * delta)
    real = tl.where((n < rows)[None, :], 1.0, y * 0.0)  # rows past the last stay at 0 in every turn
    imaginary = y * 0.0
    parts += tile.to(tl.int64) * 2 * knots * slices + s
    for k in range(1, knots):
        real, imaginary = turn(versine, sine, real, imaginary)
        tl.store(parts + k * slices, tl.sum(real, 1), mask=s < slices)
        tl.store(parts + (knots + k) * slices, tl.sum(imaginary, 1), mask=s < slices)


@triton.jit(do_not_specialize=LENGTHS)
def _sigreg_sum_kernel(parts, moments, rows, blocks, slices, knots, delta, LANES: tl.constexpr):
    s = tl.program_id(0) * LANES + tl.arange(0, LANES)
    k = tl.program_id(1)
    view = tl.program_id(2).to(tl.int64)
    real = tl.zeros([LANES], tl.float64)
    imaginary = tl.zeros([LANES], tl.float64)
    if k > 0:
        for block in range(blocks):
            at = parts + ((view * blocks + block) * 2 * knots + k) * slices + s
            real += tl.load(at, mask=s < slices, other=0.0).to(tl.float64)
            imaginary += tl.load(at + knots * slices, mask=s < slices, other=0.0).to(tl.float64)
    t = k.to(tl.float64) * delta
    real += tl.where(k > 0, -tl.exp(-0.5 * t * t), 1.0) * rows
    moments += (view * 2 * knots + k) * slices + s
    tl.store(moments, real.to(tl.float32), mask=s < slices)
    tl.store(moments + knots * slices, imaginary.to(tl.float32), mask=s < slices)


@triton.jit(do_not_specialize=LENGTHS)
def _sigreg_forward_kernel(moments, loss, views, slices, knots, delta, KNOTS: tl.constexpr, LANES: tl.constexpr):
    k = tl.arange(0, KNOTS)
    weight = tl.where((k > 0) & (k < knots), knot_weight(k, knots, delta), 0.0)
    total = tl.zeros([], tl.float64)
    for _ in range(views):
        count = tl.load(moments).to(tl.float64)
        distance = tl.zeros([KNOTS, LANES], tl.float64)
        for _ in range(2):
            for start in range(0, slices, LANES):
                s = start + tl.arange(0, LANES)
                there = ((k > 0) & (k < knots))[:, None] & (s < slices)[None, :]
                x = tl.load(moments + k[:, None] * slices + s[None, :], mask=there, other=0.0).to(tl.float64)
                distance += weight[:, None] * x * x
            moments += knots * slices
        total += tl.where(count > 0, tl.sum(distance) / tl.maximum(count, 1.0), count)
    tl.store(loss, (total / tl.maximum(views * slices, 1)).to(tl.float32))


@triton.jit(do_not_specialize=[*LENGTHS, "world"])
def _sigreg_factors_kernel(moments, grad, factors, views, slices, knots, delta, world, LANES: tl.constexpr):
    """What Horner's rule adds at each knot: the sine's moment to the real part, the cosine's to the imaginary one."""
    s = tl.program_id(0) * LANES + tl.arange(0, LANES)
    k = tl.program_id(1)
    at = tl.program_id(2).to(tl.int64) * 2 * knots * slices + s
    scale = tl.load(grad).to(tl.float64) * world / (views * slices).to(tl.float64)
    slope = 2.0 * scale * knot_weight(k, knots, delta) * (k.to(tl.float64) * delta)
    count = tl.load(moments + at, mask=s < slices, other=1.0).to(tl.float64)
    real = tl.load(moments + at + (knots + k) * slices, mask=s < slices, other=0.0).to(tl.float64)
    imaginary = tl.load(moments + at + k * slices, mask=s < slices, other=0.0).to(tl.float64)
    tl.store(factors + at + k * slices, (slope * real / count).to(tl.float32), mask=s < slices)
    tl.store(factors + at + (knots + k) * slices, (slope * imaginary / count).to(tl.float32), mask=s < slices)


@triton.jit(do_not_specialize=LENGTHS)
def _sigreg_derivative_kernel(
    z, directions, factors, dy, rows, blocks, total, width, slices, knots, delta, z_view, z_row, z_feature,
    SLICES: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    view = (tile // blocks).to(tl.int64)
    s = tl.program_id(0) * SLICES + tl.arange(0, SLICES)
    n = tile % blocks * ROWS + tl.arange(0, ROWS)
    z += view * z_view
    y = project(z, directions, s, n, rows, width, slices, z_row, z_feature, SLICES, ROWS, FEATURES)
    versine, sine = turn_by(y * delta)
    real = y * 0.0
    imaginary = y * 0.0
    factors += view * 2 * knots * slices + s
    for i in range(1, knots):
        k = knots - i
        real += tl.load(factors + k * slices, mask=s < slices, other=0.0)[:, None]
        imaginary += tl.load(factors + (knots + k) * slices, mask=s < slices, other=0.0)[:, None]
        real, imaginary = turn(versine, sine, real, imaginary)
    at = s[:, None].to(tl.int64) * total + view * rows + n[None, :]
    tl.store(dy + at, real, mask=(s < slices)[:, None] & (n < rows)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def _sigreg_backward_kernel(
    dy, directions, dz, total, width, slices, ROWS: tl.constexpr, FEATURES: tl.constexpr, SLICES: tl.constexpr
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    sums = tl.zeros([ROWS, FEATURES], tl.float32)
    for start in range(0, slices, SLICES):
        s = start + tl.arange(0, SLICES)
        at = s[None, :].to(tl.int64) * total + n[:, None]
        left = tl.load(dy + at, mask=(n < total)[:, None] & (s < slices)[None, :], other=0.0)
        at = s[:, None].to(tl.int64) * width + e[None, :]
        right = tl.load(directions + at, mask=(s < slices)[:, None] & (e < width)[None, :], other=0.0)
        sums = tl.dot(left, right, sums, input_precision="tf32x3")
    at = n[:, None].to(tl.int64) * width + e[None, :]
    tl.store(dz + at, sums.to(dz.dtype.element_ty), mask=(n < total)[:, None] & (e < width)[None, :])


def directions(like: Tensor, slices: int, step: Tensor, seed: int) -> Tensor:
    """Unit vectors fp32 [slices, E] on the device of `like` [.., E]: the bits of the reference."""
    out = like.new_empty((slices, like.shape[-1]), dtype=torch.float32)
    if step.device != like.device:
        step = torch.full((), int(step), dtype=torch.int64, device=like.device)
    block = min(triton.next_power_of_2(triton.cdiv(out.shape[1], 4)), DRAWN)
    with device_of(like):
        # The numbers are defined by their roundings.
        _sigreg_directions_kernel[(triton.cdiv(slices, BATCH),)](
            out, step, seed ^ SALT, slices, out.shape[1], BATCH=BATCH, BLOCK=block,
            ONE_BLOCK=out.shape[1] <= 4 * block, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _tiles(z: Tensor) -> tuple[int, dict[str, Any]]:
    """Blocks of rows in a view, and the options of kernels that project."""
    tile = dict(SLICES=SLICES, ROWS=ROWS, FEATURES=FEATURES, num_warps=WARPS, num_stages=3)
    return triton.cdiv(z.shape[1], ROWS), tile


def moments(z: Tensor, slices: int, knots: int, t_max: float, step: Tensor, seed: int) -> Tensor:
    """Sums of cosines less their expectation, and of sines, over the rows: fp32 [V, 2, knots, slices].

    Those at the first knot are 0; in their place stands the number of rows.
    """
    (views, rows, width), (blocks, tile) = z.shape, _tiles(z)
    out = z.new_empty((views, 2, knots, slices), dtype=torch.float32)
    if views == 0:
        return out
    parts = z.new_empty((views * blocks, 2, knots, slices), dtype=torch.float32)
    a, delta = directions(z, slices, step, seed), t_max / (knots - 1)
    with device_of(z):
        if rows:
            _sigreg_moments_kernel[(triton.cdiv(slices, SLICES), views * blocks)](
                z, a, parts, rows, blocks, width, slices, knots, delta, *z.stride(), **tile
            )
        _sigreg_sum_kernel[(triton.cdiv(slices, LANES), knots, views)](
            parts, out, rows, blocks, slices, knots, delta, LANES=LANES, num_warps=4
        )
    return out


def forward(z: Tensor, moments: Tensor, t_max: float, step: Tensor, seed: int, world: int) -> Tensor:
    """The statistic, from the moments alone."""
    views, _, knots, slices = moments.shape
    loss, block = moments.new_empty(()), max(triton.next_power_of_2(knots), 16)
    with device_of(z):
        _sigreg_forward_kernel[(1,)](
            moments, loss, views, slices, knots, t_max / (knots - 1), KNOTS=block, LANES=max(4096 // block, 16),
            num_warps=16,
        )  # fmt: skip
    return loss


def backward(grad: Tensor, z: Tensor, moments: Tensor, t_max: float, step: Tensor, seed: int, world: int) -> Tensor:
    """dz: projections again, their derivative [slices, V N], and back along the directions."""
    (views, rows, width), (blocks, tile) = z.shape, _tiles(z)
    (_, _, knots, slices), total = moments.shape, views * rows
    dz = z.new_empty(z.shape)
    if dz.numel() == 0:
        return dz
    a, delta = directions(z, slices, step, seed), t_max / (knots - 1)
    factors, dy = torch.empty_like(moments), a.new_empty((slices, total))
    with device_of(z):
        _sigreg_factors_kernel[(triton.cdiv(slices, LANES), knots, views)](
            moments, grad, factors, views, slices, knots, delta, world, LANES=LANES, num_warps=4
        )
        _sigreg_derivative_kernel[(triton.cdiv(slices, SLICES), views * blocks)](
            z, a, factors, dy, rows, blocks, total, width, slices, knots, delta, *z.stride(), **tile
        )
        _sigreg_backward_kernel[(triton.cdiv(total, 64), triton.cdiv(width, 128))](
            dy, a, dz, total, width, slices, ROWS=64, FEATURES=128, SLICES=32, num_warps=8, num_stages=3
        )
    return dz
