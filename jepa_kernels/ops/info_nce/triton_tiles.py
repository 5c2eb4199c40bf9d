"""Tiles of similarities in Triton kernels. Embeddings are multiplied as they are; scale and column_scale,
log2(e) / (|x| temperature) and 1 / |y|, turn the products into S log2(e), of which exp2 is taken."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Arguments that kernels aren't compiled for: they change with the batch.
LENGTHS = ["rows", "columns", "shift", "first", "tiles", "d_row"]
LISTS = ["items", "column_items", "heat"]


@triton.jit
def load(x, i, c, rows, channels, row, channel, ROWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr):
    """ROWS x CHANNELS elements from [i, c] on, zeros outside; BLOCKS: x is a descriptor of such blocks."""
    if BLOCKS:
        block = x.load([i, c])
    else:
        at_row, at_channel = i + tl.arange(0, ROWS), c + tl.arange(0, CHANNELS)
        at = at_row.to(tl.int64)[:, None] * row + at_channel.to(tl.int64)[None, :] * channel
        block = tl.load(x + at, mask=(at_row < rows)[:, None] & (at_channel < channels)[None, :], other=0.0)
    return block


@triton.jit
def store(x, block, i, c, rows, channels, row, ROWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr):
    """block to x from [i, c] on, as far as x goes; BLOCKS: x is a descriptor of such blocks."""
    block = block.to(x.dtype if BLOCKS else x.dtype.element_ty)
    if BLOCKS:
        x.store([i, c], block)
    else:
        at_row, at_channel = i + tl.arange(0, ROWS), c + tl.arange(0, CHANNELS)
        at = at_row.to(tl.int64)[:, None] * row + at_channel[None, :]
        tl.store(x + at, block, mask=(at_row < rows)[:, None] & (at_channel < channels)[None, :])


@triton.jit
def products(
    x, y, i, j, rows, columns, channels, x_row, x_channel, y_row, y_channel,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Of ROWS rows of x from i on with COLUMNS rows of y from j on."""
    s = tl.zeros([ROWS, COLUMNS], tl.float32)
    for c in range(0, channels, STEP):
        left = load(x, i, c, rows, channels, x_row, x_channel, ROWS, STEP, BLOCKS)
        right = load(y, j, c, columns, channels, y_row, y_channel, COLUMNS, STEP, BLOCKS)
        s = tl.dot(left, tl.trans(right), s, input_precision="ieee")
    return s


@triton.jit
def halves(s, ROWS: tl.constexpr, HALF: tl.constexpr):
    """The left and the right half of a tile: registers hold what is worked out for the columns of one."""
    return tl.split(tl.permute(tl.reshape(s, (ROWS, 2, HALF)), (0, 2, 1)))


@triton.jit
def scores(s, scale, column_scale, i, j, rows, columns):
    """S log2(e) of rows i and columns j, from products; -inf outside."""
    s *= tl.load(scale + i, mask=i < rows, other=0.0)[:, None]
    s += tl.where(i < rows, 0.0, float("-inf"))[:, None]
    s *= tl.load(column_scale + j, mask=j < columns, other=1.0)[None, :]
    return s + tl.where(j < columns, 0.0, float("-inf"))[None, :]


@triton.jit
def shared(items, column_items, i, j, rows, columns):
    """[i, j]: which rows and columns are of one item."""
    own = tl.load(items + i, mask=i < rows, other=0.0)
    other = tl.load(column_items + j, mask=j < columns, other=0.0)
    return own[:, None] == other[None, :]


@triton.jit
def tile_of(program, tiles, column_tiles, BAND: tl.constexpr):
    """Place of a program's tile: bands of BAND tiles of rows, column after column, so that both sides stay in cache."""
    band = program // (BAND * column_tiles)
    height = tl.minimum(tiles - band * BAND, BAND)
    inside = program % (BAND * column_tiles)
    return band * BAND + inside % height, inside // height
