"""Triton `distance_weights`: a program takes a block of context tokens through tiles of their sequences' targets.

Distances are squared in int32, exactly. Row counts are run-time values: masks of other sizes run the same code.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jepa_kernels._core.triton import device_of
from jepa_kernels._core.triton_rows import LENGTHS, LISTS, run_of

CONTEXTS, TARGETS = 64, 32
FAR = tl.constexpr(2**30)  # beyond every squared distance
RUN_TIME = [*LENGTHS, "context_length", "target_length", "target_rows", "height", "width"]
ANYWHERE = [*LISTS, "context_ids", "target_ids", "target_cu_seqlens"]


@triton.jit
def _place(id, height, width):
    """Frame, row and column; ids are within the grid, so their quotients fit 32 bits."""
    frame = id // (height * width)
    inside = (id - frame * height * width).to(tl.int32)
    return frame.to(tl.int32), inside // width, inside % width


@triton.jit
def _span(run, cu_seqlens, length, rows):
    """Where a run begins and ends."""
    if cu_seqlens is None:
        begin = run * length
        end = begin + length
    else:
        begin = tl.maximum(tl.load(cu_seqlens + run), 0)
        end = tl.minimum(tl.load(cu_seqlens + run + 1), rows)
    return begin, end


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=ANYWHERE)
def _distance_weights_forward_kernel(
    context_ids, target_ids, cu_seqlens, target_cu_seqlens, weights, rows, runs, context_length, target_length,
    target_rows, steps, count, height, width, scale, CONTEXTS: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * CONTEXTS + tl.arange(0, CONTEXTS)
    run = run_of(row, cu_seqlens, runs, context_length, steps)
    inside = (row < rows) & (run < runs)
    id = tl.load(context_ids + row, mask=inside, other=-1)
    inside &= (id >= 0) & (id < count)
    t, h, w = _place(id, height, width)
    nearest = tl.full([CONTEXTS], FAR, tl.int32)
    for own in range(tl.min(run), tl.max(tl.where(inside, run, -1)) + 1):
        begin, end = _span(own, target_cu_seqlens, target_length, target_rows)
        for start in range(begin, end, TARGETS):
            i = start + tl.arange(0, TARGETS)
            target = tl.load(target_ids + i, mask=i < end, other=-1)
            there = (target >= 0) & (target < count)
            frame, line, column = _place(target, height, width)
            dt, dh, dw = t[:, None] - frame[None, :], h[:, None] - line[None, :], w[:, None] - column[None, :]
            squares = tl.where((run == own)[:, None] & there[None, :], dt * dt + dh * dh + dw * dw, FAR)
            nearest = tl.minimum(nearest, tl.min(squares, 1))
    distance = tl.sqrt_rn(nearest.to(tl.float32))
    weight = tl.div_rn(tl.full([CONTEXTS], 1.0, tl.float32), tl.sqrt_rn(tl.div_rn(distance, scale)))
    tl.store(weights + row, tl.where(inside & (nearest < FAR), weight, 0.0), mask=row < rows)


def forward(
    context_ids: Tensor,
    target_ids: Tensor,
    cu_seqlens: Tensor | None,
    target_cu_seqlens: Tensor | None,
    frames: int,
    height: int,
    width: int,
    scale: float,
) -> Tensor:
    """fp32, of the shape of context_ids."""
    rows = context_ids.numel()
    runs = context_ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    weights = context_ids.new_empty(context_ids.shape, dtype=torch.float32)
    if rows:
        with device_of(context_ids):
            _distance_weights_forward_kernel[(triton.cdiv(rows, CONTEXTS),)](
                context_ids, target_ids, cu_seqlens, target_cu_seqlens, weights, rows, runs, context_ids.shape[-1],
                target_ids.shape[-1], target_ids.numel(), runs.bit_length(), frames * height * width, height, width,
                scale, CONTEXTS=CONTEXTS, TARGETS=TARGETS, num_warps=4,
            )  # fmt: skip
    return weights
