"""Triton `collapse_stats`: a program sums a chunk of rows for each feature; two kernels add what they found, in fp64.

A program reads its rows twice, the second time from the cache: unit rows need their norms. What fp32 adds stays apart
by lane until fp64 adds the lanes, so that the layout of a tile does not reach the numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jepa_kernels._core.triton import device_of
from jepa_kernels.ops.collapse_stats.rank import effective_rank

ROWS, STEP = 64, 8  # of a program, and at a time
NORM_FEATURES, FEATURES = 64, 256  # of the tiles [ROWS, ..] and [STEP, ..]
CHUNKS, LANES = 16, 64  # of the tile that adds chunks
SUM_BLOCK = 1024
LENGTHS = ["rows", "chunks"]


@triton.jit
def _tile(z, n, e, rows, width, row, column):
    """fp32 [len(n), len(e)], 0 outside z."""
    at = n[:, None].to(tl.int64) * row + e[None, :].to(tl.int64) * column
    return tl.load(z + at, mask=(n < rows)[:, None] & (e < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _inverse_norms(z, n, rows, width, row, column, ROWS: tl.constexpr, FEATURES: tl.constexpr):
    """(inverse norm, square of the unit row as rounded) [ROWS]; a row of zeros has 0 and 0."""
    lanes = tl.zeros([ROWS, FEATURES], tl.float32)
    for start in range(0, width, FEATURES):
        x = _tile(z, n, start + tl.arange(0, FEATURES), rows, width, row, column)
        lanes += x * x
    square = tl.sum(lanes.to(tl.float64), 1)
    inverse = tl.where(square == 0.0, 0.0, 1.0 / tl.sqrt(tl.where(square == 0.0, 1.0, square))).to(tl.float32)
    return inverse, square * inverse.to(tl.float64) * inverse.to(tl.float64)


@triton.jit
def _sums(
    z, inverses, begin, e, rows, width, row, column, ROWS: tl.constexpr, STEP: tl.constexpr, FEATURES: tl.constexpr
):
    """fp64 [FEATURES]: mean less the first row of z, squared deviations from the mean, sum of unit rows."""
    first = tl.load(z + e.to(tl.int64) * column, mask=e < width, other=0.0).to(tl.float32)[None, :]
    count = tl.minimum(rows - begin, ROWS).to(tl.float64)
    n = begin + tl.arange(0, STEP)
    d = tl.where((n < rows)[:, None], _tile(z, n, e, rows, width, row, column) - first, 0.0)
    # Deviations are taken from the mean of some rows: exact for equal rows, and no cancellation for others.
    shift = first + (tl.sum(d.to(tl.float64), 0)[None, :] / tl.minimum(count, STEP)).to(tl.float32)
    sums = tl.zeros([STEP, FEATURES], tl.float32)
    squares = tl.zeros([STEP, FEATURES], tl.float32)
    units = tl.zeros([STEP, FEATURES], tl.float32)
    for i in range(0, ROWS, STEP):
        n = begin + i + tl.arange(0, STEP)
        x = _tile(z, n, e, rows, width, row, column)
        d = tl.where((n < rows)[:, None], x - shift, 0.0)
        sums += d
        squares += d * d
        units += x * tl.load(inverses + n, mask=n < rows, other=0.0)[:, None]
    mean = tl.sum(sums.to(tl.float64), 0) / count
    square = tl.sum(squares.to(tl.float64), 0) - count * mean * mean
    moved = tl.sum(shift.to(tl.float64) - first.to(tl.float64), 0)
    return moved + mean, square, tl.sum(units.to(tl.float64), 0)


@triton.jit(do_not_specialize=LENGTHS)
def _collapse_stats_forward_kernel(
    z, inverses, own, parts, rows, width, row, column,
    ROWS: tl.constexpr, STEP: tl.constexpr, NORM_FEATURES: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """parts [chunks, 3, E]: what `_sums` finds; own [chunks]: squares of unit rows."""
    chunk = tl.program_id(0)
    n = chunk * ROWS + tl.arange(0, ROWS)
    inverse, square = _inverse_norms(z, n, rows, width, row, column, ROWS, NORM_FEATURES)
    tl.store(inverses + n, inverse, mask=n < rows)
    tl.store(own + chunk, tl.sum(square))
    tl.debug_barrier()  # threads read the norms of others
    parts += chunk.to(tl.int64) * 3 * width
    for start in range(0, width, FEATURES):
        e = start + tl.arange(0, FEATURES)
        mean, square_sum, unit = _sums(z, inverses, chunk * ROWS, e, rows, width, row, column, ROWS, STEP, FEATURES)
        tl.store(parts + e, mean.to(tl.float32), mask=e < width)
        tl.store(parts + width + e, square_sum.to(tl.float32), mask=e < width)
        tl.store(parts + 2 * width + e, unit.to(tl.float32), mask=e < width)


@triton.jit(do_not_specialize=LENGTHS)
def _collapse_stats_features_kernel(
    parts, found, rows, chunks, width, ROWS: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr
):
    """found [2, E]: standard deviation of each feature, sum of unit rows."""
    e = tl.program_id(0) * LANES + tl.arange(0, LANES)
    sums = tl.zeros([CHUNKS, LANES], tl.float64)
    squares = tl.zeros([CHUNKS, LANES], tl.float64)
    units = tl.zeros([CHUNKS, LANES], tl.float64)
    for start in range(0, chunks, CHUNKS):
        c = start + tl.arange(0, CHUNKS)
        at = parts + c[:, None].to(tl.int64) * 3 * width + e[None, :]
        there = (c < chunks)[:, None] & (e < width)[None, :]
        count = tl.minimum(rows - c * ROWS, ROWS)[:, None].to(tl.float64)
        mean = tl.load(at, mask=there, other=0.0).to(tl.float64)
        sums += count * mean
        squares += tl.load(at + width, mask=there, other=0.0).to(tl.float64) + count * mean * mean
        units += tl.load(at + 2 * width, mask=there, other=0.0).to(tl.float64)
    mean = tl.sum(sums, 0) / rows
    variance = tl.sum(squares, 0) / rows - mean * mean
    deviation = tl.sqrt(tl.where(variance < 0.0, 0.0, variance))  # NaN stays
    tl.store(found + e, deviation, mask=e < width)
    tl.store(found + width + e, tl.sum(units, 0), mask=e < width)


@triton.jit(do_not_specialize=LENGTHS)
def _collapse_stats_sum_kernel(found, own, out, rows, chunks, width, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    spread = tl.zeros([BLOCK], tl.float64)
    length = tl.zeros([BLOCK], tl.float64)
    least = tl.full([BLOCK], float("inf"), tl.float64)
    for start in range(0, width, BLOCK):
        e = start + lanes
        deviation = tl.load(found + e, mask=e < width, other=0.0)
        spread += deviation
        least = tl.minimum(least, tl.where(e < width, deviation, float("inf")))
        unit = tl.load(found + width + e, mask=e < width, other=0.0)
        length += unit * unit
    alike = tl.zeros([BLOCK], tl.float64)
    for start in range(0, chunks, BLOCK):
        alike += tl.load(own + start + lanes, mask=start + lanes < chunks, other=0.0)
    total = tl.sum(spread)
    tl.store(out, (total / width).to(tl.float32))
    tl.store(out + 1, tl.where(total == total, tl.min(least), total).to(tl.float32))
    pairs = rows.to(tl.float64) * (rows - 1)
    cosine = (tl.sum(length) - tl.sum(alike)) / tl.maximum(pairs, 1.0)
    tl.store(out + 3, tl.where(pairs > 0.0, cosine, 0.0 * cosine).to(tl.float32))


def forward(z: Tensor) -> Tensor:
    """(std, min_std, rank, cosine) of z [N, E]."""
    rows, width = z.shape
    if z.numel() == 0:
        return z.new_zeros(4, dtype=torch.float32)
    chunks = triton.cdiv(rows, ROWS)
    out, inverses = z.new_empty(4, dtype=torch.float32), z.new_empty(rows, dtype=torch.float32)
    parts = z.new_empty((chunks, 3, width), dtype=torch.float32)
    own, found = z.new_empty(chunks, dtype=torch.float64), z.new_empty((2, width), dtype=torch.float64)
    with device_of(z):
        _collapse_stats_forward_kernel[(chunks,)](
            z, inverses, own, parts, rows, width, *z.stride(), ROWS=ROWS, STEP=STEP, NORM_FEATURES=NORM_FEATURES,
            FEATURES=FEATURES, num_warps=8,
        )  # fmt: skip
        _collapse_stats_features_kernel[(triton.cdiv(width, LANES),)](
            parts, found, rows, chunks, width, ROWS=ROWS, CHUNKS=CHUNKS, LANES=LANES, num_warps=8
        )
        _collapse_stats_sum_kernel[(1,)](found, own, out, rows, chunks, width, BLOCK=SUM_BLOCK, num_warps=8)
    out[2] = effective_rank(z)
    return out
