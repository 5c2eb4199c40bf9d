"""Backward Triton kernels of `embed_patches`. Every sum has a fixed order: no atomics."""

import triton
import triton.language as tl

from jepa_kernels._core.triton_rows import LISTS, offset_of, row_of
from jepa_kernels.ops.embed_patches.triton_tiles import NUMBERS, of_channel, patch_of, patches, pixel_of, place_of


@triton.jit
def gradients(grad, length, grad_skip, grad_row, grad_channel, embed_dim, row, there, e):
    """[rows, channels] of the gradient; 0 for rows that are not `there`."""
    at = offset_of(row, length, grad_skip, grad_row)[:, None] + e.to(tl.int64)[None, :] * grad_channel
    return tl.load(grad + at, mask=there[:, None] & (e < embed_dim)[None, :], other=0.0)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=LISTS)
def _embed_patches_backward_rows_kernel(
    grad, length, grad_skip, grad_row, grad_channel, embed_dim,
    ids, cu_seqlens, rows, runs, run_length, batch, count, grid_h, grid_w, steps,
    image, frame, line, column, places, parts,
    PT: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Where the patch of each row begins, -1 for rows without one; parts of dbias, each the sum over ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first, _, inside = place_of(
        row, ids, cu_seqlens, rows, runs, run_length, batch, count, grid_h, grid_w, steps,
        image, frame, line, column, PT, P, 1,
    )  # fmt: skip
    if tl.program_id(1) == 0:
        tl.store(places + row, tl.where(inside, first, -1), mask=row < rows)
    if parts is not None:
        e = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        g = gradients(grad, length, grad_skip, grad_row, grad_channel, embed_dim, row, inside, e)
        at = tl.program_id(0).to(tl.int64) * embed_dim + e
        tl.store(parts + at, tl.sum(g.to(tl.float32), 0), mask=e < embed_dim)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=LISTS)
def _embed_patches_backward_weight_kernel(
    grad, length, grad_skip, grad_row, grad_channel, embed_dim,
    pixels, places, scale, shift, rows, rows_of_part, channel, frame, line, column, parts,
    C: tl.constexpr, PT: tl.constexpr, P: tl.constexpr, ALIGN: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A part of dweight [E, K]: grad^T x patches over `rows_of_part` rows."""
    K: tl.constexpr = C * PT * P * P
    e = tl.program_id(0) // tl.cdiv(K, PIXELS) * CHANNELS + tl.arange(0, CHANNELS)
    k = tl.program_id(0) % tl.cdiv(K, PIXELS) * PIXELS + tl.arange(0, PIXELS)
    offset = pixel_of(k, channel, frame, line, column, PT, P, ALIGN)
    total = tl.zeros([CHANNELS, PIXELS], tl.float32)
    begin = tl.program_id(1) * rows_of_part
    for start in range(begin, tl.minimum(begin + rows_of_part, rows), STEP):
        row = start + tl.arange(0, STEP)
        first = tl.load(places + row, mask=row < rows, other=-ALIGN)
        inside = first >= 0
        first = tl.multiple_of(first, ALIGN)
        g = gradients(grad, length, grad_skip, grad_row, grad_channel, embed_dim, row, inside, e)
        x = patches(pixels, first, inside, k, offset, scale, shift, grad.dtype.element_ty, K, PT * P * P)
        total = tl.dot(tl.trans(g), x, total, input_precision="ieee")
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
    ids, cu_seqlens, runs, run_length, steps, dpos, RUNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dpos_embed of one patch: the sum over the runs that keep it."""
    id = tl.program_id(0)
    e = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([CHANNELS], tl.float32)
    for start in range(0, runs, RUNS):
        run = start + tl.arange(0, RUNS)
        row, kept = row_of(run, id, run < runs, ids, cu_seqlens, run_length, steps)
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
    for run in range(0, runs, batch):
        row, kept = row_of(
            run + token // count, token % count, token < batch * count, ids, cu_seqlens, run_length, steps
        )
        for start in range(0, embed_dim, STEP):
            e = start + tl.arange(0, STEP)
            g = gradients(grad, length, grad_skip, grad_row, grad_channel, embed_dim, row, kept, e)
            at = e.to(tl.int64)[:, None] * K + k[None, :]
            w = tl.load(weight + at, mask=(e < embed_dim)[:, None] & (k < K)[None, :], other=0.0)
            total = tl.dot(g, w, total, input_precision="ieee")
    if scale is not None:
        total *= of_channel(scale, k, PT * P * P)[None, :]
    first = (token // count).to(tl.int64) * image
    first += patch_of((token % count).to(tl.int64), grid_h, grid_w, frame, line, 1, PT, P)
    at = tl.multiple_of(first, ALIGN)[:, None] + pixel_of(k, channel, frame, line, 1, PT, P, ALIGN)[None, :]
    tl.store(dpixels + at, total.to(dpixels.dtype.element_ty), mask=(token < batch * count)[:, None] & (k < K)[None, :])
