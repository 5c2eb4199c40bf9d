"""Specification of `grad_norm`."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def forward(grads: Sequence[Tensor | None]) -> Tensor:
    """The square root of the sum of all squares, added in fp64: fp32 (fp64 for fp64)."""
    given = [g for g in grads if g is not None]
    if not given:
        return torch.zeros(())
    norm = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in given]).norm()
    return norm if given[0].dtype == torch.float64 else norm.float()
