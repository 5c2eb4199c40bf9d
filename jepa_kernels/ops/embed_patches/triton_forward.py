"""Forward Triton kernels of `embed_patches`: a matrix product whose left tiles are gathered from the images."""

import triton
import triton.language as tl

from jepa_kernels._core.triton_rows import LISTS
from jepa_kernels.ops.embed_patches.triton_tiles import NUMBERS, patches, pixel_of, place_of


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=LISTS)
def _embed_patches_forward_kernel(
    pixels, weight, bias, pos_embed, scale, shift, out,
    ids, cu_seqlens, rows, runs, run_length, batch, count, grid_h, grid_w, steps, embed_dim,
    image, channel, frame, line, column, bias_channel, pos_token, pos_channel,
    C: tl.constexpr, PT: tl.constexpr, P: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = C * PT * P * P
    tiles = tl.cdiv(embed_dim, CHANNELS)  # those of one set of rows run side by side: its pixels come from the L2 cache
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    e = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    first, id, inside = place_of(
        row, ids, cu_seqlens, rows, runs, run_length, batch, count, grid_h, grid_w, steps,
        image, frame, line, column, PT, P, ALIGN,
    )  # fmt: skip
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(0, K, STEP):
        k = start + tl.arange(0, STEP)
        offset = pixel_of(k, channel, frame, line, column, PT, P, ALIGN)
        x = patches(pixels, first, inside, k, offset, scale, shift, weight.dtype.element_ty, K, PT * P * P)
        at = e.to(tl.int64)[None, :] * K + k[:, None]
        w = tl.load(weight + at, mask=(e < embed_dim)[None, :] & (k < K)[:, None], other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + e.to(tl.int64) * bias_channel, mask=e < embed_dim, other=0.0).to(tl.float32)[None, :]
    there = inside[:, None] & (e < embed_dim)[None, :]
    if pos_embed is not None:
        at = id[:, None] * pos_token + e.to(tl.int64)[None, :] * pos_channel
        total += tl.load(pos_embed + at, mask=there, other=0.0).to(tl.float32)
    total = tl.where(inside[:, None], total, 0.0).to(out.dtype.element_ty)
    at = row.to(tl.int64)[:, None] * embed_dim + e[None, :]
    tl.store(out + at, total, mask=(row < rows)[:, None] & (e < embed_dim)[None, :])


@triton.jit
def _embed_patches_fold_kernel(
    weight, out, numel, embed, channel, frame, line, column,
    C: tl.constexpr, PT: tl.constexpr, P: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[E, C, PT, P, P] of any strides to [E, K]; COPIES equal frames (then PT is 1) see the sum of theirs."""
    K: tl.constexpr = C * PT * P * P
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    weight += i // K * embed + pixel_of(i % K, channel, frame, line, column, PT, P, 1)
    total = tl.zeros([BLOCK], tl.float32)
    for t in tl.static_range(COPIES):
        total += tl.load(weight + t * frame, mask=i < numel, other=0.0).to(tl.float32)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < numel)
