"""Triton kernels of `sigreg`, in the order of their launches: directions and halves, moments, statistic, gradient."""

import triton
import triton.language as tl

from jepa_kernels.ops.sigreg.triton_tiles import (
    columns,
    halves,
    knot_weight,
    normals,
    product,
    project,
    turn,
    turn_by,
)

UNIT = tl.constexpr(16384.0)  # halves of directions are of numbers up to this
LIFT = tl.constexpr(4096.0)  # halves of derivatives, which are at most 9
LENGTHS = ["rows", "blocks", "views", "padded", "knots", "slices"]


@triton.jit
def _put(out, s, e, a, slices, width, low, stride, HALVES: tl.constexpr):
    there = (s < slices) & (e < width)
    if HALVES:
        high, rest = halves(tl.where(there, a * UNIT, 0.0))
        tl.store(out + e, high, mask=e < stride)
        tl.store(out + low + e, rest, mask=e < stride)
    else:
        tl.store(out + e, a, mask=there)


@triton.jit(do_not_specialize=["key", "slices", "padded"])
def _sigreg_directions_kernel(
    out, step, key, slices, padded, width, stride,
    HALVES: tl.constexpr, BATCH: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0) * BATCH + tl.arange(0, BATCH)[:, None]
    at = tl.load(step)
    e = tl.arange(0, 4 * BLOCK)[None, :]
    out += s.to(tl.int64) * stride
    low = padded.to(tl.int64) * stride
    squares = tl.zeros([BATCH, 4 * BLOCK], tl.int64)
    grid = tl.zeros([BATCH, 4 * BLOCK], tl.int32)
    for start in range(0, width, 4 * BLOCK):
        grid = normals(start, s, at, key, BATCH, BLOCK)
        wide = tl.where(start + e < width, grid, 0).to(tl.int64)
        squares += wide * wide
    scale = (1.0 / tl.sqrt(tl.sum(squares, 1).to(tl.float64))).to(tl.float32)[:, None]
    if ONE_BLOCK:
        _put(out, s, e, grid.to(tl.float32) * scale, slices, width, low, stride, HALVES)
    else:
        for start in range(0, width, 4 * BLOCK):
            grid = normals(start, s, at, key, BATCH, BLOCK)
            _put(out, s, start + e, grid.to(tl.float32) * scale, slices, width, low, stride, HALVES)


@triton.jit(do_not_specialize=["rows", "padded"])
def _sigreg_halves_kernel(z, out, scales, rows, padded, width, stride, z_view, z_row, z_feature, BLOCK: tl.constexpr):
    """Of a row, scaled to a largest number in [2^14, 2^15); its scale undoes that, and the directions'."""
    row = tl.program_id(0).to(tl.int64)
    view, n = row // padded, row % padded
    z += view * z_view + n * z_row
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        e = start + tl.arange(0, BLOCK)
        x = tl.load(z + e.to(tl.int64) * z_feature, mask=(n < rows) & (e < width), other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    power = tl.max(largest).to(tl.int32, bitcast=True) & 0x7F800000
    power = tl.maximum(power.to(tl.float32, bitcast=True), 1e-28)  # powers of two, but for this one
    low = tl.num_programs(0).to(tl.int64) * stride
    for start in range(0, stride, BLOCK):
        e = start + tl.arange(0, BLOCK)
        x = tl.load(z + e.to(tl.int64) * z_feature, mask=(n < rows) & (e < width), other=0.0).to(tl.float32)
        high, rest = halves(x * (16384.0 / power))
        tl.store(out + row * stride + e, high, mask=e < stride)
        tl.store(out + low + row * stride + e, rest, mask=e < stride)
    tl.store(scales + row, power / 16384.0 / UNIT)


@triton.jit
def _tile():
    """Of rows, that a program takes: there may be more than one axis has programs."""
    return tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def _place(slices, knots, LANES: tl.constexpr):
    """(first slice, knot, view) of a program."""
    strips = tl.cdiv(slices, LANES)
    return tl.program_id(0) % strips * LANES, tl.program_id(0) // strips % knots, tl.program_id(0) // strips // knots


@triton.jit
def _sum_turns(y, there, parts, s, slices, knots, delta):
    versine, sine = turn_by(y, delta)
    real = tl.where(there[None, :], 1.0, y * 0.0)  # rows past the last stay at 0 in every turn
    imaginary = y * 0.0
    for k in range(1, knots):
        real, imaginary = turn(versine, sine, real, imaginary)
        tl.store(parts + k * slices, tl.sum(real, 1), mask=s < slices)
        tl.store(parts + (knots + k) * slices, tl.sum(imaginary, 1), mask=s < slices)


@triton.jit(do_not_specialize=LENGTHS)
def _sigreg_moments_kernel(
    z, scales, directions, parts, total, rows, blocks, padded, width, slices, knots, delta,
    SLICES: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    tile = _tile()
    if tile * ROWS >= total:
        return
    s = tl.program_id(0) * SLICES + tl.arange(0, SLICES)
    n = tile % blocks * ROWS + tl.arange(0, ROWS // 2)
    y = project(z, scales, directions, tile, padded, total, width, SLICES, ROWS, FEATURES)
    size = 2 * knots * slices
    parts += tile.to(tl.int64) * 2 * size + s
    left, right = columns(y, ROWS)
    _sum_turns(left, n < rows, parts, s, slices, knots, delta)
    _sum_turns(right, n + ROWS // 2 < rows, parts + size, s, slices, knots, delta)


@triton.jit(do_not_specialize=LENGTHS)
def _sigreg_sum_kernel(parts, moments, rows, blocks, slices, knots, delta, BLOCKS: tl.constexpr, LANES: tl.constexpr):
    first, k, view = _place(slices, knots, LANES)
    s = first + tl.arange(0, LANES)
    view = view.to(tl.int64)
    real = tl.zeros([BLOCKS, LANES], tl.float64)
    imaginary = tl.zeros([BLOCKS, LANES], tl.float64)
    if k > 0:
        for start in range(0, blocks, BLOCKS):
            block = start + tl.arange(0, BLOCKS)
            there = (block < blocks)[:, None] & (s < slices)[None, :]
            at = parts + ((view * blocks + block) * 2 * knots + k)[:, None] * slices + s[None, :]
            real += tl.load(at, mask=there, other=0.0).to(tl.float64)
            imaginary += tl.load(at + knots * slices, mask=there, other=0.0).to(tl.float64)
    t = k.to(tl.float64) * delta
    total = tl.sum(real, 0) + tl.where(k > 0, -tl.exp(-0.5 * t * t), 1.0) * rows
    moments += (view * 2 * knots + k) * slices + s
    tl.store(moments, total.to(tl.float32), mask=s < slices)
    tl.store(moments + knots * slices, tl.sum(imaginary, 0).to(tl.float32), mask=s < slices)


@triton.jit(do_not_specialize=LENGTHS)
def _sigreg_forward_kernel(moments, loss, views, slices, knots, delta, KNOTS: tl.constexpr, LANES: tl.constexpr):
    k = tl.arange(0, KNOTS)
    counts = (k > 0) & (k < knots)
    weight = tl.where(counts, knot_weight(k, knots, delta), 0.0)
    total = tl.zeros([], tl.float64)
    for _ in range(views):
        count = tl.load(moments).to(tl.float64)
        squares = tl.zeros([KNOTS, LANES], tl.float64)
        for start in range(0, slices, LANES):
            s = start + tl.arange(0, LANES)
            there = counts[:, None] & (s < slices)[None, :]
            at = moments + k[:, None] * slices + s[None, :]
            x = tl.load(at, mask=there, other=0.0).to(tl.float64)
            y = tl.load(at + knots * slices, mask=there, other=0.0).to(tl.float64)
            squares += x * x + y * y
        moments += 2 * knots * slices
        total += tl.where(count > 0, tl.sum(tl.sum(squares, 1) * weight) / tl.maximum(count, 1.0), count)
    tl.store(loss, (total / tl.maximum(views * slices, 1)).to(tl.float32))


@triton.jit(do_not_specialize=LENGTHS)
def _sigreg_factors_kernel(moments, factors, slices, knots, delta, LANES: tl.constexpr):
    """What Horner's rule adds at each knot: the sine's moment to the real part, the cosine's to the imaginary one."""
    first, k, view = _place(slices, knots, LANES)
    s = first + tl.arange(0, LANES)
    at = view.to(tl.int64) * 2 * knots * slices + s
    slope = 2.0 * LIFT * knot_weight(k, knots, delta) * (k.to(tl.float64) * delta)
    count = tl.load(moments + at, mask=s < slices, other=1.0).to(tl.float64)
    real = tl.load(moments + at + (knots + k) * slices, mask=s < slices, other=0.0).to(tl.float64)
    imaginary = tl.load(moments + at + k * slices, mask=s < slices, other=0.0).to(tl.float64)
    tl.store(factors + at + k * slices, (slope * real / count).to(tl.float32), mask=s < slices)
    tl.store(factors + at + (knots + k) * slices, (slope * imaginary / count).to(tl.float32), mask=s < slices)


@triton.jit
def _derive(y, factors, dy, low, s, slices, knots, delta):
    versine, sine = turn_by(y, delta)
    real = y * 0.0
    imaginary = y * 0.0
    for i in range(1, knots):
        k = knots - i
        real += tl.load(factors + k * slices, mask=s < slices, other=0.0)[:, None]
        imaginary += tl.load(factors + (knots + k) * slices, mask=s < slices, other=0.0)[:, None]
        real, imaginary = turn(versine, sine, real, imaginary)
    high, rest = halves(real)
    tl.store(dy, high)
    tl.store(dy + low, rest)


@triton.jit(do_not_specialize=LENGTHS)
def _sigreg_derivative_kernel(
    z, scales, directions, factors, dy, total, rows, blocks, padded, width, slices, knots, delta,
    SLICES: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    tile = _tile()
    if tile * ROWS >= total:
        return
    s = tl.program_id(0) * SLICES + tl.arange(0, SLICES)
    total = total.to(tl.int64)
    y = project(z, scales, directions, tile, padded, total, width, SLICES, ROWS, FEATURES)
    factors += (tile // blocks).to(tl.int64) * 2 * knots * slices + s
    dy += s[:, None] * total + tile * ROWS + tl.arange(0, ROWS // 2)[None, :]
    left, right = columns(y, ROWS)
    _derive(left, factors, dy, padded * total, s, slices, knots, delta)
    _derive(right, factors, dy + ROWS // 2, padded * total, s, slices, knots, delta)


@triton.jit(do_not_specialize=[*LENGTHS, "world"])
def _sigreg_backward_kernel(
    dy, directions, grad, dz, rows, blocks, views, padded, width, stride, slices, world,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    total = tl.num_programs(0).to(tl.int64) * ROWS
    s, r = tl.arange(0, SLICES), tl.arange(0, ROWS)
    e = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    left = s[None, :] * total + r[:, None]
    right = s[:, None] * stride + e[None, :]
    there = (e < stride)[None, :]
    dy += tile.to(tl.int64) * ROWS
    sums = tl.zeros([ROWS, FEATURES], tl.float32)
    for _ in range(0, padded, SLICES):
        sums += product(
            dy + left, padded * total, directions + right, padded.to(tl.int64) * stride, there
        )  # fmt: skip
        dy += SLICES * total
        directions += SLICES * stride
    scale = tl.load(grad).to(tl.float64) * world / (views * slices).to(tl.float64) / LIFT / UNIT
    n = tile % blocks * ROWS
    dz += ((tile // blocks).to(tl.int64) * rows + n) * width
    there = (r < rows - n)[:, None] & (e < width)[None, :]
    at = r[:, None] * width + e[None, :]
    tl.store(dz + at, (sums * scale.to(tl.float32)).to(dz.dtype.element_ty), mask=there)
