"""Inputs that the conformance suite, the command line and the benchmarks share."""

from collections.abc import Callable
from typing import Any

import torch

from jepa_kernels._core.case import Case

Make = Callable[[torch.Generator], dict[str, Any]]


def embeddings(*shape: int, offset: float = 0.5) -> Make:
    """Trained-like: an offset, and outlier features an order of magnitude larger."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        z = torch.randn(shape, generator=generator, dtype=torch.float64)
        z[..., ::17] *= 12
        return dict(z=z + offset)

    return make


def _one_direction(generator: torch.Generator) -> dict[str, Any]:
    z = torch.randn(60, 1, generator=generator, dtype=torch.float64)
    return dict(z=z * torch.randn(24, generator=generator, dtype=torch.float64) + 3)


def _equal_rows(generator: torch.Generator) -> dict[str, Any]:
    return dict(z=torch.randn(24, generator=generator, dtype=torch.float64).repeat(50, 1))


def _rows_of_zeros(generator: torch.Generator) -> dict[str, Any]:
    z = embeddings(40, 20)(generator)["z"]
    z[::3] = 0
    return dict(z=z)


def dynamic(generator: torch.Generator, size: int) -> dict[str, Any]:
    return embeddings(2, 20 + 3 * size, 24)(generator)


DIFFERENTIABLE = ()
AUTOCAST = None
CASES = (
    Case("two_images", embeddings(2, 30, 24)),
    Case("more_features_than_rows", embeddings(19, 130)),
    Case("sampled_rows", embeddings(3, 700, 40)),
    Case("blocks", embeddings(600, 530)),
    Case("far_from_zero", embeddings(70, 33, offset=100.0)),
    Case("one_direction", _one_direction),
    Case("equal_rows", _equal_rows),
    Case("rows_of_zeros", _rows_of_zeros),
    Case("two_rows", embeddings(2, 5)),
    Case("one_row", embeddings(1, 7)),
    Case("one_feature", embeddings(50, 1)),
    Case("empty_batch", embeddings(0, 8)),
)
