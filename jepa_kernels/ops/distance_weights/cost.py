"""Bytes and FLOPs of `distance_weights`."""

from typing import Any

from torch import Tensor

from jepa_kernels.cost import Cost, lengths, nbytes

OF_A_PAIR = 7  # three multiply-adds and a comparison


def forward(
    context_ids: Tensor, target_ids: Tensor, cu_seqlens: Tensor | None, target_cu_seqlens: Tensor | None, *grid: Any
) -> Cost:
    """Ids read, fp32 weights written; every context token meets every target token of its sequence."""
    if cu_seqlens is None or target_cu_seqlens is None:
        pairs = context_ids.numel() * target_ids.shape[-1]
    else:
        pairs = sum(n * m for n, m in zip(lengths(cu_seqlens), lengths(target_cu_seqlens), strict=True))
    return Cost(nbytes(context_ids, target_ids) + 4 * context_ids.numel(), OF_A_PAIR * pairs)
