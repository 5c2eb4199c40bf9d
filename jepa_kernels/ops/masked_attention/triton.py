"""Triton `masked_attention`: launches.

What a sequence goes through depends on its own lengths, on D, on the dtype and on the options alone: packed it gets the
bits that it gets alone. Sequences of at most SHORT queries and keys stay on chip; longer ones stream. A packing that
may hold both kinds takes a launch for each, whose programs leave the other kind at once.
"""

from typing import Any, NamedTuple

import triton
from torch import Tensor

from jepa_kernels._core.triton import device_of
from jepa_kernels.ops.masked_attention.layout import empty_like, empty_lse, empty_qkv
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
from jepa_kernels.ops.masked_attention.triton_table import (
    BACKWARD_KV,
    BACKWARD_Q,
    FORWARD,
    SHORT_BACKWARD,
    SHORT_BACKWARD_KV,
    SHORT_BACKWARD_Q,
    SHORT_FORWARD,
    Tile,
    blocks_up_to,
    longest_short,
    parts,
    tile_for,
)
from jepa_kernels.ops.masked_attention.triton_tiles import TAILS


class _Shape(NamedTuple):
    """queries, keys: of one dense sequence, or of all packed ones."""

    packed: bool
    sequences: int
    queries: int
    keys: int
    heads: int
    key_heads: int

    @property
    def lse_places(self) -> tuple[int, int]:
        """Between tokens and between heads of lse, counting all tokens of dense sequences."""
        return 1 if self.packed else self.heads, self.queries


class _Options(NamedTuple):
    """As in the schema."""

    cu_seqlens: Tensor | None
    k_cu_seqlens: Tensor | None
    tiles: Tensor | None
    k_tiles: Tensor | None
    max_queries: int
    max_keys: int
    frame_size: int
    key_ranges: Tensor | None
    turns: Tensor | None
    k_turns: Tensor | None
    half: bool
    scale: float

    def compiled(self, q: Tensor, unit: int) -> dict[str, Any]:
        """What every kernel is compiled for."""
        turning = 0 if self.turns is None else self.turns.shape[-1]
        return dict(PARTS=parts(q, self.half), D=q.shape[-1], UNIT=unit, TURNING=turning, HALF=self.half)


def _shape(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> _Shape:
    if cu_seqlens is None:
        return _Shape(False, q.shape[0], q.shape[2], k.shape[2], q.shape[1], k.shape[1])
    return _Shape(True, cu_seqlens.shape[0] - 1, q.shape[0], k.shape[0], q.shape[1], k.shape[1])


def _strides(x: Tensor, unit: int) -> tuple[int, int, int, int]:
    """From one sequence's end to the next's beginning, between tokens, heads and channels; counts `unit` elements."""
    if x.dim() == 3:
        token, head, channel = x.stride()
        return 0, token // unit, head // unit, channel
    batch, head, token, channel = x.stride()
    return (batch - x.shape[2] * token) // unit, token // unit, head // unit, channel


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
    return table.stride(0) - table.shape[1:].numel()


def _programs(shape: _Shape, tiles: Tensor | None, tokens: int, heads: int, tile: Tile, tail: bool) -> tuple[int, int]:
    """(programs of a streaming launch, tiles): packed, those of the list, of which half start no tile of 128."""
    count = shape.sequences * triton.cdiv(tokens, tile.rows) if tiles is None else tiles.shape[0]
    return count * heads + tail * TAILS.value, count


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """(out, logarithms of the sums). options: those of the schema, from cu_seqlens on."""
    given = _Options(*options)
    shape = _shape(q, k, given.cu_seqlens)
    out, lse = empty_like(q), empty_lse(q)
    with device_of(q):
        short = longest_short(q)
        if short > 0 and (shape.packed or given.max_keys <= short):
            _forward_short(q, k, v, out, lse, shape, given)
        if given.max_keys > short:
            _forward_stream(q, k, v, out, lse, shape, given, short)
    return out, lse


def _forward_short(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, shape: _Shape, given: _Options) -> None:
    tile, unit, width = SHORT_FORWARD, _unit(q, k, v), q.shape[-1]
    groups = triton.cdiv(given.max_queries, GROUP.value)
    programs = shape.sequences * groups * shape.heads + shape.packed * TAILS.value
    if programs:
        _masked_attention_forward_short_kernel[(programs,)](
            q, k, v, out, lse, given.cu_seqlens, given.k_cu_seqlens, given.key_ranges, given.turns, given.k_turns,
            *_strides(q, unit), *_strides(k, unit), *_strides(v, unit),
            _skip(given.key_ranges), _skip(given.turns), _skip(given.k_turns), shape.heads * width // 8,
            *shape.lse_places, shape.queries, shape.keys, shape.sequences, groups, shape.heads,
            shape.heads // shape.key_heads, given.frame_size, given.scale, FRAMES=given.frame_size > 0,
            TAIL=shape.packed, ROWS=tile.rows, **blocks_up_to(given.max_keys), **given.compiled(q, unit),
            **tile.options,
        )  # fmt: skip


def _forward_stream(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, shape: _Shape, given: _Options, short: int
) -> None:
    tile, width, tail = tile_for(FORWARD, q), q.shape[-1], shape.packed and short < 0
    programs, count = _programs(shape, given.tiles, shape.queries, shape.heads, tile, tail)
    if programs:
        q, k = _turned(q, given.turns, given.half), _turned(k, given.k_turns, given.half)
        unit = _unit(q, k, v)
        _masked_attention_forward_kernel[(programs,)](
            q, k, v, out, lse, given.cu_seqlens, given.k_cu_seqlens, given.tiles, given.key_ranges,
            *_strides(q, unit), *_strides(k, unit), *_strides(v, unit), _skip(given.key_ranges),
            shape.heads * width // 8, *shape.lse_places, shape.queries, shape.keys, shape.sequences, count,
            shape.heads, shape.heads // shape.key_heads, given.frame_size, given.scale,
            FRAMES=given.frame_size > 0, SHORT=short, TAIL=tail, ROWS=tile.rows, COLUMNS=tile.columns,
            PARTS=parts(q, False), D=width, UNIT=unit, **tile.options,
        )  # fmt: skip


def _turned(x: Tensor, turns: Tensor | None, half: bool) -> Tensor:
    """A turned copy, for sequences that stream: theirs would be turned again for every tile they meet."""
    if turns is None or x.numel() == 0:
        return x
    y, unit, heads, width = empty_like(x), _unit(x), x.shape[1], x.shape[-1]
    sequences, tokens = (1, x.shape[0]) if x.dim() == 3 else (x.shape[0], x.shape[2])
    _masked_attention_turn_kernel[(sequences * triton.cdiv(tokens, 64) * heads,)](
        x, y, turns, *_strides(x, unit), _skip(turns), heads * width // 8, tokens, heads,
        ROWS=64, PARTS=parts(x, half), D=width, UNIT=unit, TURNING=turns.shape[-1], HALF=half, num_warps=4,
    )  # fmt: skip
    return y


class _Gradients(NamedTuple):
    """dq, dk and dv; row, k_row: elements / 8 between their tokens; stacked: they are views of one tensor."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    row: int
    k_row: int
    stacked: bool


def _gradients(q: Tensor, k: Tensor, stacked: bool) -> tuple[list[Tensor], _Gradients]:
    """(what backward returns, its parts)."""
    row, k_row = (x.shape[1] * x.shape[-1] // 8 for x in (q, k))
    if not stacked:
        dq, dk, dv = empty_like(q), empty_like(k), empty_like(k)
        return [dq, dk, dv], _Gradients(dq, dk, dv, row, k_row, False)
    whole = empty_qkv(q)
    dq, dk, dv = whole.unbind(-3)
    return [whole], _Gradients(dq, dk, dv, 3 * row, 3 * row, True)


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any) -> list[Tensor]:
    """[dq, dk, dv], or [dqkv] where stacked. options: those of the schema, from cu_seqlens on; the last is stacked."""
    *rest, stacked = options
    given = _Options(*rest)
    shape, longest = _shape(q, k, given.cu_seqlens), max(given.max_queries, given.max_keys)
    whole, gradients = _gradients(q, k, stacked)
    with device_of(q):
        short = longest_short(q)
        together = longest <= short and given.max_keys <= tile_for(SHORT_BACKWARD, q).columns
        offsets = lse if together else lse.new_empty(*lse.shape, 2)  # one pass over all keys reads none
        if short > 0 and (shape.packed or longest <= short):
            _backward_short(grad, q, k, v, out, lse, offsets, gradients, shape, given)
        if longest > short:
            q, k = _turned(q, given.turns, given.half), _turned(k, given.k_turns, given.half)
            _backward_q(grad, q, k, v, out, lse, offsets, gradients, shape, given, short)
            _backward_kv(grad, q, k, v, offsets, gradients, shape, given, short)
    return whole


def _backward_short(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets: Tensor, gradients: _Gradients,
    shape: _Shape, given: _Options,
) -> None:  # fmt: skip
    tile, unit, width = tile_for(SHORT_BACKWARD, q), _unit(q, k, v, grad), q.shape[-1]
    q_tile, kv_tile = tile_for(SHORT_BACKWARD_Q, q), tile_for(SHORT_BACKWARD_KV, q)
    dq, dk, dv, row, k_row, stacked = gradients
    programs = shape.sequences * shape.key_heads + shape.packed * TAILS.value
    if programs:
        _masked_attention_backward_short_kernel[(programs,)](
            q, k, v, out, grad, lse, offsets, dq, dk, dv, given.cu_seqlens, given.k_cu_seqlens, given.key_ranges,
            given.turns, given.k_turns,
            *_strides(q, unit), *_strides(k, unit), *_strides(v, unit), *_strides(grad, unit),
            _skip(given.key_ranges), _skip(given.turns), _skip(given.k_turns), shape.heads * width // 8, row, k_row,
            *shape.lse_places, shape.queries, shape.keys, shape.sequences, shape.key_heads, given.frame_size,
            given.scale, GROUP=shape.heads // shape.key_heads, TOGETHER=tile.columns,
            LONGER=given.max_keys > tile.columns, FRAMES=given.frame_size > 0, TAIL=shape.packed, STACKED=stacked,
            ROWS=tile.rows, Q_ROWS=q_tile.rows, Q_COLUMNS=q_tile.columns, KV_ROWS=kv_tile.rows,
            KV_COLUMNS=kv_tile.columns, **given.compiled(q, unit), **tile.options,
        )  # fmt: skip


def _backward_q(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets: Tensor, gradients: _Gradients,
    shape: _Shape, given: _Options, short: int,
) -> None:  # fmt: skip
    tile, unit, width, tail = tile_for(BACKWARD_Q, q), _unit(q, k, v, grad), q.shape[-1], shape.packed and short < 0
    programs, count = _programs(shape, given.tiles, shape.queries, shape.heads, tile, tail)
    if programs:
        _masked_attention_backward_q_kernel[(programs,)](
            q, k, v, out, grad, lse, offsets, gradients.dq, given.cu_seqlens, given.k_cu_seqlens, given.tiles,
            given.key_ranges, given.turns,
            *_strides(q, unit), *_strides(k, unit), *_strides(v, unit), *_strides(grad, unit),
            _skip(given.key_ranges), _skip(given.turns), shape.heads * width // 8, gradients.row, *shape.lse_places,
            shape.queries, shape.keys, shape.sequences, count, shape.heads, shape.heads // shape.key_heads,
            given.frame_size, given.scale, FRAMES=given.frame_size > 0, SHORT=short, TAIL=tail, ROWS=tile.rows,
            COLUMNS=tile.columns, **given.compiled(q, unit), **tile.options,
        )  # fmt: skip


def _backward_kv(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, gradients: _Gradients,
    shape: _Shape, given: _Options, short: int,
) -> None:  # fmt: skip
    tile, unit = tile_for(BACKWARD_KV, q), _unit(q, k, v, grad)
    tail = shape.packed and short < 0 and not gradients.stacked  # stacked, dq's rows hold dk and dv
    programs, count = _programs(shape, given.k_tiles, shape.keys, shape.key_heads, tile, tail)
    if programs:
        _masked_attention_backward_kv_kernel[(programs,)](
            q, k, v, grad, offsets, gradients.dk, gradients.dv, given.cu_seqlens, given.k_cu_seqlens,
            given.k_tiles, given.key_ranges, given.k_turns,
            *_strides(q, unit), *_strides(k, unit), *_strides(v, unit), *_strides(grad, unit),
            _skip(given.key_ranges), _skip(given.k_turns), gradients.k_row, *shape.lse_places,
            shape.queries, shape.keys, shape.sequences, count, shape.key_heads, given.frame_size, given.scale,
            GROUP=shape.heads // shape.key_heads, FRAMES=given.frame_size > 0, SHORT=short, TAIL=tail,
            ROWS=tile.rows, COLUMNS=tile.columns, **given.compiled(q, unit), **tile.options,
        )  # fmt: skip
