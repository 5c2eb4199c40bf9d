"""Blocks as language models have them, of which VL-JEPA's predictor is made; here every token sees its whole sequence.

Parameter names are those of Llama in transformers, whose weights they take.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jepa_kernels as jk
from jepa_kernels._core.check import fail
from jepa_kernels.nn.linear import Linear
from jepa_kernels.packing import Packing
from jepa_kernels.rotary import Rope

NORM_EPS = 1e-5


class GroupedAttention(nn.Module):
    """o_proj(softmax(q k^T / sqrt(D)) v), inside each sequence; num_heads / num_kv_heads queries share a key."""

    def __init__(self, embed_dim: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        if embed_dim % num_heads:
            fail("GroupedAttention", "num_heads", f"divide embed_dim {embed_dim}", num_heads, "change either")
        if num_heads % num_kv_heads:
            fail("GroupedAttention", "num_kv_heads", f"divide num_heads {num_heads}", num_kv_heads, "change either")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        keys = embed_dim // num_heads * num_kv_heads
        self.q_proj = Linear(embed_dim, embed_dim, bias=False)
        self.k_proj = Linear(embed_dim, keys, bias=False)
        self.v_proj = Linear(embed_dim, keys, bias=False)
        self.o_proj = Linear(embed_dim, embed_dim, bias=False)

    def forward(self, x: Tensor, packing: Packing, rope: Rope) -> Tensor:
        """Packed [T, E] -> the same shape."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, -1))
        k, v = (proj(x).unflatten(-1, (self.num_kv_heads, -1)) for proj in (self.k_proj, self.v_proj))
        return self.o_proj(jk.masked_attention(q, k, v, packing, rope=rope).flatten(-2))


class GatedMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x))."""

    def __init__(self, embed_dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = Linear(embed_dim, hidden, bias=False)
        self.up_proj = Linear(embed_dim, hidden, bias=False)
        self.down_proj = Linear(hidden, embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderBlock(nn.Module):
    """Pre-norm by root mean squares: x += self_attn(input_layernorm(x)); x += mlp(post_attention_layernorm(x))."""

    def __init__(self, embed_dim: int, num_heads: int, num_kv_heads: int, hidden: int, *, eps: float = NORM_EPS):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(embed_dim, eps=eps)
        self.self_attn = GroupedAttention(embed_dim, num_heads, num_kv_heads)
        self.post_attention_layernorm = nn.RMSNorm(embed_dim, eps=eps)
        self.mlp = GatedMLP(embed_dim, hidden)

    def forward(self, x: Tensor, packing: Packing, rope: Rope) -> Tensor:
        """Packed [T, E] -> the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), packing, rope)
        return x + self.mlp(self.post_attention_layernorm(x))


def llama_frequencies(width: int, theta: float, scaling: Mapping[str, float] | None = None) -> Tensor:
    """fp32 [width / 2]: theta ** (-2 j / width), by which a head's channels turn with the token's place.

    scaling: of Llama 3.1 and 3.2, {factor, low_freq_factor, high_freq_factor, original_max_position_embeddings}: turns
        that take longer than original / low tokens are slowed by `factor`, those of fewer than original / high stay,
        and between the two the slowing fades in linearly in the number of turns.
    """
    frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    if scaling is None:
        return frequencies
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])
