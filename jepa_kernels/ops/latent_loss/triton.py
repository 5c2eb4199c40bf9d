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
SCALE_BLOCK = 4096
LANES = 1024  # channels of the head that a warp holds


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
    """Of a difference, and its derivative; NaN stays NaN in both."""
    if KIND == "l2":
        return d * d, d + d
    if KIND == "power":
        slope = tl.where(d < 0, -1.0, 1.0) * _to_power(tl.abs(d), power - 1.0)
        return _to_power(tl.abs(d), power) / power.to(tl.float32), slope
    if KIND == "l1":
        return tl.abs(d), tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d * 0.0))
    slope = tl.clamp(d * inverse_beta, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    return slope * (d - 0.5 * beta * slope), slope


@triton.jit
def _load(row, c, stride, there):
    """In fp32; `there` is None where all are."""
    at = row + c.to(tl.int64) * stride
    if there is None:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=there, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _rstd(squares, width, eps):
    return tl.div_rn(tl.full([], 1.0, tl.float32), tl.sqrt_rn(tl.div_rn(squares, width) + eps))


@triton.jit
def _normed(y, tail, there, width, eps):
    """A row in two parts. Deviations from the mean, squared: no cancellation."""
    mean = tl.div_rn(tl.sum(y) + tl.sum(tail), width)
    y -= mean
    tail -= mean
    if there is not None:
        tail = tl.where(there, tail, 0.0)
    rstd = _rstd(tl.sum(y * y) + tl.sum(tail * tail), width, eps)
    return y * rstd, tail * rstd


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
    target, stride, channels, width, eps, mean, rstd, gain, gain_stride, shift, shift_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / deviation of a row that several blocks hold, read twice."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        there = c < channels
        total += _latent(target, c, stride, there, mean, rstd, gain, gain_stride, shift, shift_stride)
    own_mean = tl.div_rn(tl.sum(total), width)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        there = c < channels
        y = _latent(target, c, stride, there, mean, rstd, gain, gain_stride, shift, shift_stride)
        y = tl.where(there, y - own_mean, 0.0)
        squares += y * y
    return own_mean, _rstd(tl.sum(squares), width, eps)


@triton.jit
def _compare(x, t, unit, c, there, weight, beta, inverse_beta, power, KIND: tl.constexpr):
    """The distances of one block of channels; their gradient goes to `unit`."""
    distance, slope = _distance(x - t, beta, inverse_beta, power, KIND)
    if unit is not None:
        tl.store(unit + c, (weight * slope).to(unit.dtype.element_ty), mask=there)
    return distance


@triton.jit
def _in_one_block(
    pred, target, gain, shift, unit, channels, width, weight, beta, inverse_beta, power, eps, norm_eps,
    pred_stride, target_stride, gain_stride, shift_stride,
    KIND: tl.constexpr, NORMALIZE: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Both rows stay in registers, in two powers of two: lanes past the last channel cost as much as those before."""
    c, rest = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    there = None if FULL else rest < channels
    y, z = _load(target, c, target_stride, None), _load(target, rest, target_stride, there)
    x, w = _load(pred, c, pred_stride, None), _load(pred, rest, pred_stride, there)
    if gain is not None:
        y, z = _normed(y, z, there, width, norm_eps)
        y = _affine(y, c, gain, gain_stride, shift, shift_stride, None)
        z = _affine(z, rest, gain, gain_stride, shift, shift_stride, there)
    if NORMALIZE:
        y, z = _normed(y, z, there, width, eps)
    head = _compare(x, y, unit, c, None, weight, beta, inverse_beta, power, KIND)
    return tl.sum(head) + tl.sum(_compare(w, z, unit, rest, there, weight, beta, inverse_beta, power, KIND))


@triton.jit
def _in_blocks(
    pred, target, gain, shift, unit, channels, width, weight, beta, inverse_beta, power, eps, norm_eps,
    pred_stride, target_stride, gain_stride, shift_stride,
    KIND: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    zero, one = tl.full([], 0.0, tl.float32), tl.full([], 1.0, tl.float32)
    norm_mean, norm_rstd, mean, rstd = zero, one, zero, one
    if gain is not None:
        norm_mean, norm_rstd = _statistics(
            target, target_stride, channels, width, norm_eps, zero, one, None, 0, None, 0, BLOCK
        )
    if NORMALIZE:
        mean, rstd = _statistics(
            target, target_stride, channels, width, eps, norm_mean, norm_rstd,
            gain, gain_stride, shift, shift_stride, BLOCK,
        )  # fmt: skip
    loss = tl.zeros([BLOCK], tl.float32)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        there = c < channels
        x = _load(pred, c, pred_stride, there)
        y = _latent(target, c, target_stride, there, norm_mean, norm_rstd, gain, gain_stride, shift, shift_stride)
        y = tl.where(there, (y - mean) * rstd, 0.0)
        loss += _compare(x, y, unit, c, there, weight, beta, inverse_beta, power, KIND)
    return tl.sum(loss)


@triton.jit
def _clear(unit, channels, BLOCK: tl.constexpr):
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        tl.store(unit + c, tl.zeros([BLOCK], unit.dtype.element_ty), mask=c < channels)


@triton.jit(do_not_specialize=["row_length", "weight_run", *LENGTHS], do_not_specialize_on_alignment=LISTS)
def _latent_loss_forward_kernel(
    pred, target, ids, cu_seqlens, gain, shift, token_weight, unit, row_loss,
    row_length, runs, steps, batch, count, channels, levels, width, row_width, weight,
    beta, inverse_beta, power: tl.float64, eps, norm_eps,
    pred_run, pred_row, pred_channel, target_image, target_token, target_channel,
    gain_stride, shift_stride, weight_run, weight_row,
    KIND: tl.constexpr, NORMALIZE: tl.constexpr, PER_MASK: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, FULL: tl.constexpr,
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
    loss = tl.full([], 0.0, tl.float32)
    if counts:
        if TAIL == 0:
            loss = _in_blocks(
                pred, target, gain, shift, unit, channels, width, weight, beta, inverse_beta, power, eps, norm_eps,
                pred_channel, target_channel, gain_stride, shift_stride, KIND, NORMALIZE, HEAD,
            )  # fmt: skip
        else:
            loss = _in_one_block(
                pred, target, gain, shift, unit, channels, width, weight, beta, inverse_beta, power, eps, norm_eps,
                pred_channel, target_channel, gain_stride, shift_stride, KIND, NORMALIZE, HEAD, TAIL, FULL,
            )  # fmt: skip
        loss *= weight
    elif unit is not None:
        _clear(unit, channels, HEAD)
    tl.store(row_loss + program, loss)


@triton.jit(do_not_specialize=["rows"])
def _latent_loss_sum_kernel(row_loss, loss, rows, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(row_loss + i, mask=i < rows, other=0.0).to(tl.float64)
    tl.store(loss, tl.sum(total).to(tl.float32))


@triton.jit
def _latent_loss_backward_kernel(unit, grad, dpred, numel, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    there = i < numel - first
    g = tl.load(unit + first + i, mask=there).to(tl.float32) * tl.load(grad)
    tl.store(dpred + first + i, g.to(dpred.dtype.element_ty), mask=there)


def _strides(x: Tensor | None) -> tuple[int, int]:
    """First and last."""
    return (0, 0) if x is None else (x.stride(0), x.stride(-1))


def _parts(width: int) -> tuple[int, int]:
    """The largest power of two below the width, and one that holds the rest; no second part where it takes a loop."""
    head = max(triton.next_power_of_2(width) // 2, 1)
    return (head, triton.next_power_of_2(max(width - head, 1))) if width <= MAX_BLOCK else (MAX_BLOCK, 0)


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
    head, tail = _parts(width)
    with device_of(pred):
        if pred.numel() and runs:
            _latent_loss_forward_kernel[(rows * levels,)](
                pred, target, ids, cu_seqlens, gain, shift, token_weight, unit if with_grad else None, row_loss,
                pred.shape[1] if cu_seqlens is None else 0, runs, runs.bit_length(), *target.shape[:2], width, levels,
                float(width), halves * channels, 1.0 / max(halves * rows * channels, 1),
                beta, 1.0 / beta, power, eps, norm_eps,
                pred.stride(0), pred.stride(-2), pred.stride(-1), *target.stride(),
                _strides(gain)[0], _strides(shift)[0], *_strides(token_weight),
                KIND=kind, NORMALIZE=normalize, PER_MASK=reduction == "mask",
                HEAD=head, TAIL=tail, FULL=head + tail == width, num_warps=min(max(head // LANES, 1), 8),
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
            _latent_loss_backward_kernel[(triton.cdiv(unit.numel(), SCALE_BLOCK),)](
                unit, grad, dpred, unit.numel(), BLOCK=SCALE_BLOCK, num_warps=8
            )
    return dpred
