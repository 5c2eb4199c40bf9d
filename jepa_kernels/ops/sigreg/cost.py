"""Bytes and FLOPs of `sigreg`: of the projections. Cosines and sines are left out, as activations are."""

from typing import Any

from jepa_kernels.cost import Cost, elements, nbytes
from jepa_kernels.ops.sigreg.cpu import kept_size


def moments(z: Any, slices: int, knots: int, t_max: Any, step: Any, seed: Any, keep: bool) -> Cost:
    """Embeddings read, fp32 sums of cosines and sines of each slice and knot written, and what is kept; directions are
    a function of two numbers."""
    written = z.shape[0] * 2 * knots * slices + (kept_size(z, slices) if keep else 0)
    return Cost(nbytes(z) + 4 * written, 2 * elements(z) * slices)


def forward(z: Any, moments: Any, *options: Any) -> Cost:
    """The sums read."""
    return Cost(nbytes(moments), 4 * elements(moments))


def backward(grad: Any, z: Any, moments: Any, t_max: Any, step: Any, seed: Any, world: Any, kept: Any) -> Cost:
    """Sums, and what was kept or else the embeddings, read; the gradient written. Projections back along the
    directions."""
    read = nbytes(moments) + (nbytes(kept) or nbytes(z))
    return Cost(read + nbytes(z), 2 * elements(z) * moments.shape[-1])
