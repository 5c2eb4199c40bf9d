"""`masked_attention` by torch's scaled_dot_product_attention, with its own gradient (atomics on some devices)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from jepa_kernels.packing import Packing


def forward(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, k_packing: Packing | None, scale: float
) -> Tensor:
    """Dense as it is; packed through padding, so that compiled code never reads the lengths."""
    if packing is None:  # token-major memory, which most of torch's kernels write anyway
        return _attend(q, k, v, None, scale).transpose(1, 2).contiguous().transpose(1, 2)
    k_packing = packing if k_packing is None else k_packing
    lengths = k_packing.cu_seqlens.diff()[:, None]
    column = torch.arange(k_packing.max_seqlen, device=q.device)
    # A sequence without keys looks at the padding, whose values are 0: no row is masked as a whole.
    keep = ((column < lengths) | (lengths == 0))[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (packing.pad(q), k_packing.pad(k), k_packing.pad(v)))
    out = _attend(q, k, v, keep, scale)
    return packing.unpad(out.transpose(1, 2))


def _attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> Tensor:
    if q.numel() == 0 or k.numel() == 0:  # nothing to look at: 0, and no value of an input reaches the gradients
        return torch.zeros_like(q) + sum(x[..., :0].sum() for x in (q, k, v))
    if keep is not None:
        keep = keep.expand(q.shape[0], 1, q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, keep, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
