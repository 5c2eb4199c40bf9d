"""Triton `latent_loss`: one program a row gathers, normalises, compares and writes the gradient of its prediction.

A second launch adds the rows' losses in a fixed order. Row lengths are run-time values: masks of other sizes run the
same code.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jepa_kernels._core.triton import device_of
from jepa_kernels._core.triton_rows import LENGTHS, LISTS, run_of

MAX_BLOCK = 4096  # channels held in registers at once; wider rows are read in several blocks
SUM_BLOCK = 8192
SCALE_BLOCK = 1024


@triton.jit
def _tokens(run, cu_seqlens, runs, batch, PER_MASK: tl.constexpr):
    """What a row's loss is divided by: rows of its mask * masks that have rows, or all rows; at least 1."""
    if not PER_MASK:
        return tl.maximum(tl.load(cu_seqlens + runs), 1).to(tl.float32)
    masks = runs // batch
    filled = tl.full([], 0, tl.int32)
    for start in range(0, masks, 32):
        j = start + tl.arange(0, 32)
        end = tl.load(cu_seqlens + (j + 1) * batch, mask=j < masks, other=0)
        filled += tl.sum((end > tl.load(cu_seqlens + j * batch, mask=j < masks, other=0)).to(tl.int32))
    own = tl.minimum(run // batch, masks - 1)
    rows = tl.load(cu_seqlens + (own + 1) * batch) - tl.load(cu_seqlens + own * batch)
    return tl.maximum(rows, 1).to(tl.float32) * tl.maximum(filled, 1).to(tl.float32)


@triton.jit
def _distance(d, beta, inverse_beta, KIND: tl.constexpr):
    if KIND == "l1":
        return tl.abs(d)
    if KIND == "l2":
        return d * d
    return tl.where(tl.abs(d) < beta, 0.5 * d * (d * inverse_beta), tl.abs(d) - 0.5 * beta)


@triton.jit
def _derivative(d, beta, inverse_beta, KIND: tl.constexpr):
    if KIND == "l2":
        return d + d
    sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d * 0.0))  # NaN stays NaN
    if KIND == "l1":
        return sign
    return tl.where(tl.abs(d) < beta, d * inverse_beta, sign)


@triton.jit
def _load(row, c, stride, there):
    return tl.load(row + c.to(tl.int64) * stride, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _rstd(squares, width, eps):
    return tl.div_rn(tl.full([], 1.0, tl.float32), tl.sqrt_rn(tl.div_rn(tl.sum(squares), width) + eps))


@triton.jit
def _compare(x, t, unit, c, channels, weight, beta, inverse_beta, KIND: tl.constexpr):
    """The distances of one block of channels; their gradient goes to `unit`."""
    d = x - t
    if unit is not None:
        g = weight * _derivative(d, beta, inverse_beta, KIND)
        tl.store(unit + c, g.to(unit.dtype.element_ty), mask=c < channels)
    return _distance(d, beta, inverse_beta, KIND)


@triton.jit(do_not_specialize=["row_length", *LENGTHS], do_not_specialize_on_alignment=LISTS)
def _latent_loss_forward_kernel(
    pred, target, ids, cu_seqlens, unit, row_loss,
    row_length, runs, steps, batch, count, channels, width, weight, beta, inverse_beta, eps,
    pred_run, pred_row, pred_channel, target_image, target_token, target_channel,
    KIND: tl.constexpr, NORMALIZE: tl.constexpr, PER_MASK: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    run = run_of(row, cu_seqlens, runs, row_length, steps)
    if cu_seqlens is None:  # runs of `row_length` rows, all of one weight
        inside = row % row_length
        pred += run.to(tl.int64) * pred_run + inside.to(tl.int64) * pred_row
    else:
        weight = tl.div_rn(tl.full([], 1.0, tl.float32), _tokens(run, cu_seqlens, runs, batch, PER_MASK) * width)
        pred += row.to(tl.int64) * pred_row
    if ids is None:
        id = inside.to(tl.int64)
    else:
        id = tl.load(ids + row)
    counts = (run < runs) & (id >= 0) & (id < count)
    target += (run % batch).to(tl.int64) * target_image + id * target_token
    if unit is not None:
        unit += row.to(tl.int64) * channels
    c = tl.arange(0, BLOCK)
    if ONE_BLOCK:  # both rows stay in registers
        there = counts & (c < channels)
        x = _load(pred, c, pred_channel, there)
        y = _load(target, c, target_channel, there)
        if NORMALIZE:  # deviations from the mean, squared: no cancellation
            y = tl.where(there, y - tl.div_rn(tl.sum(y), width), 0.0)
            y = y * _rstd(y * y, width, eps)
        loss = _compare(x, y, unit, c, channels, weight, beta, inverse_beta, KIND)
    else:
        mean = tl.full([], 0.0, tl.float32)
        rstd = tl.full([], 1.0, tl.float32)
        loss = tl.zeros([BLOCK], tl.float32)
        if NORMALIZE:
            total = tl.zeros([BLOCK], tl.float32)
            for start in range(0, channels, BLOCK):
                total += _load(target, start + c, target_channel, counts & (start + c < channels))
            mean = tl.div_rn(tl.sum(total), width)
            squares = tl.zeros([BLOCK], tl.float32)
            for start in range(0, channels, BLOCK):
                there = counts & (start + c < channels)
                y = tl.where(there, _load(target, start + c, target_channel, there) - mean, 0.0)
                squares += y * y
            rstd = _rstd(squares, width, eps)
        for start in range(0, channels, BLOCK):
            there = counts & (start + c < channels)
            x = _load(pred, start + c, pred_channel, there)
            y = tl.where(there, (_load(target, start + c, target_channel, there) - mean) * rstd, 0.0)
            loss += _compare(x, y, unit, start + c, channels, weight, beta, inverse_beta, KIND)
    tl.store(row_loss + row, tl.where(counts, tl.sum(loss) * weight, 0.0))


@triton.jit(do_not_specialize=["rows"])
def _latent_loss_sum_kernel(row_loss, loss, rows, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(row_loss + i, mask=i < rows, other=0.0).to(tl.float64)
    tl.store(loss, tl.sum(total).to(tl.float32))


@triton.jit
def _latent_loss_backward_kernel(unit, grad, dpred, numel, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(unit + i, mask=i < numel).to(tl.float32) * tl.load(grad)
    tl.store(dpred + i, g.to(dpred.dtype.element_ty), mask=i < numel)


def forward(
    pred: Tensor,
    target: Tensor,
    ids: Tensor | None,
    cu_seqlens: Tensor | None,
    kind: str,
    beta: float,
    normalize: bool,
    eps: float,
    reduction: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, gradient of the loss by pred, or an empty tensor)."""
    channels, rows = pred.shape[-1], pred.shape[:-1].numel()
    runs = pred.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    row_loss = pred.new_empty(rows, dtype=torch.float32)
    loss = pred.new_empty((), dtype=torch.float32)
    unit = pred.new_empty(
        pred.shape if with_grad else 0, dtype=torch.float32 if pred.dtype == torch.float16 else pred.dtype
    )
    block = min(triton.next_power_of_2(max(channels, 1)), MAX_BLOCK)
    with device_of(pred):
        if pred.numel() and runs:
            _latent_loss_forward_kernel[(rows,)](
                pred, target, ids, cu_seqlens, unit if with_grad else None, row_loss,
                pred.shape[1] if cu_seqlens is None else 0, runs, runs.bit_length(), *target.shape[:2], channels,
                float(channels), 1.0 / max(rows * channels, 1), beta, 1.0 / beta, eps,
                pred.stride(0), pred.stride(-2), pred.stride(-1), *target.stride(),
                KIND=kind, NORMALIZE=normalize, PER_MASK=reduction == "mask", ONE_BLOCK=channels <= block, BLOCK=block,
                num_warps=min(max(block // 512, 1), 8),
            )  # fmt: skip
        else:
            row_loss.zero_()
            unit.zero_()
        _latent_loss_sum_kernel[(1,)](row_loss, loss, rows, BLOCK=SUM_BLOCK, num_warps=16)
    return loss, unit


def backward(grad: Tensor, unit: Tensor, half: bool) -> Tensor:
    """unit * grad, in fp16 where `half`."""
    dpred = torch.empty_like(unit, dtype=torch.float16 if half else unit.dtype)
    if unit.numel():
        with device_of(unit):
            grid = (triton.cdiv(unit.numel(), SCALE_BLOCK),)
            _latent_loss_backward_kernel[grid](unit, grad, dpred, unit.numel(), BLOCK=SCALE_BLOCK, num_warps=4)
    return dpred
