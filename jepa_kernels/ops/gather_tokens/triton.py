"""Triton `gather_tokens`: forward copies tiles of rows and channels; backward adds up the rows that each token went to.

Row counts are run-time values: masks of other sizes run the same code. Backward first searches the sorted ids of each
mask, once for all channels, and lists where tokens are: no atomics, and sums in the order of the masks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jepa_kernels._core.triton import device_of, rows_of
from jepa_kernels._core.triton_rows import LENGTHS, LISTS, offset_of, row_of, token_of

ROWS = 16
SEARCHES = 128  # of a program
CHANNELS = 256  # 16 bytes a lane in bf16; the published widths are multiples of 128


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=LISTS)
def _gather_tokens_forward_kernel(
    x, ids, cu_seqlens, out, rows, runs, run_length, steps, batch, count, channels,
    x_image, x_token, x_channel, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    run, id, inside = token_of(row, ids, cu_seqlens, rows, runs, run_length, steps, count)
    token = (run % batch).to(tl.int64) * x_image + id * x_token
    there = inside[:, None] & (c < channels)[None, :]
    tile = tl.load(x + token[:, None] + c.to(tl.int64)[None, :] * x_channel, mask=there, other=0.0)
    at = row.to(tl.int64)[:, None] * channels + c[None, :]
    tl.store(out + at, tile, mask=(row < rows)[:, None] & (c < channels)[None, :])


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=LISTS)
def _gather_tokens_backward_search_kernel(
    ids, cu_seqlens, found, rows, masks, run_length, steps, count, tokens, SEARCHES: tl.constexpr
):
    """found [masks, tokens]: the row of each token in each mask; -1 where the mask left it out."""
    i = tl.program_id(0) * SEARCHES + tl.arange(0, SEARCHES)
    there = i < masks * tokens
    row, chosen = row_of(i // count, i % count, there, ids, cu_seqlens, rows, run_length, steps)
    tl.store(found + i, tl.where(chosen, row, -1), mask=there)


@triton.jit(do_not_specialize=LENGTHS)
def _gather_tokens_backward_kernel(
    grad, found, dx, masks, tokens, channels,
    length, grad_skip, grad_row, grad_channel, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for mask in range(masks):
        row = tl.load(found + mask * tokens + token, mask=token < tokens, other=-1)
        there = (row >= 0)[:, None] & (c < channels)[None, :]
        at = offset_of(row, length, grad_skip, grad_row)[:, None] + c.to(tl.int64)[None, :] * grad_channel
        total += tl.load(grad + at, mask=there, other=0.0).to(tl.float32)
    at = token.to(tl.int64)[:, None] * channels + c[None, :]
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=(token < tokens)[:, None] & (c < channels)[None, :])


def _runs(ids: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """How many, and their length where they share one."""
    return (ids.shape[0], ids.shape[1]) if cu_seqlens is None else (cu_seqlens.shape[0] - 1, 0)


def forward(x: Tensor, ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[M, K, E] or [T, E]."""
    batch, count, channels = x.shape
    rows, (runs, run_length) = ids.numel(), _runs(ids, cu_seqlens)
    out = x.new_empty(*ids.shape, channels)
    if out.numel():
        with device_of(x):
            _gather_tokens_forward_kernel[triton.cdiv(rows, ROWS), triton.cdiv(channels, CHANNELS)](
                x, ids, cu_seqlens, out, rows, runs, run_length, runs.bit_length(), batch, count, channels, *x.stride(),
                ROWS=ROWS, CHANNELS=CHANNELS, num_warps=4,
            )  # fmt: skip
    return out


def backward(grad: Tensor, ids: Tensor, cu_seqlens: Tensor | None, batch: int, count: int) -> Tensor:
    """[B, N, E]; a token that several masks chose gets their sum in fp32."""
    channels, tokens, rows = grad.shape[-1], batch * count, ids.numel()
    runs, run_length = _runs(ids, cu_seqlens)
    dx = grad.new_empty(batch, count, channels)
    if dx.numel():
        masks = runs // batch
        found = ids.new_empty(masks, tokens, dtype=torch.int32)
        with device_of(grad):
            if masks:
                _gather_tokens_backward_search_kernel[(triton.cdiv(masks * tokens, SEARCHES),)](
                    ids, cu_seqlens, found, rows, masks, run_length, min(count, rows).bit_length(), count, tokens,
                    SEARCHES=SEARCHES, num_warps=4,
                )  # fmt: skip
            _gather_tokens_backward_kernel[triton.cdiv(tokens, ROWS), triton.cdiv(channels, CHANNELS)](
                grad, found, dx, masks, tokens, channels, *rows_of(grad), ROWS=ROWS, CHANNELS=CHANNELS, num_warps=4
            )
    return dx
