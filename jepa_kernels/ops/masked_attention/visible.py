"""Which keys a query sees, as a boolean mask: for the reference, and for kernels of torch that take one."""

import torch
from torch import Tensor

from jepa_kernels.packing import Packing


def visible(
    q: Tensor,
    k: Tensor,
    packing: Packing | None,
    k_packing: Packing | None,
    frame_size: int | None,
    key_ranges: Tensor | None,
) -> Tensor | None:
    """bool [S or 1, N or 1, M] of the padded sequences; None where every query sees every key.

    frame_size: with n queries and m keys, query i stands at p = m - n + i and sees the first
    (p // frame_size + 1) * frame_size keys. key_ranges: it sees keys begin..end-1. Both: what both let it see.
    """
    seen: Tensor | None = None
    first: Tensor | int  # the place of a sequence's first query among its keys
    if packing is None:
        queries, first = q.shape[2], k.shape[2] - q.shape[2]
        column = torch.arange(k.shape[2], device=q.device)
    else:
        k_packing = packing if k_packing is None else k_packing
        lengths, k_lengths = (p.cu_seqlens.diff()[:, None] for p in (packing, k_packing))
        queries, first = packing.max_seqlen, k_lengths - lengths
        column = torch.arange(k_packing.max_seqlen, device=q.device)
        seen = (column < k_lengths)[:, None]
        key_ranges = None if key_ranges is None else packing.pad(key_ranges)
    if frame_size is not None:
        place = (first + torch.arange(queries, device=q.device))[..., None]
        seen = _both(seen, column < (place // frame_size + 1) * frame_size)
    if key_ranges is not None:
        seen = _both(seen, (column >= key_ranges[..., :1]) & (column < key_ranges[..., 1:]))
    return seen if seen is None or seen.dim() == 3 else seen[None]


def _both(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a & b
