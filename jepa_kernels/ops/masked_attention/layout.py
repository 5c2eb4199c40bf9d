"""How outputs and gradients of `masked_attention` lie in memory, whoever computes them."""

import torch
from torch import Tensor


def views(qkv: Tensor) -> tuple[Tensor, ...]:
    """q, k and v, [T, H, D] or [B, H, N, D], of [T, 3, H, D] or [B, N, 3, H, D]."""
    return qkv.unbind(1) if qkv.dim() == 4 else tuple(x.transpose(1, 2) for x in qkv.unbind(2))


def empty_like(x: Tensor) -> Tensor:
    """[T, H, D], or a [B, H, N, D] view of contiguous [B, N, H, D]: the layout of every output and gradient."""
    if x.dim() == 3:
        return x.new_empty(x.shape)
    batch, heads, tokens, width = x.shape
    return x.new_empty(batch, tokens, heads, width).transpose(1, 2)


def empty_lse(q: Tensor) -> Tensor:
    """[H, T], or [B, H, N]."""
    rows = (q.shape[1], q.shape[0]) if q.dim() == 3 else q.shape[:3]
    return q.new_empty(rows, dtype=torch.float32)


def empty_qkv(q: Tensor) -> Tensor:
    """One gradient of q, k and v: [T, 3, H, D], or [B, N, 3, H, D]."""
    if q.dim() == 3:
        return q.new_empty(q.shape[0], 3, *q.shape[1:])
    return q.new_empty(q.shape[0], q.shape[2], 3, q.shape[1], q.shape[3])
