"""The rows of a verification, op x backend x device x dtype, and running their cases."""

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from jepa_kernels._core import triton
from jepa_kernels._core.case import Case
from jepa_kernels._core.info import kernels
from jepa_kernels._core.select import DEVICES, BackendError, short, unavailable
from jepa_kernels.ops import OPS
from jepa_kernels.testing import DTYPES, Parity, op_module
from jepa_kernels.verify import checks

BACKENDS = tuple(DEVICES)


@dataclass(frozen=True)
class Result:
    """One case of a row. refused: why the kernel does not take this call, which its table states."""

    case: str
    parities: list[Parity]
    problems: list[str]  # what is out of the budget, not exact, or raised
    seconds: float
    refused: str | None = None


@dataclass
class Row:
    """One op on one backend, device and dtype. reason: why it can't run here, None where it can."""

    op: str
    backend: str
    device: str
    dtype: torch.dtype
    reason: str | None
    results: list[Result] = field(default_factory=list)
    complete: bool = False

    @property
    def cases(self) -> list[Case]:
        """The op's cases that this dtype has: a case that keeps its leading tensor in float32 has all."""
        every = op_module(self.op, "cases").CASES
        return [c for c in every if self.dtype in checks.dtypes_of(self.op, self.backend, c)]

    @property
    def verdict(self) -> str:
        """`fail`, `skipped`, `partial` or `pass`; one case that fails decides."""
        if any(r.problems for r in self.results):
            return "fail"
        if self.reason is not None:
            return "skipped"
        return "pass" if self.complete else "partial"

    @property
    def seconds(self) -> float:
        """Of all cases so far."""
        return sum(r.seconds for r in self.results)

    def worst(self, bound: str) -> float:
        """The largest error over its budget, of `max` or `rms`; NaN counts as infinite."""
        return max((_ratio(p, bound) for r in self.results for p in r.parities), default=0.0)


def _ratio(parity: Parity, bound: str) -> float:
    error, allowed = getattr(parity, f"{bound}_err"), getattr(parity, f"{bound}_budget")
    if error <= 0:
        return 0.0
    ratio = error / allowed if allowed else float("inf")
    return ratio if ratio == ratio else float("inf")


def rows(
    ops: Sequence[str] = OPS,
    backends: Sequence[str] = BACKENDS,
    dtypes: Sequence[torch.dtype] = DTYPES,
    device: str | None = None,
) -> list[Row]:
    """Every row of these; device None: the CPU, and the GPU where there is one or a backend needs one."""
    return [
        Row(op, kernel.backend, kind, dtype, reason(kernel.backend, kind))
        for op in ops
        for kernel in kernels(op)
        if kernel.backend in backends
        for kind in _devices(kernel.backend, device)
        for dtype in dtypes
        if any(dtype in checks.dtypes_of(op, kernel.backend, c) for c in op_module(op, "cases").CASES)
    ]


def _devices(backend: str, device: str | None) -> list[str]:
    if device is not None:
        return [device] if device in DEVICES[backend] else []
    if torch.cuda.is_available():
        return list(DEVICES[backend])
    return ["cpu"] if "cpu" in DEVICES[backend] else ["cuda"]


def reason(backend: str, device: str) -> str | None:
    """Why a backend can't run on a device here, or None."""
    if device == "cuda" and not torch.cuda.is_available():
        return unavailable(backend, device) or "no CUDA device"
    return unavailable(backend, device)


def prepare() -> None:
    """Make Triton's interpreter exact where this process uses it; before any kernel runs."""
    if triton.interpreting() and importlib.util.find_spec("triton") is not None:
        from jepa_kernels.verify import interpreter

        interpreter.install()


def run_row(row: Row) -> None:
    """Run the row's cases into `row.results`, each as it is done."""
    for case in row.cases if row.reason is None else ():
        row.results.append(run_case(row, case))
    row.complete = True


def run_case(row: Row, case: Case) -> Result:
    """One case: the budget, and what is exact."""
    started = time.perf_counter()
    parities: list[Parity] = []
    problems: list[str] = []
    refused, ran = None, False
    try:
        parities = checks.budget(row.op, row.backend, case, row.dtype, row.device)
        ran, problems = True, [str(p) for p in parities if not p.ok]
        problems += checks.exact(row.op, row.backend, case, row.dtype, row.device)
    except BackendError as error:  # a limit that the row states; none may refuse its op's first case, or a call it ran
        refused = None if ran else str(error)
        problems += [str(error)] if ran or case.name == checks.typical(row.op).name else []
    except Exception as error:  # of a kernel or its compiler, whatever it is: a mismatch of this case
        problems.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}")
    return Result(case.name, parities, problems, time.perf_counter() - started, refused)


def title(row: Row) -> str:
    """`rope-cpu-cpu-float32`, as test ids say it."""
    return f"{row.op}-{row.backend}-{row.device}-{short(row.dtype)}"
