"""Specification of `masked_attention`: scores, softmax and weighted sum, each product in fp32 or wider."""

from typing import Any

import torch
from torch import Tensor

from jepa_kernels.ops.masked_attention.visible import visible
from jepa_kernels.packing import Packing
from jepa_kernels.rotary import Rope


def forward(*inputs: Any, **options: Any) -> Tensor:
    """softmax(scale * q k^T) v over the keys that each query sees; 0 where it sees none. Arguments: of forward_lse."""
    return forward_lse(*inputs, **options)[0]


def forward_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing | None = None,
    *,
    k_packing: Packing | None = None,
    frame_size: int | None = None,
    key_ranges: Tensor | None = None,
    rope: Rope | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`forward`'s output, and the logarithm of each row's sum of exp(scores): [H, T] or [B, H, N], no gradient."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):  # meta has none
        seen = visible(q, k, packing, k_packing, frame_size, key_ranges)
        if packing is None:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if rope is not None:
            q, k = rope.turn(q, k)
        if packing is None:
            out, lse = _attend(q, k, v, seen, scale)
            return out.contiguous().transpose(1, 2), lse
        k_packing = packing if k_packing is None else k_packing
        out, lse = _attend(packing.pad(q), k_packing.pad(k), k_packing.pad(v), seen, scale)
        unused = torch.arange(packing.tokens, device=q.device) >= packing.cu_seqlens[-1]
        lse = packing.unpad(lse.transpose(1, 2)).T.masked_fill(unused, -torch.inf)
        return packing.unpad(out), lse


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """q [S, N, H, D], k and v [S, M, Hk, D], seen bool [S or 1, N or 1, M] (None: all) -> [S, N, H, D], [S, H, N]."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = scale * torch.einsum("snhd,smhd->shnm", q.to(wide), k.to(wide))
    if seen is None:
        weights, lse = scores.softmax(-1), scores.detach().logsumexp(-1)
    else:  # a row that sees no key: softmax spreads its weight over what is hidden
        hidden = ~seen[:, None]
        lse = scores.detach().masked_fill(hidden, -torch.inf).logsumexp(-1)
        weights = scores.masked_fill(hidden, torch.finfo(wide).min).softmax(-1)
        weights = torch.where(hidden, weights.new_zeros(()), weights)
    # The second product takes its weights in the inputs' type, as kernels with low-precision multipliers do.
    return torch.einsum("shnm,smhd->snhd", weights.to(q.dtype).to(wide), v.to(wide)).to(q.dtype), lse
