"""One workload of an op into rows: parity first, then time, memory and the share of the machine's peak."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import jepa_kernels as jk
from benchmarks import timing
from benchmarks.memory import peak_bytes
from benchmarks.rows import Row, failed, key, repro, timed_row
from benchmarks.workload import Inputs, Workload, stated
from jepa_kernels import testing
from jepa_kernels.cost import Cost

OURS = "ours"
DRAWS = 4  # inputs on which what is chaotic in a whole model, its rounding errors, is held to the budget
# A rival computes the same thing another way: held to the dtype's precision, not to our error budget.
RIVAL_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Settings:
    """How a session measures."""

    device: str = "cpu"
    threads: int = 2
    budget_s: float = 2.0
    min_rounds: int = 15
    baseline: str | None = None  # only this rival
    backend: str | None = None  # of ours; None: as chosen by itself
    peaks: dict[str, Any] | None = None


class Run:
    """One (op, workload, stage, dtype)."""

    def __init__(self, op: str, workload: Workload, stage: str, dtype: str, settings: Settings):
        self.op, self.workload, self.stage, self.dtype, self.settings = op, workload, stage, dtype, settings
        self.group = f"{op}/{workload.name}/{stage}/{dtype}"
        self.made: Inputs | None = None
        case = workload.case
        self.function = workload.function or op
        self.named = {} if settings.backend is None else {"backend": settings.backend}
        self.public = getattr(jk, self.function)
        self.reference = workload.reference or testing.op_module(op, "reference").forward
        self.case = case if stage == "backward" else type(case)(**{**case.__dict__, "grads": ()})

    def inputs(self) -> Inputs:
        """Fresh inputs, the same at every call."""
        if self.made is None:
            self.made = self.workload.make(torch.Generator().manual_seed(0))
        return self.cast(self.made)

    def checked(self) -> Inputs:
        """The inputs that parity is checked on: those that are timed, or fewer."""
        small = self.workload.small
        return self.inputs() if small is None else self.cast(small(torch.Generator().manual_seed(0)))

    def cast(self, made: Inputs) -> Inputs:
        return testing.cast(made, getattr(torch, self.dtype), self.settings.device, self.workload.keep)

    def functions(self, inputs: Inputs) -> dict[str, Callable[[], Any]]:
        """Ours, the reference, the compiled reference where asked for, and the rivals, on these inputs."""
        public, ours = self.public, partial(self.public, **self.named)
        found = {OURS: lambda: ours(**inputs), "reference": lambda: public(**inputs, backend="reference")}
        timed = self.workload.reference_timed
        if not (self.workload.small is None if timed is None else timed):
            del found["reference"]
        if self.stage in self.workload.compile:
            compiled = torch.compile(self.reference, dynamic=False)
            found["compile"] = lambda: compiled(**inputs)
        found.update(self.workload.rivals(inputs))
        wanted = self.settings.baseline
        return {name: f for name, f in found.items() if wanted in (None, name) or name == OURS}

    def cost(self, inputs: Inputs) -> Cost:
        """The least that a call moves and computes, whichever backend runs it."""
        w = self.workload
        if w.bytes and w.flops:
            return Cost(w.bytes(inputs, self.stage), w.flops(inputs, self.stage))
        ours, leaves = partial(self.public, **inputs), self.leaves(inputs)
        with torch.set_grad_enabled(bool(leaves)):
            found = stated(with_backward(ours, leaves) if leaves else ours)
        return found._replace(**({"bytes": w.bytes(inputs, self.stage)} if w.bytes else {}))

    def leaves(self, inputs: Inputs) -> list[Tensor]:
        return [inputs[name].requires_grad_() for name in self.case.grads]

    def common(self, inputs: Inputs, cost: Cost | None) -> Row:
        """What all rows of this run share. cost: None where no kernel runs it."""
        s = self.settings
        return {
            "kind": "op",
            "name": self.op,
            "workload": self.workload.name,
            "pass": self.stage,
            "dtype": self.dtype,
            "device": s.device,
            "backend": jk.explain(self.function, **inputs, **self.named).split()[1],
            "bytes": None if cost is None else cost.bytes,
            "flops": None if cost is None else cost.flops,
            "threads": s.threads,
        }

    def parity(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Ours against the float64 reference, within the error budget; and the exact results."""
        exact = testing.run(self.reference, testing.upcast(self.checked()), self.case)
        eager = testing.run(self.reference, self.checked(), self.case)
        ours = testing.run(partial(self.public, **self.named), self.checked(), self.case)
        caps = getattr(testing.op_module(self.op, "cases"), "CAPS", {})
        cap = caps.get(getattr(torch, self.dtype), float("inf"))
        return verdict([testing.hold(n, ours[n], exact[n], eager[n], cap) for n in exact]), exact

    def rival_error(self, name: str, exact: dict[str, Tensor]) -> str | None:
        """Why a rival's time would mean nothing: it fails, or computes something else."""
        try:
            actual = testing.run(lambda **inputs: self.functions(inputs)[name](), self.checked(), self.case)
            for output, wanted in exact.items():
                found = actual[output]
                if found.shape != wanted.shape:
                    return f"{output} has shape {tuple(found.shape)}, ours {tuple(wanted.shape)}"
                error = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
                if not error <= RIVAL_TOLERANCE[found.dtype]:
                    return f"{output} differs from the exact result by {error:.2g} of its norm"
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        return None

    def timed(self, inputs: Inputs) -> dict[str, Callable[[], Any]]:
        """What is timed: forward alone, or forward and backward to the same gradient."""
        leaves, functions = self.leaves(inputs), self.functions(inputs)
        return {n: with_backward(f, leaves) for n, f in functions.items()} if leaves else functions

    def rows(self, drive: Callable[..., object] = timing.loop) -> list[Row]:
        """Measure. A red parity, or a backend that can't run it, fails every row and times nothing."""
        s, inputs = self.settings, self.inputs()
        try:
            parity, exact = self.parity()
        except jk.BackendError as refused:
            common = {**self.common(inputs, None), "parity": verdict([])}
            return self.finish([failed(common, n, str(refused)) for n in self.functions(inputs) if n != OURS])
        common = {**self.common(inputs, self.cost(inputs)), "parity": parity}
        names = [n for n in self.functions(inputs) if n != OURS]
        if not parity["pass"]:
            return self.finish([failed(common, n, "parity: outside the error budget") for n in names])
        errors = {n: self.rival_error(n, exact) for n in names}
        del exact
        with torch.set_grad_enabled(self.stage == "backward"):
            functions = {n: f for n, f in self.timed(inputs).items() if errors.get(n) is None}
            self.made = None
            times = timing.interleave(
                functions,
                budget_s=s.budget_s,
                rounds=(s.min_rounds, 300),
                clock=timing.Clock(s.device),
                drive=drive,
            )
            memory = {} if times.interrupted else {n: peak_bytes(f, s.device) for n, f in functions.items()}
        found = self.finish([self.row(common, n, errors[n], times, memory) for n in names])
        if times.interrupted:
            raise Interrupted(found)
        return found

    def row(self, common: Row, name: str, error: str | None, times: timing.Times, memory: dict[str, int]) -> Row:
        if error:
            return failed(common, name, error)
        row = timed_row(common, name, times.of(OURS), times.of(name), times.interrupted)
        share = None
        if row["ours_us"] is not None and self.settings.peaks and self.settings.device == "cpu":
            floor = floor_seconds(row["bytes"], row["flops"], self.dtype, self.workload.traffic, self.settings.peaks)
            share = floor * 1e6 / row["ours_us"]["p50"]
        return {
            **row,
            "share_of_peak": share,
            "peak_bytes": memory.get(OURS),
            "baseline_peak_bytes": memory.get(name),
        }

    def finish(self, found: list[Row]) -> list[Row]:
        s = self.settings
        return [{**row, "repro": repro(key(row), s.device, s.threads, s.backend)} for row in found]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in the middle of a run; carries the rows measured so far."""

    def __init__(self, found: list[Row]):
        super().__init__("interrupted")
        self.rows = found


def verdict(checks: list[testing.Parity]) -> dict[str, Any]:
    """The worst tensor's error and budget; of none, no pass."""
    if not checks:
        return {"pass": False, "max_err": None, "budget": None, "tensor": None}
    worst = max(checks, key=lambda p: float("inf") if not p.ok else p.max_err / max(p.max_budget, 1e-300))
    return {
        "pass": all(p.ok for p in checks),
        "max_err": worst.max_err if worst.max_err == worst.max_err else None,
        "budget": worst.max_budget,
        "tensor": worst.name,
    }


def as_published(function: Callable[..., Any]) -> Callable[..., Any]:
    """A rival's form on layers of ours: as its authors run it, it multiplies by PyTorch."""

    def call(*args: Any) -> Any:
        with jk.use_backend("reference"):
            return function(*args)

    return call


def with_backward(function: Callable[[], Any], leaves: list[Tensor], **options: Any) -> Callable[[], Any]:
    """Forward, then the gradients of `leaves` for a fixed gradient of the outputs; 1 for a loss, as in training.

    options: of torch.autograd.grad.
    """
    generator = torch.Generator().manual_seed(2)

    def outputs() -> list[Tensor]:
        out = function()
        return [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]

    found = outputs()
    grads = [(torch.randn(x.shape, generator=generator) if x.dim() else torch.ones(())).to(x) for x in found]
    return lambda: torch.autograd.grad(outputs(), leaves, grads, **options)


def share_of_fma(settings: Settings, flops_per_s: float) -> float | None:
    """Of the fp32 multiply-adds that this processor was seen to do."""
    if settings.peaks is None or settings.device != "cpu":
        return None
    return flops_per_s / 1e9 / settings.peaks["fma_gflops"]["float32"]


def floor_seconds(bytes_: float, flops: float, dtype: str, traffic: str, peaks: dict[str, Any]) -> float:
    """The least time that this machine needs: bytes at its bandwidth or operations at its peak."""
    rate = peaks["fma_gflops"].get(dtype) or peaks["fma_gflops"]["float32"]
    return max(bytes_ / peaks[f"{traffic}_gbs"], flops / rate) / 1e9
