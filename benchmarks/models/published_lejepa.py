"""LeJEPA's step as an eager recipe computes it, on the same weights: the rival of ours."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.bench_sigreg import published
from jepa_kernels import patch_positions
from jepa_kernels.models.lejepa import LeJEPA, Losses
from jepa_kernels.nn import Attention, Encoder
from jepa_kernels.ops.sigreg.reference import directions


class Published(LeJEPA):
    """Size after size of the views, each a batch of its own through SDPA; SIGReg with the angles, cosines and sines of
    every row, slice and knot in memory. Its directions are ours of the first step: drawing them is not timed."""

    def embed(self, views: Tensor, local: Tensor | None = None) -> Tensor:  # type: ignore[override]
        sizes = [views] if local is None else [views, local]
        pooled = [encode(self.backbone, stack.transpose(0, 1).flatten(0, 1)).mean(1) for stack in sizes]
        return torch.cat([x.unflatten(0, (-1, len(views))) for x in pooled])

    def losses(self, projected: Tensor) -> Losses:
        c = self.config
        invariance = (projected - projected[: c.global_views].mean(0)).square().mean()
        drawn = first_directions(projected.shape[-1], c.slices, self.sigreg.seed, projected.device)
        sigreg = published(projected, c.slices, drawn, c.knots)
        return Losses((1 - c.weight) * invariance + c.weight * sigreg, invariance, sigreg)


@lru_cache
def first_directions(width: int, slices: int, seed: int, device: torch.device) -> Tensor:
    return directions(width, slices, 0, seed, device)


def encode(encoder: Encoder, pixels: Tensor) -> Tensor:
    proj, blocks = encoder.patch_embed.proj, encoder.blocks
    x = F.conv2d(normalized(encoder, pixels), proj.weight, proj.bias, stride=proj.stride).flatten(2).transpose(1, 2)
    turn = turns(encoder, encoder.grid_of(pixels))
    for block in blocks:
        x = x + attend(block.attn, block.norm1(x), turn)
        x = x + block.mlp(block.norm2(x))
    return encoder.norm(x)


def normalized(encoder: Encoder, pixels: Tensor) -> Tensor:
    mean, std = (pixels.new_tensor(v, dtype=torch.float32)[:, None, None] for v in channel_statistics(encoder))
    return (pixels / 255 - mean) / std


def channel_statistics(encoder: Encoder) -> tuple[Sequence[float], Sequence[float]]:
    assert encoder.patch_embed.mean is not None and encoder.patch_embed.std is not None
    return encoder.patch_embed.mean, encoder.patch_embed.std


def turns(encoder: Encoder, grid: tuple[int, int, int]) -> Tensor:
    """e^(i angle) of every patch and pair of channels, complex [N, head_dim / 2]; the last pairs may not turn."""
    pairs, every = encoder.head_dim // 3 // 2, torch.arange(torch.Size(grid).numel())
    frequencies = 10000.0 ** (-torch.arange(pairs, dtype=torch.float32) / pairs)
    angles = (patch_positions(every, grid)[..., None] * frequencies).flatten(1)
    angles = F.pad(angles, (0, encoder.head_dim // 2 - angles.shape[1]))
    return torch.polar(torch.ones_like(angles), angles)


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """As a product of complex numbers: the quickest of the short forms."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def attend(attention: Attention, x: Tensor, turn: Tensor) -> Tensor:
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(turned(q, turn), turned(k, turn), v)
    return attention.proj(out.transpose(1, 2).flatten(2))
