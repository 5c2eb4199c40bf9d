"""Triton `masked_attention`: launches and the table of tiles.

Sequences of any length stream over their keys; what a sequence goes through depends on its own lengths, on D, on the
dtype and on the options alone, so that packed it has the bits that it has alone.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from jepa_kernels._core.triton import device_of
from jepa_kernels.ops.masked_attention.triton_backward import (
    _masked_attention_backward_kv_kernel,
    _masked_attention_backward_q_kernel,
)
from jepa_kernels.ops.masked_attention.triton_forward import (
    _masked_attention_forward_kernel,
    _masked_attention_turn_kernel,
)
from jepa_kernels.ops.masked_attention.triton_tiles import TAILS


class Tile(NamedTuple):
    """Rows that a program owns, columns that stream past, warps, and loads under way."""

    rows: int
    columns: int
    warps: int
    stages: int


# By the largest D they serve. fp32 multiplies on the plain units, from registers: small tiles.
FORWARD = {32: Tile(128, 64, 4, 3), 64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2)}
BACKWARD_Q = {32: Tile(128, 64, 8, 2), 64: Tile(128, 64, 8, 2), 128: Tile(64, 64, 8, 2)}
BACKWARD_KV = {32: Tile(128, 64, 8, 2), 64: Tile(128, 64, 8, 2), 128: Tile(64, 64, 8, 2)}
FP32 = {32: Tile(64, 32, 4, 1), 64: Tile(64, 32, 8, 1), 128: Tile(64, 16, 8, 1)}
SHORT = -1
LOG2E = math.log2(math.e)


def _tile(table: dict[int, Tile], q: Tensor) -> Tile:
    chosen = FP32 if q.dtype == torch.float32 else table
    return next(tile for width, tile in chosen.items() if q.shape[-1] <= width)


def _parts(width: int, half: bool) -> tuple[int, ...]:
    """Powers of two, 16 or more, that hold `width` channels: two where they hold fewer in vain than one."""
    whole = max(triton.next_power_of_2(width), 16)
    rest = max(triton.next_power_of_2(width - whole // 2), 16)
    if half or rest >= whole // 2:  # a half turn pairs channels far apart
        return (whole,)
    return (whole // 2, rest)


class Strides(NamedTuple):
    """From one sequence's end to the next's beginning, between tokens, heads and channels."""

    skip: int
    token: int
    head: int
    channel: int


def _strides(x: Tensor, unit: int) -> Strides:
    if x.dim() == 3:
        token, head, channel = x.stride()
        return Strides(0, token // unit, head // unit, channel)
    batch, head, token, channel = x.stride()
    return Strides((batch - x.shape[2] * token) // unit, token // unit, head // unit, channel)


def _unit(*tensors: Tensor) -> int:
    """Elements of 16 bytes where every row starts at a multiple of them; else 1."""
    unit = 16 // tensors[0].element_size()
    wide = all(
        x.stride(-1) == 1
        and all(s % unit == 0 for s in x.stride()[:-1])
        and x.stride(0 if x.dim() == 3 else 2) < 2**23
        and x.data_ptr() % 16 == 0
        for x in tensors
    )
    return unit if wide else 1


def _skip(table: Tensor | None) -> int:
    """Elements between the sequences of turns or ranges beyond their tokens, whose rows are contiguous."""
    if table is None or table.dim() == (3 if table.is_floating_point() else 2):
        return 0
    return table.stride(0) - table[0].numel()


class _Lse(NamedTuple):
    token: int
    head: int


def _axis(x: Tensor, cu_seqlens: Tensor | None, tiles: Tensor | None, tile: Tile) -> tuple[int, int, int, int]:
    """(tokens, of a dense sequence or in all; sequences; entries of the tile list; entries that a program takes)."""
    if cu_seqlens is None:
        return x.shape[2], x.shape[0], x.shape[0] * triton.cdiv(x.shape[2], tile.rows), 1
    return x.shape[0], cu_seqlens.shape[0] - 1, tiles.shape[0], tile.rows // 64


def _turned(x: Tensor, turns: Tensor | None, half: bool) -> Tensor:
    if turns is None or x.numel() == 0:
        return x
    y = torch.empty_like(x, memory_format=torch.contiguous_format) if x.dim() == 3 else _like(x)
    heads, width = x.shape[1], x.shape[-1]
    tokens = x.shape[0] if x.dim() == 3 else x.shape[2]
    unit = _unit(x)
    grid = (triton.cdiv(tokens, 64) * heads * (1 if x.dim() == 3 else x.shape[0]),)
    _masked_attention_turn_kernel[grid](
        x, y, turns, *_strides(x, unit), _skip(turns), heads * width // 8, tokens, heads,
        ROWS=64, PARTS=_parts(width, half), D=width, UNIT=unit, TURNING=turns.shape[-1], HALF=half, num_warps=4,
    )  # fmt: skip
    return y


def _like(x: Tensor) -> Tensor:
    """[T, H, D], or a [B, H, N, D] view of contiguous [B, N, H, D]."""
    if x.dim() == 3:
        return x.new_empty(x.shape)
    batch, heads, tokens, width = x.shape
    return x.new_empty(batch, tokens, heads, width).transpose(1, 2)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    k_cu_seqlens: Tensor | None,
    tiles: Tensor | None,
    k_tiles: Tensor | None,
    max_queries: int,
    max_keys: int,
    frame_size: int,
    key_ranges: Tensor | None,
    turns: Tensor | None,
    k_turns: Tensor | None,
    half: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out, logarithms of the sums)."""
    packed, heads, width = q.dim() == 3, q.shape[1], q.shape[-1]
    out = _like(q)
    lse = q.new_empty((heads, q.shape[0]) if packed else q.shape[:3], dtype=torch.float32)
    with device_of(q):
        q, k = _turned(q, turns, half), _turned(k, k_turns, half)
        tile, unit = _tile(FORWARD, q), _unit(q, k, v)
        tokens, sequences, count, step = _axis(q, cu_seqlens, tiles, tile)
        grid = triton.cdiv(count, step) * heads + packed * TAILS.value
        if grid:
            _masked_attention_forward_kernel[(grid,)](
                q, k, v, out, lse, cu_seqlens, k_cu_seqlens, tiles, key_ranges,
                *_strides(q, unit), *_strides(k, unit), *_strides(v, unit), _skip(key_ranges), heads * width // 8,
                1 if packed else heads, tokens, tokens, k.shape[0 if packed else 2], tokens, sequences, count, heads,
                heads // k.shape[1], frame_size, scale * LOG2E, FRAMES=frame_size > 0, SHORT=SHORT, TAIL=packed,
                STEP=step, ROWS=tile.rows, COLUMNS=tile.columns, PARTS=_parts(width, half), D=width, UNIT=unit,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    k_cu_seqlens: Tensor | None,
    tiles: Tensor | None,
    k_tiles: Tensor | None,
    max_queries: int,
    max_keys: int,
    frame_size: int,
    key_ranges: Tensor | None,
    turns: Tensor | None,
    k_turns: Tensor | None,
    half: bool,
    scale: float,
    stacked: bool,
) -> list[Tensor]:
    """[dq, dk, dv], or [dqkv] where `stacked`."""
    packed, heads, width = q.dim() == 3, q.shape[1], q.shape[-1]
    key_heads = k.shape[1]
    grads, (dq, dk, dv) = _gradients(q, k, stacked)
    row = heads * width // 8
    drow, k_drow = (3 * row, 3 * row) if stacked else (row, key_heads * width // 8)
    with device_of(q):
        delta = torch.empty_like(lse)
        q, k = _turned(q, turns, half), _turned(k, k_turns, half)
        unit = _unit(q, k, v, grad)
        strides = [*_strides(q, unit), *_strides(k, unit), *_strides(v, unit), *_strides(grad, unit)]
        options = dict(
            FRAMES=frame_size > 0, SHORT=SHORT, PARTS=_parts(width, half), D=width, UNIT=unit,
            TURNING=0 if turns is None else turns.shape[-1], HALF=half,
        )  # fmt: skip
        lse_strides = (1 if packed else heads, q.shape[0] if packed else q.shape[2])
        lengths = (q.shape[0 if packed else 2], k.shape[0 if packed else 2])
        tile = _tile(BACKWARD_Q, q)
        tokens, sequences, count, step = _axis(q, cu_seqlens, tiles, tile)
        grid = triton.cdiv(count, step) * heads + packed * TAILS.value
        if grid:
            _masked_attention_backward_q_kernel[(grid,)](
                q, k, v, out, grad, lse, delta, dq, cu_seqlens, k_cu_seqlens, tiles, key_ranges, turns,
                *strides, _skip(key_ranges), _skip(turns), row, drow, *lse_strides, *lengths, tokens, sequences,
                count, heads, heads // key_heads, frame_size, scale, TAIL=packed, STEP=step, ROWS=tile.rows,
                COLUMNS=tile.columns, num_warps=tile.warps, num_stages=tile.stages, **options,
            )  # fmt: skip
        tile = _tile(BACKWARD_KV, q)
        tokens, sequences, count, step = _axis(k, k_cu_seqlens, k_tiles, tile)
        grid = triton.cdiv(count, step) * key_heads + packed * TAILS.value
        if grid:
            _masked_attention_backward_kv_kernel[(grid,)](
                q, k, v, grad, lse, delta, dk, dv, cu_seqlens, k_cu_seqlens, k_tiles, key_ranges, k_turns,
                *strides, _skip(key_ranges), _skip(k_turns), k_drow, *lse_strides, *lengths, tokens, sequences,
                count, key_heads, heads // key_heads, frame_size, scale, TAIL=packed and not stacked, STEP=step,
                ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps, num_stages=tile.stages, **options,
            )  # fmt: skip
    return grads


def _gradients(q: Tensor, k: Tensor, stacked: bool) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """(what backward returns, its dq, dk and dv)."""
    if not stacked:
        three = (_like(q), _like(k), _like(k))
        return list(three), three
    if q.dim() == 3:
        whole = q.new_empty(q.shape[0], 3, *q.shape[1:])
        return [whole], whole.unbind(1)
    whole = q.new_empty(q.shape[0], q.shape[2], 3, q.shape[1], q.shape[3])
    return [whole], whole.unbind(2)
