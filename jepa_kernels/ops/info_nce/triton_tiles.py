"""Tiles of similarities in Triton kernels. Embeddings are multiplied as they are; scale and column_scale, 1 / (|x|
temperature) and 1 / |y|, turn the products into S."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Arguments that kernels aren't compiled for: they change with the batch.
LENGTHS = ["rows", "columns", "shift", "first", "tiles", "d_row"]
LISTS = ["items", "column_items"]


@triton.jit
def load(x, i, count, row, c, channels, channel):
    """Elements [i, c] of a matrix of `count` rows, zeros outside."""
    at = i.to(tl.int64)[:, None] * row + c.to(tl.int64)[None, :] * channel
    return tl.load(x + at, mask=(i < count)[:, None] & (c < channels)[None, :], other=0.0)


@triton.jit
def scores(s, scale, column_scale, items, column_items, i, j, rows, columns, shift):
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
def tile_of(program, tiles, column_tiles, BAND: tl.constexpr):
    """Place of a program's tile: bands of BAND tiles of rows, column after column, so that both sides stay in cache."""
    band = program // (BAND * column_tiles)
    height = tl.minimum(tiles - band * BAND, BAND)
    inside = program % (BAND * column_tiles)
    return band * BAND + inside % height, inside // height
