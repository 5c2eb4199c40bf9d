"""Backward kernel of `masked_attention` for at most 256 queries and keys: one launch, every sum in one program."""

import triton
import triton.language as tl

from jepa_kernels.ops.masked_attention.triton_backward import LOG2E, load_lse
from jepa_kernels.ops.masked_attention.triton_tiles import (
    add_products,
    beginning,
    clear_rows,
    keys_seen,
    load,
    load_blocks,
    products,
    row_sums,
    rows_of,
    sequence,
    store,
    turn,
    zeros,
)

NUMBERS = [
    "q_skip", "q_token", "q_head", "q_channel", "k_skip", "k_token", "k_head", "k_channel",
    "v_skip", "v_token", "v_head", "v_channel", "g_skip", "g_token", "g_head", "g_channel",
    "ranges_skip", "turns_skip", "k_turns_skip", "row", "drow", "k_drow", "lse_token", "lse_head",
    "queries", "keys", "tokens", "k_tokens", "sequences", "heads", "group", "frame_size",
]  # fmt: skip


@triton.jit
def _weights(tile, block, base, lane, first_key, queries, keys, frame_size, ranges, factor, FRAMES: tl.constexpr):
    """exp(score - lse) of a block of keys [keys, rows]; 0 where hidden."""
    weights = tl.exp2(tl.fma(products(block, tile), factor * LOG2E, -base[None, :]))
    key = first_key + tl.arange(0, block[0].shape[0])[:, None]
    if FRAMES or ranges is not None:
        begin, end = keys_seen(lane, queries, keys, frame_size, ranges, FRAMES)
        weights = tl.where((key >= begin[None, :]) & (key < end[None, :]), weights, 0.0)
    else:
        weights = tl.where(key < keys, weights, 0.0)
    return weights


@triton.jit
def _step(
    tile, g, base, change, lane, blocks, values, dk, dv, queries, keys, frame_size, ranges, factor,
    FRAMES: tl.constexpr, EXACT: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What the rows of one tile of queries add to dk and dv, and their dq. EXACT: delta from all weights at once."""
    pairs = ()
    if EXACT:
        for i in tl.static_range(len(blocks)):
            first_key = blocks[0][0].shape[0] if i else 0
            weights = _weights(
                tile, blocks[i], base, lane, first_key, queries, keys, frame_size, ranges, factor, FRAMES
            )
            slope = products(values[i], g)
            change += tl.sum(weights * slope, 0)
            pairs = pairs + ((weights, slope),)
    dq = zeros(tile[0].shape[0], PARTS)
    new_dk = ()
    new_dv = ()
    for i in tl.static_range(len(blocks)):
        if EXACT:
            weights, slope = pairs[i]
        else:
            first_key = blocks[0][0].shape[0] if i else 0
            weights = _weights(
                tile, blocks[i], base, lane, first_key, queries, keys, frame_size, ranges, factor, FRAMES
            )
        if DV:
            new_dv = new_dv + (add_products(dv[i], weights, g),)
        if DK:
            if not EXACT:
                slope = products(values[i], g)
            change_of_scores = (weights * (slope - change[None, :])).to(tile[0].dtype)
            new_dk = new_dk + (add_products(dk[i], change_of_scores, tile),)
            dq = add_products(dq, tl.trans(change_of_scores), blocks[i])
    return dq, new_dk, new_dv


@triton.jit
def _pass(
    q, blocks, v, out, row, grad, lse, dq, drow, dk, dv, k_drow, ranges, turns, k_turns, q_head, g_head, lse_head,
    group, queries, keys, frame_size, factor, CLASSES: tl.constexpr, CLASS: tl.constexpr, FRAMES: tl.constexpr, EXACT: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
    UNIT: tl.constexpr, TURNING: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """All queries of a group of heads once, ROWS at a time: writes dk and dq (DK), dv (DV)."""
    BLOCKS: tl.constexpr = CLASSES[CLASS]
    values = ()
    dks = ()
    dvs = ()
    if DK:
        values = load_blocks(v, None, keys, CLASSES, CLASS, PARTS, D, UNIT, TURNING, HALF)
    for i in tl.static_range(len(BLOCKS)):
        if DK:
            dks = dks + (zeros(BLOCKS[i], PARTS),)
        if DV:
            dvs = dvs + (zeros(BLOCKS[i], PARTS),)
    for h in range(group):
        q_rows = (q[0] + q_head.to(tl.int64) * h, q[1], q[2])
        g_rows = (grad[0] + g_head.to(tl.int64) * h, grad[1], grad[2])
        for start in range(0, queries, ROWS):
            lane = start + tl.arange(0, ROWS)
            tile = load(q_rows, start, queries, ROWS, PARTS, D, UNIT)
            tile = turn(tile, turns, start, queries, False, PARTS, TURNING, HALF)
            g = load(g_rows, start, queries, ROWS, PARTS, D, UNIT)
            base = load_lse(lse + lse_head.to(tl.int64) * h, lane, queries)
            change = tl.zeros([ROWS], tl.float32)
            if DK and not EXACT:
                change = row_sums(g, load((out + h * D, row, 1), start, queries, ROWS, PARTS, D, 8))
            total, dks, dvs = _step(
                tile, g, base, change, lane, blocks, values, dks, dvs, queries, keys, frame_size, ranges, factor,
                FRAMES, EXACT, DK, DV, PARTS,
            )  # fmt: skip
            if DK:
                total = turn(total, turns, start, queries, True, PARTS, TURNING, HALF)
                store(dq + h * D, drow, start, queries, total, factor, PARTS, D)
    for i in tl.static_range(len(BLOCKS)):
        first_key = BLOCKS[0] if i else 0
        if DK:
            total = turn(dks[i], k_turns, first_key, keys, True, PARTS, TURNING, HALF)
            store(dk, k_drow, first_key, keys, total, factor, PARTS, D)
        if DV:
            store(dv, k_drow, first_key, keys, dvs[i], 1.0, PARTS, D)


@triton.jit(do_not_specialize=NUMBERS)
def _masked_attention_backward_short_kernel(
    q, k, v, out, grad, lse, dq, dk, dv, cu_seqlens, k_cu_seqlens, ranges, turns, k_turns,
    q_skip, q_token, q_head, q_channel, k_skip, k_token, k_head, k_channel, v_skip, v_token, v_head, v_channel,
    g_skip, g_token, g_head, g_channel, ranges_skip, turns_skip, k_turns_skip, row, drow, k_drow, lse_token, lse_head,
    queries, keys, tokens, k_tokens, sequences, heads, group, frame_size, factor,
    CLASSES: tl.constexpr, LIMITS: tl.constexpr, TOGETHER: tl.constexpr, EXACT: tl.constexpr, FRAMES: tl.constexpr, TAIL: tl.constexpr,
    STACKED: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    TURNING: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A program takes a key head of a sequence. Up to TOGETHER keys one pass gives all; more: dv, then dk and dq."""
    program = tl.program_id(0)
    head = program % heads
    s = program // heads
    if TAIL:
        part = program - sequences * heads
        if part >= 0:
            clear_rows(dq, cu_seqlens, sequences, tokens, drow * 8, part)
            if not STACKED:
                clear_rows(dk, k_cu_seqlens, sequences, k_tokens, k_drow * 8, part)
                clear_rows(dv, k_cu_seqlens, sequences, k_tokens, k_drow * 8, part)
            return
    first, n = sequence(cu_seqlens, s, queries)
    k_first, m = sequence(k_cu_seqlens, s, keys)
    if n > 256:
        return
    q_rows = rows_of(q, q_skip, q_token, q_head, q_channel, s, first, head * group, UNIT)
    k_rows = rows_of(k, k_skip, k_token, k_head, k_channel, s, k_first, head, UNIT)
    v_rows = rows_of(v, v_skip, v_token, v_head, v_channel, s, k_first, head, UNIT)
    grad_rows = rows_of(grad, g_skip, g_token, g_head, g_channel, s, first, head * group, UNIT)
    its_ranges = None if ranges is None else beginning(ranges, ranges_skip, first, s, 2)
    its_turns = None if turns is None else beginning(turns, turns_skip, first, s, 2 * TURNING)
    its_k_turns = None if k_turns is None else beginning(k_turns, k_turns_skip, k_first, s, 2 * TURNING)
    k_at = k_first * (k_drow * 8) + head * D
    at = head * group * D
    fitted = -1
    for i in tl.static_range(len(CLASSES)):
        if (m <= LIMITS[i]) & (m > fitted):
            blocks = load_blocks(k_rows, its_k_turns, m, CLASSES, i, PARTS, D, UNIT, TURNING, HALF)
            for stage in tl.static_range(1 + (LIMITS[i] > TOGETHER)):
                _pass(
                    q_rows, blocks, v_rows, out + first * (row * 8) + at, row, grad_rows,
                    lse + first * lse_token + head * group * lse_head, dq + first * (drow * 8) + at, drow,
                    dk + k_at, dv + k_at, k_drow, its_ranges, its_turns, its_k_turns,
                    q_head * UNIT, g_head * UNIT, lse_head, group, n, m, frame_size, factor, CLASSES, i, FRAMES,
                    LIMITS[i] <= EXACT, LIMITS[i] <= TOGETHER or stage == 1, stage == 0, ROWS, PARTS, D, UNIT, TURNING, HALF,
                )  # fmt: skip
        fitted = LIMITS[i]
