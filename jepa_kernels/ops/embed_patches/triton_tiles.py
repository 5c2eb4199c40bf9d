"""What the Triton kernels of `embed_patches` share: where patches and their pixels lie, and how products add up.

The layer's shape is compiled in: C channels and patches of PT frames of P x P pixels, K = C * PT * P * P in all, in the
order of the convolution's kernel. What changes with the masks and the images is not. ALIGN pixels lie side by side in
every line of a patch, beginning at multiples of ALIGN: said where offsets are made, since the compiler asks there.
"""

import triton
import triton.language as tl

from jepa_kernels._core.triton_rows import LENGTHS

# Arguments that kernels aren't compiled for.
NUMBERS = [*LENGTHS, "grid_h", "grid_w"]


@triton.jit
def patch_of(id, grid_h, grid_w, frame, line, column, PT: tl.constexpr, P: tl.constexpr):
    """Offset within an image of the first pixel of patch `id`."""
    plane = grid_h * grid_w
    return id // plane * frame * PT + id % plane // grid_w * line * P + id % grid_w * column * P


@triton.jit
def pixel_of(k, channel, frame, line, column, PT: tl.constexpr, P: tl.constexpr, ALIGN: tl.constexpr):
    """Offset within a patch of its element k."""
    c = (k // (PT * P * P)).to(tl.int64)
    t = (k // (P * P) % PT).to(tl.int64)
    offset = c * channel + t * frame + (k // P % P).to(tl.int64) * line + (k % P).to(tl.int64) * column
    return tl.max_contiguous(tl.multiple_of(offset, ALIGN), ALIGN)


@triton.jit
def of_channel(values, k, SIZE: tl.constexpr):
    """values[c] for elements k of channel c = k // SIZE."""
    x = tl.zeros(k.shape, tl.float32) + values[0]
    for c in tl.static_range(1, len(values)):
        x = tl.where(k // SIZE == c, values[c], x)
    return x


@triton.jit
def add_product(total, a, b):
    """total + a b. In fp32, where no tensor core helps, the products of a step have a sum of their own: a chain of
    fused multiply-adds as long as the summed dimension would lose bits. Subtracted, since the compiler makes one chain
    of what is added."""
    if a.dtype == tl.float32:
        return total - tl.dot(-a, b, input_precision="ieee")
    else:
        return tl.dot(a, b, total)
