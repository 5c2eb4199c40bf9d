"""Backward kernels of `masked_attention` for sequences of any length: dq first, which keeps delta, then dk and dv."""

import triton
import triton.language as tl

from jepa_kernels.ops.masked_attention.triton_tiles import (
    LISTS,
    LOG2E,
    NUMBERS,
    add_products,
    around,
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
    whole_blocks,
    zeros,
)


@triton.jit
def load_lse(lse, row, queries):
    """In powers of two; inf, which makes every weight 0, where a row is not there or saw nothing."""
    value = tl.load(lse + row, mask=row < queries, other=float("inf"))
    return tl.where(value == float("-inf"), float("inf"), value * LOG2E)


@triton.jit
def _meet_keys(
    total, tile, g, base, change, k, v, k_turns, at, keys, begin, end, ranges, factor,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, TURNING: tl.constexpr,
    HALF: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """dq with COLUMNS keys more. keys None: all rows see them all."""
    keys_tile = load(k, at, keys, COLUMNS, PARTS, D, UNIT)
    if not TURNED:
        keys_tile = turn(keys_tile, k_turns, at, at + COLUMNS if keys is None else keys, False, PARTS, TURNING, HALF)
    weights = tl.exp2(tl.fma(products(tile, keys_tile), factor * LOG2E, -base[:, None]))
    if keys is not None:
        key = (at + tl.arange(0, COLUMNS))[None, :]
        weights = where_seen(weights, key, begin[:, None], end[:, None], ranges, 0.0)
    slope = products(g, load(v, at, keys, COLUMNS, PARTS, D, UNIT))
    return add_products(total, weights * (slope - change[:, None]), keys_tile)


@triton.jit
def stream_dq(
    q, k, v, out, row, grad, lse, offsets, dq, drow, ranges, turns, k_turns, start, queries, keys, frame_size, factor,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
    UNIT: tl.constexpr, TURNING: tl.constexpr, HALF: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """dq of ROWS queries, COLUMNS keys at a time, and what dk and dv need of them. TURNED: q and k already are."""
    lane = start + tl.arange(0, ROWS)
    begin, end = keys_seen(lane, queries, keys, frame_size, ranges, FRAMES)
    first, last, inner, outer = hull(begin, end, lane, queries, keys)
    tile = load(q, start, queries, ROWS, PARTS, D, UNIT)
    if not TURNED:
        tile = turn(tile, turns, start, queries, False, PARTS, TURNING, HALF)
    g = load(grad, start, queries, ROWS, PARTS, D, UNIT)
    change = row_sums(g, load((out, row, 1), start, queries, ROWS, PARTS, D, 8))
    base = load_lse(lse, lane, queries)
    tl.store(offsets + 2 * lane, -base, mask=lane < queries)
    tl.store(offsets + 2 * lane + 1, change, mask=lane < queries)
    total = zeros(ROWS, PARTS)
    whole, rest = 0, 0
    if TURNED:  # where more work shares a program, a second loop takes more registers than it saves masks
        whole, rest = whole_blocks(inner, outer, COLUMNS)
        for at in range(whole, rest, COLUMNS):
            total = _meet_keys(
                total, tile, g, base, change, k, v, k_turns, at, None, begin, end, ranges, factor,
                COLUMNS, PARTS, D, UNIT, TURNING, HALF, True,
            )  # fmt: skip
    for at in range(first // COLUMNS * COLUMNS, last - (rest - whole), COLUMNS):
        total = _meet_keys(
            total, tile, g, base, change, k, v, k_turns, around(at, whole, rest), keys, begin, end, ranges, factor,
            COLUMNS, PARTS, D, UNIT, TURNING, HALF, TURNED,
        )  # fmt: skip
    total = turn(total, turns, start, queries, True, PARTS, TURNING, HALF)
    store(dq, drow, start, queries, total, factor, PARTS, D)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=LISTS)
def _masked_attention_backward_q_kernel(
    q, k, v, out, grad, lse, offsets, dq, cu_seqlens, k_cu_seqlens, tiles, ranges, turns,
    q_skip, q_token, q_head, q_channel, k_skip, k_token, k_head, k_channel, v_skip, v_token, v_head, v_channel,
    g_skip, g_token, g_head, g_channel, ranges_skip, turns_skip, row, drow, lse_token, lse_head,
    queries, keys, sequences, count, heads, group, frame_size, factor,
    FRAMES: tl.constexpr, SHORT: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, TURNING: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """dq, and of each row what its scores and slopes lose: (lse, delta = sum of out * grad). Tiles as forward."""
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
        lse + first * lse_token + head * lse_head, offsets + 2 * (first * lse_token + head * lse_head),
        dq + first * (drow * 8) + head * D, drow,
        None if ranges is None else beginning(ranges, ranges_skip, first, s, 2),
        None if turns is None else beginning(turns, turns_skip, first, s, 2 * TURNING), None,
        start, n, m, frame_size, factor, FRAMES, ROWS, COLUMNS, PARTS, D, UNIT, TURNING, HALF, True,
    )  # fmt: skip


@triton.jit
def rows_that_see(start, ROWS: tl.constexpr, queries, keys, frame_size, ranges, FRAMES: tl.constexpr):
    """The queries first..last-1 outside which none sees a key of start..start+ROWS-1; from `whole` on all see all."""
    low = queries * 0
    high = queries
    whole = queries * 0
    if FRAMES or ranges is not None:
        low = queries
        high = queries * 0
        stop = tl.minimum(start + ROWS, keys)
        for at in range(0, queries, 256):
            row = at + tl.arange(0, 256)
            begin, end = keys_seen(row, queries, keys, frame_size, ranges, FRAMES)
            some = tl.minimum(end, stop) > tl.maximum(begin, start)
            low = tl.minimum(low, tl.min(tl.where(some, row, queries)))
            high = tl.maximum(high, tl.max(tl.where(some, row + 1, 0)))
            part = ((begin > start) | (end < stop)) & (row < queries)
            whole = tl.maximum(whole, tl.max(tl.where(part, row + 1, 0)))
    return low, high, whole


@triton.jit
def _load_offsets(offsets, row, queries):
    """(-lse in powers of two, delta) of each row, in one load; -inf and 0 where a row is not there: no weight."""
    which = tl.arange(0, 2)[None, :]
    at = offsets + 2 * row[:, None] + which
    if queries is None:
        pairs = tl.load(at)
    else:
        pairs = tl.load(at, mask=(row < queries)[:, None], other=0.0)
        pairs = tl.where((row < queries)[:, None] | (which == 1), pairs, float("-inf"))
    return tl.split(pairs)


@triton.jit
def _meet_queries(
    total_k, total_v, block, values, q, grad, offsets, turns, at, limit, queries, keys, key, ranges, frame_size,
    factor, FRAMES: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    TURNING: tl.constexpr, HALF: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """dk and dv with COLUMNS queries more. limit: the queries; None where all of these are there and see all keys."""
    row = at + tl.arange(0, COLUMNS)
    tile = load(q, at, limit, COLUMNS, PARTS, D, UNIT)
    if not TURNED:
        tile = turn(tile, turns, at, queries, False, PARTS, TURNING, HALF)
    base, change = _load_offsets(offsets, row, limit)
    weights = tl.exp2(tl.fma(products(block, tile), factor * LOG2E, base[None, :]))
    if limit is not None and (FRAMES or ranges is not None):
        begin, end = keys_seen(row, queries, keys, frame_size, ranges, FRAMES)
        weights = where_seen(weights, key, begin[None, :], end[None, :], ranges, 0.0)
    g = load(grad, at, limit, COLUMNS, PARTS, D, UNIT)
    total_v = add_products(total_v, weights, g)
    total_k = add_products(total_k, weights * (products(values, g) - change[None, :]), tile)
    return total_k, total_v


@triton.jit
def stream_dkv(
    q, q_head, block, values, grad, g_head, offsets, lse_head, dk, dv, drow, ranges, turns, k_turns,
    start, queries, keys, frame_size, factor, GROUP: tl.constexpr,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
    UNIT: tl.constexpr, TURNING: tl.constexpr, HALF: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of ROWS keys: GROUP query heads in order, COLUMNS queries at a time."""
    first, last, inner = rows_that_see(start, ROWS, queries, keys, frame_size, ranges, FRAMES)
    whole, rest = 0, 0
    if TURNED:  # as in stream_dq
        whole, rest = whole_blocks(inner, last, COLUMNS)
    key = (start + tl.arange(0, ROWS))[:, None]
    total_k = zeros(ROWS, PARTS)
    total_v = zeros(ROWS, PARTS)
    for h in range(GROUP):
        q_rows = (q[0] + q_head.to(tl.int64) * UNIT * h, q[1], q[2])
        g_rows = (grad[0] + g_head.to(tl.int64) * UNIT * h, grad[1], grad[2])
        its = offsets + lse_head.to(tl.int64) * 2 * h
        if TURNED:
            for at in range(whole, rest, COLUMNS):
                total_k, total_v = _meet_queries(
                    total_k, total_v, block, values, q_rows, g_rows, its, turns, at, None, queries, keys, key, ranges,
                    frame_size, factor, FRAMES, COLUMNS, PARTS, D, UNIT, TURNING, HALF, True,
                )  # fmt: skip
        for at in range(first // COLUMNS * COLUMNS, last - (rest - whole), COLUMNS):
            total_k, total_v = _meet_queries(
                total_k, total_v, block, values, q_rows, g_rows, its, turns, around(at, whole, rest), queries,
                queries, keys, key, ranges, frame_size, factor,
                FRAMES, COLUMNS, PARTS, D, UNIT, TURNING, HALF, TURNED,
            )  # fmt: skip
    total_k = turn(total_k, k_turns, start, keys, True, PARTS, TURNING, HALF)
    store(dk, drow, start, keys, total_k, factor, PARTS, D)
    store(dv, drow, start, keys, total_v, 1.0, PARTS, D)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=LISTS)
def _masked_attention_backward_kv_kernel(
    q, k, v, grad, offsets, dk, dv, cu_seqlens, k_cu_seqlens, tiles, ranges, turns,
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
    stream_dkv(
        rows_of(q, q_skip, q_token, q_head, q_channel, s, first, head * GROUP, UNIT), q_head,
        load(k_rows, start, m, ROWS, PARTS, D, UNIT), load(v_rows, start, m, ROWS, PARTS, D, UNIT),
        rows_of(grad, g_skip, g_token, g_head, g_channel, s, first, head * GROUP, UNIT), g_head,
        offsets + 2 * (first * lse_token + head * GROUP * lse_head), lse_head, dk + at, dv + at, drow,
        None if ranges is None else beginning(ranges, ranges_skip, first, s, 2), None,
        None if turns is None else beginning(turns, turns_skip, k_first, s, 2 * TURNING),
        start, n, m, frame_size, factor,
        GROUP, FRAMES, ROWS, COLUMNS, PARTS, D, UNIT, TURNING, HALF, True,
    )  # fmt: skip
