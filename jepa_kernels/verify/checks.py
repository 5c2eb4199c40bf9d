"""What a kernel is held to on one case: the error budget, and what is exact. The conformance suite asks the same."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from jepa_kernels._core import triton
from jepa_kernels._core.case import Case
from jepa_kernels._core.info import kernels
from jepa_kernels.testing import DTYPES, Parity, cast, check_case, map_tensors, op_module, poisoned_memory, public, run

# sdpa hands rows to a BLAS, which chooses its kernel by their strides: the bits are not ours to promise.
# The cuda row of masked_attention refuses them.
ONE_LAYOUT = {("masked_attention", "sdpa"), ("masked_attention", "cuda")}


def draw(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
    """The case's inputs in the dtype under test."""
    return cast(case.make(torch.Generator().manual_seed(seed)), dtype, device, case.keep)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal bits, NaN where the other has NaN."""
    return a.keys() == b.keys() and all(torch.equal(a[n].nan_to_num(7), b[n].nan_to_num(7)) for n in a)


def torch_answers(backend: str, device: str) -> bool:
    """sdpa on a GPU is PyTorch's kernels, whose sums are not ours to order. Where a check promises less of them it says
    so: fp32's largest error, bits of gradients from run to run, and bits under inductor, which lays tensors out anew.
    """
    return backend == "sdpa" and device == "cuda"


def typical(op: str) -> Case:
    """The op's first case: the one that the structural tests use."""
    return op_module(op, "cases").CASES[0]


def dtypes_of(op: str, backend: str, case: Case) -> list[torch.dtype]:
    """The dtypes under test that the kernel states; all where the case keeps its leading tensor in float32."""
    stated = next(k.dtypes for k in kernels(op) if k.backend == backend)
    return [d for d in DTYPES if case.keep or d in stated]


def leading_dtype(op: str, backend: str, case: Case) -> torch.dtype:
    """float32 where the kernel takes it."""
    return dtypes_of(op, backend, case)[0]


def budget(op: str, backend: str, case: Case, dtype: torch.dtype, device: str) -> list[Parity]:
    """Every output and gradient held against the error budget.

    sdpa's gradients are PyTorch's own rule, not ours to answer for. Of PyTorch's kernels in fp32 a single element may
    err twice as much as of ours; no other bound gives way.
    """
    if backend == "sdpa":
        case = replace(case, grads=())
    parities = check_case(op, backend, case, dtype, device)
    if torch_answers(backend, device) and dtype == torch.float32:
        return [replace(p, max_budget=2 * p.max_budget) for p in parities]
    return parities


def two_runs(op: str, backend: str, case: Case, dtype: torch.dtype, device: str) -> str | None:
    """The bits of two runs, one of them in poisoned memory; what differs, or None."""
    first = run(public(op, backend), draw(case, dtype, device), case)
    with poisoned_memory():
        second = run(public(op, backend), draw(case, dtype, device), case)
    if torch_answers(backend, device):  # backward may add in any order
        for name in [n for n in first if n.startswith("d")]:
            torch.testing.assert_close(first.pop(name), second.pop(name), equal_nan=True)
    return None if same(first, second) else "two runs differ"


def strided(op: str, backend: str, case: Case, dtype: torch.dtype, device: str) -> str | None:
    """The bits of inputs laid out in other ways; the layout that changes them, or None."""
    plain = run(public(op, backend), draw(case, dtype, device), case)
    for layout in (_spread, _transpose):
        found = run(public(op, backend), map_tensors(draw(case, dtype, device), layout), case)
        if not same(plain, found):
            return f"strides change the result ({layout.__name__[1:]})"
    return None


def takes_strides(op: str, backend: str, case: Case) -> bool:
    """Where `strided` is promised."""
    return case.strided and (op, backend) not in ONE_LAYOUT


def _spread(_: str, x: Tensor) -> Tensor:  # rows further apart than they are long, NaN between them
    if x.dim() == 0 or not x.is_floating_point():
        return x
    if x.dim() == 1:
        return torch.stack([x, torch.full_like(x, float("nan"))], 1)[:, 0]
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), float("nan"))
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def _transpose(_: str, x: Tensor) -> Tensor:  # the last dimension is not the one with stride 1
    return x.transpose(0, -1).contiguous().transpose(0, -1) if x.is_floating_point() and x.dim() > 1 else x


def promises_alone(op: str, backend: str) -> bool:
    """Where `alone` can be asked and holds; sdpa's BLAS is not ours to order, see above."""
    return backend != "sdpa" and hasattr(op_module(op, "cases"), "alone")


def alone(op: str, backend: str, case: Case, dtype: torch.dtype, device: str) -> str | None:
    """The bits of each packed sequence by itself, as the op's cases state it (`alone`); which one differs, or None."""
    inputs = draw(case, dtype, device)
    together = public(op, backend)(**inputs)
    for sequence, (call, rows) in enumerate(op_module(op, "cases").alone(inputs)):
        if not torch.equal(together[rows], public(op, backend)(**call)):
            return f"packed sequence {sequence} differs from itself alone"
    return None


def exact(op: str, backend: str, case: Case, dtype: torch.dtype, device: str) -> list[str]:
    """What of this case should be exact and is not.

    Triton's interpreter runs programs one after the other: no second run can differ for their order. It is slow: the
    others are asked in one dtype there.
    """
    held: list[Callable[..., str | None]] = []
    interpreted = backend == "triton" and triton.interpreting()
    if not interpreted:
        held.append(two_runs)
    if not interpreted or dtype == leading_dtype(op, backend, case):
        held += [strided] if takes_strides(op, backend, case) else []
        held += [alone] if promises_alone(op, backend) else []
    return [found for check in held if (found := check(op, backend, case, dtype, device)) is not None]
