"""Device functions of `sigreg`: directions, tiles of products, turns by an angle."""

import triton
import triton.language as tl


@triton.jit
def _pair(first, second):
    """Two standard normal numbers from two words, by Box and Muller's transform, in odd multiples of 2^-17."""
    u = ((first >> 8) + 1).to(tl.int32).to(tl.float32)  # in [1, 2^24]
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    m = (bits - exponent * 8388608).to(tl.float32, bitcast=True)  # in [sqrt(1/2), sqrt(2))
    t = tl.div_rn(m - 1.0, m + 1.0)
    q = t * t
    log_m = (((q * (2 / 9) + 2 / 7) * q + 2 / 5) * q + 2 / 3) * q * t + 2.0 * t
    radius = tl.sqrt_rn((24 - exponent).to(tl.float32) * 1.3862943611198906 - 2.0 * log_m)
    angle = ((second >> 8).to(tl.int32).to(tl.float32) + 0.5) * 4.681337853654911e-08  # pi / 4 * 2^-24
    s = angle * angle
    sine = ((s * (-1 / 5040) + 1 / 120) * s + -1 / 6) * s * angle + angle
    cosine = (((s * (1 / 40320) + -1 / 720) * s + 1 / 24) * s + -1 / 2) * s + 1.0
    swapped = (second & 1) != 0
    x = tl.where(swapped, sine, cosine)  # one of eight octants
    y = tl.where(swapped, cosine, sine)
    x = tl.where((second & 2) != 0, -x, x) * radius
    y = tl.where((second & 4) != 0, -y, y) * radius
    return 2 * tl.floor(x * 65536.0).to(tl.int32) + 1, 2 * tl.floor(y * 65536.0).to(tl.int32) + 1


@triton.jit
def normals(first, slice, step, key, BATCH: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers [slices, 4 BLOCK] from element `first` on: those of the reference, bit for bit."""
    block = (first // 4 + tl.arange(0, BLOCK)[None, :] + slice * 0).to(tl.uint32)
    zero = block * 0
    low = zero + step.to(tl.uint32)
    a, b, c, d = tl.philox(key, block, zero + slice.to(tl.uint32), low, zero + (step >> 32).to(tl.uint32))
    a, b = _pair(a, b)
    c, d = _pair(c, d)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BATCH, 4 * BLOCK])


@triton.jit
def halves(x):
    """x, below 65504, as a sum of two numbers of 11 bits, within 2^-25 or 24 bits of it."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def product(left, left_low, right, right_low, there):
    """Of halves, as exact as fp32: fp32 holds a product of two halves. From 0: tensor cores cut off what they add."""
    left_high, right_high = tl.load(left), tl.load(right, mask=there)
    sums = tl.dot(tl.load(left + left_low), right_high)
    sums = tl.dot(left_high, tl.load(right + right_low, mask=there), sums)
    return tl.dot(left_high, right_high, sums)


@triton.jit
def project(
    z, scales, directions, tile, slices, rows, width,
    SLICES: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """[slices of the tile, rows of the tile], from halves."""
    first, e = tl.program_id(0) * SLICES, tl.arange(0, FEATURES)
    directions += first.to(tl.int64) * width
    z += tile.to(tl.int64) * ROWS * width
    a = tl.arange(0, SLICES)[:, None] * width + e[None, :]
    x = tl.arange(0, ROWS)[None, :] * width + e[:, None]
    y = tl.zeros([SLICES, ROWS], tl.float32)
    for start in range(0, width, FEATURES):
        y += product(
            directions + start + a, slices.to(tl.int64) * width, z + start + x, rows.to(tl.int64) * width, None
        )
    return y * tl.load(scales + tile * ROWS + tl.arange(0, ROWS))[None, :]


@triton.jit
def columns(y, ROWS: tl.constexpr):
    """The left and the right half of a tile: what is computed from a whole one does not fit the registers."""
    return tl.split(tl.permute(tl.reshape(y, [y.shape[0], 2, ROWS // 2]), (0, 2, 1)))


@triton.jit
def turn_by(y, delta):
    """1 - cos and sin of y delta, within 1e-7 up to 1e4, near 0 relatively; NaN and infinities give NaN."""
    angle = y * delta
    shifted = tl.fma(angle, 0.6366197466850281, 12582912.0)  # leaves whole numbers of quarters in the last bits
    quarters = shifted - 12582912.0
    r = tl.fma(quarters, -1.5707963705062866, angle)  # pi / 2 in three parts
    r = tl.fma(quarters, 4.371138828673793e-08, r)
    r = tl.fma(quarters, 1.7151245100058819e-15, r) + tl.fma(y, delta, -angle)
    r = tl.where(tl.abs(r) > 1.0, 1.0, r)  # beyond 2^22 quarters no digit is left
    s = r * r
    sine = ((s * -1.951527e-4 + 8.33216e-3) * s + -1.6666655e-1) * s * r + r
    versine = ((s * -2.4476185e-5 + 1.3887723e-3) * s + -4.1666653e-2) * s * s + 0.5 * s
    bits = shifted.to(tl.int32, bitcast=True)
    odd = (bits & 1) != 0
    opposite = (bits & 2) != 0
    v = tl.where(odd, 1.0 + sine, versine)
    w = tl.where(odd, 1.0 - versine, sine)
    return tl.where(opposite, 2.0 - v, v), tl.where(opposite, -w, w)


@triton.jit
def turn(versine, sine, x, y):
    """(x, y) turned, rounded at the scale of the change."""
    real = tl.fma(-sine, y, tl.fma(-versine, x, x))
    return real, tl.fma(sine, x, tl.fma(-versine, y, y))


@triton.jit
def knot_weight(k, knots, delta):
    """Of the trapezoid of an even function, folded to [0, t_max], under the normal's characteristic function."""
    t = k.to(tl.float64) * delta
    return tl.where(k == knots - 1, 1.0, 2.0) * tl.exp(-0.5 * t * t) * delta
