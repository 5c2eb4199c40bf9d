"""Forward kernels of `masked_attention`."""

import triton
import triton.language as tl

from jepa_kernels.ops.masked_attention.triton_tiles import (
    LISTS,
    LOG2E,
    NUMBERS,
    add_products,
    around,
    beginning,
    clear,
    clear_rows,
    hull,
    keys_seen,
    load,
    products,
    rows_of,
    sequence,
    store,
    tile_at,
    times,
    turn,
    where_seen,
    whole_blocks,
    zeros,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def finish(out, row, lse, start, queries, total, top, weight, PARTS: tl.constexpr, D: tl.constexpr):
    """Writes total / weight and the logarithm of the sum; 0 and -inf where a row saw nothing."""
    lane = start + tl.arange(0, top.shape[0])
    some = weight > 0
    weight = tl.where(some, weight, 1.0)
    store(out, row, start, queries, times(total, 1.0 / weight), 1.0, PARTS, D)
    value = tl.where(some, (top + tl.log2(weight)) * LN2, float("-inf"))
    tl.store(lse + lane, value, mask=lane < queries)


@triton.jit
def _meet(
    total, top, weight, tile, k, v, at, keys, begin, end, ranges, scale,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The sums with COLUMNS keys more, scaled down where a top rises. keys None: all rows see them all."""
    scores = products(tile, load(k, at, keys, COLUMNS, PARTS, D, UNIT))
    if keys is None:
        new = tl.maximum(top, tl.max(scores, 1) * scale)
        base = new
    else:
        key = (at + tl.arange(0, COLUMNS))[None, :]
        scores = where_seen(scores, key, begin[:, None], end[:, None], ranges, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1) * scale)
        base = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(tl.fma(scores, scale, -base[:, None]))
    fade = tl.exp2(top - base)
    weight = weight * fade + tl.sum(weights, 1)
    total = add_products(times(total, fade), weights, load(v, at, keys, COLUMNS, PARTS, D, UNIT))
    return total, new, weight


@triton.jit
def _stream(
    q, k, v, out, row, lse, ranges, start, queries, keys, frame_size, scale, FRAMES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """ROWS queries against the keys they see, COLUMNS at a time: first those that need no mask."""
    lane = start + tl.arange(0, ROWS)
    begin, end = keys_seen(lane, queries, keys, frame_size, ranges, FRAMES)
    first, last, inner, outer = hull(begin, end, lane, queries, keys)
    whole, rest = whole_blocks(inner, outer, COLUMNS)
    tile = load(q, start, queries, ROWS, PARTS, D, UNIT)
    total = zeros(ROWS, PARTS)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    for at in range(whole, rest, COLUMNS):
        total, top, weight = _meet(
            total, top, weight, tile, k, v, at, None, begin, end, ranges, scale, COLUMNS, PARTS, D, UNIT
        )
    for at in range(first // COLUMNS * COLUMNS, last - (rest - whole), COLUMNS):
        total, top, weight = _meet(
            total, top, weight, tile, k, v, around(at, whole, rest), keys, begin, end, ranges, scale,
            COLUMNS, PARTS, D, UNIT,
        )  # fmt: skip
    finish(out, row, lse, start, queries, total, top, weight, PARTS, D)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=LISTS)
def _masked_attention_forward_kernel(
    q, k, v, out, lse, cu_seqlens, k_cu_seqlens, tiles, ranges,
    q_skip, q_token, q_head, q_channel, k_skip, k_token, k_head, k_channel, v_skip, v_token, v_head, v_channel,
    ranges_skip, row, lse_token, lse_head, queries, keys, sequences, count, heads, group, frame_size, factor,
    FRAMES: tl.constexpr, SHORT: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Sequences of more than SHORT keys. A program takes a head and an entry of the tile list."""
    program = tl.program_id(0)
    head = program % heads
    if TAIL:
        part = program - count * heads
        if part >= 0:
            clear_out(out, lse, cu_seqlens, sequences, queries, row * 8, lse_head, heads, part)
            return
    s, start = tile_at(tiles, program // heads, queries, ROWS)
    if s < 0:
        return
    first, n = sequence(cu_seqlens, s, queries)
    k_first, m = sequence(k_cu_seqlens, s, keys)
    if m <= SHORT:
        return
    _stream(
        rows_of(q, q_skip, q_token, q_head, q_channel, s, first, head, UNIT),
        rows_of(k, k_skip, k_token, k_head, k_channel, s, k_first, head // group, UNIT),
        rows_of(v, v_skip, v_token, v_head, v_channel, s, k_first, head // group, UNIT),
        out + first * (row * 8) + head * D, row, lse + first * lse_token + head * lse_head,
        None if ranges is None else beginning(ranges, ranges_skip, first, s, 2),
        start, n, m, frame_size, factor * LOG2E, FRAMES, ROWS, COLUMNS, PARTS, D, UNIT,
    )  # fmt: skip


@triton.jit
def clear_out(out, lse, cu_seqlens, sequences, tokens, width, lse_head, heads, part):
    """0 and -inf in the rows behind the last sequence."""
    clear_rows(out, cu_seqlens, sequences, tokens, width, part)
    used = tl.load(cu_seqlens + sequences)
    for head in range(heads):
        clear(lse + lse_head.to(tl.int64) * head, used, tokens, part, float("-inf"))


@triton.jit(do_not_specialize=["skip", "token", "head_stride", "channel", "turns_skip", "row", "tokens", "heads"])
def _masked_attention_turn_kernel(
    x, y, turns, skip, token, head_stride, channel, turns_skip, row, tokens, heads, ROWS: tl.constexpr,
    PARTS: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, TURNING: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """y = x turned: for sequences so long that each row would be turned many times."""
    program = tl.program_id(0)
    head = program % heads
    s, start = tile_at(None, program // heads, tokens, ROWS)
    first = s.to(tl.int64) * tokens
    tile = load(
        rows_of(x, skip, token, head_stride, channel, s, first, head, UNIT), start, tokens, ROWS, PARTS, D, UNIT
    )
    its_turns = None if turns is None else beginning(turns, turns_skip, first, s, 2 * TURNING)
    tile = turn(tile, its_turns, start, tokens, False, PARTS, TURNING, HALF)
    store(y + first * (row * 8) + head * D, row, start, tokens, tile, 1.0, PARTS, D)
