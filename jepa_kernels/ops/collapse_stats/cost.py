"""Bytes and FLOPs of `collapse_stats`."""

from typing import Any

from jepa_kernels.cost import Cost, elements, nbytes

ROWS = 1024  # at most, of the matrix product


def forward(z: Any) -> Cost:
    """Embeddings read once; 7 operations each, and half of the product of at most ROWS rows with themselves."""
    width, rows = z.shape[-1], min(z.shape[0], ROWS)
    return Cost(nbytes(z), 7 * elements(z) + rows * width * min(width, rows))
