"""Bytes and FLOPs of `rope`."""

from math import prod
from typing import Any

from jepa_kernels.cost import Cost, elements, nbytes, places


def forward(q: Any, k: Any, turns: Any, k_turns: Any, half: bool) -> Cost:
    """Queries and keys read and written, tables of cosines and sines read, one table once."""
    return Cost(2 * nbytes(q, k) + nbytes(places(turns, k_turns)), 3 * elements(q, k))


backward = forward  # of gradients, the other way round


def turns(positions: Any, frequencies: Any, theta: float, pairing: str, width: int) -> Cost:
    """Positions read, the table written; its cosines and sines are left out, as activations are."""
    axes, tokens = positions.shape[-1], prod(positions.shape[:-1])
    return Cost(nbytes(positions, frequencies) + 4 * tokens * 2 * axes * (width // axes // 2) * 2, 0)
