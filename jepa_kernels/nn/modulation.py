"""Adaptive layer norm: a condition shifts, scales and gates what a block does to its tokens (DiT, arXiv:2212.09748)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jepa_kernels.nn.linear import Linear


class Modulation(nn.Sequential):
    """W silu(c) + b, split into `parts` vectors as wide as c; parameters `1.weight` and `1.bias`, as upstream's.

    dim: D, width of condition and tokens. parts: in a block 6, in the published order (shift, scale, gate of the
        attention, then of the MLP).
    std: of the weight's normal start; the bias starts at 0. Default 0: AdaLN-zero, every part is 0 and a gated branch
        adds nothing. JEPA-WMs start at 0.2.
    """

    def __init__(self, dim: int, parts: int = 6, *, std: float = 0.0) -> None:
        linear = Linear(dim, parts * dim)
        nn.init.normal_(linear.weight, std=std) if std else nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        super().__init__(nn.SiLU(), linear)
        self.parts = parts

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """condition [..., D] -> `parts` of that shape, views of one product.

        One vector serves many tokens by broadcasting: pass [..., T, 1, D] for tokens [..., T, N, D] of T frames.
        """
        return super().forward(condition).chunk(self.parts, -1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, in one pass over x: [..., N, D] with shift and scale that broadcast to it."""
    return torch.addcmul(shift, x, 1 + scale)
