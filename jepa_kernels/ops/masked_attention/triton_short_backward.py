"""Backward kernel of `masked_attention` for at most 256 queries and keys: one launch, every sum in one program."""

import triton
import triton.language as tl

from jepa_kernels.ops.masked_attention.triton_backward import load_lse, stream_dkv, stream_dq
from jepa_kernels.ops.masked_attention.triton_tiles import (
    LISTS,
    LOG2E,
    NUMBERS,
    add_products,
    beginning,
    clear_rows,
    keys_seen,
    load,
    products,
    rows_of,
    sequence,
    store,
    turn,
    where_seen,
    zeros,
)


@triton.jit
def _together(
    q, q_head, k, v, grad, g_head, lse, lse_head, dq, drow, dk, dv, k_drow, ranges, turns, k_turns,
    queries, keys, frame_size, factor, GROUP: tl.constexpr, COLUMNS: tl.constexpr, FRAMES: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, TURNING: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """All gradients of at most COLUMNS keys and their queries: delta = sum of weight * slope needs no `out`."""
    key = tl.arange(0, COLUMNS)[:, None]
    block = load(k, 0, keys, COLUMNS, PARTS, D, UNIT)
    block = turn(block, k_turns, 0, keys, False, PARTS, TURNING, HALF)
    values = load(v, 0, keys, COLUMNS, PARTS, D, UNIT)
    total_k = zeros(COLUMNS, PARTS)
    total_v = zeros(COLUMNS, PARTS)
    for h in range(GROUP):
        q_rows = (q[0] + q_head.to(tl.int64) * UNIT * h, q[1], q[2])
        g_rows = (grad[0] + g_head.to(tl.int64) * UNIT * h, grad[1], grad[2])
        for start in range(0, queries, ROWS):
            lane = start + tl.arange(0, ROWS)
            tile = load(q_rows, start, queries, ROWS, PARTS, D, UNIT)
            tile = turn(tile, turns, start, queries, False, PARTS, TURNING, HALF)
            g = load(g_rows, start, queries, ROWS, PARTS, D, UNIT)
            base = load_lse(lse + lse_head.to(tl.int64) * h, lane, queries)
            weights = tl.exp2(tl.fma(products(block, tile), factor * LOG2E, -base[None, :]))
            if FRAMES or ranges is not None:
                begin, end = keys_seen(lane, queries, keys, frame_size, ranges, FRAMES)
                weights = where_seen(weights, key, begin[None, :], end[None, :], ranges, 0.0)
            else:
                weights = tl.where(key < keys, weights, 0.0)
            total_v = add_products(total_v, weights, g)
            slope = products(values, g)
            change = tl.sum(weights * slope, 0)
            slope = (weights * (slope - change[None, :])).to(tile[0].dtype)
            total_q = add_products(zeros(ROWS, PARTS), tl.trans(slope), block)  # before dk, which needs its registers
            total_q = turn(total_q, turns, start, queries, True, PARTS, TURNING, HALF)
            store(dq + h * D, drow, start, queries, total_q, factor, PARTS, D)
            total_k = add_products(total_k, slope, tile)
    total_k = turn(total_k, k_turns, 0, keys, True, PARTS, TURNING, HALF)
    store(dk, k_drow, 0, keys, total_k, factor, PARTS, D)
    store(dv, k_drow, 0, keys, total_v, 1.0, PARTS, D)


@triton.jit
def _in_turn(
    q, q_head, k, v, out, row, grad, g_head, lse, offsets, lse_head, dq, drow, dk, dv, k_drow, ranges, turns, k_turns,
    queries, keys, frame_size, factor, GROUP: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, KV_ROWS: tl.constexpr, KV_COLUMNS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
    UNIT: tl.constexpr, TURNING: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """dq of all queries, then dk and dv: the streaming kernels in one program."""
    for h in range(GROUP):
        its = lse_head.to(tl.int64) * h
        for start in range(0, queries, ROWS):
            stream_dq(
                (q[0] + q_head.to(tl.int64) * UNIT * h, q[1], q[2]), k, v, out + h * D, row,
                (grad[0] + g_head.to(tl.int64) * UNIT * h, grad[1], grad[2]), lse + its, offsets + 2 * its,
                dq + h * D, drow, ranges, turns, k_turns, start, queries, keys, frame_size, factor,
                FRAMES, ROWS, COLUMNS, PARTS, D, UNIT, TURNING, HALF, False,
            )  # fmt: skip
    tl.debug_barrier()  # offsets are read by other threads than wrote it
    for start in range(0, keys, KV_ROWS):
        block = load(k, start, keys, KV_ROWS, PARTS, D, UNIT)
        block = turn(block, k_turns, start, keys, False, PARTS, TURNING, HALF)
        stream_dkv(
            q, q_head, block, load(v, start, keys, KV_ROWS, PARTS, D, UNIT), grad, g_head, offsets, lse_head,
            dk, dv, k_drow, ranges, turns, k_turns, start, queries, keys, frame_size, factor,
            GROUP, FRAMES, KV_ROWS, KV_COLUMNS, PARTS, D, UNIT, TURNING, HALF, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=LISTS)
def _masked_attention_backward_short_kernel(
    q, k, v, out, grad, lse, offsets, dq, dk, dv, cu_seqlens, k_cu_seqlens, ranges, turns, k_turns,
    q_skip, q_token, q_head, q_channel, k_skip, k_token, k_head, k_channel, v_skip, v_token, v_head, v_channel,
    g_skip, g_token, g_head, g_channel, ranges_skip, turns_skip, k_turns_skip, row, drow, k_drow, lse_token, lse_head,
    queries, keys, sequences, heads, frame_size, factor,
    GROUP: tl.constexpr, TOGETHER: tl.constexpr, LONGER: tl.constexpr, FRAMES: tl.constexpr, TAIL: tl.constexpr,
    STACKED: tl.constexpr, ROWS: tl.constexpr, Q_ROWS: tl.constexpr, Q_COLUMNS: tl.constexpr, KV_ROWS: tl.constexpr,
    KV_COLUMNS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, TURNING: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """A program takes a key head of a sequence. Up to TOGETHER keys one pass gives all; LONGER: there may be more."""
    program = tl.program_id(0)
    head = program % heads
    s = program // heads
    if TAIL:
        part = program - sequences * heads
        if part >= 0:
            clear_rows(dq, cu_seqlens, sequences, queries, drow * 8, part)
            if not STACKED:
                clear_rows(dk, k_cu_seqlens, sequences, keys, k_drow * 8, part)
                clear_rows(dv, k_cu_seqlens, sequences, keys, k_drow * 8, part)
            return
    first, n = sequence(cu_seqlens, s, queries)
    k_first, m = sequence(k_cu_seqlens, s, keys)
    if tl.maximum(n, m) > 256:
        return
    q_rows = rows_of(q, q_skip, q_token, q_head, q_channel, s, first, head * GROUP, UNIT)
    k_rows = rows_of(k, k_skip, k_token, k_head, k_channel, s, k_first, head, UNIT)
    v_rows = rows_of(v, v_skip, v_token, v_head, v_channel, s, k_first, head, UNIT)
    grad_rows = rows_of(grad, g_skip, g_token, g_head, g_channel, s, first, head * GROUP, UNIT)
    its_ranges = None if ranges is None else beginning(ranges, ranges_skip, first, s, 2)
    its_turns = None if turns is None else beginning(turns, turns_skip, first, s, 2 * TURNING)
    its_k_turns = None if k_turns is None else beginning(k_turns, k_turns_skip, k_first, s, 2 * TURNING)
    dk += k_first * (k_drow * 8) + head * D
    dv += k_first * (k_drow * 8) + head * D
    dq += first * (drow * 8) + head * GROUP * D
    out += first * (row * 8) + head * GROUP * D
    lse += first * lse_token + head * GROUP * lse_head
    offsets += 2 * (first * lse_token + head * GROUP * lse_head)
    if m <= TOGETHER:
        _together(
            q_rows, q_head, k_rows, v_rows, grad_rows, g_head, lse, lse_head, dq, drow, dk, dv, k_drow,
            its_ranges, its_turns, its_k_turns, n, m, frame_size, factor,
            GROUP, TOGETHER, FRAMES, ROWS, PARTS, D, UNIT, TURNING, HALF,
        )  # fmt: skip
    elif LONGER:
        _in_turn(
            q_rows, q_head, k_rows, v_rows, out, row, grad_rows, g_head, lse, offsets, lse_head,
            dq, drow, dk, dv, k_drow, its_ranges, its_turns, its_k_turns, n, m, frame_size, factor,
            GROUP, FRAMES, Q_ROWS, Q_COLUMNS, KV_ROWS, KV_COLUMNS, PARTS, D, UNIT, TURNING, HALF,
        )  # fmt: skip
