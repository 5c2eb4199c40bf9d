"""Inputs that the conformance suite, the command line and the benchmarks share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from jepa_kernels._core.case import Case

SHAPES = ((3, 5), (1,), (0,), (257,), (64, 64), (16385,), ())
STATE = ("params", "exp_avgs", "exp_avg_sqs", "steps", "targets")
SHADOWS = ("online_shadow", "target_shadow")
Make = Callable[[torch.Generator], dict[str, Any]]


def make(
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    *,
    targets: bool = True,
    shadows: tuple[torch.dtype | None, torch.dtype | None] = (None, None),
    missing: int = 0,
    step: float = 7.0,
    weights: float = 1.0,
    size: float = 1e-3,
    **options: Any,
) -> Make:
    """Gradients of `size`, an order of magnitude more or less from tensor to tensor; `step` steps lie behind.

    missing: every so manieth entry of each list that may lack one is None, of a different remainder for each list.
    """

    def draw(generator: torch.Generator) -> dict[str, Any]:
        def normal(scale: float = 1.0) -> list[torch.Tensor]:
            return [torch.randn(s, generator=generator, dtype=torch.float64) * scale for s in shapes]

        def some(values: list[torch.Tensor], remainder: int) -> list[torch.Tensor | None]:
            return [None if missing and i % missing == remainder else v for i, v in enumerate(values)]

        scales = [size * 10.0 ** (i % 5 - 2) for i in range(len(shapes))]
        inputs: dict[str, Any] = dict(
            params=normal(weights),
            grads=some([g * s for g, s in zip(normal(), scales, strict=True)], 0),
            exp_avgs=[m * s / 3 for m, s in zip(normal(), scales, strict=True)],
            exp_avg_sqs=[(v * s).square() for v, s in zip(normal(), scales, strict=True)],
            steps=[torch.tensor(step + i, dtype=torch.float64) for i in range(len(shapes))],
            **dict(lr=1e-3, weight_decay=0.04, momentum=0.996),
        )
        if targets:
            inputs["targets"] = some(normal(weights), 1)
        for name, dtype, kept in zip(SHADOWS, shadows, (2, 1), strict=True):
            if dtype is not None:
                inputs[name] = some([torch.zeros(s, dtype=dtype) for s in shapes], kept)
        return inputs | options

    return draw


def _first_step(generator: torch.Generator) -> dict[str, Any]:
    inputs = make(shadows=(torch.bfloat16, torch.bfloat16), step=0.0, weights=0.0, lr=0.5)(generator)
    for name in ("exp_avgs", "exp_avg_sqs", "steps"):
        inputs[name] = [torch.zeros_like(t) for t in inputs[name]]
    return inputs


def _flag(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def dynamic(generator: torch.Generator, size: int) -> dict[str, Any]:
    lr, momentum = (torch.tensor(x, dtype=torch.float32) for x in (1e-3 + 1e-4 * size, 0.996 + 0.0005 * size))
    return make(((16 + 8 * size, 4), (9, 3 + size)), lr=lr, momentum=momentum)(generator)


def case(name: str, drawn: Make) -> Case:
    """Everything but the gradients and the shadows stays fp32."""
    return Case(name, drawn, mutates=(*STATE, *SHADOWS), keep=(*STATE, "grad_scale", "found_inf"), strided=False)


DIFFERENTIABLE = ()
AUTOCAST = None
CASES = (
    case("with_targets", make()),
    case("adamw_alone", make(targets=False)),
    case("both_shadows", make(shadows=(torch.bfloat16, torch.bfloat16), step=4000.0)),
    case("mixed_shadows", make(shadows=(torch.float16, torch.bfloat16), weights=0.02)),
    case("online_shadow", make(targets=False, shadows=(torch.float16, None))),
    case("first_step_from_zero", _first_step),
    case("missing_entries", make(missing=3, shadows=(torch.bfloat16, torch.float16))),
    case("no_gradients", make(missing=1, shadows=(None, None), targets=False)),
    case("averages_alone", make(grads=[None] * len(SHAPES), shadows=(torch.bfloat16, torch.bfloat16))),
    case("maximize", make(maximize=True, weights=0.0, lr=0.1)),
    case("scaled", make(size=64.0, grad_scale=65536.0, found_inf=_flag(0.0), weights=0.0, lr=0.1)),
    case("skipped", make(grad_scale=128.0, found_inf=_flag(1.0), shadows=(torch.bfloat16, torch.bfloat16))),
    case("large_eps", make(eps=1e-3, betas=(0.5, 0.75), weights=0.0, lr=0.1)),
    case("no_momentum", make(betas=(0.0, 0.0), weight_decay=0.0, momentum=0.0, weights=0.0, lr=0.1)),
    case("frozen_average", make(momentum=1.0, lr=0.0, weight_decay=0.0)),
    case("empty", make(())),
)
