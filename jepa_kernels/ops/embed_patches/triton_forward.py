"""Forward Triton kernels of `embed_patches`: kept patches are copied side by side, then a plain matrix product."""

import triton
import triton.language as tl

from jepa_kernels._core.triton_rows import LISTS, end_of, id_of, token_of
from jepa_kernels.ops.embed_patches.triton_tiles import NUMBERS, add_product, of_channel, patch_of, pixel_of


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=LISTS)
def _embed_patches_copy_kernel(
    pixels, scale, shift, patches, ids, cu_seqlens, rows, runs, run_length, batch, count, grid_h, grid_w, steps,
    image, channel, frame, line, column,
    C: tl.constexpr, PT: tl.constexpr, P: tl.constexpr, ALIGN: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """patches [.., DEPTH]: the normalised pixels of each row's patch; 0 for rows without one and past pixel K."""
    K: tl.constexpr = C * PT * P * P
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    run, id, inside = token_of(row, ids, cu_seqlens, rows, runs, run_length, steps, count)
    first = (run % batch).to(tl.int64) * image + patch_of(id, grid_h, grid_w, frame, line, column, PT, P)
    at = tl.multiple_of(first, ALIGN)[:, None] + pixel_of(k, channel, frame, line, column, PT, P, ALIGN)[None, :]
    there = inside[:, None] & (k < K)[None, :]
    x = tl.load(pixels + at, mask=there, other=0)
    if scale is not None:
        SIZE: tl.constexpr = PT * P * P
        x = tl.fma(x.to(tl.float32), of_channel(scale, k, SIZE)[None, :], of_channel(shift, k, SIZE)[None, :])
        x = tl.where(there, x, 0.0)
    at = row.to(tl.int64)[:, None] * DEPTH + k[None, :]
    tl.store(patches + at, x.to(patches.dtype.element_ty), mask=(k < DEPTH)[None, :])


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=LISTS)
def _embed_patches_forward_kernel(
    patches, weight, bias, pos_embed, out, ids, cu_seqlens, rows, runs, count, embed_dim,
    bias_channel, pos_token, pos_channel,
    K: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(embed_dim, CHANNELS)  # those of one set of rows run side by side: it comes from the L2 cache
    begin = tl.program_id(0) // tiles * ROWS
    row = begin + tl.arange(0, ROWS)
    e = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    k = tl.arange(0, STEP)
    x_at = patches + begin.to(tl.int64) * DEPTH + tl.arange(0, ROWS)[:, None] * DEPTH + k[None, :]
    w_at = weight + e.to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(0, DEPTH, STEP):
        x = tl.load(x_at + start)
        w = tl.load(w_at + start, mask=(e < embed_dim)[None, :] & (start + k < K)[:, None], other=0.0)
        total = add_product(total, x, w)
    id, inside = id_of(row, end_of(cu_seqlens, rows, runs), ids, count)
    there = inside[:, None] & (e < embed_dim)[None, :]
    if bias is not None:
        total += tl.load(bias + e.to(tl.int64) * bias_channel, mask=e < embed_dim, other=0.0).to(tl.float32)[None, :]
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
