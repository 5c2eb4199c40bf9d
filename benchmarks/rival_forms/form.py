"""One public form to be timed, and how its gradient is taken."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]


@dataclass(frozen=True)
class Form:
    """One row to be: `make(device, dtype)` builds the inputs and returns the function to time."""

    name: str
    workload: str
    make: Callable[[str, torch.dtype], Run]
    bytes: float
    flops: float = 0.0
    stage: str = "forward"
    fp32: bool = False  # fp32 on every device; else bf16 on a GPU, fp32 on the CPU
    compiles: bool = False  # minutes of compilation come last


def step(function: Callable[..., Tensor], *inputs: Tensor) -> Run:
    """Forward and backward for a fixed gradient of the output."""
    leaves = [x.requires_grad_() for x in inputs]
    grad = torch.ones_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def timed(stage: str, function: Callable[..., Tensor], *inputs: Tensor) -> Run:
    return step(function, *inputs) if stage == "backward" else lambda: function(*inputs)
