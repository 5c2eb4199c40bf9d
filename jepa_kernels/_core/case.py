"""What an op's `cases.py` states: named inputs that the conformance suite, `verify` and the benchmarks share.

CASES           the cases; the first is typical and small, one is an empty batch (named so)
CAPS            {dtype: bound of the relative Frobenius error}, optional
DIFFERENTIABLE  positions of the differentiable inputs in the torch op's schema
AUTOCAST        arguments that autocast casts to its low type; None: the op runs as it is
alone(inputs)   of a packed call, each sequence's own call and the rows of its output, which are equal; optional
dynamic(generator, size)  inputs like the first case's, of lengths that depend on size (0, 1, 2, ...)
"""

from collections.abc import Callable
from dataclasses import dataclass
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
    keep: tuple[str, ...] = ()  # arguments that stay float32 whatever the dtype under test
    strided: bool = True  # False: the op takes contiguous tensors only
    gradcheck: bool = False  # small enough for a numerical gradient of the reference
