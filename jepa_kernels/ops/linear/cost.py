"""Bytes and FLOPs of `linear`."""

from typing import Any

from jepa_kernels.cost import Cost, nbytes


def forward(x: Any, weight: Any, bias: Any, gelu: bool, keep: bool) -> Cost:
    """Rows and the layer read once, the result written, and what GELU was of where that is kept. One product."""
    written = (2 if gelu and keep else 1) * x.shape[:-1].numel() * weight.shape[0] * x.dtype.itemsize
    return Cost(nbytes(x, weight, bias) + written, _products(x, weight))


def backward(grad: Any, x: Any, weight: Any, kept: Any, wanted: Any) -> Cost:
    """The gradient of the rows read, and what GELU was of; with it for the rows' own the weight, for the weight's the
    rows, and each written, which is as large as what it is of, and a product."""
    size, moved = x.dtype.itemsize, nbytes(grad, kept)
    if wanted[0]:
        moved += nbytes(weight) + x.shape.numel() * size
    if wanted[1]:
        moved += nbytes(x) + weight.shape.numel() * size
    moved += weight.shape[0] * size if wanted[2] else 0
    return Cost(moved, (wanted[0] + wanted[1]) * _products(x, weight))


def _products(x: Any, weight: Any) -> int:
    return 2 * x.shape.numel() * weight.shape[0]
