"""What the Triton kernels of `masked_attention` share: where sequences lie, tiles of rows, turning, what rows see.

A tile of ROWS tokens is a tuple of parts [ROWS, P], one for each P in PARTS: powers of two, all but the last alike,
that cover the D channels exactly where it pays (80 = 64 + 16), else padded with zeros on chip.
"""

import triton
import triton.language as tl

# Arguments that kernels aren't compiled for: lengths change with every call, strides with them.
NUMBERS = [
    *(f"{x}_{stride}" for x in "qkvg" for stride in ("skip", "token", "head", "channel")),
    *("ranges_skip", "turns_skip", "k_turns_skip", "row", "drow", "k_drow", "lse_token", "lse_head"),
    *("queries", "keys", "sequences", "count", "groups", "heads", "group", "frame_size"),
]
LISTS = ["cu_seqlens", "k_cu_seqlens", "tiles", "ranges"]  # nor for where these begin
TAILS = tl.constexpr(8)  # programs that clear the rows behind the last sequence
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sequence(cu_seqlens, s, length):
    """The first token of sequence s, of all tokens, and its length; dense: `length` tokens each."""
    if cu_seqlens is None:
        first = s.to(tl.int64) * length
    else:
        first = tl.load(cu_seqlens + s).to(tl.int64)
        length = (tl.load(cu_seqlens + s + 1) - first).to(tl.int32)
    return first, length


@triton.jit
def tile_at(tiles, i, length, ROWS: tl.constexpr):
    """(sequence, first row) of the i-th tile of ROWS rows; sequence -1 where there is none.

    Packed: `tiles` lists (sequence, block of 64); those that don't start a tile of ROWS rows are none.
    """
    if tiles is None:
        per_sequence = tl.cdiv(length, ROWS)
        s = i // per_sequence
        start = i % per_sequence * ROWS
    else:
        s = tl.load(tiles + 2 * i.to(tl.int64))
        start = tl.load(tiles + 2 * i.to(tl.int64) + 1) * 64
        s = tl.where(start % ROWS == 0, s, -1)
    return s, start


@triton.jit
def rows_of(x, skip, token, head_stride, channel, s, first, head, UNIT: tl.constexpr):
    """(address of a head's first row, from row to row, from channel to channel). Strides count UNIT elements."""
    return x + (s.to(tl.int64) * skip + first * token + head.to(tl.int64) * head_stride) * UNIT, token, channel


@triton.jit
def load(x, start, length, ROWS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr):
    """Rows start..start+ROWS-1 as a tile; 0 from row `length` (None: all are there) and from channel D on."""
    lane = tl.arange(0, ROWS)
    tile = ()
    for i in tl.static_range(len(PARTS)):
        c = i * PARTS[0] + tl.arange(0, PARTS[i])
        there = (c < D)[None, :]
        if length is not None:
            there = there & (start + lane < length)[:, None]
        if UNIT == 1:
            at = x[0] + (start + lane).to(tl.int64)[:, None] * x[1] + c.to(tl.int64)[None, :] * x[2]
        else:  # 16 bytes a thread: the compiler sees that rows start at multiples of UNIT
            at = x[0] + x[1].to(tl.int64) * UNIT * start + (lane[:, None] * (x[1] * UNIT) + c[None, :])
        tile = tile + (tl.load(at, mask=there, other=0.0),)
    return tile


@triton.jit
def store(x, row, start, length, tile, factor, PARTS: tl.constexpr, D: tl.constexpr):
    """tile * factor to rows start.. of x, 8 * row elements apart."""
    lane = tl.arange(0, tile[0].shape[0])
    for i in tl.static_range(len(PARTS)):
        c = i * PARTS[0] + tl.arange(0, PARTS[i])
        at = x + row.to(tl.int64) * 8 * start + (lane[:, None] * (row * 8) + c[None, :])
        mask = (start + lane < length)[:, None] & (c < D)[None, :]
        tl.store(at, (tile[i].to(tl.float32) * factor).to(x.dtype.element_ty), mask=mask)


@triton.jit
def zeros(ROWS: tl.constexpr, PARTS: tl.constexpr):
    tile = ()
    for i in tl.static_range(len(PARTS)):
        tile = tile + (tl.full([ROWS, PARTS[i]], 0.0, tl.float32),)
    return tile


@triton.jit
def _add_apart(total, product):
    """total + product, which was summed from zero. Of a plain sum the compiler makes one long chain from `total` on."""
    return tl.fma(product, 1.0, total)


@triton.jit
def products(a, b):
    """a b^T, summed over the channels of all parts. In fp32 each apart: long chains lose more."""
    scores = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    for i in tl.static_range(1, len(a)):
        if a[i].dtype == tl.float32:
            scores = _add_apart(scores, tl.dot(a[i], tl.trans(b[i]), input_precision="ieee"))
        else:
            scores = tl.dot(a[i], tl.trans(b[i]), scores)
    return scores


@triton.jit
def add_products(total, weights, b):
    """total + weights b, part by part; weights in b's type. In fp32 what is added is summed apart."""
    tile = ()
    for i in tl.static_range(len(b)):
        if b[i].dtype == tl.float32:
            tile = tile + (_add_apart(total[i], tl.dot(weights, b[i], input_precision="ieee")),)
        else:
            tile = tile + (tl.dot(weights.to(b[i].dtype), b[i], total[i]),)
    return tile


@triton.jit
def times(tile, factor):
    """Each row times its own factor."""
    scaled = ()
    for i in tl.static_range(len(tile)):
        scaled = scaled + (tile[i] * factor[:, None],)
    return scaled


@triton.jit
def row_sums(a, b):
    """sum over channels of a * b, of each row."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return total


@triton.jit
def _partner(x, c, TURNING: tl.constexpr, HALF: tl.constexpr):
    """x[partner(i)]: the neighbour i ^ 1, or half of the TURNING channels further."""
    if HALF:
        there = tl.where(c < TURNING, (c + TURNING // 2) % TURNING, c)
        partner = tl.gather(x, tl.broadcast_to(there[None, :], x.shape), 1)
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
        partner = tl.reshape(tl.join(odd, even), x.shape)
    return partner


@triton.jit
def turn(
    tile, turns, start, length, BACK: tl.constexpr, PARTS: tl.constexpr, TURNING: tl.constexpr, HALF: tl.constexpr
):
    """y[i] = x[i] cos[i] + x[partner] sin[i] in fp32, in the tile's type; BACK: its transpose."""
    turned = tile
    if turns is not None:
        row = start + tl.arange(0, tile[0].shape[0])
        turned = ()
        for i in tl.static_range(len(PARTS)):
            c = i * PARTS[0] + tl.arange(0, PARTS[i])
            at = turns + row.to(tl.int64)[:, None] * (2 * TURNING) + c[None, :]
            mask = (row < length)[:, None] & (c < TURNING)[None, :]
            cos = tl.load(at, mask=mask, other=1.0)
            sin = tl.load(at + TURNING, mask=mask, other=0.0)
            x = tile[i].to(tl.float32)
            if BACK:
                y = tl.fma(x, cos, _partner(x * sin, c, TURNING, HALF))
            else:
                y = tl.fma(x, cos, _partner(x, c, TURNING, HALF) * sin)
            turned = turned + (y.to(tile[i].dtype),)
    return turned


@triton.jit
def load_blocks(
    x, turns, length, CLASSES: tl.constexpr, CLASS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
    UNIT: tl.constexpr, TURNING: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """All rows of a sequence, turned, as tiles of CLASSES[CLASS] rows."""
    blocks = ()
    for i in tl.static_range(len(CLASSES[CLASS])):
        start = i * CLASSES[CLASS][0]
        block = load(x, start, length, CLASSES[CLASS][i], PARTS, D, UNIT)
        blocks = blocks + (turn(block, turns, start, length, False, PARTS, TURNING, HALF),)
    return blocks


@triton.jit
def keys_seen(row, queries, keys, frame_size, ranges, FRAMES: tl.constexpr):
    """The keys begin..end-1 that each row sees. Rows behind the last query see none."""
    begin = tl.zeros_like(row)
    end = begin + keys
    if FRAMES:
        place = keys - queries + row
        end = tl.where(place < 0, 0, tl.minimum((place // frame_size + 1) * frame_size, keys))
    if ranges is not None:
        begin = tl.maximum(begin, tl.load(ranges + 2 * row.to(tl.int64), mask=row < queries, other=0))
        end = tl.minimum(end, tl.load(ranges + 2 * row.to(tl.int64) + 1, mask=row < queries, other=0))
    return begin, tl.where(row < queries, end, 0)


@triton.jit
def where_seen(x, key, begin, end, ranges, hidden: tl.constexpr):
    """x where a row sees a key; key, begin and end broadcast to x."""
    seen = key < end
    if ranges is not None:  # without, all keys are seen from the first on
        seen &= key >= begin
    return tl.where(seen, x, hidden)


@triton.jit
def hull(begin, end, row, queries, keys):
    """Of a tile's rows: the keys first..last-1 that some row sees, and from..to-1 that all rows see."""
    some = end > begin
    first = tl.min(tl.where(some, begin, keys))
    last = tl.max(tl.where(some, end, 0))
    return first, last, tl.max(begin), tl.min(tl.where(row < queries, end, keys))


@triton.jit
def whole_blocks(inner, outer, SIZE: tl.constexpr):
    """Where the blocks of SIZE begin and end that lie in inner..outer-1."""
    begin = tl.cdiv(inner, SIZE) * SIZE
    return begin, tl.maximum(outer // SIZE * SIZE, begin)


@triton.jit
def around(at, begin, end):
    """The place that `at` stands for where begin..end-1 are left out."""
    return tl.where(at < begin, at, at + end - begin)


@triton.jit
def beginning(x, skip, first, s, WIDTH: tl.constexpr):
    """Where the rows of sequence s begin in x, of WIDTH elements a token."""
    return x + s.to(tl.int64) * skip + first * WIDTH


@triton.jit
def clear(x, first, last, part, VALUE: tl.constexpr):
    """VALUE in x[first:last], as one of TAILS programs."""
    for start in range(first + part * 1024, last, TAILS * 1024):
        i = start + tl.arange(0, 1024)
        tl.store(x + i, tl.full([1024], VALUE, x.dtype.element_ty), mask=i < last)


@triton.jit
def clear_rows(x, cu_seqlens, sequences, tokens, width, part):
    """0 in the rows of x, of `width` elements, that lie behind the last sequence."""
    used = tl.load(cu_seqlens + sequences).to(tl.int64)
    clear(x, used * width, tokens.to(tl.int64) * width, part, 0.0)
