"""Forward kernel of `masked_attention` for sequences of at most 256 keys: keys and values of a head stay on chip."""

import triton
import triton.language as tl

from jepa_kernels.ops.masked_attention.triton_forward import clear_out, finish
from jepa_kernels.ops.masked_attention.triton_tiles import (
    LISTS,
    LOG2E,
    NUMBERS,
    add_products,
    beginning,
    keys_seen,
    load,
    load_blocks,
    products,
    rows_of,
    sequence,
    turn,
    where_seen,
    zeros,
)

GROUP = tl.constexpr(256)  # queries that one program goes through


@triton.jit
def _rows(
    q, k, v, out, row, lse, ranges, turns, k_turns, begin, queries, keys, frame_size, scale,
    CLASSES: tl.constexpr, CLASS: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    D: tl.constexpr, UNIT: tl.constexpr, TURNING: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """GROUP queries from `begin`, ROWS at a time, against all keys at once, in blocks: tops are known before sums."""
    BLOCKS: tl.constexpr = CLASSES[CLASS]
    key_blocks = load_blocks(k, k_turns, keys, CLASSES, CLASS, PARTS, D, UNIT, TURNING, HALF)
    value_blocks = load_blocks(v, None, keys, CLASSES, CLASS, PARTS, D, UNIT, TURNING, HALF)
    for start in range(begin, tl.minimum(begin + GROUP, queries), ROWS):
        tile = load(q, start, queries, ROWS, PARTS, D, UNIT)
        tile = turn(tile, turns, start, queries, False, PARTS, TURNING, HALF)
        first, last = keys_seen(start + tl.arange(0, ROWS), queries, keys, frame_size, ranges, FRAMES)
        scores = ()
        top = tl.full([ROWS], float("-inf"), tl.float32)
        for i in tl.static_range(len(BLOCKS)):
            block = products(tile, key_blocks[i])
            key = (BLOCKS[0] if i else 0) + tl.arange(0, BLOCKS[i])[None, :]
            if FRAMES or ranges is not None:
                block = where_seen(block, key, first[:, None], last[:, None], ranges, float("-inf"))
            elif i == len(BLOCKS) - 1:
                block = tl.where(key < keys, block, float("-inf"))
            top = tl.maximum(top, tl.max(block, 1))
            scores = scores + (block,)
        top = tl.where(top == float("-inf"), 0.0, top * scale)
        total = zeros(ROWS, PARTS)
        weight = tl.zeros([ROWS], tl.float32)
        for i in tl.static_range(len(BLOCKS)):
            weights = tl.exp2(tl.fma(scores[i], scale, -top[:, None]))
            weight += tl.sum(weights, 1)
            total = add_products(total, weights, value_blocks[i])
        finish(out, row, lse, start, queries, total, top, weight, PARTS, D)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=LISTS)
def _masked_attention_forward_short_kernel(
    q, k, v, out, lse, cu_seqlens, k_cu_seqlens, ranges, turns, k_turns,
    q_skip, q_token, q_head, q_channel, k_skip, k_token, k_head, k_channel, v_skip, v_token, v_head, v_channel,
    ranges_skip, turns_skip, k_turns_skip, row, lse_token, lse_head,
    queries, keys, sequences, groups, heads, group, frame_size, factor,
    CLASSES: tl.constexpr, LIMITS: tl.constexpr, FRAMES: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, TURNING: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A program takes a head of a sequence. CLASSES: blocks of keys, for sequences that fit no earlier entry."""
    program = tl.program_id(0)
    head = program % heads
    s = program // heads // groups
    begin = program // heads % groups * GROUP
    if TAIL:
        part = program - sequences * groups * heads
        if part >= 0:
            clear_out(out, lse, cu_seqlens, sequences, queries, row * 8, lse_head, heads, part)
            return
    first, n = sequence(cu_seqlens, s, queries)
    k_first, m = sequence(k_cu_seqlens, s, keys)
    if begin >= n:
        return
    fitted = -1
    for i in tl.static_range(len(CLASSES)):
        if (m <= LIMITS[i]) & (m > fitted):
            _rows(
                rows_of(q, q_skip, q_token, q_head, q_channel, s, first, head, UNIT),
                rows_of(k, k_skip, k_token, k_head, k_channel, s, k_first, head // group, UNIT),
                rows_of(v, v_skip, v_token, v_head, v_channel, s, k_first, head // group, UNIT),
                out + first * (row * 8) + head * D, row, lse + first * lse_token + head * lse_head,
                None if ranges is None else beginning(ranges, ranges_skip, first, s, 2),
                None if turns is None else beginning(turns, turns_skip, first, s, 2 * TURNING),
                None if k_turns is None else beginning(k_turns, k_turns_skip, k_first, s, 2 * TURNING),
                begin, n, m, frame_size, factor * LOG2E,
                CLASSES, i, FRAMES, ROWS, PARTS, D, UNIT, TURNING, HALF,
            )  # fmt: skip
        fitted = LIMITS[i]
