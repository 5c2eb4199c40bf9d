"""The attentive probe: learned queries read the latents of a frozen encoder, and a linear layer tells the class."""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from jepa_kernels._core.check import fail
from jepa_kernels.nn.attention import cross_attention
from jepa_kernels.nn.block import MLP, Block, init_weights, rescale_blocks
from jepa_kernels.nn.linear import Linear
from jepa_kernels.packing import Packing

PROBE_EPS = 1e-5  # of every norm in published probes; Hugging Face's have their encoder's, 1e-6


class CrossAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v with keys and values of other tokens, and no projection after it.

    unused_proj: hold the layer `proj`, frozen, that V-JEPA's files hold and nothing reads.
    """

    def __init__(self, embed_dim: int, num_heads: int, *, unused_proj: bool = False) -> None:
        super().__init__()
        if embed_dim % num_heads:
            fail("CrossAttention", "num_heads", f"divide embed_dim {embed_dim}", num_heads, "change either")
        self.num_heads = num_heads
        self.q = Linear(embed_dim, embed_dim)
        self.kv = Linear(embed_dim, 2 * embed_dim)
        if unused_proj:
            self.proj = Linear(embed_dim, embed_dim).requires_grad_(False)

    def forward(
        self, queries: Tensor, x: Tensor, packing: Packing | None = None, x_packing: Packing | None = None
    ) -> Tensor:
        """queries [B, Q, E] of x [B, N, E]; or packed, each with its packing -> like queries."""
        return cross_attention(self.q(queries), self.kv(x), self.num_heads, packing, x_packing)


class CrossAttentionBlock(nn.Module):
    """q += xattn(q, norm1(x)); q += mlp(norm2(q)). The queries themselves are not normed before they look."""

    def __init__(
        self, embed_dim: int, num_heads: int, mlp_ratio: float, *, eps: float = PROBE_EPS, unused_proj: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=eps)
        self.xattn = CrossAttention(embed_dim, num_heads, unused_proj=unused_proj)
        self.norm2 = nn.LayerNorm(embed_dim, eps=eps)
        self.mlp = MLP(embed_dim, int(embed_dim * mlp_ratio))

    def forward(
        self, queries: Tensor, x: Tensor, packing: Packing | None = None, x_packing: Packing | None = None
    ) -> Tensor:
        queries = queries + self.xattn(queries, self.norm1(x), packing, x_packing)
        return queries + self.mlp(self.norm2(queries))


class AttentivePooler(nn.Module):
    """Pool the latents of a clip: depth - 1 blocks of self-attention, without positions, then learned queries.

    num_heads: 16 in V-JEPA 2's probes whatever the encoder; V-JEPA's have the encoder's.
    depth: counts the block of cross-attention. V-JEPA 2's probes have 4, V-JEPA's 1.
    cross_first: the queries look first, and the blocks follow on them alone; with it comes the unused layer of
        `CrossAttention` (V-JEPA).
    Parameter names, and the start of all that is used, are those of the published code.
    Source: V-JEPA (arXiv:2404.08471), attentive probing; V-JEPA 2 (arXiv:2506.09985), its probes.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 16,
        depth: int = 4,
        *,
        num_queries: int = 1,
        mlp_ratio: float = 4.0,
        eps: float = PROBE_EPS,
        cross_first: bool = False,
    ) -> None:
        super().__init__()
        for name, count in (("depth", depth), ("num_queries", num_queries)):
            if count < 1:
                fail("AttentivePooler", name, "be at least 1", count, "published probes have 1 to 4 and 1 or 3")
        self.cross_first = cross_first
        self.query_tokens = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_queries, embed_dim), std=0.02))
        sizes = embed_dim, num_heads, mlp_ratio
        self.cross_attention_block = CrossAttentionBlock(*sizes, eps=eps, unused_proj=cross_first)
        self.blocks = nn.ModuleList(Block(*sizes, eps=eps) for _ in range(depth - 1))
        self.apply(init_weights)
        rescale_blocks(self.blocks, first=2 if cross_first else 1)
        n = 1 if cross_first else max(depth - 1, 1)  # after other blocks, the number of the last one, as published
        self.cross_attention_block.mlp.fc2.weight.data.div_(math.sqrt(2 * n))

    def forward(self, x: Tensor, packing: Packing | None = None, query_packing: Packing | None = None) -> Tensor:
        """x [B, N, E], or packed [T, E] of S sequences -> [B, Q, E] or [S, Q, E], a row for each query.

        query_packing: of S sequences of Q, `Packing.uniform`; built when left out; pass it in compiled code.
        """
        count = self.query_tokens.shape[1]
        if not self.cross_first:
            for block in self.blocks:
                x = block(x, packing)
        if packing is None:
            pooled = self.cross_attention_block(self.query_tokens.expand(x.shape[0], -1, -1), x)
        else:
            own = query_packing
            if own is None:
                own = Packing.uniform(packing.sequences, count, device=x.device)
            queries = self.query_tokens.expand(packing.sequences, -1, -1).flatten(0, 1)
            pooled = self.cross_attention_block(queries, x, own, packing).unflatten(0, (-1, count))
        if self.cross_first:
            for block in self.blocks:
                pooled = block(pooled)
        return pooled


class AttentiveClassifier(nn.Module):
    """The published probe: `pooler`, and a linear layer for each query.

    num_classes: how many; or {"verb": .., "noun": .., "action": ..} as in EPIC-KITCHENS-100, a query for each name, in
        this order: layers `verb_classifier`, ..., and logits by name.
    options: as of `AttentivePooler`, which takes the number of queries from num_classes.
    """

    def __init__(self, embed_dim: int, num_classes: int | Mapping[str, int], **options: Any) -> None:
        super().__init__()
        heads = {"linear": num_classes} if isinstance(num_classes, int) else _named(num_classes)
        self.names = None if isinstance(num_classes, int) else tuple(num_classes)
        self.pooler = AttentivePooler(embed_dim, num_queries=len(heads), **options)
        for name, classes in heads.items():
            self.add_module(name, Linear(embed_dim, classes))

    def forward(
        self, x: Tensor, packing: Packing | None = None, query_packing: Packing | None = None
    ) -> Tensor | dict[str, Tensor]:
        """x [B, N, E], or packed [T, E] of S sequences -> logits [B, classes] or [S, classes], or by name.

        query_packing: as of `AttentivePooler`.
        """
        pooled = self.pooler(x, packing, query_packing).unbind(1)
        if self.names is None:
            return cast(nn.Linear, self.linear)(pooled[0])
        heads = (cast(nn.Linear, self.get_submodule(f"{name}_classifier")) for name in self.names)
        return {name: head(query) for name, head, query in zip(self.names, heads, pooled, strict=True)}


def _named(classes: Mapping[str, int]) -> dict[str, int]:
    if not classes:
        fail("AttentiveClassifier", "num_classes", "name at least one head", "none", "pass a number, or names")
    return {f"{name}_classifier": count for name, count in classes.items()}
