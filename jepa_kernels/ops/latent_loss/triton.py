"""Triton `latent_loss`: one program gathers a row, or one level of it, normalises, compares and writes the gradient.

A second launch adds the programs' losses in a fixed order. Row lengths are run-time values: masks of other sizes run
the same code.
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
def _to_power(x, exponent):
    """In fp64: a logarithm and an exponential in fp32 would lose the last digits."""
    return tl.exp2(tl.log2(x.to(tl.float64)) * exponent).to(tl.float32)


@triton.jit
def _distance(d, beta, inverse_beta, power, KIND: tl.constexpr):
    if KIND == "l1":
        return tl.abs(d)
    if KIND == "l2":
        return d * d
    if KIND == "power":
        return _to_power(tl.abs(d), power) / power
    return tl.where(tl.abs(d) < beta, 0.5 * d * (d * inverse_beta), tl.abs(d) - 0.5 * beta)


@triton.jit
def _derivative(d, beta, inverse_beta, power, KIND: tl.constexpr):
    if KIND == "l2":
        return d + d
    sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d * 0.0))  # NaN stays NaN
    if KIND == "l1":
        return sign
    if KIND == "power":
        return tl.where(d < 0, -1.0, 1.0) * _to_power(tl.abs(d), power - 1.0)
    return tl.where(tl.abs(d) < beta, d * inverse_beta, sign)


@triton.jit
def _load(row, c, stride, there):
    return tl.load(row + c.to(tl.int64) * stride, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _rstd(squares, width, eps):
    return tl.div_rn(tl.full([], 1.0, tl.float32), tl.sqrt_rn(tl.div_rn(tl.sum(squares), width) + eps))


@triton.jit
def _normed(y, there, width, eps):
    """Deviations from the mean, squared: no cancellation."""
    y = tl.where(there, y - tl.div_rn(tl.sum(y), width), 0.0)
    return y * _rstd(y * y, width, eps)


@triton.jit
def _affine(y, c, gain, gain_stride, shift, shift_stride, there):
    return y * _load(gain, c, gain_stride, there) + _load(shift, c, shift_stride, there)


@triton.jit
def _latent(
    target, c, stride, there, mean, rstd, gain, gain_stride, shift, shift_stride,
):  # fmt: skip
    """One block of a target, after the encoder's norm where there is one: (y - mean) * rstd * gain + shift."""
    y = _load(target, c, stride, there)
    if gain is not None:
        y = _affine((y - mean) * rstd, c, gain, gain_stride, shift, shift_stride, there)
    return y


@triton.jit
def _statistics(
    target, stride, counts, channels, width, eps, mean, rstd, gain, gain_stride, shift, shift_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / deviation of a row that several blocks hold, read twice."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        there = counts & (c < channels)
        total += _latent(target, c, stride, there, mean, rstd, gain, gain_stride, shift, shift_stride)
    own_mean = tl.div_rn(tl.sum(total), width)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        there = counts & (c < channels)
        y = _latent(target, c, stride, there, mean, rstd, gain, gain_stride, shift, shift_stride)
        y = tl.where(there, y - own_mean, 0.0)
        squares += y * y
    return own_mean, _rstd(squares, width, eps)


@triton.jit
def _compare(x, t, unit, c, channels, weight, beta, inverse_beta, power, KIND: tl.constexpr):
    """The distances of one block of channels; their gradient goes to `unit`."""
    d = x - t
    if unit is not None:
        g = weight * _derivative(d, beta, inverse_beta, power, KIND)
        tl.store(unit + c, g.to(unit.dtype.element_ty), mask=c < channels)
    return _distance(d, beta, inverse_beta, power, KIND)


@triton.jit(do_not_specialize=["row_length", *LENGTHS], do_not_specialize_on_alignment=LISTS)
def _latent_loss_forward_kernel(
    pred, target, ids, cu_seqlens, gain, shift, token_weight, unit, row_loss,
    row_length, runs, steps, batch, count, channels, levels, width, row_width, weight,
    beta, inverse_beta, power, eps, norm_eps,
    pred_run, pred_row, pred_channel, target_image, target_token, target_channel,
    gain_stride, shift_stride, weight_run, weight_row,
    KIND: tl.constexpr, NORMALIZE: tl.constexpr, PER_MASK: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, level = program // levels, program % levels
    run = run_of(row, cu_seqlens, runs, row_length, steps)
    if cu_seqlens is None:  # runs of `row_length` rows, all of one weight
        inside = row % row_length
        pred += run.to(tl.int64) * pred_run + inside.to(tl.int64) * pred_row
    else:
        tokens = _tokens(run, cu_seqlens, runs, batch, PER_MASK)
        weight = tl.div_rn(tl.full([], 1.0, tl.float32), tokens * row_width)
        pred += row.to(tl.int64) * pred_row
    if ids is None:
        id = inside.to(tl.int64)
    else:
        id = tl.load(ids + row)
    counts = (run < runs) & (id >= 0) & (id < count)
    if token_weight is not None:
        if cu_seqlens is None:
            token_weight += run.to(tl.int64) * weight_run + inside.to(tl.int64) * weight_row
        else:
            token_weight += row.to(tl.int64) * weight_row
        weight *= tl.load(token_weight, mask=counts, other=0.0)
    target += (run % batch).to(tl.int64) * target_image + id * target_token
    first = level.to(tl.int64) * channels  # of the level
    pred += first * pred_channel
    target += first * target_channel
    if gain is not None:
        gain += first * gain_stride
        shift += first * shift_stride
    if unit is not None:
        unit += program.to(tl.int64) * channels
    c = tl.arange(0, BLOCK)
    if ONE_BLOCK:  # both rows stay in registers
        there = counts & (c < channels)
        x = _load(pred, c, pred_channel, there)
        y = _load(target, c, target_channel, there)
        if gain is not None:
            y = _affine(_normed(y, there, width, norm_eps), c, gain, gain_stride, shift, shift_stride, there)
        if NORMALIZE:
            y = _normed(y, there, width, eps)
        loss = _compare(x, y, unit, c, channels, weight, beta, inverse_beta, power, KIND)
    else:
        zero, one = tl.full([], 0.0, tl.float32), tl.full([], 1.0, tl.float32)
        norm_mean, norm_rstd, mean, rstd = zero, one, zero, one
        if gain is not None:
            norm_mean, norm_rstd = _statistics(
                target, target_channel, counts, channels, width, norm_eps, zero, one, None, 0, None, 0, BLOCK
            )
        if NORMALIZE:
            mean, rstd = _statistics(
                target, target_channel, counts, channels, width, eps, norm_mean, norm_rstd,
                gain, gain_stride, shift, shift_stride, BLOCK,
            )  # fmt: skip
        loss = tl.zeros([BLOCK], tl.float32)
        for start in range(0, channels, BLOCK):
            at = start + c
            there = counts & (at < channels)
            x = _load(pred, at, pred_channel, there)
            y = _latent(target, at, target_channel, there, norm_mean, norm_rstd, gain, gain_stride, shift, shift_stride)
            y = tl.where(there, (y - mean) * rstd, 0.0)
            loss += _compare(x, y, unit, at, channels, weight, beta, inverse_beta, power, KIND)
    tl.store(row_loss + program, tl.where(counts, tl.sum(loss) * weight, 0.0))


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


def _strides(x: Tensor | None) -> tuple[int, int]:
    """First and last."""
    return (0, 0) if x is None else (x.stride(0), x.stride(-1))


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
    power: float,
    levels: int,
    gain: Tensor | None,
    shift: Tensor | None,
    norm_eps: float,
    token_weight: Tensor | None,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, gradient of the loss by pred, or an empty tensor)."""
    channels, rows = pred.shape[-1], pred.shape[:-1].numel()
    runs = pred.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    row_loss = pred.new_empty(rows * levels, dtype=torch.float32)
    loss = pred.new_empty((), dtype=torch.float32)
    unit = pred.new_empty(
        pred.shape if with_grad else 0, dtype=torch.float32 if pred.dtype == torch.float16 else pred.dtype
    )
    width, halves = channels // levels, 1.0
    if kind == "l1" and power != 1:
        kind, halves = ("l2", 2.0) if power == 2 else ("power", 1.0)  # d^2 / 2
    block = min(triton.next_power_of_2(max(width, 1)), MAX_BLOCK)
    with device_of(pred):
        if pred.numel() and runs:
            _latent_loss_forward_kernel[(rows * levels,)](
                pred, target, ids, cu_seqlens, gain, shift, token_weight, unit if with_grad else None, row_loss,
                pred.shape[1] if cu_seqlens is None else 0, runs, runs.bit_length(), *target.shape[:2], width, levels,
                float(width), halves * channels, 1.0 / max(halves * rows * channels, 1),
                beta, 1.0 / beta, power, eps, norm_eps,
                pred.stride(0), pred.stride(-2), pred.stride(-1), *target.stride(),
                _strides(gain)[0], _strides(shift)[0], *_strides(token_weight),
                KIND=kind, NORMALIZE=normalize, PER_MASK=reduction == "mask", ONE_BLOCK=width <= block, BLOCK=block,
                num_warps=min(max(block // 512, 1), 8),
            )  # fmt: skip
        else:
            row_loss.zero_()
            unit.zero_()
        _latent_loss_sum_kernel[(1,)](row_loss, loss, rows * levels, BLOCK=SUM_BLOCK, num_warps=16)
    return loss, unit


def backward(grad: Tensor, unit: Tensor, half: bool) -> Tensor:
    """unit * grad, in fp16 where `half`."""
    dpred = torch.empty_like(unit, dtype=torch.float16 if half else unit.dtype)
    if unit.numel():
        with device_of(unit):
            grid = (triton.cdiv(unit.numel(), SCALE_BLOCK),)
            _latent_loss_backward_kernel[grid](unit, grad, dpred, unit.numel(), BLOCK=SCALE_BLOCK, num_warps=4)
    return dpred
