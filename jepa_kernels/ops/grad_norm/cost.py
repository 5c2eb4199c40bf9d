"""Bytes and FLOPs of `grad_norm`."""

from typing import Any

from jepa_kernels.cost import Cost, elements, nbytes


def forward(grads: Any) -> Cost:
    """Read once; a multiply-add each."""
    return Cost(nbytes(grads), 2 * elements(grads))
