"""Numeric parity: the error budget, and running an op's cases on a backend and on the reference.

The budget, per output and per gradient, against the float64 reference on identical inputs:
max error <= 2 x the error of the same-dtype reference + 2 ulp of the largest value,
RMS error <= 1.25 x its RMS error + the same floor, and
RMS error <= 1.7 x its RMS error + 2 fp32 ulp of the largest value.
The RMS bounds catch a bias that the maximum hides. The last one catches a cast that truncates (2 x the error of
rounding) and leaves room for a second rounding (1.41 x) and for another order of fp32 sums.
Source: FlashAttention's test rule (github.com/Dao-AILab/flash-attention), with the RMS bounds added.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from jepa_kernels._core.case import Case
from jepa_kernels.packing import Packing
from jepa_kernels.rotary import Rope

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Parity:
    """One tensor held against the budget."""

    name: str
    max_err: float
    max_budget: float
    rms_err: float
    rms_budget: float
    relative: float  # Frobenius norm of the error over that of the exact result
    cap: float

    @property
    def ok(self) -> bool:
        """Within all three bounds; a NaN error is not."""
        return self.max_err <= self.max_budget and self.rms_err <= self.rms_budget and self.relative <= self.cap

    def __str__(self) -> str:
        return (
            f"{self.name}: max error {self.max_err:.3g} (budget {self.max_budget:.3g}), "
            f"rms {self.rms_err:.3g} (budget {self.rms_budget:.3g}), relative {self.relative:.3g} (cap {self.cap:.3g})"
        )


def compare(name: str, actual: Tensor, exact: Tensor, eager: Tensor, cap: float = float("inf")) -> Parity:
    """Hold `actual` against `exact` (float64 reference); `eager` is the reference in actual's dtype."""
    if actual.shape != exact.shape or actual.dtype != eager.dtype:
        raise AssertionError(
            f"{name}: must be {eager.dtype} {tuple(exact.shape)}, got {actual.dtype} {tuple(actual.shape)}"
        )
    if actual.numel() == 0:
        return Parity(name, 0.0, 0.0, 0.0, 0.0, 0.0, cap)
    exact = exact.double()
    error, allowed = _error(actual, exact), _error(eager, exact)
    allowed_rms, twice_largest = _rms(allowed), 2 * exact.nan_to_num(0, 0, 0).abs().max().item()
    floor, fp32_floor = (twice_largest * torch.finfo(d).eps for d in (actual.dtype, torch.float32))
    norm = exact.nan_to_num(0, 0, 0).norm().item()
    return Parity(
        name,
        error.max().item(),
        2 * allowed.max().item() + floor,
        _rms(error),
        min(1.25 * allowed_rms + floor, 1.7 * allowed_rms + fp32_floor),
        error.norm().item() / norm if norm > 0 else 0.0,
        cap,
    )


def _error(actual: Tensor, exact: Tensor) -> Tensor:
    # Equal infinities are no error; a NaN on one side stays NaN and fails every bound.
    actual = actual.double()
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    return torch.where(same, 0.0, (actual - exact).abs())


def _rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every uninitialised allocation with NaN (floats) or the largest integer."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = fill


def op_module(op: str, part: str) -> ModuleType:
    """`jepa_kernels.ops.<op>.<part>`: its op, reference or cases."""
    return importlib.import_module(f"jepa_kernels.ops.{op}.{part}")


def public(op: str, backend: str) -> Callable[..., Any]:
    """The op as users call it, on one backend."""
    import jepa_kernels

    function = getattr(jepa_kernels, op)
    return lambda **inputs: function(**inputs, backend=backend)


def map_tensors(inputs: dict[str, Any], change: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    """Apply `change(argument, tensor)` to every tensor of a call, lists included."""

    def one(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(name, value)
        return [one(name, v) for v in value] if isinstance(value, list) else value

    return {name: one(name, value) for name, value in inputs.items()}


def cast(
    inputs: dict[str, Any], dtype: torch.dtype, device: torch.device | str, keep: tuple[str, ...] = ()
) -> dict[str, Any]:
    """A case's float64 inputs in the dtype under test (`keep`: in float32), on a device, fresh, strides kept."""

    def change(name: str, x: Tensor) -> Tensor:
        to = (torch.float32 if name in keep else dtype) if x.dtype == torch.float64 else x.dtype
        if 0 in x.stride():  # expanded: one place in memory for many elements can't be copied into
            return x.to(device=device, dtype=to, copy=True)
        return torch.empty_strided(x.shape, x.stride(), dtype=to, device=device).copy_(x)

    moved = map_tensors(inputs, change)
    return {k: v.to(device) if isinstance(v, (Packing, Rope)) else v for k, v in moved.items()}


def upcast(inputs: dict[str, Any]) -> dict[str, Any]:
    """The identical values in float64, as fresh tensors."""
    return map_tensors(inputs, lambda _, x: (x.double() if x.is_floating_point() else x).clone())


def run(function: Callable[..., Any], inputs: dict[str, Any], case: Case) -> dict[str, Tensor]:
    """Outputs (or mutated arguments) and gradients of sum(output * fixed weights), by name."""
    for name in case.grads:
        inputs[name] = inputs[name].detach().requires_grad_()
    output = function(**inputs)
    if case.mutates:
        named = [(f"{n}[{i}]", t) for n in case.mutates for i, t in enumerate(inputs.get(n, ()))]
        return {name: t for name, t in named if t is not None}
    outputs = output if isinstance(output, tuple) else (output,)
    results = {f"output{i}": x for i, x in enumerate(outputs)}
    if case.grads:
        weights = torch.Generator().manual_seed(1)
        total = sum((x.double() * _weights(x, weights)).sum() for x in outputs if x.requires_grad)
        grads = torch.autograd.grad(total, [inputs[n] for n in case.grads])
        results.update({f"d{n}": g for n, g in zip(case.grads, grads, strict=True)})
    return {name: x.detach() for name, x in results.items()}


def _weights(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype).double()


def check_case(
    op: str, backend: str, case: Case, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> list[Parity]:
    """Run one case on a backend, in poisoned memory, and hold every output and gradient against the budget."""
    reference, cases = op_module(op, "reference"), op_module(op, "cases")
    drawn = case.make(torch.Generator().manual_seed(0))
    inputs = cast(drawn, dtype, device, case.keep)
    exact = run(reference.forward, upcast(inputs), case)
    eager = run(reference.forward, cast(drawn, dtype, device, case.keep), case)
    with poisoned_memory():
        actual = run(public(op, backend), inputs, case)
    caps = getattr(cases, "CAPS", {})
    return [compare(n, actual[n], exact[n], eager[n], caps.get(dtype, float("inf"))) for n in exact]
