"""What an op's benchmark file states: workloads and rivals. Everything else (parity, timing, rows) is shared.

WORKLOADS are timed; SMALL ones are calls whose instructions are counted (benchmarks/instructions.py).
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_kernels._core.case import Case
from jepa_kernels.cost import Cost, total
from jepa_kernels.profiling.notes import Notes

Inputs = dict[str, Any]


def no_rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    return {}


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One wrapper for all runs: a compiled function is found again by its identity."""
    return torch.compile(function, dynamic=False)


@dataclass(frozen=True)
class Workload:
    """One call of an op at a size that JEPA training meets.

    name        as in the row, e.g. "vit_h14_context"
    make        make(generator) -> keyword arguments of the public function, floats in float64 on the CPU, as in
                the op's cases.py; float64 tensors are cast to the dtype under test (in `keep`: float32) and moved
    bytes       bytes(inputs, stage) -> the least that has to be moved: every needed input read once, every output
                written once ("backward" = forward + backward). None: what the op's cost.py states of the kernels that a
                call runs; of its own where both passes as one need not move what is kept for the second
    flops       flops(inputs, stage) -> the useful operations, a multiply-add being two. None: likewise
    rivals      rivals(inputs) -> {name: function of no arguments} doing the same work on the same inputs; what is
                built outside the functions (masks, index tensors) is not timed. An output must have the shape of
                ours. "reference" is added by itself; a "compile" of your own replaces the compiled reference
    reference_timed  False where the reference takes seconds and says little: rivals alone are timed. None: it is
                timed unless parity is checked on a smaller call
    grads       arguments that get a gradient: adds the stage "backward"
    mutates     arguments changed in place: they are compared instead of the output
    dtypes      each is a run of its own
    traffic     which measured bandwidth bounds it: "copy", "read" or "rmw" (read, modify, write in place)
    compile     stages in which torch.compile of the reference is timed too; compiling takes seconds, so few
    function    the public function, where the op has several; `reference` then is its specification
    devices     where it is measured: sizes that fill a GPU take minutes on a CPU
    small       make, of a smaller call of the same kind, on which parity is checked where the reference of the timed
                call would not fit into memory, or take longer than all timing
    smoke       part of the one-minute run, in fp32
    """

    name: str
    make: Callable[[torch.Generator], Inputs]
    bytes: Callable[[Inputs, str], float] | None = None
    flops: Callable[[Inputs, str], float] | None = None
    rivals: Callable[[Inputs], dict[str, Callable[[], Any]]] = no_rivals
    grads: tuple[str, ...] = ()
    mutates: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32",)
    traffic: str = "copy"
    compile: tuple[str, ...] = ()
    function: str | None = None
    reference: Callable[..., Any] | None = None
    devices: tuple[str, ...] = ("cpu",)
    small: Callable[[torch.Generator], Inputs] | None = None
    reference_timed: bool | None = None
    smoke: bool = False

    @property
    def stages(self) -> tuple[str, ...]:
        return ("forward", "backward") if self.grads else ("forward",)

    @property
    def case(self) -> Case:
        """The same call as the conformance suite sees it."""
        return Case(self.name, self.make, grads=self.grads, mutates=self.mutates, keep=self.keep)


class Dispatched(TorchDispatchMode):
    """Lets every call through; ops of long lists then go through the dispatcher, where they are noted."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def stated(call: Callable[[], Any]) -> Cost:
    """What ops state of the kernels that a call runs."""
    notes = Notes()
    notes.begin()
    try:
        with Dispatched():
            call()
    finally:
        notes.end()
    return total(cost for note in notes if (cost := note.cost()) is not None)


def each(op: str, workloads: Iterable[Workload]) -> pytest.MarkDecorator:
    """Parametrize a test over (op, workload, stage, dtype). The id is the row's key: `op/workload/stage/dtype`."""
    runs = [
        pytest.param(op, w, stage, dtype, id=f"{op}/{w.name}/{stage}/{dtype}")
        for w in workloads
        for dtype in w.dtypes
        for stage in w.stages
    ]
    return pytest.mark.parametrize("op, workload, stage, dtype", runs)


def nbytes(*tensors: Tensor | Iterable[Tensor]) -> int:
    """Bytes of tensors and of lists of tensors, each counted once."""
    flat = [t for x in tensors for t in ([x] if isinstance(x, Tensor) else x)]
    return sum(t.numel() * t.element_size() for t in flat)
