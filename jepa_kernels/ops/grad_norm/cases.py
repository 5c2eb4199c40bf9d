"""Inputs that the conformance suite, the command line and the benchmarks share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from jepa_kernels._core.case import Case

SHAPES = ((3, 5), (1,), (0,), (257,), (64, 64), (16385,), ())


def make(shapes: Sequence[tuple[int, ...]] = SHAPES, size: float = 1e-3) -> Callable[[torch.Generator], dict[str, Any]]:
    """Gradients around `size`, one tensor in ten times larger than the one before."""

    def draw(generator: torch.Generator) -> dict[str, Any]:
        return dict(
            grads=[
                torch.randn(s, generator=generator, dtype=torch.float64) * size * 10 ** (i % 4)
                for i, s in enumerate(shapes)
            ]
        )

    return draw


def _special(value: float) -> Callable[[torch.Generator], dict[str, Any]]:
    def draw(generator: torch.Generator) -> dict[str, Any]:
        inputs = make()(generator)
        inputs["grads"][-2][-1] = value
        return inputs

    return draw


def dynamic(generator: torch.Generator, size: int) -> dict[str, Any]:
    return make(((16 + 8 * size, 4), (9, 3 + size)))(generator)


DIFFERENTIABLE = ()
AUTOCAST = None
CASES = (
    Case("ordinary", make(), strided=False),
    Case("large", make(size=20.0), strided=False),
    Case("squares_beyond_fp32", make(size=1e22), strided=False),
    Case("squares_below_fp32", make(size=1e-28), strided=False),
    Case("one", make(((1,),)), strided=False),
    Case("zero", make(size=0.0), strided=False),
    Case("infinite", _special(float("inf")), strided=False),
    Case("nan", _special(float("nan")), strided=False),
    Case("empty_tensors", make(((0,), (3, 0))), strided=False),
    Case("empty", make(()), strided=False),
)
