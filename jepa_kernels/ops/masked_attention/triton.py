"""Triton `masked_attention`: launches, and the table of tiles.

Sequences of at most SHORT keys keep a head's keys and values on chip; longer ones stream past them. What a sequence
goes through depends on its own lengths, on D, on the dtype and on the options alone: packed it gets the bits that it
gets alone. A packing that may hold both kinds takes a launch for each.
"""

import math
from typing import Any, NamedTuple

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
from jepa_kernels.ops.masked_attention.triton_short_backward import _masked_attention_backward_short_kernel
from jepa_kernels.ops.masked_attention.triton_short_forward import GROUP, _masked_attention_forward_short_kernel
from jepa_kernels.ops.masked_attention.triton_tiles import TAILS

LOG2E = math.log2(math.e)


class Tile(NamedTuple):
    """Rows that a program holds, columns that pass it at a time, warps, loads under way."""

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None  # a thread may use no more, so that another program fits beside


# By the largest D that they serve; longer sequences first.
FORWARD = {64: Tile(128, 64, 8, 3, 128), 128: Tile(128, 128, 8, 2)}
BACKWARD_Q = {64: Tile(128, 64, 8, 2, 128), 128: Tile(128, 64, 8, 2)}
BACKWARD_KV = {64: Tile(128, 32, 8, 2, 128), 80: Tile(128, 32, 8, 2), 96: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2)}
FP32 = {32: Tile(64, 32, 4, 1), 64: Tile(64, 32, 8, 1), 128: Tile(64, 16, 8, 1)}  # products on the plain units

SHORT = {80: 256, 128: -1}  # queries and keys up to which a sequence stays on chip; in fp32 it always streams
SHORT_FORWARD = Tile(64, 256, 4, 2)
SHORT_BACKWARD = Tile(64, 128, 8, 2)  # beyond its columns BACKWARD_Q and BACKWARD_KV take turns, in the same program
KEYS = ((64,), (64, 32), (128,), (128, 64), (256,))  # blocks of keys of SHORT_FORWARD: the first entry that holds them


def _by_width(table: dict[int, Any], width: int) -> Any:
    return next(entry for largest, entry in table.items() if width <= largest)


def _tile(table: dict[int, Tile], q: Tensor) -> Tile:
    return _by_width(FP32 if q.dtype == torch.float32 else table, q.shape[-1])


def _compiled(tile: Tile) -> dict[str, int | None]:
    return dict(num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers)


def _short(q: Tensor) -> int:
    return -1 if q.dtype == torch.float32 else _by_width(SHORT, q.shape[-1])


def _classes(blocks: tuple[tuple[int, ...], ...], longest: int) -> dict[str, Any]:
    """Those that sequences of up to `longest` keys may need: leaving out the others changes no bits."""
    needed = blocks[: sum(sum(row) < longest for row in blocks) + 1]
    return dict(CLASSES=needed, LIMITS=tuple(sum(row) for row in needed))


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


class _Axis(NamedTuple):
    """tokens: of one dense sequence, or of all packed ones."""

    tokens: int
    sequences: int


def _axis(x: Tensor, cu_seqlens: Tensor | None) -> _Axis:
    if cu_seqlens is None:
        return _Axis(x.shape[2], x.shape[0])
    return _Axis(x.shape[0], cu_seqlens.shape[0] - 1)


def _count(axis: _Axis, tiles: Tensor | None, rows: int) -> int:
    """Entries of the tile list. Packed, it lists 64 rows each: programs with more leave the others to their first."""
    return axis.sequences * triton.cdiv(axis.tokens, rows) if tiles is None else tiles.shape[0]


def _like(x: Tensor) -> Tensor:
    """[T, H, D], or a [B, H, N, D] view of contiguous [B, N, H, D]."""
    if x.dim() == 3:
        return x.new_empty(x.shape)
    batch, heads, tokens, width = x.shape
    return x.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _turned(x: Tensor, axis: _Axis, turns: Tensor | None, half: bool) -> Tensor:
    """A turned copy, for sequences that stream: theirs would be turned again for every tile they meet."""
    if turns is None or x.numel() == 0:
        return x
    y, unit, width = _like(x), _unit(x), x.shape[-1]
    sequences = axis.sequences if x.dim() == 4 else 1
    _masked_attention_turn_kernel[(sequences * triton.cdiv(axis.tokens, 64) * x.shape[1],)](
        x, y, turns, *_strides(x, unit), _skip(turns), x.shape[1] * width // 8, axis.tokens, x.shape[1],
        ROWS=64, PARTS=_parts(width, half), D=width, UNIT=unit, TURNING=turns.shape[-1], HALF=half, num_warps=4,
    )  # fmt: skip
    return y


def _options(q: Tensor, frame_size: int, turns: Tensor | None, half: bool, unit: int) -> dict[str, Any]:
    """What every kernel is compiled for."""
    return dict(
        FRAMES=frame_size > 0, PARTS=_parts(q.shape[-1], half), D=q.shape[-1], UNIT=unit,
        TURNING=0 if turns is None else turns.shape[-1], HALF=half,
    )  # fmt: skip


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
    axis, k_axis, short = _axis(q, cu_seqlens), _axis(k, k_cu_seqlens), _short(q)
    out = _like(q)
    lse = q.new_empty((heads, q.shape[0]) if packed else q.shape[:3], dtype=torch.float32)
    places = (heads * width // 8, 1 if packed else heads, axis.tokens)  # between rows of out, and of lse
    with device_of(q):
        groups = triton.cdiv(max_queries, GROUP.value)
        programs = axis.sequences * groups * heads + packed * TAILS.value
        if short > 0 and programs and (packed or max_keys <= short):
            tile, unit = SHORT_FORWARD, _unit(q, k, v)
            _masked_attention_forward_short_kernel[(programs,)](
                q, k, v, out, lse, cu_seqlens, k_cu_seqlens, key_ranges, turns, k_turns,
                *_strides(q, unit), *_strides(k, unit), *_strides(v, unit),
                _skip(key_ranges), _skip(turns), _skip(k_turns), *places, axis.tokens, k_axis.tokens, axis.tokens,
                axis.sequences, groups, heads, heads // k.shape[1], frame_size, scale * LOG2E,
                TAIL=packed, ROWS=tile.rows,
                **_compiled(tile), **_classes(KEYS, max_keys),
                **_options(q, frame_size, turns, half, unit),
            )  # fmt: skip
        tile = _tile(FORWARD, q)
        count = _count(axis, tiles, tile.rows)
        tail = packed and short < 0
        programs = count * heads + tail * TAILS.value
        if programs and max_keys > short:
            q, k = _turned(q, axis, turns, half), _turned(k, k_axis, k_turns, half)
            unit = _unit(q, k, v)
            _masked_attention_forward_kernel[(programs,)](
                q, k, v, out, lse, cu_seqlens, k_cu_seqlens, tiles, key_ranges,
                *_strides(q, unit), *_strides(k, unit), *_strides(v, unit), _skip(key_ranges),
                *places, axis.tokens, k_axis.tokens, axis.tokens, axis.sequences, count,
                heads, heads // k.shape[1], frame_size, scale * LOG2E, FRAMES=frame_size > 0, SHORT=short, TAIL=tail,
                ROWS=tile.rows, COLUMNS=tile.columns, PARTS=_parts(width, half), D=width, UNIT=unit,
                **_compiled(tile),
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
    packed, heads, width, key_heads = q.dim() == 3, q.shape[1], q.shape[-1], k.shape[1]
    axis, k_axis, short = _axis(q, cu_seqlens), _axis(k, k_cu_seqlens), _short(q)
    longest = max(max_queries, max_keys)
    grads, (dq, dk, dv) = _gradients(q, k, stacked)
    delta = torch.empty_like(lse)
    row = heads * width // 8
    drow, k_drow = (3 * row, 3 * row) if stacked else (row, key_heads * width // 8)
    lse_places = (1 if packed else heads, axis.tokens)
    lengths = (axis.tokens, k_axis.tokens)
    with device_of(q):
        programs = axis.sequences * key_heads + packed * TAILS.value
        if short > 0 and programs and (packed or longest <= short):
            tile, unit = SHORT_BACKWARD, _unit(q, k, v, grad)
            q_tile, kv_tile = _tile(BACKWARD_Q, q), _tile(BACKWARD_KV, q)
            _masked_attention_backward_short_kernel[(programs,)](
                q, k, v, out, grad, lse, delta, dq, dk, dv, cu_seqlens, k_cu_seqlens, key_ranges, turns, k_turns,
                *_strides(q, unit), *_strides(k, unit), *_strides(v, unit), *_strides(grad, unit),
                _skip(key_ranges), _skip(turns), _skip(k_turns), row, drow, k_drow, *lse_places, *lengths, *lengths,
                axis.sequences, key_heads, frame_size, scale, GROUP=heads // key_heads,
                TOGETHER=tile.columns, LONGER=max_keys > tile.columns, TAIL=packed, STACKED=stacked, ROWS=tile.rows,
                Q_ROWS=q_tile.rows, Q_COLUMNS=q_tile.columns, KV_ROWS=kv_tile.rows, KV_COLUMNS=kv_tile.columns,
                **_compiled(tile), **_options(q, frame_size, turns, half, unit),
            )  # fmt: skip
        if longest <= short:
            return grads
        q, k = _turned(q, axis, turns, half), _turned(k, k_axis, k_turns, half)
        unit = _unit(q, k, v, grad)
        strides = [*_strides(q, unit), *_strides(k, unit), *_strides(v, unit), *_strides(grad, unit)]
        options = _options(q, frame_size, turns, half, unit)
        tile, tail = _tile(BACKWARD_Q, q), packed and short < 0
        count = _count(axis, tiles, tile.rows)
        programs = count * heads + tail * TAILS.value
        if programs:
            _masked_attention_backward_q_kernel[(programs,)](
                q, k, v, out, grad, lse, delta, dq, cu_seqlens, k_cu_seqlens, tiles, key_ranges, turns,
                *strides, _skip(key_ranges), _skip(turns), row, drow, *lse_places, *lengths, axis.tokens,
                axis.sequences, count, heads, heads // key_heads, frame_size, scale, SHORT=short, TAIL=tail,
                ROWS=tile.rows, COLUMNS=tile.columns,
                **_compiled(tile), **options,
            )  # fmt: skip
        tile, tail = _tile(BACKWARD_KV, q), tail and not stacked
        count = _count(k_axis, k_tiles, tile.rows)
        programs = count * key_heads + tail * TAILS.value
        if programs:
            _masked_attention_backward_kv_kernel[(programs,)](
                q, k, v, grad, lse, delta, dk, dv, cu_seqlens, k_cu_seqlens, k_tiles, key_ranges, k_turns,
                *strides, _skip(key_ranges), _skip(k_turns), k_drow, *lse_places, *lengths, k_axis.tokens,
                axis.sequences, count, key_heads, frame_size, scale, GROUP=heads // key_heads, SHORT=short,
                TAIL=tail, ROWS=tile.rows, COLUMNS=tile.columns,
                **_compiled(tile), **options,
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
