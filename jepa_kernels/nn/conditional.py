"""The predictor that an action steers at every block: LeWorldModel's, one token a frame."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

import jepa_kernels as jk
from jepa_kernels.nn.block import NORM_EPS
from jepa_kernels.nn.linear import Linear
from jepa_kernels.nn.modulation import Modulation, modulate


class Net(nn.Module):
    """Layers one after the other, with the published names `net.0`, `net.1`, ..."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class CausalAttention(nn.Module):
    """W softmax(q k^T / sqrt(D)) v + b of the normed tokens, each seeing itself and those before it.

    The heads' width is their own: q, k and v have num_heads * head_dim channels, whatever embed_dim is.
    dropout: of what comes out alone; the published code drops the softmax's weights in training too.
    """

    def __init__(self, embed_dim: int, num_heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, inner = num_heads, num_heads * head_dim
        self.norm = nn.LayerNorm(embed_dim)
        self.to_qkv = Linear(embed_dim, 3 * inner, bias=False)
        self.to_out = nn.Sequential(Linear(inner, embed_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, E] -> the same shape."""
        qkv = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1))
        return self.to_out(jk.masked_attention_qkv(qkv, frame_size=1).transpose(1, 2).flatten(-2))


class ConditionalBlock(nn.Module):
    """x += gate attn(modulate(norm1 x)); x += gate' mlp(modulate'(norm2 x)): a condition modulates and gates.

    norm1 and norm2 have no weights; attention and MLP have norms of their own behind the modulation, as published.
    """

    def __init__(self, embed_dim: int, num_heads: int, head_dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=NORM_EPS, elementwise_affine=False)
        self.attn = CausalAttention(embed_dim, num_heads, head_dim, dropout)
        self.norm2 = nn.LayerNorm(embed_dim, eps=NORM_EPS, elementwise_affine=False)
        widen, narrow = Linear(embed_dim, hidden), Linear(hidden, embed_dim)
        self.mlp = Net(nn.LayerNorm(embed_dim), widen, nn.GELU(), nn.Dropout(dropout), narrow, nn.Dropout(dropout))
        self.adaLN_modulation = Modulation(embed_dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x and condition [B, T, E] -> [B, T, E]."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(condition)
        x = x + gate * self.attn(modulate(self.norm1(x), shift, scale))
        return x + mlp_gate * self.mlp(modulate(self.norm2(x), mlp_shift, mlp_scale))


class ConditionalPredictor(nn.Module):
    """Frames' embeddings with learned places and the actions taken in them -> what follows each, seeing no later one.

    frames: how many there are places for. Source: LeWorldModel (arXiv:2603.19312).
    """

    def __init__(
        self, frames: int, embed_dim: int, depth: int, num_heads: int, head_dim: int, hidden: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.randn(1, frames, embed_dim))
        layers = (ConditionalBlock(embed_dim, num_heads, head_dim, hidden, dropout) for _ in range(depth))
        self.transformer = nn.ModuleDict({"layers": nn.ModuleList(layers), "norm": nn.LayerNorm(embed_dim)})

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x and condition [B, T, E], T at most `frames` -> [B, T, E]."""
        x = x + self.pos_embedding[:, : x.shape[1]]
        for layer in cast(nn.ModuleList, self.transformer["layers"]):
            x = layer(x, condition)
        return self.transformer["norm"](x)
