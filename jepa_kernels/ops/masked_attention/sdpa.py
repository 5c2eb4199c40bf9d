"""`masked_attention` by torch's scaled_dot_product_attention, with its own gradient (atomics on some devices)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from jepa_kernels.ops.masked_attention.visible import visible
from jepa_kernels.packing import Packing
from jepa_kernels.rotary import Rope


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing | None,
    *,
    k_packing: Packing | None,
    frame_size: int | None,
    key_ranges: Tensor | None,
    rope: Rope | None,
    scale: float,
) -> Tensor:
    """Dense as it is; packed through padding, so that compiled code never reads the lengths."""
    seen = visible(q, k, packing, k_packing, frame_size, key_ranges)
    if packing is None:  # token-major, as packed
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if rope is not None:
        q, k = rope.turn(q, k)
    if packing is not None:
        k_packing = packing if k_packing is None else k_packing
        q, k, v = packing.pad(q), k_packing.pad(k), k_packing.pad(v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = _attend(q, k, v, seen, scale).transpose(1, 2)
    return out.contiguous().transpose(1, 2) if packing is None else packing.unpad(out)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    if q.numel() == 0 or k.numel() == 0:  # nothing to look at: 0, and no value of an input reaches the gradients
        return torch.zeros_like(q) + sum(x[..., :0].sum() for x in (q, k, v))
    any_seen = None
    if seen is not None:  # a row that sees nothing looks at all, and its output is dropped
        any_seen = seen.any(-1, keepdim=True)
        seen = (seen | ~any_seen)[:, None].expand(q.shape[0], 1, q.shape[2], k.shape[2])
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=grouped)
    return out if any_seen is None else torch.where(any_seen[:, None], out, out.new_zeros(()))
