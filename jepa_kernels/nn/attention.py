"""Multi-head self-attention."""

from torch import Tensor, nn

import jepa_kernels as jk
from jepa_kernels._core.check import fail
from jepa_kernels.packing import Packing


class Attention(nn.Module):
    """proj(softmax(q k^T / sqrt(D)) v), inside each sequence.

    The output of `qkv` is [3, H, D] per token; q, k and v are read in place, and get one gradient.
    """

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        if embed_dim % num_heads:
            fail("Attention", "num_heads", f"divide embed_dim {embed_dim}", num_heads, "change either")
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """x [B, N, E], or packed [T, E] with `packing` -> the same shape."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        out = jk.masked_attention_qkv(qkv, packing)
        return self.proj((out if packing is not None else out.transpose(1, 2)).flatten(-2))
