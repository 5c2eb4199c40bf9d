"""What the Triton kernels of `embed_patches` share: where patches lie, and tiles of their pixels.

The layer's shape is compiled in: C channels and patches of PT frames of P x P pixels, K = C * PT * P * P in all, in the
order of the convolution's kernel. What changes with the masks and the images is not. ALIGN pixels lie side by side in
every line of a patch, beginning at multiples of ALIGN: said where offsets are made, since the compiler asks there.
"""

import triton
import triton.language as tl

from jepa_kernels._core.triton_rows import LENGTHS, token_of

# Arguments that kernels aren't compiled for.
NUMBERS = [*LENGTHS, "grid_h", "grid_w"]


@triton.jit
def patch_of(id, grid_h, grid_w, frame, line, column, PT: tl.constexpr, P: tl.constexpr):
    """Offset within an image of the first pixel of patch `id`."""
    plane = grid_h * grid_w
    return id // plane * (PT * frame) + id % plane // grid_w * (P * line) + id % grid_w * (P * column)


@triton.jit
def pixel_of(k, channel, frame, line, column, PT: tl.constexpr, P: tl.constexpr, ALIGN: tl.constexpr):
    """Offset within a patch of its element k."""
    c = (k // (PT * P * P)).to(tl.int64)
    t = (k // (P * P) % PT).to(tl.int64)
    offset = c * channel + t * frame + (k // P % P).to(tl.int64) * line + (k % P).to(tl.int64) * column
    return tl.max_contiguous(tl.multiple_of(offset, ALIGN), ALIGN)


@triton.jit
def place_of(
    row, ids, cu_seqlens, rows, runs, run_length, batch, count, grid_h, grid_w, steps,
    image, frame, line, column, PT: tl.constexpr, P: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """(offset of the first pixel, id, inside) of the patches that rows stand for."""
    run, id, inside = token_of(row, ids, cu_seqlens, rows, runs, run_length, steps, count)
    first = (run % batch).to(tl.int64) * image + patch_of(id, grid_h, grid_w, frame, line, column, PT, P)
    return tl.multiple_of(first, ALIGN), id, inside


@triton.jit
def of_channel(values, k, SIZE: tl.constexpr):
    """values[c] for elements k of channel c = k // SIZE."""
    x = tl.zeros(k.shape, tl.float32) + values[0]
    for c in tl.static_range(1, len(values)):
        x = tl.where(k // SIZE == c, values[c], x)
    return x


@triton.jit
def patches(pixels, first, inside, k, offset, scale, shift, dtype, K: tl.constexpr, SIZE: tl.constexpr):
    """[rows, k]: elements k of patches, normalised, in `dtype`. Rows not `inside` read nothing."""
    x = tl.load(pixels + first[:, None] + offset[None, :], mask=inside[:, None] & (k < K)[None, :], other=0)
    if scale is not None:
        x = tl.fma(x.to(tl.float32), of_channel(scale, k, SIZE)[None, :], of_channel(shift, k, SIZE)[None, :])
    return x.to(dtype)
