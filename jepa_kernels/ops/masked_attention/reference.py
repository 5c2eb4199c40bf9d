"""Specification of `masked_attention`: scores, softmax and weighted sum, each product in fp32 or wider."""

import torch
from torch import Tensor

from jepa_kernels.packing import Packing


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing | None = None,
    *,
    k_packing: Packing | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v inside each sequence; 0 where a sequence has no keys."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        if packing is None:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return _attend(q, k, v, None, scale).contiguous().transpose(1, 2)
        k_packing = packing if k_packing is None else k_packing
        column = torch.arange(k_packing.max_seqlen, device=q.device)
        keep = column < k_packing.cu_seqlens.diff()[:, None]
        return packing.unpad(_attend(packing.pad(q), k_packing.pad(k), k_packing.pad(v), keep, scale))


def _attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> Tensor:
    """q [S, N, H, D], k and v [S, M, Hk, D], keep bool [S, M] (None: all) -> [S, N, H, D]."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = scale * torch.einsum("snhd,smhd->shnm", q.to(wide), k.to(wide))
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None], torch.finfo(wide).min)
    weights = scores.softmax(-1)
    if keep is not None:  # a row without keys: softmax spread its weight over the padding
        weights = torch.where(keep[:, None, None], weights, weights.new_zeros(()))
    # The second product takes its weights in the inputs' type, as kernels with low-precision multipliers do.
    return torch.einsum("shnm,smhd->snhd", weights.to(q.dtype).to(wide), v.to(wide)).to(q.dtype)
