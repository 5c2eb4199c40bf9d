"""Bytes and FLOPs of `gather_tokens`."""

from typing import Any

from torch import Tensor

from jepa_kernels.cost import Cost, distinct, elements, nbytes


def forward(x: Any, ids: Tensor, cu_seqlens: Tensor | None) -> Cost:
    """Each token that ids name read once, and ids; the result written."""
    row = x.shape[2] * x.dtype.itemsize
    return Cost((distinct(ids, cu_seqlens, x.shape[0]) + ids.numel()) * row + nbytes(ids), 0)


def backward(grad: Any, ids: Tensor, cu_seqlens: Tensor | None, batch: int, count: int) -> Cost:
    """The gradient and ids read, that of every token written; an addition for each row."""
    return Cost(nbytes(grad, ids) + batch * count * grad.shape[-1] * grad.dtype.itemsize, elements(grad))
