"""Inputs that the conformance suite, the command line and the benchmarks share."""

from collections.abc import Callable
from typing import Any

import torch

from jepa_kernels._core.case import Case

SHAPES = ((3, 5), (1,), (0,), (257,), (64, 64), (16385,), ())


def _make(form: str, momentum: float, shadow: torch.dtype | None) -> Callable[[torch.Generator], dict[str, Any]]:
    def make(generator: torch.Generator) -> dict[str, Any]:
        def draw() -> list[torch.Tensor]:
            return [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]

        inputs: dict[str, Any] = dict(target=draw(), online=draw(), momentum=momentum, form=form)
        if shadow is not None:
            inputs["shadow"] = [torch.zeros(s, dtype=shadow) for s in SHAPES]
        return inputs

    return make


def _from_zero(generator: torch.Generator) -> dict[str, Any]:
    """1 - momentum alone decides: a target that begins at zero shows its rounding."""
    drawn = _make("lerp", 0.99925, None)(generator)
    return {**drawn, "target": [torch.zeros_like(t) for t in drawn["target"]]}


def _empty(generator: torch.Generator) -> dict[str, Any]:
    return dict(target=[], online=[], momentum=0.5)


def dynamic(generator: torch.Generator, size: int) -> dict[str, Any]:
    def draw() -> list[torch.Tensor]:
        return [torch.randn(16 + 8 * size, 4, generator=generator, dtype=torch.float64) for _ in range(2)]

    momentum = torch.tensor(0.996 + 0.0005 * size, dtype=torch.float32)
    return dict(target=draw(), online=draw(), momentum=momentum)


DIFFERENTIABLE = ()
AUTOCAST = None
CASES = (
    *(
        Case(
            f"{form}_{momentum}_{shadow}",
            _make(form, momentum, shadow),
            mutates=("target", "shadow"),
            keep=("target",),
            strided=False,
        )
        for form in ("lerp", "ijepa", "vjepa2")
        for momentum, shadow in ((0.996, None), (0.99925, torch.bfloat16), (0.0, torch.float16), (1.0, None))
    ),
    Case("from_zero", _from_zero, mutates=("target",), keep=("target",), strided=False),
    Case("empty", _empty, mutates=("target",), keep=("target",), strided=False),
)
