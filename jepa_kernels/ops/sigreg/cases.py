"""Inputs that the conformance suite, the command line and the benchmarks share."""

from collections.abc import Callable
from typing import Any

import torch

from jepa_kernels._core.case import Case

Make = Callable[[torch.Generator], dict[str, Any]]


def embeddings(*shape: int, scale: float = 1.0, offset: float = 0.0, **options: Any) -> Make:
    """Standard normal but for a scale and an offset."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        z = torch.randn(shape, generator=generator, dtype=torch.float64)
        return dict(z=z * scale + offset, **options)

    return make


def _few_directions(generator: torch.Generator) -> dict[str, Any]:
    """Nearly collapsed: three dimensions out of 40, and outlier features."""
    z = torch.randn(2, 50, 3, generator=generator, dtype=torch.float64)
    z = z @ torch.randn(3, 40, generator=generator, dtype=torch.float64)
    z[..., ::17] *= 12
    return dict(z=z, slices=70, step=9, seed=3)


def dynamic(generator: torch.Generator, size: int) -> dict[str, Any]:
    return embeddings(2, 20 + 3 * size, 12, slices=40)(generator)


DIFFERENTIABLE = (0,)
AUTOCAST = None
CASES = (
    Case("two_views", embeddings(2, 21, 12, slices=40), ("z",), gradcheck=True),
    Case("one_view", embeddings(70, 33, slices=130, step=2**40 + 7, seed=2**62 + 5), ("z",)),
    Case("views_and_frames", embeddings(2, 3, 5, 24, slices=9, knots=6, t_max=5.0), ("z",)),
    Case("wide_spread", embeddings(30, 16, scale=30.0, offset=2.0, slices=65), ("z",)),
    Case("many_knots", embeddings(30, 16, slices=20, knots=64, t_max=6.0), ("z",)),
    Case("two_knots", embeddings(9, 4, slices=3, knots=2), ("z",)),
    Case("few_directions", _few_directions, ("z",)),
    Case("all_zero", embeddings(37, 8, scale=0.0, slices=16), ("z",)),
    Case("one_row", embeddings(1, 5, slices=8), ("z",)),
    Case("one_feature", embeddings(6, 40, 1, slices=5), ("z",)),
    Case("empty_batch", embeddings(2, 0, 8, slices=6), ("z",)),
    Case("no_views", embeddings(0, 4, 8, slices=6), ("z",)),
)
