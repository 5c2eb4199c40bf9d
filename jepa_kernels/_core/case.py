"""What an op's `cases.py` states: named inputs that the conformance suite, `verify` and the benchmarks share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One call of an op.

    make(generator) returns the public function's keyword arguments with floating tensors in float64 on the
    CPU; the suite casts them to the dtype under test (but for those in `keep`, cast to float32) and moves them.
    """

    name: str
    make: Callable[[torch.Generator], dict[str, Any]]
    grads: tuple[str, ...] = ()  # arguments that get a gradient
    mutates: tuple[str, ...] = ()  # arguments changed in place; they are the outputs then
    keep: tuple[str, ...] = field(default=())  # arguments that stay float32 whatever the dtype under test
