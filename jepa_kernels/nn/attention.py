"""Multi-head attention."""

from typing import Any

from torch import Tensor, nn

import jepa_kernels as jk
from jepa_kernels._core.check import fail
from jepa_kernels.nn.linear import Linear, plain, product
from jepa_kernels.packing import Packing
from jepa_kernels.rotary import Rope


class Attention(nn.Module):
    """proj(softmax(q k^T / sqrt(D)) v), inside each sequence; `rope` turns q and k by their positions.

    The output of `qkv` is [3, H, D] per token; q, k and v are read in place, and get one gradient.
    """

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        if embed_dim % num_heads:
            fail("Attention", "num_heads", f"divide embed_dim {embed_dim}", num_heads, "change either")
        self.num_heads = num_heads
        self.qkv = Linear(embed_dim, 3 * embed_dim)
        self.proj = Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, packing: Packing | None = None, rope: Rope | None = None, **sight: Any) -> Tensor:
        """x [B, N, E], or packed [T, E] with `packing` -> the same shape.

        sight: frame_size and key_ranges of `masked_attention`, which keys a token sees; without: all.
        """
        return self.attend(self.qkv(x), packing, rope, **sight)

    def attend(self, qkv: Tensor, packing: Packing | None = None, rope: Rope | None = None, **sight: Any) -> Tensor:
        """What follows the first product: qkv [..., 3 E] -> [..., E]."""
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
        return self.proj(_merged(jk.masked_attention_qkv(qkv, packing, rope=rope, **sight), packing))

    def cross(
        self,
        x: Tensor,
        context: Tensor,
        packing: Packing | None = None,
        context_packing: Packing | None = None,
        rope: Rope | None = None,
    ) -> Tensor:
        """Queries of x alone, keys and values of context: x [..., E] -> the same shape."""
        parts = [x.shape[-1], 2 * x.shape[-1]]
        if type(self.qkv) is Linear and plain(self.qkv):
            (q_weight, kv_weight), (q_bias, kv_bias) = self.qkv.weight.split(parts), self.qkv.bias.split(parts)
            q, kv = product(x, q_weight, q_bias), product(context, kv_weight, kv_bias)
        else:  # an adapter in its place, or hooks: what it gives is more than its weights tell
            q, kv = self.qkv(x).split(parts, -1)[0], self.qkv(context).split(parts, -1)[1]
        return self.proj(cross_attention(q, kv, self.num_heads, packing, context_packing, rope))


def cross_attention(
    q: Tensor,
    kv: Tensor,
    num_heads: int,
    packing: Packing | None = None,
    k_packing: Packing | None = None,
    rope: Rope | None = None,
) -> Tensor:
    """Attention of queries to other tokens: q [..., E], kv [..., 2 E], dense or packed -> like q."""
    q, (k, v) = q.unflatten(-1, (num_heads, -1)), kv.unflatten(-1, (2, num_heads, -1)).unbind(-3)
    if packing is None:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return _merged(jk.masked_attention(q, k, v, packing, k_packing=k_packing, rope=rope), packing)


def _merged(out: Tensor, packing: Packing | None) -> Tensor:
    """The heads of an attention's output side by side: [..., E]."""
    return (out if packing is not None else out.transpose(1, 2)).flatten(-2)
