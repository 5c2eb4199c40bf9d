"""Triton `ema_update`: one pass over memory, one launch for all tensors."""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from jepa_kernels._core.triton import device_of
from jepa_kernels.chunks import Groups, Lists, groups
from jepa_kernels.triton_chunks import DTYPES, THREADS, aligned_count, pointer


@triton.jit
def _mix(target, online, keep, step, FORM: tl.constexpr):
    if FORM == "lerp":
        return tl.fma(step, online - target, target)
    product = keep * target
    if FORM == "ijepa":
        return product + step * online
    return tl.fma(step, online, product)


@triton.jit
def _update(target, online, shadow, i, mask, keep, step, FORM: tl.constexpr, SHADOW: tl.constexpr):
    x = tl.load(target + i, mask=mask)
    x = _mix(x, tl.load(online + i, mask=mask).to(tl.float32), keep, step, FORM)
    tl.store(target + i, x, mask=mask)
    if SHADOW is not None:
        tl.store(shadow + i, x.to(SHADOW), mask=mask)


@triton.jit
def _ema_update_forward_kernel(
    table, keep, step, momentum, FORM: tl.constexpr, ONLINE: tl.constexpr, SHADOW: tl.constexpr, THREADS: tl.constexpr
):
    if momentum is not None:  # on the device; the factors in fp64, rounded once, like a float's
        m = tl.load(momentum).to(tl.float64)
        keep = m.to(tl.float32)
        step = (1.0 - m).to(tl.float32)
    row = table + tl.program_id(0).to(tl.int64) * 4
    target, online, shadow = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    count = tl.load(row + 3)
    whole = aligned_count(target | online | shadow, count)
    a, b, c = pointer(target, tl.float32, True), pointer(online, ONLINE, True), pointer(shadow, SHADOW, True)
    lanes = tl.arange(0, 4 * THREADS)  # four elements a thread: 16 bytes of fp32
    for start in range(0, whole, 4 * THREADS):
        _update(a, b, c, start + lanes, start + lanes < tl.multiple_of(whole, 16), keep, step, FORM, SHADOW)
    # What is left over: the last elements, or all of a tensor that starts anywhere.
    a, b, c = pointer(target, tl.float32, False), pointer(online, ONLINE, False), pointer(shadow, SHADOW, False)
    lanes = tl.arange(0, THREADS)
    for start in range(whole, count, THREADS):
        _update(a, b, c, start + lanes, start + lanes < count, keep, step, FORM, SHADOW)


def prepare(lists: Lists, known: Any = None) -> Groups:
    """The table of chunks."""
    return groups("ema_update", lists, known)


def run(prepared: Groups, momentum: Tensor, form: str) -> None:
    """One launch for each pair of online and shadow dtypes, usually one in all."""
    on_device = momentum.device == prepared[0].table.device
    host = 0.0 if on_device else float(momentum)
    with device_of(prepared[0].table):
        for table, (_, online, shadow) in prepared:
            _ema_update_forward_kernel[(len(table),)](
                table,
                host,
                1.0 - host,
                momentum if on_device else None,
                FORM=form,
                ONLINE=DTYPES[online],
                SHADOW=DTYPES[shadow],
                THREADS=THREADS,
                num_warps=THREADS // 32,
                enable_fp_fusion=False,  # the forms are defined by their roundings
            )


def forward(
    target: Sequence[Tensor], online: Sequence[Tensor], shadow: Sequence[Tensor], momentum: Tensor, form: str
) -> None:
    """`run` of lists that torch's dispatcher hands over."""
    run(prepare((target, online, shadow)), momentum, form)
