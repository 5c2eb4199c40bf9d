"""Triton kernels of `info_nce`. Embeddings are multiplied as they are; scale and column_scale, 1 / (|x| temperature)
and 1 / |y|, turn the products into S."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LENGTHS = ["rows", "columns", "shift", "first", "tiles", "d_row", "depth"]  # not compiled for: they change with B
LISTS = ["items", "column_items"]


@triton.jit
def _load(x, i, count, row, c, channels, channel):
    """Elements [i, c] of a matrix of `count` rows, zeros outside."""
    at = i.to(tl.int64)[:, None] * row + c.to(tl.int64)[None, :] * channel
    return tl.load(x + at, mask=(i < count)[:, None] & (c < channels)[None, :], other=0.0)


@triton.jit
def _scores(s, scale, column_scale, items, column_items, i, j, rows, columns, shift):
    """(S of rows i and columns j, from products; which of them are pairs). -inf stands for what is left out."""
    s *= tl.load(scale + i, mask=i < rows, other=0.0)[:, None]
    s *= tl.load(column_scale + j, mask=j < columns, other=0.0)[None, :]
    pair = (i + shift)[:, None] == j[None, :]
    counts = (i < rows)[:, None] & (j < columns)[None, :]
    if items is not None:
        own = tl.load(items + i, mask=i < rows, other=0.0)
        other = tl.load(column_items + j, mask=j < columns, other=0.0)
        counts &= pair | (own[:, None] != other[None, :])
    return tl.where(counts, s, float("-inf")), pair


@triton.jit
def _tile_of(program, tiles, column_tiles, BAND: tl.constexpr):
    """Place of a program's tile: bands of BAND tiles of rows, column after column, so that both sides stay in cache."""
    band = program // (BAND * column_tiles)
    height = tl.minimum(tiles - band * BAND, BAND)
    inside = program % (BAND * column_tiles)
    return band * BAND + inside % height, inside // height


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
    s, pair = _scores(s, scale, column_scale, items, column_items, i, j, rows, columns, shift)
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
    ti, tj = _tile_of(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS * MORE), BAND)
    tj *= MORE
    i, j = ti * ROWS + tl.arange(0, ROWS), tj * COLUMNS + tl.arange(0, COLUMNS)
    s = tl.zeros([ROWS, COLUMNS], tl.float32)
    t = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, channels, STEP):
        c = start + tl.arange(0, STEP)
        left = _load(x, i, rows, x_row, c, channels, x_channel)
        right = _load(y, j, columns, y_row, c, channels, y_channel)
        s = tl.dot(left, tl.trans(right), s, input_precision="ieee")
        if TWO:
            right = _load(y, j + COLUMNS, columns, y_row, c, channels, y_channel)
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


@triton.jit
def _expm1(t):
    """exp(t) - 1 for t <= 0: of pairs, whose parts nearly cancel where the loss is small."""
    y = tl.full(t.shape, 1.0, tl.float32)
    for n in tl.static_range(9, 1, -1):
        y = 1.0 + t * y * (1.0 / n)
    return tl.where(t > -0.5, t * y, tl.exp2(t * LOG2E) - 1.0)


@triton.jit
def _less(s, lse, axis: tl.constexpr):
    """s - lse, a log-sum-exp in two floats: where it is large, one would lose the weights' last bits."""
    high = lse.to(tl.float32)
    low = (lse - high.to(tl.float64)).to(tl.float32)
    return (s - tl.expand_dims(high, axis)) - tl.expand_dims(low, axis)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=LISTS)
def _info_nce_backward_kernel(
    x, y, scale, column_scale, row_inverse, items, column_items, row_lse, col_lse, row_share, col_share, d, heat,
    rows, columns, channels, x_row, x_channel, y_row, y_channel, shift, first, tiles, d_row, kept,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """A tile of d = G / (|x_i| |y_j|), of the strip of S whose first row is `first`, and its sum of G S to heat."""
    ti, tj = _tile_of(tl.program_id(0), tiles, tl.cdiv(columns, COLUMNS), BAND)
    inside = ti * ROWS + tl.arange(0, ROWS)
    i, j = first + inside, tj * COLUMNS + tl.arange(0, COLUMNS)
    s = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, channels, STEP):
        c = start + tl.arange(0, STEP)
        left = _load(x, i, rows, x_row, c, channels, x_channel)
        s = tl.dot(left, tl.trans(_load(y, j, columns, y_row, c, channels, y_channel)), s, input_precision="ieee")
    s, pair = _scores(s, scale, column_scale, items, column_items, i, j, rows, columns, shift)
    own = tl.load(row_lse + i, mask=i < rows, other=0.0)
    g = tl.exp2(_less(s, own, 1) * LOG2E)
    g += tl.exp2(_less(s, tl.load(col_lse + j, mask=j < columns, other=0.0), 0) * LOG2E)
    if (first + ti * ROWS + shift < (tj + 1) * COLUMNS) & (first + (ti + 1) * ROWS + shift > tj * COLUMNS):
        place = i + shift
        other = tl.load(col_lse + place, mask=(i < rows) & (place >= 0) & (place < columns), other=0.0)
        value = tl.sum(tl.where(pair & (s > float("-inf")), s, 0.0), 1).to(tl.float64)
        value = _expm1((value - own).to(tl.float32)) + _expm1((value - other).to(tl.float32)) + (2.0 - 2.0 * kept)
        g = tl.where(pair, value[:, None], g)
    if row_share is not None:
        g -= tl.load(row_share + i, mask=i < rows, other=0.0)[:, None]
        g -= tl.load(col_share + j, mask=j < columns, other=0.0)[None, :]
    g = tl.where(s == float("-inf"), 0.0, g)
    tl.store(heat + tl.program_id(0), tl.sum(tl.where(s == float("-inf"), 0.0, s) * g))
    g *= tl.load(row_inverse + i, mask=i < rows, other=0.0)[:, None]
    g *= tl.load(column_scale + j, mask=j < columns, other=0.0)[None, :]
    at = d + inside.to(tl.int64)[:, None] * d_row + j[None, :]
    tl.store(at, g.to(d.dtype.element_ty), mask=(i < rows)[:, None] & (j < d_row)[None, :])


@triton.jit(do_not_specialize=["rows", "depth"])
def _info_nce_product_kernel(
    d, v, out, rows, depth, width, channels, v_row, v_channel,
    TURNED: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """out [rows, channels] = d [rows, depth] v [depth, channels] (ADD: + out), in fp32; TURNED: d^T is given.

    Rows of d in memory are `width` long, with zeros at their ends: read whole, 16 bytes at a time.
    """
    wide = tl.cdiv(channels, COLUMNS)
    i = tl.program_id(0) // wide * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % wide * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, depth, STEP):
        k = start + tl.arange(0, STEP)
        if TURNED:
            left = tl.trans(_load(d, k, depth, width, i, width, 1))
        else:
            left = _load(d, i, rows, width, k, width, 1)
        total = tl.dot(left, _load(v, k, depth, v_row, c, channels, v_channel), total, input_precision="ieee")
    at = out + i.to(tl.int64)[:, None] * channels + c[None, :]
    there = (i < rows)[:, None] & (c < channels)[None, :]
    if ADD:
        total += tl.load(at, mask=there, other=0.0)
    tl.store(at, total, mask=there)


@triton.jit
def _info_nce_normalize_kernel(
    x, norm, gradient, weight, temperature, out, channels, x_row, x_channel, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of dx. `gradient` is that of the direction x^, over |x|."""
    row = tl.program_id(0).to(tl.int64)
    size = tl.load(norm + row)
    x += row * x_row
    gradient += row * channels
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        value = tl.load(x + c.to(tl.int64) * x_channel, mask=c < channels, other=0.0).to(tl.float32)
        g = tl.load(gradient + c, mask=c < channels, other=0.0) * size
        products += tl.div_rn(value, tl.zeros_like(value) + size) * g
    along = tl.sum(products) if NORMALIZE else 0.0
    along = tl.where(size > 1e-12, along, 0.0)
    factor = tl.load(weight) / tl.load(temperature).to(tl.float32) / size
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        value = tl.load(x + c.to(tl.int64) * x_channel, mask=c < channels, other=0.0).to(tl.float32)
        g = tl.load(gradient + c, mask=c < channels, other=0.0) * size
        g = factor * (g - tl.div_rn(value, tl.zeros_like(value) + size) * along)
        tl.store(out + row * channels + c, g.to(out.dtype.element_ty), mask=c < channels)
