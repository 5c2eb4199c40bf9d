"""Bytes and FLOPs of `sigreg`: of the projections. Cosines and sines are left out, as activations are."""

from typing import Any

from jepa_kernels.cost import Cost, elements, nbytes


def moments(z: Any, slices: int, knots: int, *options: Any) -> Cost:
    """Embeddings read, fp32 sums of cosines and sines of each slice and knot written; directions are a function of
    two numbers."""
    return Cost(nbytes(z) + 4 * z.shape[0] * 2 * knots * slices, 2 * elements(z) * slices)


def forward(z: Any, moments: Any, *options: Any) -> Cost:
    """The sums read."""
    return Cost(nbytes(moments), 4 * elements(moments))


def backward(grad: Any, z: Any, moments: Any, *options: Any) -> Cost:
    """Embeddings and sums read, the gradient written; projections back along the directions."""
    return Cost(2 * nbytes(z) + nbytes(moments), 2 * elements(z) * moments.shape[-1])
