"""Triton `grad_norm`: a program adds the squares of a chunk; one more adds what they found, in a fixed order."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jepa_kernels._core.triton import device_of
from jepa_kernels.chunks import groups
from jepa_kernels.triton_chunks import DTYPES, THREADS, aligned_count, pointer

UNROLL = 16  # elements a thread has in flight
SUM_BLOCK = 8192


@triton.jit
def _squares(grad, i, mask):
    """In fp64: exact, and none overflows. Memory is slower than the conversions of a GPU that has its fp64 units."""
    x = tl.load(grad + i, mask=mask, other=0.0).to(tl.float32).to(tl.float64)
    return x * x


@triton.jit(do_not_specialize_on_alignment=["partial"])
def _grad_norm_forward_kernel(table, partial, DTYPE: tl.constexpr, LANES: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64)
    address = tl.load(table + 2 * chunk)
    count = tl.load(table + 2 * chunk + 1).to(tl.int32)
    whole = aligned_count(address, count)
    lanes = tl.arange(0, LANES)
    grad = pointer(address, DTYPE, True)
    total = tl.zeros([LANES], tl.float64)
    for start in range(0, whole, LANES):
        total += _squares(grad, start + lanes, start + lanes < tl.multiple_of(whole, 16))
    grad = pointer(address, DTYPE, False)
    for start in range(whole, count, LANES):
        total += _squares(grad, start + lanes, start + lanes < count)
    tl.store(partial + chunk, tl.sum(total))


@triton.jit(do_not_specialize=["count"])
def _grad_norm_sum_kernel(partial, out, count, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        total += tl.load(partial + start + lanes, mask=start + lanes < count, other=0.0)
    tl.store(out, tl.sqrt(tl.sum(total)).to(tl.float32))


def forward(grads: Sequence[Tensor], known: Any = None) -> Tensor:
    """A launch for each dtype of gradient, and one for the sum. known: what `chunks.read` told of them."""
    found = groups("grad_norm", (grads,), known, changing=True)
    partial = torch.empty(sum(len(table) for table, _ in found), dtype=torch.float64, device=grads[0].device)
    out = torch.empty((), dtype=torch.float32, device=grads[0].device)
    start = 0
    with device_of(out):
        for table, (dtype,) in found:
            if len(table):
                lanes, own = UNROLL * THREADS, partial[start:]
                _grad_norm_forward_kernel[(len(table),)](table, own, DTYPES[dtype], lanes, num_warps=THREADS // 32)
            start += len(table)
        _grad_norm_sum_kernel[(1,)](partial, out, start, BLOCK=SUM_BLOCK, num_warps=16)
    return out
