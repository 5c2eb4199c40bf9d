"""Inputs that the conformance suite, the command line and the benchmarks share."""

from collections.abc import Callable
from typing import Any

import torch

from jepa_kernels._core.case import Case

Make = Callable[[torch.Generator], dict[str, Any]]


def pairs(
    batch: int, channels: int, temperature: float = 0.0625, noise: float = 0.5, items: int = 0, **options: Any
) -> Make:
    """Pairs whose halves differ by `noise`, with outlier channels; items: labels drawn from so many."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        x, between = torch.randn(2, batch, channels, generator=generator, dtype=torch.float64)
        x[:, ::17] *= 4
        labels = torch.randint(items, (batch,), generator=generator) * 10**12 if items else None
        given = dict(options, duplicates=labels) if items else options
        return dict(x=x, y=x + noise * between, temperature=torch.tensor(temperature, dtype=torch.float64), **given)

    return make


def _by_number(generator: torch.Generator) -> dict[str, Any]:
    return {**pairs(12, 24)(generator), "temperature": 0.125}


def _constant_rows(generator: torch.Generator) -> dict[str, Any]:
    """One candidate like another, and rows that have no direction."""
    inputs = pairs(6, 24)(generator)
    inputs["x"][1:4] = inputs["x"][0]
    inputs["y"][2:] = 3.0
    return inputs


def dynamic(generator: torch.Generator, size: int) -> dict[str, Any]:
    return pairs(7 + 3 * size, 20)(generator)


ALL, EMBEDDINGS = ("x", "y", "temperature"), ("x", "y")
KEPT = ("temperature",)
DIFFERENTIABLE = (0, 1, 2)
AUTOCAST = None
CASES = (
    Case("pairs", pairs(8, 20), ALL, keep=KEPT, gradcheck=True),
    Case("two_tiles", pairs(300, 72), ALL, keep=KEPT),
    Case("sharp", pairs(70, 48, temperature=0.01), ALL, keep=KEPT),
    Case("flat", pairs(70, 48, temperature=4.0, noise=5.0), ALL, keep=KEPT),
    Case("number", _by_number, EMBEDDINGS),
    Case("smoothed", pairs(40, 33, label_smoothing=0.125), ALL, keep=KEPT),
    Case("duplicates", pairs(45, 32, items=12), ALL, keep=KEPT),
    Case("smoothed_duplicates", pairs(9, 8, items=4, label_smoothing=0.25), ALL, keep=KEPT, gradcheck=True),
    Case("one_item", pairs(5, 16, items=1), ALL, keep=KEPT),
    Case("as_they_are", pairs(30, 24, temperature=8.0, normalize=False), ALL, keep=KEPT),
    Case("constant_rows", _constant_rows, ALL, keep=KEPT),
    Case("one_channel", pairs(6, 1), ALL, keep=KEPT),
    Case("one_pair", pairs(1, 40), ALL, keep=KEPT),
    Case("empty_batch", pairs(0, 16), ALL, keep=KEPT),
)
