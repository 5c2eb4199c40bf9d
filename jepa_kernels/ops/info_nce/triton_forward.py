"""Forward Triton kernels of `info_nce`: sums of tiles, and their merge."""

import triton
import triton.language as tl

from jepa_kernels.ops.info_nce.triton_tiles import LENGTHS, LISTS, LOG2E, load, scores, tile_of


@triton.jit
def _store_weights(parts, s, count, there, axis: tl.constexpr):
    """Top, number of tops and the others' weights, along an axis: the log-sum-exp is top + log(tops + others).

    Added to 1, small weights would be lost, and with them a small loss. Nothing seen: (-inf, 0, 0).
    """
    top = tl.max(s, axis)
    base = tl.expand_dims(tl.where(top == float("-inf"), 0.0, top), axis)
    weights = tl.exp2((s - base) * LOG2E)
    tl.store(parts, top, mask=there)
    tl.store(parts + count, tl.sum((s == base).to(tl.float32), axis), mask=there)
    tl.store(parts + 2 * count, tl.sum(tl.where(s == base, 0.0, weights), axis), mask=there)


@triton.jit
def _store_sums(
    s, scale, column_scale, items, column_items, row_parts, column_parts, diagonal, ti, tj, rows, columns, shift,
    SUMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of the tile [ti, tj], from its products: weights, pairs, and (SUMS) the sums of its entries."""
    PARTS: tl.constexpr = 4 if SUMS else 3
    i, j = ti * ROWS + tl.arange(0, ROWS), tj * COLUMNS + tl.arange(0, COLUMNS)
    s, pair = scores(s, scale, column_scale, items, column_items, i, j, rows, columns, shift)
    if (ti * ROWS + shift < (tj + 1) * COLUMNS) & ((ti + 1) * ROWS + shift > tj * COLUMNS):
        place = i + shift
        here = (i < rows) & (place >= tj * COLUMNS) & (place < tl.minimum((tj + 1) * COLUMNS, columns))
        tl.store(diagonal + i, tl.sum(tl.where(pair, s, 0.0), 1), mask=here)
    row_parts += tj.to(tl.int64) * PARTS * rows + i
    column_parts += ti.to(tl.int64) * PARTS * columns + j
    _store_weights(row_parts, s, rows, i < rows, 1)
    _store_weights(column_parts, s, columns, j < columns, 0)
    if SUMS:
        s = tl.where(s == float("-inf"), 0.0, s)
        tl.store(row_parts + 3 * rows, tl.sum(s, 1), mask=i < rows)
        tl.store(column_parts + 3 * columns, tl.sum(s, 0), mask=j < columns)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=LISTS)
def _info_nce_forward_kernel(
    x, y, scale, column_scale, items, column_items, row_parts, column_parts, diagonal, rows, columns, channels,
    x_row, x_channel, y_row, y_channel, shift, SUMS: tl.constexpr, TWO: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Sums of a tile of S, or (TWO) of two side by side, which share what is read of x: of its rows to row_parts
    [column tile, 3 or 4, rows], of its columns to column_parts [row tile, 3 or 4, columns]."""
    MORE: tl.constexpr = 2 if TWO else 1
    ti, tj = tile_of(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS * MORE), BAND)
    tj *= MORE
    i, j = ti * ROWS + tl.arange(0, ROWS), tj * COLUMNS + tl.arange(0, COLUMNS)
    s = tl.zeros([ROWS, COLUMNS], tl.float32)
    t = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, channels, STEP):
        c = start + tl.arange(0, STEP)
        left = load(x, i, rows, x_row, c, channels, x_channel)
        right = load(y, j, columns, y_row, c, channels, y_channel)
        s = tl.dot(left, tl.trans(right), s, input_precision="ieee")
        if TWO:
            right = load(y, j + COLUMNS, columns, y_row, c, channels, y_channel)
            t = tl.dot(left, tl.trans(right), t, input_precision="ieee")
    _store_sums(
        s, scale, column_scale, items, column_items, row_parts, column_parts, diagonal, ti, tj, rows, columns, shift,
        SUMS, ROWS, COLUMNS,
    )  # fmt: skip
    if TWO:
        _store_sums(
            t, scale, column_scale, items, column_items, row_parts, column_parts, diagonal, ti, tj + 1, rows, columns,
            shift, SUMS, ROWS, COLUMNS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count", "tiles"])
def _info_nce_merge_kernel(parts, lse, sums, count, tiles, SUMS: tl.constexpr, BLOCK: tl.constexpr):
    """Log-sum-exps, and sums, of the tiles' parts, in their order."""
    PARTS: tl.constexpr = 4 if SUMS else 3
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < count
    at = parts + i
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for _ in range(tiles):
        top = tl.maximum(top, tl.load(at, mask=there, other=0.0))
        at += PARTS * count
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK], tl.float64)
    plain = tl.zeros([BLOCK], tl.float64)
    at = parts + i
    for _ in range(tiles):
        factor = tl.exp2((tl.load(at, mask=there, other=0.0) - base) * LOG2E)
        tops = tl.load(at + count, mask=there, other=1.0).to(tl.float64)
        others = tl.load(at + 2 * count, mask=there, other=0.0).to(tl.float64)
        total += (tops + others) * factor.to(tl.float64)
        if SUMS:
            plain += tl.load(at + 3 * count, mask=there, other=0.0).to(tl.float64)
        at += PARTS * count
    tl.store(lse + i, base.to(tl.float64) + tl.log(total), mask=there)
    if SUMS:
        tl.store(sums + i, plain, mask=there)
