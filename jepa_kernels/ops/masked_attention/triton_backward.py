"""Backward kernels of `masked_attention` for sequences of any length: dq first, which keeps delta, then dk and dv."""

import triton
import triton.language as tl

from jepa_kernels.ops.masked_attention.triton_tiles import (
    LISTS,
    NUMBERS,
    add_products,
    beginning,
    clear_rows,
    hull,
    keys_seen,
    load,
    products,
    row_sums,
    rows_of,
    sequence,
    store,
    tile_at,
    turn,
    where_seen,
    zeros,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_lse(lse, row, queries):
    """In powers of two; inf, which makes every weight 0, where a row is not there or saw nothing."""
    value = tl.load(lse + row, mask=row < queries, other=float("inf"))
    return tl.where(value == float("-inf"), float("inf"), value * LOG2E)


@triton.jit
def stream_dq(
    q, k, v, out, row, grad, lse, delta, dq, drow, ranges, turns, k_turns, start, queries, keys, frame_size, factor,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
    UNIT: tl.constexpr, TURNING: tl.constexpr, HALF: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """dq and delta of ROWS queries, COLUMNS keys at a time. TURNED: q and k already are."""
    lane = start + tl.arange(0, ROWS)
    begin, end = keys_seen(lane, queries, keys, frame_size, ranges, FRAMES)
    first, last, inner, outer = hull(begin, end, lane, queries, keys)
    tile = load(q, start, queries, ROWS, PARTS, D, UNIT)
    if not TURNED:
        tile = turn(tile, turns, start, queries, False, PARTS, TURNING, HALF)
    g = load(grad, start, queries, ROWS, PARTS, D, UNIT)
    change = row_sums(g, load((out, row, 1), start, queries, ROWS, PARTS, D, 8))
    tl.store(delta + lane, change, mask=lane < queries)
    base = load_lse(lse, lane, queries)[:, None]
    total = zeros(ROWS, PARTS)
    for at in range(first // COLUMNS * COLUMNS, last, COLUMNS):
        keys_tile = load(k, at, keys, COLUMNS, PARTS, D, UNIT)
        if not TURNED:
            keys_tile = turn(keys_tile, k_turns, at, keys, False, PARTS, TURNING, HALF)
        weights = tl.exp2(tl.fma(products(tile, keys_tile), factor * LOG2E, -base))
        if (at < inner) | (at + COLUMNS > outer):
            key = (at + tl.arange(0, COLUMNS))[None, :]
            weights = where_seen(weights, key, begin[:, None], end[:, None], ranges, 0.0)
        slope = products(g, load(v, at, keys, COLUMNS, PARTS, D, UNIT))
        total = add_products(total, weights * (slope - change[:, None]), keys_tile)
    total = turn(total, turns, start, queries, True, PARTS, TURNING, HALF)
    store(dq, drow, start, queries, total, factor, PARTS, D)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=LISTS)
def _masked_attention_backward_q_kernel(
    q, k, v, out, grad, lse, delta, dq, cu_seqlens, k_cu_seqlens, tiles, ranges, turns,
    q_skip, q_token, q_head, q_channel, k_skip, k_token, k_head, k_channel, v_skip, v_token, v_head, v_channel,
    g_skip, g_token, g_head, g_channel, ranges_skip, turns_skip, row, drow, lse_token, lse_head,
    queries, keys, sequences, count, heads, group, frame_size, factor,
    FRAMES: tl.constexpr, SHORT: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, TURNING: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """dq and delta = sum of out * grad of each row, tiles as in the forward kernel."""
    program = tl.program_id(0)
    head = program % heads
    if TAIL:
        part = program - count * heads
        if part >= 0:
            clear_rows(dq, cu_seqlens, sequences, queries, drow * 8, part)
            return
    s, start = tile_at(tiles, program // heads, queries, ROWS)
    if s < 0:
        return
    first, n = sequence(cu_seqlens, s, queries)
    k_first, m = sequence(k_cu_seqlens, s, keys)
    if tl.maximum(n, m) <= SHORT:
        return
    stream_dq(
        rows_of(q, q_skip, q_token, q_head, q_channel, s, first, head, UNIT),
        rows_of(k, k_skip, k_token, k_head, k_channel, s, k_first, head // group, UNIT),
        rows_of(v, v_skip, v_token, v_head, v_channel, s, k_first, head // group, UNIT),
        out + first * (row * 8) + head * D, row,
        rows_of(grad, g_skip, g_token, g_head, g_channel, s, first, head, UNIT),
        lse + first * lse_token + head * lse_head, delta + first * lse_token + head * lse_head,
        dq + first * (drow * 8) + head * D, drow,
        None if ranges is None else beginning(ranges, ranges_skip, first, s, 2),
        None if turns is None else beginning(turns, turns_skip, first, s, 2 * TURNING), None,
        start, n, m, frame_size, factor, FRAMES, ROWS, COLUMNS, PARTS, D, UNIT, TURNING, HALF, True,
    )  # fmt: skip


@triton.jit
def rows_that_see(start, ROWS: tl.constexpr, queries, keys, frame_size, ranges, FRAMES: tl.constexpr):
    """The queries first..last-1 outside which none sees a key of start..start+ROWS-1."""
    low = queries * 0
    high = queries
    if FRAMES or ranges is not None:
        low = queries
        high = queries * 0
        for at in range(0, queries, 256):
            row = at + tl.arange(0, 256)
            begin, end = keys_seen(row, queries, keys, frame_size, ranges, FRAMES)
            some = tl.minimum(end, start + ROWS) > tl.maximum(begin, start)
            low = tl.minimum(low, tl.min(tl.where(some, row, queries)))
            high = tl.maximum(high, tl.max(tl.where(some, row + 1, 0)))
    return low, high


@triton.jit
def stream_dkv(
    q, q_head, block, values, grad, g_head, lse, delta, lse_head, dk, dv, drow, ranges, turns, k_turns,
    start, queries, keys, frame_size, factor, GROUP: tl.constexpr,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
    UNIT: tl.constexpr, TURNING: tl.constexpr, HALF: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of ROWS keys: GROUP query heads in order, COLUMNS queries at a time."""
    first, last = rows_that_see(start, ROWS, queries, keys, frame_size, ranges, FRAMES)
    key = (start + tl.arange(0, ROWS))[:, None]
    total_k = zeros(ROWS, PARTS)
    total_v = zeros(ROWS, PARTS)
    for h in range(GROUP):
        q_rows = (q[0] + q_head.to(tl.int64) * UNIT * h, q[1], q[2])
        g_rows = (grad[0] + g_head.to(tl.int64) * UNIT * h, grad[1], grad[2])
        its = lse_head.to(tl.int64) * h
        for at in range(first // COLUMNS * COLUMNS, last, COLUMNS):
            lane = at + tl.arange(0, COLUMNS)
            tile = load(q_rows, at, queries, COLUMNS, PARTS, D, UNIT)
            if not TURNED:
                tile = turn(tile, turns, at, queries, False, PARTS, TURNING, HALF)
            base = load_lse(lse + its, lane, queries)[None, :]
            change = tl.load(delta + its + lane, mask=lane < queries, other=0.0)[None, :]
            weights = tl.exp2(tl.fma(products(block, tile), factor * LOG2E, -base))
            if FRAMES or ranges is not None:
                begin, end = keys_seen(lane, queries, keys, frame_size, ranges, FRAMES)
                weights = where_seen(weights, key, begin[None, :], end[None, :], ranges, 0.0)
            g = load(g_rows, at, queries, COLUMNS, PARTS, D, UNIT)
            total_v = add_products(total_v, weights, g)
            total_k = add_products(total_k, weights * (products(values, g) - change), tile)
    total_k = turn(total_k, k_turns, start, keys, True, PARTS, TURNING, HALF)
    store(dk, drow, start, keys, total_k, factor, PARTS, D)
    store(dv, drow, start, keys, total_v, 1.0, PARTS, D)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=LISTS)
def _masked_attention_backward_kv_kernel(
    q, k, v, grad, lse, delta, dk, dv, cu_seqlens, k_cu_seqlens, tiles, ranges, turns,
    q_skip, q_token, q_head, q_channel, k_skip, k_token, k_head, k_channel, v_skip, v_token, v_head, v_channel,
    g_skip, g_token, g_head, g_channel, ranges_skip, turns_skip, drow, lse_token, lse_head,
    queries, keys, sequences, count, heads, frame_size, factor,
    GROUP: tl.constexpr, FRAMES: tl.constexpr, SHORT: tl.constexpr, TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, TURNING: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """dk and dv of tiles of keys; `heads` key heads, each the sum over its GROUP query heads, in order."""
    program = tl.program_id(0)
    head = program % heads
    if TAIL:
        part = program - count * heads
        if part >= 0:
            clear_rows(dk, k_cu_seqlens, sequences, keys, drow * 8, part)
            clear_rows(dv, k_cu_seqlens, sequences, keys, drow * 8, part)
            return
    s, start = tile_at(tiles, program // heads, keys, ROWS)
    if s < 0:
        return
    first, n = sequence(cu_seqlens, s, queries)
    k_first, m = sequence(k_cu_seqlens, s, keys)
    if tl.maximum(n, m) <= SHORT:
        return
    k_rows = rows_of(k, k_skip, k_token, k_head, k_channel, s, k_first, head, UNIT)
    v_rows = rows_of(v, v_skip, v_token, v_head, v_channel, s, k_first, head, UNIT)
    at = k_first * (drow * 8) + head * D
    lse_at = first * lse_token + head * GROUP * lse_head
    stream_dkv(
        rows_of(q, q_skip, q_token, q_head, q_channel, s, first, head * GROUP, UNIT), q_head,
        load(k_rows, start, m, ROWS, PARTS, D, UNIT), load(v_rows, start, m, ROWS, PARTS, D, UNIT),
        rows_of(grad, g_skip, g_token, g_head, g_channel, s, first, head * GROUP, UNIT), g_head,
        lse + lse_at, delta + lse_at, lse_head, dk + at, dv + at, drow,
        None if ranges is None else beginning(ranges, ranges_skip, first, s, 2), None,
        None if turns is None else beginning(turns, turns_skip, k_first, s, 2 * TURNING),
        start, n, m, frame_size, factor,
        GROUP, FRAMES, ROWS, COLUMNS, PARTS, D, UNIT, TURNING, HALF, True,
    )  # fmt: skip
