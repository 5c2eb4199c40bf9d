"""Inputs that the conformance suite, the command line and the benchmarks share."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from jepa_kernels._core.case import Case

Make = Callable[[torch.Generator], dict[str, Any]]


def layer(
    *shape: int, width: int, bias: bool = True, change: Callable[[Tensor], Tensor] | None = None, **options: Any
) -> Make:
    """x of `shape` and weights of the layer's initial size, N = `width`; `change` is made to a fresh x."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        x = randn(*shape)
        x = x if change is None else change(x)
        depth = x.shape[-1]
        weight = randn(width, depth) / max(depth, 1) ** 0.5
        return dict(x=x, weight=weight, bias=randn(width) if bias else None, **options)

    return make


def transposed_weight(*shape: int, width: int) -> Make:
    """A weight that is stored [K, N]."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        drawn = layer(*shape, width=width)(generator)
        return drawn | dict(weight=drawn["weight"].t().contiguous().t())

    return make


def dynamic(generator: torch.Generator, size: int) -> dict[str, Any]:
    return layer(2, 5 + 3 * size, 40, width=24)(generator)


def alone(inputs: dict[str, Any]) -> Iterator[tuple[dict[str, Any], slice]]:
    """The first and the last part of a batch: rows know nothing of their neighbours."""
    x = inputs["x"]
    for i in {0, len(x) - 1} if x.dim() > 1 and len(x) else ():
        yield inputs | dict(x=x[i : i + 1]), slice(i, i + 1)


def tails(generator: torch.Generator) -> dict[str, Any]:
    """Products down to -14 and up to 14 through an identity: both tails of the GELU."""
    x = torch.linspace(-14, 14, 40 * 24, dtype=torch.float64).view(40, 24)
    return dict(x=x, weight=torch.eye(24, dtype=torch.float64), bias=torch.zeros(24).double(), activation="gelu")


EVERY, NO_BIAS = ("x", "weight", "bias"), ("x", "weight")
DIFFERENTIABLE = (0, 1, 2)
AUTOCAST = EVERY
CASES = (
    Case("tokens", layer(2, 5, 12, width=7), EVERY, gradcheck=True),
    Case("one_row", layer(1, 64, width=33), EVERY),
    Case("lone_row", layer(300, width=20), EVERY),
    Case("one_channel", layer(13, 1, width=1), EVERY, gradcheck=True),
    Case("one_output", layer(97, 129, width=1), EVERY),
    Case("narrow_input", layer(97, 3, width=100), EVERY),
    Case("odd_sizes", layer(97, 257, width=65), EVERY),
    Case("deep", layer(13, 700, width=17), EVERY),
    Case("deeper_than_a_chunk", layer(13, 1600, width=17), EVERY),
    Case("blocks", layer(130, 384, width=192), EVERY),
    Case("many_rows", layer(530, 70, width=50), EVERY),
    Case("no_bias", layer(3, 31, 48, width=96, bias=False), NO_BIAS),
    Case("clips", layer(2, 3, 11, 40, width=30), EVERY),
    Case("transposed_rows", layer(37, 61, width=48, change=lambda x: x.t()), EVERY),
    Case("tokens_of_slices", layer(3, 20, 80, width=24, change=lambda x: x[:, 4:, 16:56]), EVERY),
    Case("expanded_rows", layer(1, 52, width=21, change=lambda x: x.expand(29, 52)), ("weight", "bias")),
    Case("transposed_weight", transposed_weight(45, 77, width=40), EVERY),
    Case("gelu", layer(2, 9, 12, width=7, activation="gelu"), EVERY, gradcheck=True),
    Case("gelu_blocks", layer(130, 100, width=80, activation="gelu"), EVERY),
    Case("gelu_deeper_than_a_chunk", layer(13, 1600, width=17, activation="gelu"), EVERY),
    Case("gelu_no_bias", layer(3, 31, 48, width=96, bias=False, activation="gelu"), NO_BIAS),
    Case("gelu_tails", tails, EVERY),
    Case("gelu_frozen_weight", layer(40, 56, width=72, activation="gelu"), ("x",)),
    Case("gelu_frozen_rows", layer(40, 56, width=72, activation="gelu"), ("weight", "bias")),
    Case("gelu_empty_batch", layer(0, 4, 24, width=16, activation="gelu"), EVERY),
    Case("frozen_weight", layer(40, 56, width=72), ("x",)),
    Case("frozen_rows", layer(40, 56, width=72), ("weight", "bias")),
    Case("empty_batch", layer(0, 4, 24, width=16), EVERY),
    Case("empty_middle", layer(2, 0, 3, 24, width=16), EVERY),
    Case("empty_rows", layer(6, 0, width=5), EVERY),
)
