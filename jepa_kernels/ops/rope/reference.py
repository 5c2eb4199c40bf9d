"""Specification of `rope`: the table of cosines and signed sines, and the turn by it."""

from typing import Any

import torch
from torch import Tensor

from jepa_kernels.rotary import Rope, rope_of, turn


def forward(x: Tensor, positions: Tensor | Rope, **options: Any) -> Tensor:
    """x [T, H, D] or [B, H, N, D] turned by its positions; options: of `Rope`."""
    rope = rope_of("rope", positions, **options)
    return tokens_first(turn(tokens_first(x), rope.turns(x.shape[-1], plain=True)[0], rope.half))


def forward_qk(
    q: Tensor, k: Tensor, positions: Tensor | Rope, *, k_positions: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Queries and keys, the keys by `k_positions` where they have their own."""
    rope = rope_of("rope_qk", positions, k_positions, **options)
    q, k = rope.turn(tokens_first(q), tokens_first(k))
    return tokens_first(q), tokens_first(k)


def tokens_first(x: Tensor) -> Tensor:
    """[B, H, N, D] as [B, N, H, D] and back, a view; [T, H, D] as it is."""
    return x if x.dim() == 3 else x.transpose(1, 2)


def turns(positions: Tensor, frequencies: Tensor | None, theta: float, pairing: str, width: int) -> Tensor:
    """The table of `Rope.turns`: fp32 [..., 2, R] for positions [..., a] in the type of the angles."""
    pairs = width // positions.shape[-1] // 2  # A / 2
    if frequencies is None:
        exponents = torch.arange(pairs, device=positions.device, dtype=torch.float64) / max(pairs, 1)
        frequencies = (theta**-exponents).float().to(positions.dtype)
    angles = positions[..., None] * frequencies
    cos, sin = angles.cos().float(), angles.sin().float()  # of each pair's frequency
    if pairing == "interleaved":
        cos, sin = torch.stack([cos, cos], -1).flatten(-2), torch.stack([-sin, sin], -1).flatten(-2)
    elif pairing == "half":
        cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    else:
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        sin = torch.where(torch.arange(2 * pairs, device=sin.device) % 2 == 0, -sin, sin)
    return torch.stack([cos.flatten(-2), sin.flatten(-2)], -2)
