"""Bytes and FLOPs of `assemble_tokens`."""

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from jepa_kernels.cost import Cost, elements, nbytes


def forward(
    context: Any, mask_token: Any, context_ids: Tensor | None, target_ids: Tensor | None, pos_embed: Any,
    context_cu_seqlens: Any, target_cu_seqlens: Any, cu_seqlens: Any, rows: Sequence[int],
) -> Cost:  # fmt: skip
    """Contexts, ids, mask tokens and positions once, and the sequences; an addition where there are positions."""
    written = prod(rows) * context.shape[-1]
    read = nbytes(context, mask_token, context_ids, target_ids, pos_embed)
    return Cost(read + written * context.dtype.itemsize, 0 if pos_embed is None else written)


def backward(
    grad: Any, context_rows: Sequence[int], context_cu_seqlens: Any, cu_seqlens: Any, groups: int, wanted: Any
) -> Cost:
    """The gradient of the sequences read, that of the contexts written and, in fp32, of the mask tokens."""
    channels = grad.shape[-1]
    context = prod(context_rows) * channels * grad.dtype.itemsize if wanted[0] else 0
    return Cost(nbytes(grad) + context + (4 * groups * channels if wanted[1] else 0), elements(grad))
