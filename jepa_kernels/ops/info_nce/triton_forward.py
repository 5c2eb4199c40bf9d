"""Forward Triton kernels of `info_nce`: lengths and pairs, sums of tiles, and their merge."""

import triton
import triton.language as tl

from jepa_kernels.ops.info_nce.triton_tiles import (
    LENGTHS,
    LISTS,
    LN2,
    LOG2E,
    halves,
    products,
    scores,
    shared,
    tile_of,
)

LAST_CUT = tl.constexpr(2.0**-25 / 0.6931471805599453)  # half of the last of 24 bits, over numbers of every mantissa


@triton.jit(do_not_specialize=["rows", "columns", "shift"])
def _info_nce_pair_kernel(
    x, y, temperature, norm, scale, column_norm, column_scale, pairs, rows, columns, channels,
    x_row, x_channel, y_row, y_channel, shift, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """|x_i|, |y_i|, their scales, and S of the pair of x_i, all summed in double.

    Tensor cores cut the ends of what they add: of a pair, the largest product, that would be seen in a small loss. To
    the other products, of 16 bits, the scale gives back what the last cut takes in the mean.
    """
    CUT: tl.constexpr = 0.0 if x.dtype.element_ty == tl.float32 else LAST_CUT
    i = tl.program_id(0).to(tl.int64)
    place = i + shift
    paired = (i < rows) & (place >= 0) & (place < columns)
    own = tl.zeros([BLOCK], tl.float64)
    other = tl.zeros([BLOCK], tl.float64)
    partner = tl.zeros([BLOCK], tl.float64)
    product = tl.zeros([BLOCK], tl.float64)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        a = tl.load(x + i * x_row + c.to(tl.int64) * x_channel, mask=(i < rows) & (c < channels), other=0.0)
        y_at = y + c.to(tl.int64) * y_channel
        b = tl.load(y_at + i * y_row, mask=(i < columns) & (c < channels), other=0.0).to(tl.float64)
        p = tl.load(y_at + place * y_row, mask=paired & (c < channels), other=0.0).to(tl.float64)
        a = a.to(tl.float64)
        own += a * a
        other += b * b
        partner += p * p
        product += a * p
    heat = tl.load(temperature).to(tl.float32).to(tl.float64)  # a number and an fp32 tensor of it: the same bits
    size, column_size, partner_size = _length(own, NORMALIZE), _length(other, NORMALIZE), _length(partner, NORMALIZE)
    tl.store(norm + i, size.to(tl.float32), mask=i < rows)
    tl.store(scale + i, (1.0 / (size * heat) * LOG2E * (1.0 + CUT)).to(tl.float32), mask=i < rows)
    tl.store(column_norm + i, column_size.to(tl.float32), mask=i < columns)
    tl.store(column_scale + i, (1.0 / column_size).to(tl.float32), mask=i < columns)
    tl.store(pairs + i, tl.where(paired, tl.sum(product) / (size * partner_size * heat), 0.0), mask=i < rows)


@triton.jit
def _length(squares, NORMALIZE: tl.constexpr):
    """1 where embeddings are taken as they are."""
    length = tl.sqrt(tl.sum(squares))
    length = tl.where(length < 1e-12, 1e-12, length)
    return length if NORMALIZE else tl.zeros_like(length) + 1.0


@triton.jit
def _store_weights(parts, s, count, there, axis: tl.constexpr):
    """Top, and sum of weights under it, along an axis. Nothing seen: (-inf, 0)."""
    top = tl.max(s, axis)
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(parts, top, mask=there)
    tl.store(parts + count, tl.sum(tl.exp2(s - tl.expand_dims(base, axis)), axis), mask=there)


@triton.jit
def _store_sums(
    s, scale, column_scale, items, column_items, row_parts, column_parts, ti, tj, rows, columns, shift,
    SUMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of the tile [ti, tj], from its products: weights of all but pairs, and (SUMS) the sums of their entries.

    Added to that of the pair, small weights would be lost, and with them a small loss: the merge adds it in double.
    """
    PARTS: tl.constexpr = 3 if SUMS else 2
    i, j = ti * ROWS + tl.arange(0, ROWS), tj * COLUMNS + tl.arange(0, COLUMNS)
    s = scores(s, scale, column_scale, i, j, rows, columns)
    if items is not None:
        s = tl.where(shared(items, column_items, i, j, rows, columns), float("-inf"), s)
    if (ti * ROWS + shift < (tj + 1) * COLUMNS) & ((ti + 1) * ROWS + shift > tj * COLUMNS):
        s = tl.where((i + shift)[:, None] == j[None, :], float("-inf"), s)
    row_parts += tj.to(tl.int64) * PARTS * rows + i
    column_parts += ti.to(tl.int64) * PARTS * columns + j
    _store_weights(row_parts, s, rows, i < rows, 1)
    _store_weights(column_parts, s, columns, j < columns, 0)
    if SUMS:
        s = tl.where(s == float("-inf"), 0.0, s)
        tl.store(row_parts + 2 * rows, tl.sum(s, 1), mask=i < rows)
        tl.store(column_parts + 2 * columns, tl.sum(s, 0), mask=j < columns)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=LISTS)
def _info_nce_forward_kernel(
    x, y, scale, column_scale, items, column_items, row_parts, column_parts, rows, columns, channels,
    x_row, x_channel, y_row, y_channel, shift, SUMS: tl.constexpr, BLOCKS: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Sums of a tile of S, or of its halves where HALF is less than COLUMNS: of its rows to row_parts
    [half, 2 or 3, rows], of its columns to column_parts [row tile, 2 or 3, columns]."""
    ti, tj = tile_of(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), BAND)
    s = products(
        x, y, ti * ROWS, tj * COLUMNS, rows, columns, channels, x_row, x_channel, y_row, y_channel,
        ROWS, COLUMNS, STEP, BLOCKS,
    )  # fmt: skip
    if HALF < COLUMNS:
        s, t = halves(s, ROWS, HALF)
        tj *= 2
        _store_sums(
            t, scale, column_scale, items, column_items, row_parts, column_parts, ti, tj + 1, rows, columns, shift,
            SUMS, ROWS, HALF,
        )  # fmt: skip
    _store_sums(
        s, scale, column_scale, items, column_items, row_parts, column_parts, ti, tj, rows, columns, shift,
        SUMS, ROWS, HALF,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "tiles", "shift", "first", "last"])
def _info_nce_merge_kernel(
    parts, pairs, lse, sums, count, tiles, shift, first, last,
    SUMS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps, and sums, of the tiles' parts and, for i in first .. last, of the pair of row i - shift."""
    PARTS: tl.constexpr = 3 if SUMS else 2
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = (i < count)[None, :]
    pair = tl.load(pairs + i - shift, mask=(i >= first) & (i < last), other=float("-inf")).to(tl.float64)
    parts += i[None, :]
    top = pair
    for start in range(0, tiles, TILES):
        t = (start + tl.arange(0, TILES))[:, None]
        tops = tl.load(parts + t.to(tl.int64) * PARTS * count, mask=(t < tiles) & there, other=float("-inf"))
        top = tl.maximum(top, tl.max(tops, 0).to(tl.float64) * LN2)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.exp(pair - base)
    plain = tl.where(pair == float("-inf"), 0.0, pair)
    for start in range(0, tiles, TILES):
        t = (start + tl.arange(0, TILES))[:, None]
        at = parts + t.to(tl.int64) * PARTS * count
        tops = tl.load(at, mask=(t < tiles) & there, other=float("-inf")).to(tl.float64) * LN2
        weights = tl.load(at + count, mask=(t < tiles) & there, other=0.0).to(tl.float64)
        total += tl.sum(weights * tl.exp(tops - base[None, :]), 0)
        if SUMS:
            plain += tl.sum(tl.load(at + 2 * count, mask=(t < tiles) & there, other=0.0).to(tl.float64), 0) * LN2
    tl.store(lse + i, base + tl.log(total), mask=i < count)
    if SUMS:
        tl.store(sums + i, plain, mask=i < count)
