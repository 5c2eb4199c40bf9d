"""Backward Triton kernels of `info_nce`: the gradient of a strip of S, its products, and the way back to embeddings."""

import triton
import triton.language as tl

from jepa_kernels.ops.info_nce.triton_tiles import (
    LENGTHS,
    LISTS,
    LOG2E,
    halves,
    load,
    products,
    scores,
    shared,
    store,
    tile_of,
)


@triton.jit
def _expm1(t):
    """exp(t) - 1 for t <= 0: of pairs, whose parts nearly cancel where the loss is small."""
    y = tl.full(t.shape, 1.0, tl.float32)
    for n in tl.static_range(9, 1, -1):
        y = 1.0 + t * y * (1.0 / n)
    return tl.where(t > -0.5, t * y, tl.exp2(t * LOG2E) - 1.0)


@triton.jit
def _weights(s, high, low, i, count, axis: tl.constexpr):
    """exp(S - lse), lse log2(e) in two floats: where it is large, one would lose the weights' last bits."""
    s -= tl.expand_dims(tl.load(high + i, mask=i < count, other=0.0), axis)
    return tl.exp2(s - tl.expand_dims(tl.load(low + i, mask=i < count, other=0.0), axis))


@triton.jit
def _store_gradient(
    s, norm, scale, column_scale, items, column_items, pairs, row_lse, row_high, row_low, col_lse, col_high, col_low,
    row_share, col_share, d, heat, tile, tj, rows, columns, shift, first, d_row, taken,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """d of a tile, from its products; the sum of its G S log2(e) to heat.

    taken: what label smoothing takes from a pair, twice its share, rounded once: fp32 has no more of a share near 0.
    """
    i, j = first + tile * ROWS + tl.arange(0, ROWS), tj * COLUMNS + tl.arange(0, COLUMNS)
    s = scores(s, scale, column_scale, i, j, rows, columns)
    if items is not None:
        s = tl.where(shared(items, column_items, i, j, rows, columns), float("-inf"), s)
    g = _weights(s, row_high, row_low, i, rows, 1) + _weights(s, col_high, col_low, j, columns, 0)
    if (first + tile * ROWS + shift < (tj + 1) * COLUMNS) & (first + (tile + 1) * ROWS + shift > tj * COLUMNS):
        place = i + shift
        paired = (i < rows) & (place >= 0) & (place < columns)
        value = tl.load(pairs + i, mask=paired, other=float("-inf"))
        own = tl.load(row_lse + i, mask=paired, other=0.0)
        other = tl.load(col_lse + place, mask=paired, other=0.0)
        pair = place[:, None] == j[None, :]
        s = tl.where(pair, (value * LOG2E)[:, None], s)
        value = value.to(tl.float64)
        value = _expm1((value - own).to(tl.float32)) + _expm1((value - other).to(tl.float32)) + taken
        g = tl.where(pair, value[:, None], g)
    if row_share is not None:
        g -= tl.load(row_share + i, mask=i < rows, other=0.0)[:, None]
        g -= tl.load(col_share + j, mask=j < columns, other=0.0)[None, :]
        g = tl.where(s == float("-inf"), 0.0, g)
    tl.store(heat, tl.sum(tl.where(s == float("-inf"), 0.0, s) * g))
    g *= (1.0 / tl.load(norm + i, mask=i < rows, other=1.0))[:, None]
    g *= tl.load(column_scale + j, mask=j < columns, other=0.0)[None, :]
    store(d, g, tile * ROWS, tj * COLUMNS, rows - first, d_row, d_row, ROWS, COLUMNS, BLOCKS)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=LISTS)
def _info_nce_backward_kernel(
    x, y, norm, scale, column_scale, items, column_items, pairs, row_lse, row_high, row_low, col_lse, col_high, col_low,
    row_share, col_share, d, heat, rows, columns, channels, x_row, x_channel, y_row, y_channel, shift, first, tiles,
    d_row, taken, BLOCKS: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """A tile of d = G / (|x_i| |y_j|), of the strip of S whose first row is `first`, by halves as forward."""
    ti, tj = tile_of(tl.program_id(0), tiles, tl.cdiv(d_row, COLUMNS), BAND)
    s = products(
        x, y, first + ti * ROWS, tj * COLUMNS, rows, columns, channels, x_row, x_channel, y_row, y_channel,
        ROWS, COLUMNS, STEP, BLOCKS,
    )  # fmt: skip
    heat += tl.program_id(0) * (COLUMNS // HALF)
    if HALF < COLUMNS:
        s, t = halves(s, ROWS, HALF)
        tj *= 2
        _store_gradient(
            t, norm, scale, column_scale, items, column_items, pairs, row_lse, row_high, row_low, col_lse,
            col_high, col_low, row_share, col_share, d, heat + 1, ti, tj + 1, rows, columns, shift, first, d_row, taken,
            BLOCKS, ROWS, HALF,
        )  # fmt: skip
    _store_gradient(
        s, norm, scale, column_scale, items, column_items, pairs, row_lse, row_high, row_low, col_lse,
        col_high, col_low, row_share, col_share, d, heat, ti, tj, rows, columns, shift, first, d_row, taken,
        BLOCKS, ROWS, HALF,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "depth"])
def _info_nce_product_kernel(
    d, v, out, rows, depth, width, channels, v_row, v_channel, TURNED: tl.constexpr, ADD: tl.constexpr,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """out [rows, channels] = d [rows, depth] v [depth, channels] (ADD: + out), in fp32; TURNED: d^T is given.

    Rows of d in memory are `width` long, with zeros at their ends: read whole, 16 bytes at a time.
    """
    wide = tl.cdiv(channels, COLUMNS)
    first, c = tl.program_id(0) // wide * ROWS, tl.program_id(0) % wide * COLUMNS
    i, cs = first + tl.arange(0, ROWS), c + tl.arange(0, COLUMNS)
    at = out + i.to(tl.int64)[:, None] * channels + cs[None, :]
    there = (i < rows)[:, None] & (cs < channels)[None, :]
    total = tl.load(at, mask=there, other=0.0) if ADD else tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, depth, STEP):
        if TURNED:
            left = tl.trans(load(d, k, first, depth, width, width, 1, STEP, ROWS, BLOCKS))
        else:
            left = load(d, first, k, rows, width, width, 1, ROWS, STEP, BLOCKS)
        right = load(v, k, c, depth, channels, v_row, v_channel, STEP, COLUMNS, BLOCKS)
        total = tl.dot(left, right, total, input_precision="ieee")
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
