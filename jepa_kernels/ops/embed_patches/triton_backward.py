"""Backward Triton kernels of `embed_patches`. Every sum has a fixed order: no atomics."""

import triton
import triton.language as tl

from jepa_kernels._core.triton_rows import LISTS, end_of, id_of, offset_of, row_of
from jepa_kernels.ops.embed_patches.triton_tiles import NUMBERS, add_product, of_channel, patch_of, pixel_of


@triton.jit
def gradients(grad, length, grad_skip, grad_row, grad_channel, embed_dim, row, there, e):
    """[rows, channels] of the gradient; 0 for rows that are not `there`."""
    at = offset_of(row, length, grad_skip, grad_row)[:, None] + e.to(tl.int64)[None, :] * grad_channel
    return tl.load(grad + at, mask=there[:, None] & (e < embed_dim)[None, :], other=0.0)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=LISTS)
def _embed_patches_backward_bias_kernel(
    grad, length, grad_skip, grad_row, grad_channel, embed_dim, ids, cu_seqlens, rows, runs, count, parts,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A part of dbias: the sum over ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    _, inside = id_of(row, end_of(cu_seqlens, rows, runs), ids, count)
    g = gradients(grad, length, grad_skip, grad_row, grad_channel, embed_dim, row, inside, e)
    at = tl.program_id(0).to(tl.int64) * embed_dim + e
    tl.store(parts + at, tl.sum(g.to(tl.float32), 0), mask=e < embed_dim)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=LISTS)
def _embed_patches_backward_weight_kernel(
    grad, length, grad_skip, grad_row, grad_channel, embed_dim,
    patches, ids, cu_seqlens, rows, runs, count, rows_of_part, parts,
    K: tl.constexpr, DEPTH: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A part of dweight [E, K]: grad^T x patches over `rows_of_part` rows."""
    e = tl.program_id(0) // tl.cdiv(K, PIXELS) * CHANNELS + tl.arange(0, CHANNELS)
    k = tl.program_id(0) % tl.cdiv(K, PIXELS) * PIXELS + tl.arange(0, PIXELS)
    begin = tl.program_id(1) * rows_of_part
    end = tl.minimum(begin + rows_of_part, end_of(cu_seqlens, rows, runs))
    total = tl.zeros([CHANNELS, PIXELS], tl.float32)
    for start in range(begin, end, STEP):
        row = start + tl.arange(0, STEP)
        _, inside = id_of(row, end, ids, count)
        g = gradients(grad, length, grad_skip, grad_row, grad_channel, embed_dim, row, inside, e)
        x = tl.load(patches + row.to(tl.int64)[:, None] * DEPTH + k[None, :], mask=(k < DEPTH)[None, :], other=0.0)
        total = add_product(total, tl.trans(g), x)
    at = (tl.program_id(1).to(tl.int64) * embed_dim + e)[:, None] * K + k[None, :]
    tl.store(parts + at, total, mask=(e < embed_dim)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=NUMBERS)
def _embed_patches_backward_sum_kernel(
    parts, out, count, numel, COPIES: tl.constexpr, INNER: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds `count` parts of `numel` elements; each INNER elements are written COPIES times, once for each frame."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        there = (part < count)[:, None] & (i < numel)[None, :]
        total += tl.sum(tl.load(parts + part.to(tl.int64)[:, None] * numel + i[None, :], mask=there, other=0.0), 0)
    for copy in tl.static_range(COPIES):
        at = i if COPIES == 1 else (i // INNER * COPIES + copy) * INNER + i % INNER
        tl.store(out + at, total.to(out.dtype.element_ty), mask=i < numel)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=LISTS)
def _embed_patches_backward_pos_kernel(
    grad, length, grad_skip, grad_row, grad_channel, embed_dim,
    ids, cu_seqlens, rows, runs, run_length, steps, dpos, RUNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dpos_embed of one patch: the sum over the runs that keep it."""
    id = tl.program_id(0)
    e = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([CHANNELS], tl.float32)
    for start in range(0, runs, RUNS):
        run = start + tl.arange(0, RUNS)
        row, kept = row_of(run, id, run < runs, ids, cu_seqlens, rows, run_length, steps)
        g = gradients(grad, length, grad_skip, grad_row, grad_channel, embed_dim, row, kept, e)
        total += tl.sum(g.to(tl.float32), 0)
    tl.store(dpos + id.to(tl.int64) * embed_dim + e, total.to(dpos.dtype.element_ty), mask=e < embed_dim)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=LISTS)
def _embed_patches_backward_pixels_kernel(
    grad, length, grad_skip, grad_row, grad_channel, embed_dim,
    ids, cu_seqlens, rows, runs, run_length, batch, count, grid_h, grid_w, steps,
    weight, scale, image, channel, frame, line, dpixels,
    C: tl.constexpr, PT: tl.constexpr, P: tl.constexpr, ALIGN: tl.constexpr,
    TOKENS: tl.constexpr, PIXELS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dpixels of TOKENS patches: W^T grad, summed over the masks that keep them; 0 where none does."""
    K: tl.constexpr = C * PT * P * P
    token = tl.program_id(0) // tl.cdiv(K, PIXELS) * TOKENS + tl.arange(0, TOKENS)
    k = tl.program_id(0) % tl.cdiv(K, PIXELS) * PIXELS + tl.arange(0, PIXELS)
    total = tl.zeros([TOKENS, PIXELS], tl.float32)
    for mask in range(runs // batch):
        run = mask * batch + token // count
        row, kept = row_of(run, token % count, token < batch * count, ids, cu_seqlens, rows, run_length, steps)
        for start in range(0, embed_dim, STEP):
            e = start + tl.arange(0, STEP)
            g = gradients(grad, length, grad_skip, grad_row, grad_channel, embed_dim, row, kept, e)
            at = e.to(tl.int64)[:, None] * K + k[None, :]
            w = tl.load(weight + at, mask=(e < embed_dim)[:, None] & (k < K)[None, :], other=0.0)
            total = add_product(total, g, w)
    if scale is not None:
        total *= of_channel(scale, k, PT * P * P)[None, :]
    first = (token // count).to(tl.int64) * image
    first += patch_of((token % count).to(tl.int64), grid_h, grid_w, frame, line, 1, PT, P)
    at = tl.multiple_of(first, ALIGN)[:, None] + pixel_of(k, channel, frame, line, 1, PT, P, ALIGN)[None, :]
    tl.store(dpixels + at, total.to(dpixels.dtype.element_ty), mask=(token < batch * count)[:, None] & (k < K)[None, :])
