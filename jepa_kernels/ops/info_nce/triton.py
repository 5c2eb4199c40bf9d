"""Triton `info_nce`: one pass over tiles of S leaves partial log-sum-exps of rows and columns, merged in their order.

Backward computes S again in strips of rows, no more than STRIP bytes of it at a time, turns each into the gradient of S
and multiplies it with y and, transposed, with x. No atomics: the same bits on every run.
"""

import torch
import triton
from torch import Tensor

from jepa_kernels._core.triton import capability, device_of
from jepa_kernels.ops.info_nce.triton_backward import (
    _info_nce_backward_kernel,
    _info_nce_normalize_kernel,
    _info_nce_product_kernel,
)
from jepa_kernels.ops.info_nce.triton_forward import _info_nce_forward_kernel, _info_nce_merge_kernel

STRIP = 32 << 20  # bytes: it stays in the L2 cache of the largest GPUs
BAND = 8
MERGE_BLOCK = 128
MAX_BLOCK = 2048


def _tile(dtype: torch.dtype) -> dict[str, int]:
    """128 x 128 sums; what two pipelined steps of both sides fill leaves room for a second block."""
    return dict(ROWS=128, COLUMNS=128, STEP=128 // dtype.itemsize, num_warps=8, num_stages=3)


def _two_fit(dtype: torch.dtype, plain: bool) -> bool:
    """Whether registers hold two tiles of sums, so that less is read for each: on Hopper and later, with no options."""
    return plain and dtype != torch.float32 and capability() >= 90


def _norms(x: Tensor, normalize: bool) -> Tensor:
    """fp32 [B]; 1 where embeddings are taken as they are."""
    if not normalize:
        return x.new_ones(x.shape[0], dtype=torch.float32)
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).clamp_min(1e-12).float()


def _scales(norm: Tensor, column_norm: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    return (1 / (norm * temperature)).float(), 1 / column_norm


def _merge(parts: Tensor, sums: bool) -> tuple[Tensor, Tensor]:
    """Log-sum-exps and sums, float64, of parts [tiles, 3 or 4, count]."""
    tiles, _, count = parts.shape
    lse = parts.new_empty(count, dtype=torch.float64)
    plain = parts.new_empty(count if sums else 0, dtype=torch.float64)
    if count:
        _info_nce_merge_kernel[(triton.cdiv(count, MERGE_BLOCK),)](
            parts, lse, plain, count, tiles, SUMS=sums, BLOCK=MERGE_BLOCK, num_warps=4
        )
    return lse, plain


def forward(
    x: Tensor,
    y: Tensor,
    temperature: Tensor,
    items: Tensor | None,
    column_items: Tensor | None,
    shift: int,
    label_smoothing: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(row_lse, col_lse, diagonal, row_sum, col_sum) of the block of rows of x and columns y."""
    (rows, channels), columns, sums, tile = x.shape, y.shape[0], label_smoothing > 0, _tile(x.dtype)
    two = _two_fit(x.dtype, plain=items is None and not sums)
    row_tiles = triton.cdiv(rows, tile["ROWS"])
    column_tiles = triton.cdiv(columns, tile["COLUMNS"] * (1 + two)) * (1 + two)
    row_parts = x.new_empty(column_tiles, 4 if sums else 3, rows, dtype=torch.float32)
    column_parts = x.new_empty(row_tiles, 4 if sums else 3, columns, dtype=torch.float32)
    diagonal = x.new_zeros(rows, dtype=torch.float32)
    scales = _scales(_norms(x, normalize), _norms(y, normalize), temperature)
    with device_of(x):
        if rows and columns:
            _info_nce_forward_kernel[(row_tiles * column_tiles // (1 + two),)](
                x, y, *scales, items, column_items, row_parts, column_parts, diagonal, rows, columns, channels,
                *x.stride(), *y.stride(), shift, SUMS=sums, TWO=two, BAND=BAND, **tile,
            )  # fmt: skip
        row_lse, row_sum = _merge(row_parts, sums)
        col_lse, col_sum = _merge(column_parts, sums)
    return row_lse, col_lse, diagonal, row_sum, col_sum


def backward(
    weight: Tensor,
    x: Tensor,
    y: Tensor,
    temperature: Tensor,
    items: Tensor | None,
    column_items: Tensor | None,
    row_lse: Tensor,
    col_lse: Tensor,
    row_share: Tensor | None,
    col_share: Tensor | None,
    shift: int,
    kept: float,
    normalize: bool,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dy, dtemperature) of weight * sum(G S), G held fixed; in fp32 where `wide`."""
    norms = _norms(x, normalize), _norms(y, normalize)
    gradients = [torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (x, y)]
    heat = x.new_zeros((), dtype=torch.float64)
    with device_of(x):
        if x.shape[0] and y.shape[0]:
            scales = _scales(*norms, temperature)
            lists = (*scales, 1 / norms[0], items, column_items, row_lse, col_lse, row_share, col_share)
            heat = _strips(x, y, lists, gradients, shift, kept)
        dx, dy = (
            _normalize(t, norm, gradient, weight, temperature, normalize, wide)
            for t, norm, gradient in zip((x, y), norms, gradients, strict=True)
        )
    return dx, dy, -heat * weight / temperature


def _strips(
    x: Tensor, y: Tensor, lists: tuple[Tensor | None, ...], gradients: list[Tensor], shift: int, kept: float
) -> Tensor:
    """Adds d y to the gradients of x, d^T x to those of y, strip after strip; returns the sum of G S."""
    (rows, channels), columns, tile = x.shape, y.shape[0], _tile(x.dtype)
    # In fp16 small weights would be lost: its products are of fp32.
    left, right = (t.float() if t.dtype == torch.float16 else t for t in (x, y))
    width = triton.cdiv(columns, 16) * 16  # of whole 32 bytes: rows of a strip are read 16 bytes at a time
    tiles = max(min(STRIP // (width * left.itemsize * tile["ROWS"]), triton.cdiv(rows, tile["ROWS"])), 1)
    height, column_tiles = tiles * tile["ROWS"], triton.cdiv(width, tile["COLUMNS"])
    d = left.new_empty(min(height, rows), width)
    heat = x.new_empty(triton.cdiv(rows, tile["ROWS"]), column_tiles, dtype=torch.float32)
    for first in range(0, rows, height):
        part = slice(first, min(first + height, rows))
        its = heat[first // tile["ROWS"] : triton.cdiv(part.stop, tile["ROWS"])]
        _info_nce_backward_kernel[(its.numel(),)](
            x, y, *lists, d, its, part.stop, columns, channels, *x.stride(), *y.stride(), shift, first, its.shape[0],
            width, kept, BAND=BAND, **tile,
        )  # fmt: skip
        strip = d[: part.stop - first]
        _product(strip, right, gradients[0][part])
        _product(strip, left[part], gradients[1], turned=True, add=first > 0)
    return heat.sum(dtype=torch.float64)


def _product(d: Tensor, v: Tensor, out: Tensor, turned: bool = False, add: bool = False) -> None:
    """out = d v or d^T v, or out + that; the ends of d's rows, behind v's or out's last one, are zeros."""
    tile, (rows, channels) = _tile(v.dtype), out.shape
    if channels:
        grid = (triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(channels, tile["COLUMNS"]),)
        _info_nce_product_kernel[grid](
            d, v, out, rows, v.shape[0], d.shape[1], channels, *v.stride(), TURNED=turned, ADD=add, **tile
        )


def _normalize(
    x: Tensor, norm: Tensor, gradient: Tensor, weight: Tensor, temperature: Tensor, normalize: bool, wide: bool
) -> Tensor:
    """Gradient of x from that of its direction."""
    out = x.new_empty(x.shape, dtype=torch.float32 if wide else x.dtype)
    if out.numel():
        block = min(triton.next_power_of_2(x.shape[1]), MAX_BLOCK)
        _info_nce_normalize_kernel[(x.shape[0],)](
            x, norm, gradient, weight, temperature, out, x.shape[1], *x.stride(),
            NORMALIZE=normalize, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out
