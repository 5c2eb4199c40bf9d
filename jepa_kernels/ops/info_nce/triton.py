"""Triton `info_nce`: one pass over tiles of S leaves partial log-sum-exps of rows and columns, merged in their order.

Backward computes S again in strips of rows, turns each into the gradient of S and multiplies it with y and, transposed,
with x. No atomics: the same bits on every run.
"""

from collections.abc import Iterator
from math import log
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from jepa_kernels._core.triton import capability, device_of
from jepa_kernels.ops.info_nce.triton_backward import (
    _info_nce_backward_kernel,
    _info_nce_normalize_kernel,
    _info_nce_product_kernel,
)
from jepa_kernels.ops.info_nce.triton_forward import (
    _info_nce_forward_kernel,
    _info_nce_merge_kernel,
    _info_nce_pair_kernel,
)

HALF = 128  # columns whose sums are kept at a time
WAVE = 132  # tiles of d x, the product of a strip with y: one for each multiprocessor of an H100
BAND = 16
LN2 = log(2)
MERGE = dict(TILES=32, BLOCK=32, num_warps=4)
PAIR_BLOCK = 512
MAX_BLOCK = 2048


def _large() -> bool:
    """Hopper and Blackwell of data centers: 227 KB of shared memory a block and the copy engine. GeForce has 99 KB."""
    return 90 <= capability() < 120


def _columns(dtype: torch.dtype, plain: bool = True) -> int:
    """Of a tile of 128 rows, whose sums registers hold: more in 16 bits, on large GPUs, with no options."""
    return 256 if plain and dtype != torch.float32 and _large() else 128


def _tile(*operands: Tensor, plain: bool = True) -> dict[str, Any]:
    """Without the copy engine 256 columns would not leave registers for addresses."""
    dtype, blocks = operands[0].dtype, all(_copied_in_blocks(x) for x in operands)
    sides = dict(ROWS=128, COLUMNS=_columns(dtype, plain and blocks), STEP=128 // dtype.itemsize)
    return dict(sides, BLOCKS=blocks, num_warps=8, num_stages=3 + blocks)


def _copied_in_blocks(x: Tensor) -> bool:
    """Whether the copy engine takes x: rows of 16 bits, each from a multiple of 16 bytes on."""
    aligned = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x.itemsize == 2 and aligned and x.stride(0) >= x.shape[1] > 0 and _large()


def _blocks(x: Tensor, tile: dict[str, Any], *sides: str) -> Tensor | TensorDescriptor:
    """x as kernels load it with this tile."""
    return TensorDescriptor.from_tensor(x, [tile[side] for side in sides]) if tile["BLOCKS"] else x


class _Vectors(NamedTuple):
    """Of rows, and of columns: lengths, and what turns products into S log2(e); S of pairs."""

    norm: Tensor
    scale: Tensor
    column_norm: Tensor
    column_scale: Tensor
    pairs: Tensor


def _vectors(x: Tensor, y: Tensor, temperature: Tensor, shift: int, normalize: bool) -> _Vectors:
    rows, columns = x.shape[0], y.shape[0]
    out = _Vectors(*(x.new_empty(n, dtype=torch.float32) for n in (rows, rows, columns, columns, rows)))
    if max(rows, columns):
        block = min(triton.next_power_of_2(max(x.shape[1], 1)), PAIR_BLOCK)
        _info_nce_pair_kernel[(max(rows, columns),)](
            x, y, temperature, *out, rows, columns, x.shape[1], *x.stride(), *y.stride(), shift,
            NORMALIZE=normalize, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out


def _merge(parts: Tensor, pairs: Tensor, shift: int, paired: tuple[int, int], sums: bool) -> tuple[Tensor, Tensor]:
    """Log-sum-exps and sums, float64, of parts [tiles, 2 or 3, count] and of the pairs that entries `paired` have."""
    tiles, _, count = parts.shape
    lse = parts.new_empty(count, dtype=torch.float64)
    plain = parts.new_empty(count if sums else 0, dtype=torch.float64)
    if count:
        _info_nce_merge_kernel[(triton.cdiv(count, MERGE["BLOCK"]),)](
            parts, pairs, lse, plain, count, tiles, shift, *paired, SUMS=sums, **MERGE
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
    (rows, channels), columns, sums = x.shape, y.shape[0], label_smoothing > 0
    with device_of(x):
        tile = _tile(x, y, plain=items is None and not sums)
        row_tiles, column_tiles = triton.cdiv(rows, tile["ROWS"]), triton.cdiv(columns, tile["COLUMNS"])
        halves = tile["COLUMNS"] // HALF
        row_parts = x.new_empty(column_tiles * halves, 3 if sums else 2, rows, dtype=torch.float32)
        column_parts = x.new_empty(row_tiles, 3 if sums else 2, columns, dtype=torch.float32)
        vectors = _vectors(x, y, temperature, shift, normalize)
        if rows and columns:
            _info_nce_forward_kernel[(row_tiles * column_tiles,)](
                _blocks(x, tile, "ROWS", "STEP"), _blocks(y, tile, "COLUMNS", "STEP"),
                vectors.scale, vectors.column_scale, items, column_items, row_parts, column_parts, rows, columns,
                channels, *x.stride(), *y.stride(), shift, SUMS=sums, HALF=HALF, BAND=BAND, **tile,
            )  # fmt: skip
        paired = max(0, -shift), min(rows, columns - shift)
        row_lse, row_sum = _merge(row_parts, vectors.pairs, 0, paired, sums)
        col_lse, col_sum = _merge(column_parts, vectors.pairs, shift, (paired[0] + shift, paired[1] + shift), sums)
    return row_lse, col_lse, vectors.pairs, row_sum, col_sum


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
    dx, dy = (t.new_empty(t.shape, dtype=torch.float32 if wide else t.dtype) for t in (x, y))
    if not (x.numel() and y.numel()):
        return dx.zero_(), dy.zero_(), x.new_zeros((), dtype=torch.float64)
    # In fp16 small weights would be lost: its products are of fp32.
    left, right = (t.float() if t.dtype == torch.float16 else t for t in (x, y))
    columns_gradient = torch.empty(y.shape, dtype=torch.float32, device=y.device)
    with device_of(x):
        v = _vectors(x, y, temperature, shift, normalize)
        tile = _tile(x, y, plain=items is None and row_share is None)
        lses = (row_lse, *_two_floats(row_lse), col_lse, *_two_floats(col_lse))
        lists = (v.norm, v.scale, v.column_scale, items, column_items, v.pairs, *lses, row_share, col_share)
        heat = x.new_empty(_grid(x, y, tile), dtype=torch.float32)
        for part, d in _strips(x, y, left.dtype, lists, heat, tile, shift, kept):
            gradient = columns_gradient.new_empty(d.shape[0], x.shape[1])
            _product(d, right, gradient)
            _normalize(dx[part], x[part], v.norm[part], gradient, weight, temperature, normalize)
            _product(d, left[part], columns_gradient, turned=True, add=part.start > 0)
        _normalize(dy, y, v.column_norm, columns_gradient, weight, temperature, normalize)
    return dx, dy, -LN2 * heat.sum(dtype=torch.float64) * weight / temperature


def _two_floats(lse: Tensor) -> tuple[Tensor, Tensor]:
    """lse log2(e) as the sum of two fp32 numbers."""
    lse = lse / LN2
    high = lse.float()
    return high, (lse - high).float()


def _width(columns: int) -> int:
    """Of rows of a strip in memory: whole 32 bytes, as they are read 16 bytes at a time."""
    return triton.cdiv(columns, 16) * 16


def _grid(x: Tensor, y: Tensor, tile: dict[str, Any]) -> tuple[int, int]:
    """Tiles of rows, and parts of tiles of columns, that each leave a sum of G S."""
    column_tiles = triton.cdiv(_width(y.shape[0]), tile["COLUMNS"])
    return triton.cdiv(x.shape[0], tile["ROWS"]), column_tiles * (tile["COLUMNS"] // HALF)


def _strips(
    x: Tensor,
    y: Tensor,
    dtype: torch.dtype,
    lists: tuple[Tensor | None, ...],
    heat: Tensor,
    tile: dict[str, Any],
    shift: int,
    kept: float,
) -> Iterator[tuple[slice, Tensor]]:
    """Which rows, and d of them, strip after strip in the same memory; sums of G S go to heat."""
    (rows, channels), columns, width = x.shape, y.shape[0], _width(y.shape[0])
    height = max(WAVE // triton.cdiv(channels, _columns(dtype)), 1) * tile["ROWS"]
    strip = x.new_empty(min(height, rows), width, dtype=dtype)
    blocks = _blocks(x, tile, "ROWS", "STEP"), _blocks(y, tile, "COLUMNS", "STEP")
    for first in range(0, rows, height):
        part = slice(first, min(first + height, rows))
        its = heat[first // tile["ROWS"] : triton.cdiv(part.stop, tile["ROWS"])]
        d = strip[: part.stop - first]
        _info_nce_backward_kernel[(its.numel() * HALF // tile["COLUMNS"],)](
            *blocks, *lists, _blocks(d, dict(tile, COLUMNS=HALF), "ROWS", "COLUMNS"), its, part.stop, columns, channels,
            *x.stride(), *y.stride(), shift, first, its.shape[0], width, 2.0 - 2.0 * kept, HALF=HALF, BAND=BAND, **tile,
        )  # fmt: skip
        yield part, d


def _product(d: Tensor, v: Tensor, out: Tensor, turned: bool = False, add: bool = False) -> None:
    """out = d v or d^T v, or out + that; the ends of d's rows, behind v's or out's last one, are zeros."""
    tile, (rows, channels) = _tile(d, v), out.shape
    sides = ("STEP", "ROWS") if turned else ("ROWS", "STEP")
    grid = (triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(channels, tile["COLUMNS"]),)
    _info_nce_product_kernel[grid](
        _blocks(d, tile, *sides), _blocks(v, tile, "STEP", "COLUMNS"), out, rows, v.shape[0], d.shape[1], channels,
        *v.stride(), TURNED=turned, ADD=add, **tile,
    )  # fmt: skip


def _normalize(
    out: Tensor, x: Tensor, norm: Tensor, gradient: Tensor, weight: Tensor, temperature: Tensor, normalize: bool
) -> None:
    """Gradient of x from that of its direction."""
    block = min(triton.next_power_of_2(x.shape[1]), MAX_BLOCK)
    _info_nce_normalize_kernel[(x.shape[0],)](
        x, norm, gradient, weight, temperature, out, x.shape[1], *x.stride(),
        NORMALIZE=normalize, BLOCK=block, num_warps=4,
    )  # fmt: skip
