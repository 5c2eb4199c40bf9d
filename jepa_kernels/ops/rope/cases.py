"""Inputs that the conformance suite, the command line and the benchmarks share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jepa_kernels._core.case import Case
from jepa_kernels.rotary import Rope

Make = Callable[[torch.Generator], dict[str, Any]]


def places(generator: torch.Generator, *tokens: int, axes: int) -> Tensor:
    """Frames, rows and columns of patches, fp32 [..., axes]; some lie between two patches, beside others on them."""
    grid, between = torch.randint(0, 24, (2, *tokens, axes), generator=generator)
    return grid + 0.25 * (between % 5 == 1)


def packed(tokens: int, heads: int, width: int, axes: int = 3, **options: Any) -> Make:
    def make(generator: torch.Generator) -> dict[str, Any]:
        x = torch.randn(tokens, heads, width, generator=generator, dtype=torch.float64)
        return dict(x=x, positions=places(generator, tokens, axes=axes), **options)

    return make


def dense(batch: int, heads: int, tokens: int, width: int, axes: int = 3, each: bool = False, **options: Any) -> Make:
    """each: every sequence has its own positions."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        x = torch.randn(batch, heads, tokens, width, generator=generator, dtype=torch.float64)
        shape = (batch, tokens) if each else (tokens,)
        return dict(x=x, positions=places(generator, *shape, axes=axes), **options)

    return make


def qkv_view(batch: int, tokens: int, heads: int, width: int) -> Make:
    """Queries where a qkv product left them, and a Rope for positions."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        qkv = torch.randn(batch, tokens, 3, heads, width, generator=generator, dtype=torch.float64)
        positions = places(generator, batch, tokens, axes=3)
        return dict(x=qkv[:, :, 0].transpose(1, 2), positions=Rope(positions, pairing="tiled"))

    return make


def _outlier_channels(generator: torch.Generator) -> dict[str, Any]:
    """Trained-like: a few channels an order of magnitude larger, and an offset; positions far from 0."""
    inputs = packed(40, 3, 80, pairing="tiled")(generator)
    inputs["x"][..., ::17] *= 12
    inputs["x"] += 0.5
    inputs["positions"] += 1000
    return inputs


def dynamic(generator: torch.Generator, size: int) -> dict[str, Any]:
    return packed(7 + 3 * size, 2, 16)(generator)


FREQUENCIES = torch.tensor([1.0, 0.3125, 0.1, 0.03])
DIFFERENTIABLE = (0,)
AUTOCAST = None
CASES = (
    Case("packed_d16", packed(7, 2, 16), ("x",), gradcheck=True),
    Case("tiled_d64", packed(70, 3, 64, pairing="tiled"), ("x",)),
    Case("tiled_d32_odd_pairs", dense(2, 3, 33, 32, pairing="tiled"), ("x",)),
    Case("interleaved_d80", dense(2, 2, 17, 80, each=True), ("x",)),
    Case("half_d40", dense(2, 3, 9, 40, axes=1, pairing="half"), ("x",), gradcheck=True),
    Case("half_d33_leftover", packed(9, 2, 33, axes=1, pairing="half", theta=100.0), ("x",)),
    Case("two_axes_d23", packed(20, 1, 23, axes=2, pairing="tiled"), ("x",)),
    Case("smallest_d2", packed(5, 3, 2, axes=1), ("x",)),
    Case("largest_d256", packed(6, 2, 256), ("x",)),
    Case("one_axis_d255", dense(1, 1, 5, 255, axes=1, each=True), ("x",)),
    Case("qkv_view_d88", qkv_view(2, 13, 2, 88), ("x",)),
    Case("frequencies_bf16_angles", packed(30, 2, 24, frequencies=FREQUENCIES, angle_dtype=torch.bfloat16), ("x",)),
    Case("outlier_channels_d80", _outlier_channels, ("x",)),
    Case("empty_batch", dense(0, 2, 5, 16), ("x",)),
    Case("empty_rows", packed(0, 2, 16), ("x",)),
)
