"""Numeric parity: the error budget, `compare` for anyone's function, and running an op's cases on a backend.

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
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from jepa_kernels._core.case import Case
from jepa_kernels._core.check import fail
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


def hold(name: str, actual: Tensor, exact: Tensor, eager: Tensor, cap: float = float("inf")) -> Parity:
    """Hold `actual` against `exact` (float64 reference); `eager` is the reference in actual's dtype.

    Where eager overflows it allows no error: `actual` must be as far off in the same way, or within the rest's budget.
    """
    if actual.shape != exact.shape or actual.dtype != eager.dtype:
        raise AssertionError(
            f"{name}: must be {eager.dtype} {tuple(exact.shape)}, got {actual.dtype} {tuple(actual.shape)}"
        )
    if actual.numel() == 0:
        return Parity(name, 0.0, 0.0, 0.0, 0.0, 0.0, cap)
    exact = exact.double()
    error, allowed = _error(actual, exact), _error(eager, exact)
    beyond = ~allowed.isfinite()
    error = error.masked_fill(beyond & (_error(actual, eager.double()) == 0), 0.0)
    allowed = allowed.masked_fill(beyond, 0.0)
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


@dataclass(frozen=True)
class Statement:
    """What `compare` found: each output and each gradient held against the budget."""

    parities: list[Parity]

    @property
    def ok(self) -> bool:
        """Every tensor within the budget."""
        return all(p.ok for p in self.parities)

    def check(self) -> None:
        """Raise AssertionError that names each tensor out of the budget, with its numbers."""
        if not self.ok:
            raise AssertionError("\n".join(str(p) for p in self.parities if not p.ok))

    def __str__(self) -> str:
        return "\n".join(f"{'ok  ' if p.ok else 'FAIL'} {p}" for p in self.parities)


def compare(
    fn: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: dict[str, Any] | tuple[Any, ...],
    *,
    grads: tuple[str | int, ...] = (),
    dtype: torch.dtype | None = None,
) -> Statement:
    """Hold anyone's function to the error budget of this module's first lines.

    exact = reference(inputs in float64), eager = reference(inputs), actual = fn(inputs), its memory poisoned with NaN:
    max|actual - exact| <= 2 max|eager - exact| + 2 ulp, and both bounds of the RMS error. Each runs on fresh copies.

    inputs: keyword arguments, or a tuple of positional ones. Floating tensors are cast to `dtype` (None: stay as they
        are); float64 takes their values from there, so that the rounding of inputs is no error.
    grads: arguments, by name or position; the gradient of sum(output * fixed random weights) is held too, "d<name>".
    fn, reference: return a floating tensor, or a tuple, list or dict of them; of one shape, and in the inputs' dtype of
        one dtype.

    >>> from torch.nn.functional import gelu
    >>> x = torch.linspace(-3, 3, 100)
    >>> print(compare(lambda x: x * (0.5 + 0.5 * torch.erf(x * 0.5**0.5)), gelu, {"x": x}, grads=("x",)).ok)
    True
    >>> print(compare(lambda x: gelu(x, approximate="tanh"), gelu, (x,)).ok)
    False

    Raises ValueError and TypeError for bad arguments, AssertionError where fn's outputs differ in number, shape or
    dtype, or have no gradient. Source: FlashAttention's test rule, see above.
    """
    named = _named_inputs(inputs, dtype)
    case = Case("compare", lambda generator: named, grads=_named_grads(named, grads))
    positional = not isinstance(inputs, dict)
    exact, eager = (run(_plain("reference", reference, positional), copy(named), case) for copy in (upcast, _fresh))
    for name in _without_grad(case, exact):
        fail("compare", "reference", f"have a gradient of {name}", "none", "leave it out of grads")
    with poisoned_memory():
        actual = run(_plain("fn", fn, positional), _fresh(named), case)
    for name in _without_grad(case, actual):
        raise AssertionError(f"fn: must have a gradient of {name}, got none")
    if actual.keys() != exact.keys():
        raise AssertionError(f"fn: must return {_outputs(exact)} outputs, got {_outputs(actual)}")
    return Statement([hold(n, actual[n], exact[n], eager[n]) for n in exact])


def _named_inputs(inputs: Any, dtype: torch.dtype | None) -> dict[str, Any]:
    if not isinstance(inputs, (dict, tuple)):
        remedy = "write {'x': x} or (x,)"
        fail("compare", "inputs", "be a dict or a tuple of arguments", type(inputs).__name__, remedy, TypeError)
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        fail("compare", "dtype", "be a floating dtype", dtype, "leave it out to keep the inputs' own", TypeError)
    named = inputs if isinstance(inputs, dict) else {str(i): x for i, x in enumerate(inputs)}
    return map_tensors(named, lambda _, x: x.to(dtype) if dtype is not None and x.is_floating_point() else x)


def _named_grads(named: dict[str, Any], grads: tuple[str | int, ...]) -> tuple[str, ...]:
    able = [n for n, x in named.items() if isinstance(x, Tensor) and x.is_floating_point()]
    names = tuple(map(str, (grads,) if isinstance(grads, (str, int)) else grads))
    for name in names:
        if name not in able:
            fail("compare", "grads", f"name floating tensors of inputs ({', '.join(able)})", repr(name), "leave it out")
    return names


def _plain(name: str, function: Callable[..., Any], positional: bool) -> Callable[..., Any]:
    """As `run` calls it: keyword arguments, and a tuple of tensors."""

    def call(**inputs: Any) -> tuple[Tensor, ...]:
        found = function(*inputs.values()) if positional else function(**inputs)
        found = tuple(found.values()) if isinstance(found, dict) else found
        outputs = tuple(found) if isinstance(found, (tuple, list)) else (found,)
        for i, x in enumerate(outputs):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                actual = x.dtype if isinstance(x, Tensor) else type(x).__name__
                fail("compare", f"{name}'s output {i}", "be a floating tensor", actual, "wrap the function", TypeError)
        return outputs

    return call


def _without_grad(case: Case, results: dict[str, Tensor]) -> list[str]:
    return [name for name in case.grads if f"d{name}" not in results]


def _outputs(results: dict[str, Tensor]) -> int:
    return sum(n.startswith("output") for n in results)


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
    """Apply `change(argument, tensor)` to every tensor of a call, those in lists, tuples and dicts included."""

    def one(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(name, value)
        if isinstance(value, dict):
            return {key: one(name, v) for key, v in value.items()}
        if isinstance(value, (list, tuple)):
            parts = [one(name, v) for v in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        return value

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


def _fresh(inputs: dict[str, Any]) -> dict[str, Any]:
    return map_tensors(inputs, lambda _, x: x.detach().clone())


def upcast(inputs: dict[str, Any]) -> dict[str, Any]:
    """The identical values in float64, as fresh tensors."""
    return map_tensors(inputs, lambda _, x: (x.double() if x.is_floating_point() else x).clone())


def run(function: Callable[..., Any], inputs: dict[str, Any], case: Case) -> dict[str, Tensor]:
    """Outputs (or mutated arguments) and gradients of sum(output * fixed weights), by name; none, no entry."""
    for name in case.grads:
        inputs[name] = inputs[name].detach().requires_grad_()
    output = function(**inputs)
    if case.mutates:
        named = [(f"{n}[{i}]", t) for n in case.mutates for i, t in enumerate(inputs.get(n, ()))]
        return {name: t for name, t in named if t is not None}
    outputs = output if isinstance(output, tuple) else (output,)
    results = {f"output{i}": x for i, x in enumerate(outputs)}
    if case.grads:
        held = [x for x in outputs if x.requires_grad]
        weights = [w.to(x.device, x.dtype) for x, w in zip(held, _weights(*(x.shape for x in held)), strict=True)]
        grads = torch.autograd.grad(held, [inputs[n] for n in case.grads], weights, allow_unused=True) if held else ()
        results.update({f"d{n}": g for n, g in zip(case.grads, grads, strict=False) if g is not None})
    return {name: x.detach() for name, x in results.items()}


@lru_cache(maxsize=1)  # a case's runs follow one another
def _weights(*shapes: torch.Size) -> list[Tensor]:
    """Held exactly by every dtype under test: rounding them in one run and not in the other would count as error.

    Half of them are 2^-8 as large as the others: a sum of two gradients then has more bits than bf16 and fp16 hold, and
    shows how it is rounded. A scalar's is a power of two, like a GradScaler's: `latent_loss` in bf16 rounds a second
    time by any other, all elements of an L1 loss alike, which no mean over elements evens out.
    """
    generator = torch.Generator().manual_seed(1)
    return [_weights_of(shape, generator) for shape in shapes]


def _weights_of(shape: torch.Size, generator: torch.Generator) -> Tensor:
    small = torch.randint(2, shape, generator=generator)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    if not shape:
        return drawn.sign() * (1 + small)
    drawn = (drawn * torch.where(small > 0, 2.0**-8, 1.0)).to(torch.bfloat16).double()
    least = torch.finfo(torch.float16).tiny
    return torch.where(drawn.abs() < least, least, drawn)


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
    for name in _without_grad(case, actual):
        raise AssertionError(f"{op}: must have a gradient of {name}, got none")
    caps = getattr(cases, "CAPS", {})
    return [hold(n, actual[n], exact[n], eager[n], caps.get(dtype, float("inf"))) for n in exact]
