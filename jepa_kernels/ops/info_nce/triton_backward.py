"""Backward Triton kernels of `info_nce`: the gradient of a strip of S, its products, and the way back to embeddings."""

import triton
import triton.language as tl

from jepa_kernels.ops.info_nce.triton_tiles import LENGTHS, LISTS, LOG2E, load, scores, tile_of


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
    ti, tj = tile_of(tl.program_id(0), tiles, tl.cdiv(columns, COLUMNS), BAND)
    inside = ti * ROWS + tl.arange(0, ROWS)
    i, j = first + inside, tj * COLUMNS + tl.arange(0, COLUMNS)
    s = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, channels, STEP):
        c = start + tl.arange(0, STEP)
        left = load(x, i, rows, x_row, c, channels, x_channel)
        s = tl.dot(left, tl.trans(load(y, j, columns, y_row, c, channels, y_channel)), s, input_precision="ieee")
    s, pair = scores(s, scale, column_scale, items, column_items, i, j, rows, columns, shift)
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
            left = tl.trans(load(d, k, depth, width, i, width, 1))
        else:
            left = load(d, i, rows, width, k, width, 1)
        total = tl.dot(left, load(v, k, depth, v_row, c, channels, v_channel), total, input_precision="ieee")
    at = out + i.to(tl.int64)[:, None] * channels + c[None, :]
    there = (i < rows)[:, None] & (c < channels)[None, :]
    if ADD:
        total += tl.load(at, mask=there, other=0.0)
    tl.store(at, total, mask=there)


@triton.jit
def _info_nce_normalize_kernel(
    x, norm, gradient, weight, temperature, out, channels, x_row, x_channel,
    NORMALIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
