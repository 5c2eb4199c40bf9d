"""Triton `adamw_ema`: step, average and low-precision copies in one pass over memory, one launch for all tensors."""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from jepa_kernels._core.triton import device_of
from jepa_kernels.chunks import groups
from jepa_kernels.triton_chunks import DTYPES, THREADS, aligned_count, pointer

Tensors = Sequence[Tensor]


@triton.jit
def _power(base, exponent):
    """By squaring, in fp64: exponents are whole."""
    result = tl.full([], 1.0, tl.float64)
    while exponent > 0:
        result = tl.where(exponent % 2 == 1, result * base, result)
        base = base * base
        exponent = exponent // 2
    return result


@triton.jit
def _factors(step, lr, weight_decay, beta1, beta2):
    """What p, m over the root of v, and that root are multiplied by: in fp64, each rounded once."""
    t = tl.load(step).to(tl.int32)
    decay = (1.0 - lr * weight_decay).to(tl.float32)
    size = (-lr / (1.0 - _power(beta1, t))).to(tl.float32)
    return decay, size, (1.0 / tl.sqrt(1.0 - _power(beta2, t))).to(tl.float32)


@triton.jit
def _adamw(p, g, m, v, factors, betas, eps):
    decay, size, correction = factors
    beta1, beta2 = betas
    near = beta1 >= 0.5  # interpolated from the nearer end: exact at both
    m = tl.fma(tl.where(near, 1.0 - beta1, -beta1).to(tl.float32), g - m, tl.where(near, m, g))
    v = tl.fma((1.0 - beta2).to(tl.float32) * g, g, beta2.to(tl.float32) * v)
    return tl.fma(size, tl.div_rn(m, tl.fma(tl.sqrt_rn(v), correction, eps)), decay * p), m, v


@triton.jit
def _update(
    at, i, mask, moves, scale, factors, betas, eps, momentum, MAXIMIZE: tl.constexpr,
    GRAD: tl.constexpr, TARGET: tl.constexpr, ONLINE_COPY: tl.constexpr, TARGET_COPY: tl.constexpr,
):  # fmt: skip
    param, grad, exp_avg, exp_avg_sq, target, online_copy, target_copy = at
    p = tl.load(param + i, mask=mask)
    if GRAD is not None:
        moved = mask & moves
        m = tl.load(exp_avg + i, mask=moved)
        v = tl.load(exp_avg_sq + i, mask=moved)
        g = tl.load(grad + i, mask=moved).to(tl.float32)
        if scale is not None:
            g = tl.div_rn(g, scale)
        if MAXIMIZE:
            g = -g
        new, m, v = _adamw(p, g, m, v, factors, betas, eps)
        tl.store(param + i, new, mask=moved)
        tl.store(exp_avg + i, m, mask=moved)
        tl.store(exp_avg_sq + i, v, mask=moved)
        p = tl.where(moves, new, p)
    if ONLINE_COPY is not None:
        tl.store(online_copy + i, p.to(ONLINE_COPY), mask=mask)
    if TARGET is not None:
        k = tl.load(target + i, mask=mask)
        k = tl.fma((1.0 - momentum).to(tl.float32), p - k, k)
        tl.store(target + i, k, mask=mask)
        if TARGET_COPY is not None:
            tl.store(target_copy + i, k.to(TARGET_COPY), mask=mask)


@triton.jit
def _pointers(
    row, ALIGNED: tl.constexpr, GRAD: tl.constexpr, TARGET: tl.constexpr, ONLINE_COPY: tl.constexpr,
    TARGET_COPY: tl.constexpr,
):  # fmt: skip
    return (
        pointer(tl.load(row), tl.float32, ALIGNED),
        pointer(tl.load(row + 1), GRAD, ALIGNED),
        pointer(tl.load(row + 2), tl.float32, ALIGNED),
        pointer(tl.load(row + 3), tl.float32, ALIGNED),
        pointer(tl.load(row + 4), TARGET, ALIGNED),
        pointer(tl.load(row + 5), ONLINE_COPY, ALIGNED),
        pointer(tl.load(row + 6), TARGET_COPY, ALIGNED),
    )


@triton.jit(do_not_specialize_on_alignment=["scalars", "grad_scale", "found_inf"])
def _adamw_ema_forward_kernel(
    table, scalars, lr: tl.float64, weight_decay: tl.float64, momentum: tl.float64, grad_scale, found_inf,
    beta1: tl.float64, beta2: tl.float64, eps, MAXIMIZE: tl.constexpr, GRAD: tl.constexpr, TARGET: tl.constexpr,
    ONLINE_COPY: tl.constexpr, TARGET_COPY: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    if scalars is None:
        lr, momentum = tl.full([], lr, tl.float64), tl.full([], momentum, tl.float64)
    else:  # on the device
        lr, weight_decay, momentum = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    betas = tl.full([], beta1, tl.float64), tl.full([], beta2, tl.float64)
    factors, scale, moves = None, None, True
    row = table + tl.program_id(0).to(tl.int64) * 9
    if GRAD is not None:
        factors = _factors(pointer(tl.load(row + 7), tl.float32, False), lr, weight_decay, *betas)
        if grad_scale is not None:
            scale = tl.load(grad_scale).to(tl.float32)
        if found_inf is not None:
            moves = tl.load(found_inf) == 0
    addresses = tl.load(row)
    for list in tl.static_range(1, 7):
        addresses |= tl.load(row + list)
    count = tl.load(row + 8).to(tl.int32)
    whole = aligned_count(addresses, count)
    at = _pointers(row, True, GRAD, TARGET, ONLINE_COPY, TARGET_COPY)
    lanes = tl.arange(0, 4 * THREADS)
    for start in range(0, whole, 4 * THREADS):
        _update(
            at, start + lanes, start + lanes < tl.multiple_of(whole, 16), moves, scale, factors, betas, eps, momentum,
            MAXIMIZE, GRAD, TARGET, ONLINE_COPY, TARGET_COPY,
        )  # fmt: skip
    # What is left over: the last elements, or all of tensors that start anywhere.
    at = _pointers(row, False, GRAD, TARGET, ONLINE_COPY, TARGET_COPY)
    lanes = tl.arange(0, THREADS)
    for start in range(whole, count, THREADS):
        _update(
            at, start + lanes, start + lanes < count, moves, scale, factors, betas, eps, momentum,
            MAXIMIZE, GRAD, TARGET, ONLINE_COPY, TARGET_COPY,
        )  # fmt: skip


def forward(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors, targets: Tensors,
    online_shadow: Tensors, target_shadow: Tensors, scalars: Tensor, grad_scale: Tensor | None,
    found_inf: Tensor | None, beta1: float, beta2: float, eps: float, maximize: bool, known: Any = None,
) -> None:  # fmt: skip
    """One launch for tensors of the same dtypes that lack the same ones: usually one in all.

    known: what `chunks.read` told of them.
    """
    on_device = scalars.device == params[0].device
    host = (0.0, 0.0, 0.0) if on_device else scalars.tolist()
    lists = (params, grads, exp_avgs, exp_avg_sqs, targets, online_shadow, target_shadow, steps)
    found = groups("adamw_ema", lists, known, changing=True)
    with device_of(params[0]):
        for table, (_, grad, _, _, target, online_copy, target_copy, _) in found:
            _adamw_ema_forward_kernel[(len(table),)](
                table,
                scalars if on_device else None,
                *host,
                grad_scale,
                found_inf,
                beta1,
                beta2,
                eps,
                MAXIMIZE=maximize,
                GRAD=DTYPES[grad],
                TARGET=DTYPES[target],
                ONLINE_COPY=DTYPES[online_copy],
                TARGET_COPY=DTYPES[target_copy],
                THREADS=THREADS,
                num_warps=THREADS // 32,
                enable_fp_fusion=False,  # rounds as the CPU kernel does
            )
